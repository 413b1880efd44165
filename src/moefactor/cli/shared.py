"""What commands have in common: the application, the options that several take, progress bars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

from ..allocate import RULES
from ..errors import UserError
from ..forms.packing import BITS
from ..methods import METHODS

app = typer.Typer(
    help="Make Mixture-of-Experts models smaller by factorising their experts, without retraining.",
    epilog="Start with `moefactor inspect MODEL`, then `moefactor compress MODEL --ratio 0.4 -o OUT`, then "
    "`moefactor serve OUT`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)


def say(sentence: str, to: Console = console, style: str | None = None) -> None:
    """As it is: a path is not cut into lines, and brackets in it are no markup."""
    to.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)


# What commands are for, in the order of --help.
LOOK, MAKE, STAGES, USE = "Look", "Make smaller", "compress, stage by stage", "Use"
# Options of the chosen method are flags too (--group-size 8); they are read from its signature.
METHOD_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Model = Annotated[str, typer.Argument(help="Folder or hub name of the model.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.", show_default=False)]
RunOption = Annotated[Path, typer.Option("--run", help="Run folder: statistics, plan and journal.", show_default=False)]
MethodName = Annotated[str, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS)}.")]
Ratio = Annotated[float, typer.Option("--ratio", "-r", help="Fraction of the experts' parameters to remove.")]
MaybeRatio = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        "-r",
        help="Fraction of the experts' parameters to remove.",
        show_default="0.4; 0 with --bits alone",
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        help=f"Bits of what is private to an expert: {', '.join(map(str, BITS))}, or mixed: every channel its own.",
        show_default="not rounded; mixed with --bpw or --target-gb",
    ),
]
Bpw = Annotated[
    float | None,
    typer.Option(help="In place of --ratio: bits for each of the experts' parameters.", show_default=False),
]
TargetGb = Annotated[
    float | None,
    typer.Option(help="In place of --ratio: GB (1e9 bytes) of the whole checkpoint.", show_default=False),
]
BitsGroup = Annotated[int | None, typer.Option(help="Neighbours that share a scale.", show_default="64")]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text file, .jsonl, .json, .parquet, folder, or a dataset: wikitext2, c4, ptb, or a hub name; several "
        "with weights: A:2,B:1. 'self', alone or among them: what the model writes. Default: Python's own language "
        "reference, which needs no network; text like what the model will read does better.",
        show_default=False,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        help="Of .jsonl, .json, .parquet and datasets.",
        show_default="text, messages (by the chat template), or prompt and completion",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code from the model's repository where transformers lacks it."),
]
OwnText = Annotated[
    float | None,
    typer.Option(
        help="Share of the windows that the model writes itself, so that text of one kind does not mislead.",
        show_default="for biaxial, where the model can write and fits in memory, 0.5, or 1 with no text given; else 0",
        min=0,
        max=1,
    ),
]
Samples = Annotated[int, typer.Option(help="Windows of calibration text.", min=1)]
Seqlen = Annotated[int | None, typer.Option(help="Tokens a window.", show_default="2048 or the model's length", min=2)]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="CUDA if there is one")]
Sequential = Annotated[
    bool, typer.Option(help="Calibrate each layer on what the factorised layers before it really give.")
]
Allocation = Annotated[str | None, typer.Option(help=f"{', '.join(RULES)}.", show_default="the method's own")]
RankMultiple = Annotated[
    int | None, typer.Option(help="Ranks come in multiples of this.", show_default="8 on wide models, 1 on narrow")
]

DropMtp = Annotated[
    bool, typer.Option("--drop-mtp", help="Leave out multi-token-prediction layers; config.json says there are none.")
]

RestBits = Annotated[
    int,
    typer.Option(
        help="16, 8 or 4: of the matrices that are not routed experts' (attention, shared experts, embeddings: 8 at "
        "least). Rounded when the checkpoint is written."
    ),
]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DTYPES = {name: getattr(torch, name) for name in get_args(Dtype)[1:]}


class Bars:
    """A Rich progress bar for each stage, drawn on standard error."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
        )  # fmt: skip
        self.bar = RichBar(*columns, console=errors)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total, detail=detail)
        self.bar.update(self.tasks[stage], completed=done, total=total, detail=detail)


def method_options(arguments: list[str]) -> dict[str, str]:
    """`--group-size 8 --no-joint --xi=0.5` -> {"group_size": "8", "joint": "false", "xi": "0.5"}."""
    options, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"Unexpected argument {flag!r}.")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                name, value = (name[3:], "false") if name.startswith("no-") else (name, "true")
        options[name.replace("-", "_")] = value
    return options
