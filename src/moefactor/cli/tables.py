"""What commands print, as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text as RichText

from ..contrast import Contrast
from ..coverage import Coverage
from ..divergence import Interval, Repetition
from ..evaluation import Evaluation
from ..healing import Healing
from ..inspection import KernelChoice
from ..plan import Plan
from ..text import OWN


def kernel_table(choices: list[KernelChoice]) -> Table:
    table = Table("stack", "form", "stacks", "is run by", "what would be faster, and why not")
    for choice in choices:
        reasons = "; ".join(f"{way}: {why}" for way, why in choice.slower_because)
        table.add_row(choice.stack, choice.form, str(choice.stacks), choice.kernel, reasons)
    return table


def validation_table(healed: Healing) -> Table:
    """The validation curve, thinned to a dozen rows, the best marked."""
    table = Table("step", "nats from the dense model, held-out text", "")
    step = -(-len(healed.validation) // 12)
    for index, (at, value) in enumerate(healed.validation):
        if index % step == 0 or at == healed.best_step:
            table.add_row(str(at), f"{value:.4f}", "★" if at == healed.best_step else "")
    return table


def comparison_table(rows: list[dict]) -> Table:
    """One line a run; the Pareto front (parameters against mean perplexity) is starred."""
    dense = rows[0]
    names = ("× dense", "KL", "same top", "experts", "model", "disk", "tok/s", "s", "")
    table = Table("method", "ratio", *dense["perplexity"], *names)
    for row in rows:
        if "error" in row:
            table.add_row(row["label"], str(row["ratio"]), RichText(row["error"], style="dim"))
            continue
        table.add_row(
            row["label"], str(row["ratio"]), *(f"{p:.2f}" for p in row["perplexity"].values()),
            f"{row['mean_perplexity'] / dense['mean_perplexity']:.3f}",
            f"{row['kl']:.4f}" if "kl" in row else "", f"{row['agreement']:.1%}" if "agreement" in row else "",
            short(row["expert_parameters"]), short(row["parameters"]), size(row["disk_bytes"]),
            f"{row['tokens_per_second']:,.0f}", f"{row.get('seconds', 0):.1f}", "★" if row["front"] else "",
        )  # fmt: skip
    return table


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

    def row(label: str, values: Sequence[float], show: Callable[[float], str]) -> None:
        ratio = [f"{values[1] / values[0]:.3f}"] if len(values) == 2 and values[0] else []
        table.add_row(label, *(show(v) for v in values), *ratio)

    row("parameters", [r.parameters for r in results], "{:,}".format)
    row("  in routed experts", [r.expert_parameters for r in results], "{:,}".format)
    row("resident bytes", [r.resident_bytes for r in results], size)
    row("  in routed experts", [r.expert_bytes for r in results], size)
    row("  bits a parameter that was there", [r.expert_bits for r in results], "{:.2f}".format)
    row("bytes on disk", [r.disk_bytes for r in results], size)
    row("tokens a second", [r.tokens_per_second for r in results], "{:,.0f}".format)
    for text in results[0].perplexity:
        row(f"perplexity, {text}", [r.perplexity[text] for r in results], "{:.3f}".format)
    if len(results[0].perplexity) > 1:
        row("  geometric mean", [r.mean_perplexity for r in results], "{:.3f}".format)
    if len(results) == 2 and results[1].expected_loss is not None:
        rise = math.log(results[1].mean_perplexity / results[0].mean_perplexity)
        table.add_row("rise of the loss, nats a token", "", f"{rise:.4f}", f"{results[1].expected_loss:.4f} planned")
    return table


def divergence_table(found: Contrast) -> Table:
    """How far the model is from the dense one, a line a text, with 95 % intervals over windows."""
    table = Table(
        "text", "windows", "KL, nats a token", "same likeliest token", "perplexity / dense", title_justify="left",
        title=f"How far from {Path(found.dense.model).name}, with 95 % intervals over windows",
    )  # fmt: skip
    table.columns[0].overflow = "fold"
    rows = {("what it writes itself" if label == OWN else label): one for label, one in found.texts.items()}
    if len(found.dense.perplexity) > 1:
        rows["the given texts, each as much"] = found.overall
    for label, one in rows.items():
        table.add_row(
            label, str(one.windows), between(one.kl, "{:.4f}"), between(one.agreement, "{:.1%}"),
            between(one.perplexity_ratio, "{:.4f}"),
        )  # fmt: skip
    return table


def repetition_table(found: Repetition, results: Sequence[Evaluation]) -> Table:
    """What greedy output repeats: the dense model's and the other's."""
    table = Table(
        "", *(Path(r.model).name for r in results), title_justify="left",
        title=f"Greedy output: {found.outputs} prompts of {found.prompt} tokens, up to {found.tokens} more",
    )  # fmt: skip
    table.add_row("fall into a loop", between(found.dense_looping, "{:.1%}"), between(found.looping, "{:.1%}"))
    table.add_row(
        "different sequences of four", between(found.dense_distinct, "{:.1%}"), between(found.distinct, "{:.1%}")
    )
    return table


def between(interval: Interval, form: str) -> str:
    """`0.0123 [0.0119, 0.0128]`"""
    value = form.format(interval.value)
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{form.format(interval.low)}, {form.format(interval.high)}]"


def plan_table(made: Plan) -> Table:
    asked = (
        f"ratio {made.ratio}" if made.budget is None else f"{made.budget / made.original_count:.2f} bits a parameter"
    )
    title = (
        f"{made.method}, {asked}: {made.original_count:,} -> {made.parameter_count():,} expert parameters "
        f"({made.achieved_ratio():.4f} removed), {size(made.bits() / 8)} of {size(2 * made.original_count)} in 16 bits"
    )
    if made.expected_loss is not None:
        title += f", expected to cost {made.expected_loss:.4f} nats a token"
    table = Table("layer", "stack", "form", "kept", title=title, title_justify="left")
    for entry in made.layers:
        for stack, form in entry.forms.items():
            original = entry.layer.experts * entry.layer.stack_width(stack) * entry.layer.hidden
            table.add_row(entry.layer.decoder_layer, stack, form.summary(), f"{form.parameter_count() / original:.1%}")
    return table


def short(count: int) -> str:
    """`2.36 M`: parameters, where the column is narrow."""
    return next((f"{count / size:.2f} {unit}" for unit, size in (("B", 1e9), ("M", 1e6)) if count >= size), str(count))


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError
