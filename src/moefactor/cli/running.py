"""Commands that make something: the stages, alone and in order, healing, and methods side by side."""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..checkpoint import refuse_existing
from ..comparison import Contender
from ..comparison import compare as compare_verb
from ..compression import compress as compress_verb
from ..coverage import Coverage
from ..errors import UserError
from ..export import export_dense, export_gguf
from ..files import locked
from ..healing import LABELS, Trained
from ..healing import heal as heal_verb
from ..plan import Plan
from ..quantisation import export_quantised
from ..run_folder import RunFolder
from ..size import Size
from ..stages import Recipe, Run, planned_recipe
from ..stats import STATISTICS
from ..streaming import StreamedModel, default_device
from .shared import (
    LOOK,
    MAKE,
    METHOD_FLAGS,
    STAGES,
    USE,
    Allocation,
    Bars,
    Bits,
    BitsGroup,
    Bpw,
    Column,
    Device,
    DropMtp,
    Dtype,
    MaybeRatio,
    MethodName,
    Model,
    Output,
    OwnText,
    RankMultiple,
    RestBits,
    RunOption,
    Samples,
    Seed,
    Seqlen,
    Sequential,
    TargetGb,
    Text,
    Trust,
    app,
    console,
    method_options,
    say,
)
from .tables import comparison_table, coverage_table, plan_table, validation_table


@app.command(context_settings=METHOD_FLAGS, rich_help_panel=MAKE)
def compress(
    context: typer.Context, model: Model, output: Output, method: MethodName = "biaxial", ratio: MaybeRatio = None,
    bits: Bits = None, bpw: Bpw = None, target_gb: TargetGb = None, bits_group: BitsGroup = None,
    calibration: Text = None, own_text: OwnText = None, samples: Samples = 256, seqlen: Seqlen = None, seed: Seed = 0,
    sequential: Sequential = True, allocation: Allocation = None, rank_multiple: RankMultiple = None,
    device: Device = None, text_column: Column = None, trust_remote_code: Trust = False,
    heal: Annotated[
        int, typer.Option(help="Steps of distillation from the dense model afterwards; both must fit in memory.", min=0)
    ] = 0,
    drop_mtp: DropMtp = False, rest_bits: RestBits = 16,
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
            model, method, ratio, output, bits=bits, bpw=bpw, target_gb=target_gb, bits_group=bits_group,
            calibration=calibration, own_text=own_text, samples=samples, seqlen=seqlen,
            seed=seed, sequential=sequential, allocation=allocation, rank_multiple=rank_multiple, device=device,
            heal=heal, drop_mtp=drop_mtp, rest_bits=rest_bits, run=run, text_column=text_column,
            trust_remote_code=trust_remote_code, progress=bars, on_coverage=show_coverage, **options,
        )  # fmt: skip
    say(f"Wrote {output}. Next: moefactor evaluate {output} --against {model}")


@app.command(context_settings=METHOD_FLAGS, rich_help_panel=STAGES)
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
    say(f"{told} Next: moefactor plan {model} --run {run} --method {method}")


@app.command(context_settings=METHOD_FLAGS, rich_help_panel=STAGES)
def plan(
    context: typer.Context, model: Model, run: RunOption, method: MethodName = "biaxial", ratio: MaybeRatio = None,
    bits: Bits = None, bpw: Bpw = None, target_gb: TargetGb = None, bits_group: BitsGroup = None,
    rest_bits: RestBits = 16, seed: Seed = 0, allocation: Allocation = None, rank_multiple: RankMultiple = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the ranks, write nothing.")] = False,
) -> None:  # fmt: skip
    """Stage 2: which layer and group gets which rank. Writes RUN/plan.json, which you may edit."""
    recipe = Recipe.of(
        method, method_options(context.args), size=Size.of(ratio, bits, bpw, target_gb, bits_group),
        allocation=allocation, rank_multiple=rank_multiple, seed=seed, rest_bits=rest_bits,
    )  # fmt: skip
    if recipe.size and recipe.size.bits and recipe.method.standard(recipe.options):
        raise UserError(
            f"{method} with these options leaves an ordinary checkpoint, which `compress` rounds once it is written. "
            "Plan without --bits, then `moefactor export --quantised int4` what `factorise` writes."
        )
    with Bars() as bars, TemporaryDirectory() as nowhere:
        folder = RunFolder(nowhere if dry_run and not run.exists() else run)
        streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
        work = Run(streamed, recipe, folder, bars)
        work.check()
        made = work.plan()
    console.print(plan_table(made))
    if not dry_run:
        work.folder.write_plan(made)
        rest = "" if rest_bits == 16 else f" --rest-bits {rest_bits}"
        say(f"Wrote {work.folder.plan}. Next: moefactor factorise {model} --run {run} -o OUT{rest}")


