"""The command line: thin, one function a verb."""

from __future__ import annotations

import errno
import json
import math
import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, get_args, get_origin

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar
from rich.table import Table
from rich.text import Text as RichText

from .allocate import RULES
from .checkpoint import refuse_existing
from .comparison import Contender
from .comparison import compare as compare_verb
from .compression import compress as compress_verb
from .coverage import Coverage
from .errors import UserError
from .evaluation import Evaluation
from .evaluation import evaluate as evaluate_verb
from .export import export_dense
from .files import FULL, locked
from .generate import generate as generate_verb
from .healing import LABELS, Healing, Trained
from .healing import heal as heal_verb
from .inspection import KernelChoice, kernels_of
from .inspection import inspect as inspect_verb
from .methods import METHODS, available, get
from .plan import Plan
from .run_folder import RunFolder
from .stages import Recipe, Run, planned_recipe
from .stats import STATISTICS
from .streaming import StreamedModel, default_device

app = typer.Typer(
    help="Make Mixture-of-Experts models smaller by factorising their experts, without retraining.",
    epilog="Start with `moefactor inspect MODEL`, then `moefactor compress MODEL --ratio 0.4 -o OUT`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)
# Options of the chosen method are flags too (--group-size 8); they are read from its signature.
METHOD_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Model = Annotated[str, typer.Argument(help="Folder or hub name of the model.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.", show_default=False)]
RunOption = Annotated[Path, typer.Option("--run", help="Run folder: statistics, plan and journal.", show_default=False)]
MethodName = Annotated[str, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS)}.")]
Ratio = Annotated[float, typer.Option("--ratio", "-r", help="Fraction of the experts' parameters to remove.")]
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

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
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
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> Bars:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total, detail=detail)
        self.bar.update(self.tasks[stage], completed=done, total=total, detail=detail)


@app.callback()
def _root(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    _root.debug = debug


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


@app.command()
def inspect(model: Model, ratio: Ratio = 0.4, trust_remote_code: Trust = False) -> None:
    """What is in a model, and what it would shrink to. Reads no weights."""
    found = inspect_verb(model, trust_remote_code=trust_remote_code)
    first = found.layers[0]
    table = Table(title=f"{model} ({found.model_type})", title_justify="left", show_header=False)
    same = all((e.experts, e.intermediate) == (first.experts, first.intermediate) for e in found.layers)
    table.add_row("expert layers", f"{len(found.layers)}, {first.decoder_layer} to {found.layers[-1].decoder_layer}")
    table.add_row("experts a layer", f"{first.experts}" + ("" if same else " (the first layer's)"))
    table.add_row("hidden × intermediate", f"{first.hidden} × {first.intermediate}")
    table.add_row("projections", ", ".join(first.projections) + (", with biases" if first.biased else ""))
    share = found.expert_parameters / found.parameters
    table.add_row("parameters", f"{found.parameters:,}, {share:.0%} of them in routed experts")
    table.add_row("on disk", f"{_size(found.bytes)} ({found.dtype})")
    for r in sorted({0.2, ratio, 0.6}):
        left, removed = found.shrunk(r)
        table.add_row(f"--ratio {r}", f"{left:,} parameters left, {removed:.0%} of the model removed")
    console.print(table)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, for its options.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help="A compressed folder: how its forms would be run here, and why not faster.")
    ] = None,
    device: Device = None, dtype: Annotated[Dtype, typer.Option(help="With --kernels; auto: the folder's.")] = "auto",
) -> None:  # fmt: skip
    """The compression methods; with a name, that method's options."""
    if kernels is not None:
        console.print(
            kernel_table(kernels_of(kernels, device=device, dtype=None if dtype == "auto" else DTYPES[dtype]))
        )
        return
    if name is None:
        table = Table("method", "what it does", "paper")
        for method in map(get, available()):
            table.add_row(method.name, method.summary, method.paper)
        console.print(table)
        return
    method = get(name)
    table = Table("option", "default", "values")
    for option, parameter in method.options.items():
        default = parameter.default
        shown = ",".join(default) if isinstance(default, tuple) else str(default)
        kind = parameter.annotation
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        described = " | ".join(choices) or ("a,b,c" if get_origin(kind) is tuple else kind.__name__)
        table.add_row(f"--{option.replace('_', '-')}", shown, described)
    console.print(method.description, markup=False, highlight=False)
    console.print(table)


