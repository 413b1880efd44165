"""A model compressed, and healed where asked: all stages in order, from one call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .checkpoint import refuse_existing
from .compressed_tensors import need_library
from .coverage import Coverage
from .errors import UserError
from .files import locked
from .healing import heal as distil
from .progress import Progress, silent
from .quantisation import export_quantised
from .run_folder import RunFolder
from .size import Size
from .stages import Recipe, Run
from .streaming import StreamedModel, default_device
from .text import with_own

ORDINARY = {4: "W4A16", 8: "W8A16"}  # bits -> what compressed-tensors calls them


def compress(
    model: str,
    method: str = "biaxial",
    ratio: float | None = None,
    output: str | Path = "compressed",
    *,
    calibration: str | None = None,
    own_text: float | None = None,
    samples: int = 256,
    seqlen: int | None = None,
    seed: int = 0,
    sequential: bool = True,
    allocation: str | None = None,
    rank_multiple: int | None = None,
    bits: int | str | None = None,
    bpw: float | None = None,
    target_gb: float | None = None,
    bits_group: int | None = None,
    device: torch.device | str | None = None,
    heal: int = 0,
    drop_mtp: bool = False,
    rest_bits: int = 16,
    run: str | Path | None = None,
    text_column: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    on_coverage: Callable[[list[Coverage]], None] = lambda rows: None,
    **options: object,
) -> Path:
    """Compresses a model's routed experts and writes a checkpoint that plain `from_pretrained` loads.

    Args:
        model: folder or hub name.
        method: a name of moefactor.METHODS; `options` are that method's.
        ratio: fraction of the routed experts' parameters to remove, below 1; without any size 0.4, with `bits` alone 0.
        bits: what private factors are rounded to, 2, 3, 4, 5, 6 or 8; what experts share has 8 at least. `mixed`: every
            channel its own, which is what happens with `bpw` or `target_gb` alone.
        bpw, target_gb: in place of a ratio, bits for each of the experts' parameters, or gigabytes (1e9 bytes) for all
            tensors of the checkpoint; the plan spends them where the loss rises least.
        bits_group: neighbours that share a scale, 64 unless said otherwise.
        output: folder to write; it must not exist.
        calibration: text file, .jsonl, .json, .parquet, folder or dataset; `A:2,B:1` for several with weights; `self`
            for text that the model writes, `FILE,self` for half of each; None for `self` with biaxial, text that every
            Python has otherwise. `samples` windows of `seqlen` tokens are drawn from it by `seed`.
        own_text: share of them that the model writes itself, so that text of one kind does not mislead; None for the
            method's own (biaxial: half, or all where no text is given, if the model fits in memory).
        sequential: calibrate each layer on what the factorised layers before it give.
        allocation: `uniform`, `score` or `loss`; None for the method's own.
        device: CUDA when there is one unless said otherwise.
        heal: steps of distillation from the dense model afterwards, see heal.py; both models must fit in memory. Where
            the model wrote a share of the calibration text, healing reads text of its own too.
        drop_mtp: leave out layers of multi-token prediction, which are kept otherwise (and cut like the others where
            experts become fewer or narrower), and let config.json say that there are none.
        rest_bits: 8 or 4 rounds the larger matrices that are not routed experts' (attention, shared experts, dense
            layers, embeddings, these to 8 at least) when the checkpoint is written; 16 leaves them as they are.
        run: folder of the intermediate files, kept when named. By default `OUTPUT.run`, removed at the end; a killed
            run continues from it when the same call is made again.
        text_column: of .jsonl, .parquet and datasets; `text`, `messages` or `prompt` with `completion` otherwise.
        trust_remote_code: whether code from the model's repository may run, for what transformers lacks.
        on_coverage: told how many calibration tokens the experts of every layer saw.

    Raises UserError (a ValueError) for anything that the caller can mend.

    >>> moefactor.compress("Qwen/Qwen3-30B-A3B", method="rfid", ratio=0.4, output="qwen3-40")
    """
    output = Path(output).expanduser()
    refuse_existing(output)
    recipe = Recipe.of(
        method, options, size=Size.of(ratio, bits, bpw, target_gb, bits_group), sequential=sequential,
        allocation=allocation, rank_multiple=rank_multiple,
        calibration=calibration, own_text=own_text, samples=samples, seqlen=seqlen, seed=seed,
        text_column=text_column, drop_mtp=drop_mtp, heal=heal, rest_bits=rest_bits,
    )  # fmt: skip
    streamed = StreamedModel(model, default_device() if device is None else device, trust_remote_code=trust_remote_code)
    folder = RunFolder(run or output.with_name(output.name + ".run"))
    places = output.resolve(), folder.folder.resolve()
    if places[0] == places[1] or places[0] in places[1].parents:
        raise UserError(f"{folder.folder}: the run folder can't lie in the output, which appears whole or not at all.")
    ordinary = recipe.method.standard(recipe.options)
    if heal and ordinary:
        raise UserError(f"--heal trains factors, and {method} with these options leaves ordinary experts; choose.")
    scheme = _scheme(recipe) if ordinary else None
    if scheme:
        need_library()
    work = Run(streamed, recipe, folder, progress, on_coverage)
    work.check()
    with locked(output.with_name(f".{output.name}.lock"), str(output)), folder.opened(streamed):
        work.text  # noqa: B018 (read now: bad text fails before anything is written)
        written = folder.folder / "unhealed" if heal else folder.folder / "unrounded" if scheme else output
        if written != output:
            shutil.rmtree(written, ignore_errors=True)  # written again from the journal, which costs nothing
        plan = work.all(written)
        if heal:
            distil(
                written, model, output, steps=heal, text=with_own(calibration) if work.own_share else calibration,
                seqlen=seqlen, seed=seed, device=streamed.device, run=folder.folder, text_column=text_column,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
            shutil.rmtree(written)
        elif scheme and not plan.standard():
            written.rename(output)  # config.json can't say it, so it is in a form of ours, rounded already
        elif scheme:
            export_quantised(
                str(written), output, scheme, group_size=bits_group, rest_bits=rest_bits,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
            shutil.rmtree(written)
    if run is None:
        shutil.rmtree(folder.folder)
    return output


def _scheme(recipe: Recipe) -> str | None:
    """The format of an ordinary checkpoint in so many bits; None where nothing is rounded."""
    bits = None if recipe.size is None else recipe.size.bits
    if bits is None:
        return None
    if bits not in ORDINARY:
        raise UserError(
            f"{recipe.method.name} with these options leaves an ordinary checkpoint, for which engines have formats of "
            f"{' or '.join(map(str, ORDINARY))} bits: give --bits {next(iter(ORDINARY))}."
        )
    return ORDINARY[bits]
