"""The stages in order: calibrate, plan, factorise, write. The one verb that calls others."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import torch

from .calibrate import Calibration, calibrate, own_share
from .checkpoint import refuse_existing
from .factorise import factorise
from .heal import heal as distil
from .methods import Method, get
from .plan import Plan
from .planning import check_ratio, make_plan
from .progress import Progress, silent
from .run_folder import RunFolder
from .stats import GRADIENTS
from .streaming import StreamedModel, default_device
from .text import with_own
from .write import check_method, write_checkpoint


def compress(
    model: str,
    method: str = "biaxial",
    ratio: float = 0.4,
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
    device: torch.device | str | None = None,
    heal: int = 0,
    drop_mtp: bool = False,
    run: str | Path | None = None,
    progress: Progress = silent,
    **options: object,
) -> Path:
    """Compresses a model's routed experts and writes a checkpoint that plain `from_pretrained` loads.

    Args:
        model: folder or hub name.
        method: a name of moefactor.METHODS; `options` are that method's.
        ratio: fraction of the routed experts' parameters to remove, above 0 and below 1.
        output: folder to write; it must not exist.
        calibration: text file, folder or dataset; `self` for text that the model writes, `FILE,self` for half of each;
            None for `self` with biaxial, text that every Python has otherwise. `samples` windows of `seqlen` tokens are
            drawn from it by `seed`.
        own_text: share of them that the model writes itself, so that text of one kind does not mislead; None for the
            method's own (biaxial: half, or all where no text is given, if the model fits in memory).
        sequential: calibrate each layer on what the factorised layers before it give.
        allocation: `uniform`, `score` or `loss`; None for the method's own.
        device: CUDA when there is one unless said otherwise.
        heal: steps of distillation from the dense model afterwards, see heal.py; both models must fit in memory. Where
            the model wrote a share of the calibration text, healing reads text of its own too.
        drop_mtp: leave out layers of multi-token prediction, which are kept otherwise (and cut like the others where
            experts become fewer or narrower), and let config.json say that there are none.
        run: folder of the intermediate files, kept when named. By default `OUTPUT.run`, removed at the end; a killed
            run continues from it when the same call is made again.

    Raises UserError (a ValueError) for anything that the caller can mend.

    >>> moefactor.compress("Qwen/Qwen3-30B-A3B", method="rfid", ratio=0.4, output="qwen3-40")
    """
    output = Path(output).expanduser()
    refuse_existing(output)
    chosen = get(method)
    completed = chosen.complete(options)
    check_ratio(ratio)
    streamed = StreamedModel(model, default_device() if device is None else device)
    check_method(streamed, chosen, completed, drop_mtp=drop_mtp)
    reads = needs_text(chosen, completed)
    own = own_share(chosen, streamed, own_text, calibration) if reads or own_text is not None else 0.0
    own = own if reads else 0.0  # a method that reads no text has none written either
    folder = RunFolder(run or output.with_name(output.name + ".run"))
    text = None
    if calibration is not None or reads:  # read now: bad text fails before anything is written
        text = Calibration.read(
            streamed, calibration, samples=samples, seqlen=seqlen, seed=seed, own=own, kept=folder.own_text,
            progress=progress,
        )  # fmt: skip
    written = folder.folder / "unhealed" if heal else output
    if written != output:
        shutil.rmtree(written, ignore_errors=True)  # written again from the journal, which costs nothing
    run_stages(
        streamed, chosen, completed, ratio, written, folder, text=text, sequential=sequential, allocation=allocation,
        rank_multiple=rank_multiple, seed=seed, drop_mtp=drop_mtp, progress=progress,
    )  # fmt: skip
    if heal:
        distil(
            written, model, output, steps=heal, text=with_own(calibration) if own else calibration, seqlen=seqlen,
            seed=seed, device=streamed.device, run=folder.folder, progress=progress,
        )  # fmt: skip
        shutil.rmtree(written)
    if run is None:
        shutil.rmtree(folder.folder)
    return output


def needs_text(method: Method, options: dict) -> bool:
    return bool(method.plan_needs(options) or method.factorise_needs(options))


def upfront_needs(method: Method, options: dict, *, sequential: bool, allocation: str | None = None) -> set[str]:
    """The statistics of the dense model that must be there before planning and factorising."""
    later = method.factorise_needs(options)
    return method.needs_to_plan(options, allocation) | (later & GRADIENTS if sequential else later)


def run_stages(
    model: StreamedModel, method: Method, options: dict, ratio: float, output: Path, folder: RunFolder, *,
    text: Calibration | None, sequential: bool = True, allocation: str | None = None, rank_multiple: int | None = None,
    seed: int = 0, drop_mtp: bool = False, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """The stages on an opened model, checked options and read text; what `compress` and `compare` have in common."""
    check_method(model, method, options, drop_mtp=drop_mtp)
    needs = upfront_needs(method, options, sequential=sequential, allocation=allocation)
    if needs:
        calibrate(model, folder, text, needs, progress=progress)
    plan = make_plan(
        model, method, options, ratio, run=folder, allocation=allocation, rank_multiple=rank_multiple, seed=seed,
        progress=progress,
    )  # fmt: skip
    folder.write_plan(plan)
    factorise(model, plan, method, folder, calibration=text, sequential=sequential, progress=progress)
    command = f"moefactor compress {shlex.quote(model.name)} --method {method.name} --ratio {ratio}"
    write_checkpoint(model, plan, folder, output, f"{command} -o {shlex.quote(output.name)}", drop_mtp=drop_mtp)
    return plan