def kernel_table(choices: list[KernelChoice]) -> Table:
    table = Table("stack", "form", "stacks", "is run by", "what would be faster, and why not")
    for choice in choices:
        reasons = "; ".join(f"{way}: {why}" for way, why in choice.slower_because)
        table.add_row(choice.stack, choice.form, str(choice.stacks), choice.kernel, reasons)
    return table


@app.command(context_settings=METHOD_FLAGS)
def compress(
    context: typer.Context, model: Model, output: Output, method: MethodName = "biaxial", ratio: Ratio = 0.4,
    calibration: Text = None, own_text: OwnText = None, samples: Samples = 256, seqlen: Seqlen = None, seed: Seed = 0,
    sequential: Sequential = True, allocation: Allocation = None, rank_multiple: RankMultiple = None,
    device: Device = None, text_column: Column = None, trust_remote_code: Trust = False,
    heal: Annotated[
        int, typer.Option(help="Steps of distillation from the dense model afterwards; both must fit in memory.", min=0)
    ] = 0,
    drop_mtp: DropMtp = False,
    run: Annotated[
        Path | None, typer.Option(help="Keep the run folder here.", show_default="OUTPUT.run, removed at the end")
    ] = None,
) -> None:  # fmt: skip
    """Calibrate, plan, factorise, write: a checkpoint that plain from_pretrained loads.

    The method's own options are flags too, see `moefactor methods NAME`: --group-size 8 --projections gate,up,down.
    A killed run goes on where it was when the same command is given again.
    """
    options = method_options(context.args)
    with Bars() as bars:
        compress_verb(
            model, method, ratio, output, calibration=calibration, own_text=own_text, samples=samples, seqlen=seqlen,
            seed=seed, sequential=sequential, allocation=allocation, rank_multiple=rank_multiple, device=device,
            heal=heal, drop_mtp=drop_mtp, run=run, text_column=text_column,
            trust_remote_code=trust_remote_code, progress=bars, on_coverage=show_coverage, **options,
        )  # fmt: skip
    console.print(f"Wrote {output}. Next: moefactor evaluate {output} --against {model}")


@app.command(context_settings=METHOD_FLAGS)
def calibrate(
    context: typer.Context, model: Model, run: RunOption, method: MethodName = "biaxial", calibration: Text = None,
    own_text: OwnText = None, samples: Samples = 256, seqlen: Seqlen = None, seed: Seed = 0, device: Device = None,
    text_column: Column = None, trust_remote_code: Trust = False,
    statistics: Annotated[
        str | None,
        typer.Option(help=f"Which to collect: {', '.join(STATISTICS)}.", show_default="all that --method reads"),
    ] = None,
) -> None:  # fmt: skip
    """Stage 1: what each layer's experts see. Writes RUN/stats."""
    recipe = Recipe.of(
        method, method_options(context.args), calibration=calibration, own_text=own_text, samples=samples,
        seqlen=seqlen, seed=seed, sequential=False, text_column=text_column,
    )  # fmt: skip
    needs = set(statistics.split(",")) if statistics else recipe.all_statistics
    recipe.check()
    told = f"Wrote {run}/stats." if needs else f"{method} reads no statistics with these options."
    with Bars() as bars:
        streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
        Run(streamed, recipe, RunFolder(run), bars, show_coverage).calibrate(needs)
    console.print(f"{told} Next: moefactor plan {model} --run {run} --method {method}")


