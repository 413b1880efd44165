"""Commands that look: at a model, at methods and kernels, at what compression cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import typer
from rich.table import Table

from ..contrast import TOP, evaluate_against
from ..errors import UserError
from ..evaluation import STAGE
from ..evaluation import evaluate as evaluate_verb
from ..inspection import inspect as inspect_verb
from ..inspection import kernels_of
from ..methods import available, get, kind_of
from .shared import (
    DTYPES,
    LOOK,
    Bars,
    Column,
    Device,
    Dtype,
    Model,
    Ratio,
    Seed,
    Trust,
    app,
    console,
)
from .tables import divergence_table, evaluation_table, kernel_table, repetition_table, size


@app.command(rich_help_panel=LOOK)
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
    table.add_row("on disk", f"{size(found.bytes)} ({found.dtype})")
    for r in sorted({0.2, ratio, 0.6}):
        left, removed = found.shrunk(r)
        table.add_row(f"--ratio {r}", f"{left:,} parameters left, {removed:.0%} of the model removed")
    console.print(table)


@app.command(rich_help_panel=LOOK)
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
        shown = ",".join(default) if isinstance(default, tuple) else "automatic" if default is None else str(default)
        kind = kind_of(parameter)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        described = " | ".join(choices) or ("a,b,c" if get_origin(kind) is tuple else kind.__name__)
        table.add_row(f"--{option.replace('_', '-')}", shown, described)
    console.print(method.description, markup=False, highlight=False)
    console.print(table)


@app.command(rich_help_panel=LOOK)
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
    baseline: Annotated[
        Path | None,
        typer.Option(help="File for what the second model says of these texts: written once, then read in its place."),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            help="Likeliest next tokens of the second model that are kept; of the others a few are drawn.", min=1
        ),
    ] = TOP,
    own: Annotated[int, typer.Option(help="Windows that the second model writes itself, also compared on.", min=0)] = 0,
    greedy: Annotated[
        int, typer.Option(help="Windows that both go on from, always with the likeliest token: who loops?", min=0)
    ] = 0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="To load and run in; auto: the checkpoint's own.")] = "auto",
    json_output: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    text_column: Column = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity, tokens a second, bytes on disk and in memory; with a second model, how far the two are apart."""
    with Bars() as bars:

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            bars(" ".join(filter(None, (detail, stage if stage != STAGE else ""))), done, total)

        how: dict = {
            "window": window, "max_windows": max_windows, "batch_size": batch_size, "device": device, "dtype": dtype,
            "text_column": text_column, "trust_remote_code": trust_remote_code, "progress": progress,
        }  # fmt: skip
        found = None
        if against is None and baseline is None:
            if own or greedy or top != TOP or seed:
                raise UserError("--own, --greedy, --top and --seed are for comparing; name a model with --against.")
            results = [evaluate_verb(model, text or [None], **how)]
        else:
            found = evaluate_against(
                model, against, text or [None], baseline=baseline, top=top, own=own, greedy=greedy, seed=seed, **how
            )
            results = [found.dense, found.model]
    console.print(evaluation_table(results))
    figures = [asdict(result) for result in results]
    if found is not None:
        console.print(divergence_table(found))
        if found.repetition is not None:
            console.print(repetition_table(found.repetition, results))
        figures[1] |= {name: asdict(found)[name] for name in ("texts", "overall", "repetition")}
    if json_output:
        json_output.write_text(json.dumps(figures, indent=1) + "\n")