@app.command(rich_help_panel=STAGES)
def factorise(
    model: Model, run: RunOption, output: Output, calibration: Text = None, own_text: OwnText = None,
    samples: Samples = 256, seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration windows.")] = 0,
    sequential: Sequential = True, device: Device = None, text_column: Column = None, trust_remote_code: Trust = False,
    drop_mtp: DropMtp = False, rest_bits: RestBits = 16,
) -> None:  # fmt: skip
    """Stage 3: the factors of every layer, from weights, statistics and RUN/plan.json; then the checkpoint."""
    refuse_existing(output)
    streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
    folder = RunFolder(run)
    recipe, made = planned_recipe(
        Plan.read(folder.plan, streamed.experts), calibration=calibration, own_text=own_text, samples=samples,
        seqlen=seqlen, seed=seed, sequential=sequential, text_column=text_column,
        drop_mtp=drop_mtp, rest_bits=rest_bits,
    )  # fmt: skip
    with Bars() as bars, locked(output.with_name(f".{output.name}.lock"), str(output)):
        work = Run(streamed, recipe, folder, bars, show_coverage)
        work.check()
        work.factorise(made)
        work.write(made, output, f"moefactor factorise {model} --run RUN -o {output.name}")
    say(f"Wrote {output}. Next: moefactor evaluate {output} --against {model}")


@app.command(rich_help_panel=MAKE)
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
    say(f"Wrote {output}, the state after step {healed.best_step} of {healed.steps}.")


@app.command(rich_help_panel=LOOK)
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


@app.command(rich_help_panel=USE)
def export(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist. Not with --gguf.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="An ordinary MoE checkpoint, every expert rebuilt.")] = False,
    quantised: Annotated[
        str | None,
        typer.Option(help="An ordinary MoE with experts in W4A16 (int4), W8A16 (int8), FP8_DYNAMIC, MXFP4A16 ..."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Of --quantised: weights that share a scale.", show_default="the most, up to 128, that divides rows",
            min=1,
        ),
    ] = None,
    rest_bits: Annotated[
        int | None,
        typer.Option(help="Of --quantised: 16, 8 or 4, of attention and shared experts.", show_default="16"),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="A file for llama.cpp, by its own converter.")] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="Of --gguf: f32, bf16, f16, q8_0, q4_k_m ...", show_default="what the weights have"),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="llama.cpp's folder.", show_default="LLAMA_CPP, else what is on the PATH")
    ] = None,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="Of --gguf: llama.cpp's name of one, where it does not know the tokenizer.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """For engines that know nothing of moefactor: an ordinary MoE checkpoint again, one quantised, or a GGUF."""
    kinds = {"--dense": dense, "--quantised": quantised, "--gguf": gguf}
    chosen = [option for option, value in kinds.items() if value]
    if len(chosen) != 1:
        raise UserError(
            "Say what to export to: --dense -o FOLDER rebuilds every expert, --quantised int4 -o FOLDER stores an "
            "ordinary MoE in fewer bits, --gguf FILE is for llama.cpp."
        )
    parts = {
        "--quant": (quant, "--gguf"), "--llama-cpp": (llama_cpp, "--gguf"),
        "--pre-tokenizer": (pre_tokenizer, "--gguf"), "--group-size": (group_size, "--quantised"),
        "--rest-bits": (rest_bits, "--quantised"),
    }  # fmt: skip
    for option, (value, kind) in parts.items():
        if value is not None and kind != chosen[0]:
            raise UserError(f"{option} goes with {kind}.")
    if bool(output) == bool(gguf):
        raise UserError(
            "-o goes with --dense and --quantised; --gguf has FILE."
            if gguf
            else f"{chosen[0]} takes -o, the folder to write."
        )
    with Bars() as bars:
        if gguf:
            export_gguf(
                model, gguf, quant=quant, llama_cpp=llama_cpp, pre_tokenizer=pre_tokenizer,
                trust_remote_code=trust_remote_code, progress=bars,
            )  # fmt: skip
        elif quantised and output:
            export_quantised(
                model, output, quantised, group_size=group_size, rest_bits=16 if rest_bits is None else rest_bits,
                trust_remote_code=trust_remote_code, progress=bars,
            )  # fmt: skip
        elif output:
            export_dense(model, output, trust_remote_code=trust_remote_code, progress=bars)
    say(f"Wrote {gguf or output}" + (", of the original's size and layout." if dense else "."))


def show_coverage(rows: list[Coverage]) -> None:
    console.print(coverage_table(rows))