@app.command(context_settings=METHOD_FLAGS)
def plan(
    context: typer.Context, model: Model, run: RunOption, method: MethodName = "biaxial", ratio: Ratio = 0.4,
    seed: Seed = 0, allocation: Allocation = None, rank_multiple: RankMultiple = None, device: Device = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the ranks, write nothing.")] = False,
) -> None:  # fmt: skip
    """Stage 2: which layer and group gets which rank. Writes RUN/plan.json, which you may edit."""
    recipe = Recipe.of(
        method, method_options(context.args), ratio=ratio, allocation=allocation, rank_multiple=rank_multiple, seed=seed
    )
    with Bars() as bars, TemporaryDirectory() as nowhere:
        folder = RunFolder(nowhere if dry_run and not run.exists() else run)
        streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
        work = Run(streamed, recipe, folder, bars)
        work.check()
        made = work.plan()
    console.print(_plan_table(made))
    if not dry_run:
        work.folder.write_plan(made)
        console.print(f"Wrote {work.folder.plan}. Next: moefactor factorise {model} --run {run} -o OUT")


@app.command()
def factorise(
    model: Model, run: RunOption, output: Output, calibration: Text = None, own_text: OwnText = None,
    samples: Samples = 256, seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration windows.")] = 0,
    sequential: Sequential = True, device: Device = None, text_column: Column = None, trust_remote_code: Trust = False,
    drop_mtp: DropMtp = False,
) -> None:  # fmt: skip
    """Stage 3: the factors of every layer, from weights, statistics and RUN/plan.json; then the checkpoint."""
    refuse_existing(output)
    streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
    folder = RunFolder(run)
    recipe, made = planned_recipe(
        Plan.read(folder.plan, streamed.experts), calibration=calibration, own_text=own_text, samples=samples,
        seqlen=seqlen, seed=seed, sequential=sequential, text_column=text_column,
        drop_mtp=drop_mtp,
    )  # fmt: skip
    with Bars() as bars, locked(output.with_name(f".{output.name}.lock"), str(output)):
        work = Run(streamed, recipe, folder, bars, show_coverage)
        work.check()
        work.factorise(made)
        work.write(made, output, f"moefactor factorise {model} --run RUN -o {output.name}")
    console.print(f"Wrote {output}. Next: moefactor evaluate {output} --against {model}")


@app.command()
def heal(
    model: Annotated[str, typer.Argument(help="Folder of a compressed model.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="The dense model that it was made from.", show_default=False)],
    output: Output, steps: Annotated[int, typer.Option(help="At most; of 2048 tokens each.", min=1)] = 800,
    calibration: Text = None, seqlen: Seqlen = None,
    labels: Annotated[
        float, typer.Option(help="Weight of the text's own next tokens; 0: the dense model's word alone.", min=0)
    ] = LABELS,
    train: Annotated[Trained, typer.Option(help="The experts with routers and norms, or all parameters.")] = "all",
    seed: Seed = 0, device: Device = None, text_column: Column = None, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Train a compressed model to give what the dense model gives. Resumes; never farther from it on held-out text."""
    with Bars() as bars:
        healed = heal_verb(
            model, teacher, output, steps=steps, text=calibration, seqlen=seqlen, labels=labels, train=train,
            seed=seed, device=device, text_column=text_column, trust_remote_code=trust_remote_code, progress=bars,
        )  # fmt: skip
    console.print(validation_table(healed))
    console.print(f"Wrote {output}, the state after step {healed.best_step} of {healed.steps}.")


def validation_table(healed: Healing) -> Table:
    """The validation curve, thinned to a dozen rows, the best marked."""
    table = Table("step", "nats from the dense model, held-out text", "")
    step = -(-len(healed.validation) // 12)
    for index, (at, value) in enumerate(healed.validation):
        if index % step == 0 or at == healed.best_step:
            table.add_row(str(at), f"{value:.4f}", "★" if at == healed.best_step else "")
    return table


@app.command()
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="A second model to compare with, usually the dense one.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder or dataset (test split); repeat for several.", show_default="Python's reference"
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window.", show_default="2048 or the model's")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Of each text.", show_default="all", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 8,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="To load and run in; auto: the checkpoint's own.")] = "auto",
    json_output: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    text_column: Column = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity, tokens a second, bytes on disk and in memory."""
    names = [model] if against is None else [against, model]
    with Bars() as bars:
        results = []
        for name in names:

            def progress(stage: str, done: int, total: int, detail: str = "") -> None:
                bars(detail or stage, done, total)

            results.append(
                evaluate_verb(
                    name, text or [None], window=window, max_windows=max_windows, batch_size=batch_size,
                    device=device, dtype=dtype, text_column=text_column, trust_remote_code=trust_remote_code,
                    progress=progress,
                )
            )  # fmt: skip
    console.print(evaluation_table(results))
    if json_output:
        json_output.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


@app.command()
def compare(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results.json; a stopped run goes on.")],
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "svd,whitened_svd,rfid",
    also: Annotated[
        list[str] | None,
        typer.Option(help='One more, with options: --also "mobe --projections gate,up,down". Repeat for several.'),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Comma-separated.")] = "0.2,0.4,0.6",
    text: Annotated[list[str] | None, typer.Option(help="To measure on; repeat for several.")] = None,
    calibration: Text = None, own_text: OwnText = None, samples: Samples = 256, seqlen: Seqlen = None, seed: Seed = 0,
    window: Annotated[int | None, typer.Option(help="Tokens a window.", show_default="2048 or the model's")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Of each text.", show_default="all", min=1)] = None,
    device: Device = None, dtype: Annotated[Dtype, typer.Option(help="To measure in.")] = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the compressed models.")] = False,
    text_column: Column = None, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Several methods at several ratios on one calibration: perplexity, parameters, bytes, seconds, speed."""
    contenders = [Contender(name.strip(), name.strip(), {}) for name in methods.split(",") if name.strip()]
    for line in also or []:
        name, *arguments = shlex.split(line)
        contenders.append(Contender(line, name, method_options(arguments)))
    try:
        wanted = [float(ratio) for ratio in ratios.split(",")]
    except ValueError:
        raise UserError(f"--ratios: expected numbers like 0.2,0.4, found {ratios!r}.") from None
    with Bars() as bars:
        rows = compare_verb(
            model, contenders, wanted, output, texts=text or [None], calibration=calibration,
            own_text=own_text, samples=samples, seqlen=seqlen, seed=seed, window=window, max_windows=max_windows,
            device=device, dtype=dtype, keep=keep, text_column=text_column, trust_remote_code=trust_remote_code,
            progress=bars,
        )  # fmt: skip
    console.print(comparison_table(rows))


def comparison_table(rows: list[dict]) -> Table:
    """One line a run; the Pareto front (parameters against mean perplexity) is starred."""
    dense = rows[0]
    names = ("× dense", "experts", "model", "disk", "tok/s", "s", "")
    table = Table("method", "ratio", *dense["perplexity"], *names)
    for row in rows:
        if "error" in row:
            table.add_row(row["label"], str(row["ratio"]), RichText(row["error"], style="dim"))
            continue
        table.add_row(
            row["label"], str(row["ratio"]), *(f"{p:.2f}" for p in row["perplexity"].values()),
            f"{row['mean_perplexity'] / dense['mean_perplexity']:.3f}", _short(row["expert_parameters"]),
            _short(row["parameters"]), _size(row["disk_bytes"]), f"{row['tokens_per_second']:,.0f}",
            f"{row.get('seconds', 0):.1f}", "★" if row["front"] else "",
        )  # fmt: skip
    return table


@app.command()
def generate(
    model: Model, prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="How many new ones at most.", min=1)] = 50, device: Device = None,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Continue a prompt, greedily."""
    said = generate_verb(model, prompt, tokens=tokens, device=device, trust_remote_code=trust_remote_code)
    console.print(said, markup=False, highlight=False)


@app.command()
def export(
    model: Model,
    output: Output,
    dense: Annotated[bool, typer.Option("--dense", help="Rebuild every expert; the only target there is yet.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """An ordinary MoE checkpoint again, for engines that know nothing of moefactor."""
    if not dense:
        raise UserError("Say what to export to: --dense rebuilds every expert.")
    with Bars() as bars:
        export_dense(model, output, trust_remote_code=trust_remote_code, progress=bars)
    console.print(f"Wrote {output}, of the original's size and layout.")


def show_coverage(rows: list[Coverage]) -> None:
    console.print(coverage_table(rows))


def coverage_table(rows: list[Coverage]) -> Table:
    """How many calibration tokens a layer's experts saw; the text's gaps."""
    table = Table(
        "layer", "least", "median", "most", "experts with none", title="tokens an expert", title_justify="left"
    )
    for row in rows:
        none = f"{len(row.unreached)} of {row.experts}" if row.unreached else ""
        table.add_row(row.layer, f"{row.least:,}", f"{row.median:,}", f"{row.most:,}", none)
    return table


def evaluation_table(results: list[Evaluation]) -> Table:
    """One column a model; with two, how the second compares with the first."""
    table = Table("", *(Path(r.model).name for r in results), *(["second / first"] if len(results) == 2 else []))

    def row(label: str, values: list[float], show: object) -> None:
        ratio = [f"{values[1] / values[0]:.3f}"] if len(values) == 2 and values[0] else []
        table.add_row(label, *(show(v) for v in values), *ratio)

    row("parameters", [r.parameters for r in results], "{:,}".format)
    row("  in routed experts", [r.expert_parameters for r in results], "{:,}".format)
    row("resident bytes", [r.resident_bytes for r in results], _size)
    row("  in routed experts", [r.expert_bytes for r in results], _size)
    row("bytes on disk", [r.disk_bytes for r in results], _size)
    row("tokens a second", [r.tokens_per_second for r in results], "{:,.0f}".format)
    for text in results[0].perplexity:
        row(f"perplexity, {text}", [r.perplexity[text] for r in results], "{:.3f}".format)
    if len(results[0].perplexity) > 1:
        row("  geometric mean", [r.mean_perplexity for r in results], "{:.3f}".format)
    if len(results) == 2 and results[1].expected_loss is not None:
        rise = math.log(results[1].mean_perplexity / results[0].mean_perplexity)
        table.add_row("rise of the loss, nats a token", "", f"{rise:.4f}", f"{results[1].expected_loss:.4f} planned")
    return table


def _plan_table(made: Plan) -> Table:
    title = (
        f"{made.method}, ratio {made.ratio}: {made.original_count:,} -> {made.parameter_count():,} expert parameters "
        f"({made.achieved_ratio():.4f} removed)"
    )
    if made.expected_loss is not None:
        title += f", expected to cost {made.expected_loss:.4f} nats a token"
    table = Table("layer", "stack", "form", "kept", title=title, title_justify="left")
    for entry in made.layers:
        for stack, form in entry.forms.items():
            original = entry.layer.experts * entry.layer.stack_width(stack) * entry.layer.hidden
            table.add_row(entry.layer.decoder_layer, stack, form.summary(), f"{form.parameter_count() / original:.1%}")
    return table


def _short(count: int) -> str:
    """`2.36 M`: parameters, where the column is narrow."""
    return next((f"{count / size:.2f} {unit}" for unit, size in (("B", 1e9), ("M", 1e6)) if count >= size), str(count))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError


def main() -> None:
    """Entry point: a user's mistake is one red line and exit code 2, a warning of ours a yellow one."""
    shown = warnings.showwarning

    def show(message: Warning, category: type, file: str, *rest: object) -> None:
        if category is UserWarning and "moefactor" in file:
            errors.print(RichText.assemble(("note:", "bold yellow"), f" {message}"), soft_wrap=True)
        else:
            shown(message, category, file, *rest)

    warnings.showwarning = show
    try:
        app()
    except (UserError, OSError) as error:
        # Of the system's errors, those that no command of ours can do anything about; others are bugs of ours.
        theirs = isinstance(error, UserError) or error.errno in (*FULL, *REFUSED)
        if getattr(_root, "debug", False) or not theirs:
            raise
        # Assembled, not marked up: [brackets] in a name are not tags.
        errors.print(RichText.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)
    finally:
        warnings.showwarning = shown


if __name__ == "__main__":
    main()
