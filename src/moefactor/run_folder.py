"""The files of one run: what each stage reads and writes, and what they belong to.

RUN/source.json               the weights that this is a run of (identity.py)
RUN/calibration.json          what was calibrated on, and with what
RUN/calibrating.json          how far an unfinished calibration is
RUN/stats/00003.safetensors   one file a layer, by the layer's place among the expert layers
RUN/states/00003.safetensors  hidden states that enter a decoder layer, while a calibration needs them
RUN/own.safetensors           the windows of text that the model wrote itself
RUN/pricing/00003.json        what a layer can spend on, while a plan is being made
RUN/plan.json
RUN/layers/00003.safetensors  the compressed tensors of a layer
RUN/journal.json              the finished layers: file, checksum, errors, loss curves, seconds
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, required
from .experts import ExpertLayer
from .files import (
    differences,
    digest_of,
    file_digest,
    locked,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from .identity import CALIBRATION, SourceRecord, maths_version
from .plan import Plan
from .stats import LayerStats
from .streaming import StreamedModel


@dataclass(frozen=True)
class Entry:
    """One finished layer in the journal."""

    sha256: str
    errors: dict[str, float]
    seconds: float
    curves: dict[str, list[float]]


class RunFolder:
    """
    Args:
        calibrated: another run folder whose calibration this one reads instead of having its own.
        seen: file of what was seen of the source's weights, where several run folders of one model share it.
    """

    def __init__(self, folder: str | Path, *, calibrated: RunFolder | None = None, seen: Path | None = None):
        self.folder = Path(folder).expanduser()
        self.calibrated, self.seen = calibrated, seen or self.folder / "source.json"
        self._source: SourceRecord | None = None
        self._opened = 0
        self._checked: set[int] = set()  # layers whose statistics are what was written

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def source(self) -> SourceRecord:
        """The weights that this is a run of, once it has been opened."""
        return required(self._source, "the source of a run folder that was not opened")

    @property
    def own_text(self) -> Path:
        """The calibration windows that the model wrote itself."""
        return self.folder / "own.safetensors"

    @contextmanager
    def opened(self, model: StreamedModel) -> Iterator[None]:
        """For the length of a stage: no other process works here, and what is here is of this model's weights.

        Raises UserError where either does not hold.
        """
        with ExitStack() as stack:
            if self._opened == 0:
                if self.folder.is_file():
                    raise UserError(f"{self.folder}: is a file; a run folder is needed.")
                stack.callback(self._drop_if_empty)
                stack.enter_context(locked(self.folder / ".lock", str(self.folder)))
                self._check_source()
                self._source = SourceRecord(self.seen, model.reader.checkpoint, model.name)
                stack.callback(setattr, model.reader, "on_read", model.reader.on_read)
                model.reader.on_read = self._source.saw
            self._opened += 1
            try:
                yield
            finally:
                self._opened -= 1

    def _check_source(self) -> None:
        """Without the record of whose weights it is of, nothing that a run holds can be believed."""
        made = ("calibration.json", "calibrating.json", "journal.json")
        left = [name for name in made if (self.folder / name).exists()]
        if left and not self.seen.is_file():
            raise UserError(
                f"{self.folder}: has {left[0]} but no {self.seen.name}. Remove the folder, or choose another."
            )

    def _drop_if_empty(self) -> None:
        """A run that was refused before it wrote anything leaves nothing."""
        with suppress(OSError):
            self.folder.rmdir()

    # -- calibration ---------------------------------------------------------------------------------------------

    def forget_calibration(self) -> None:
        """Before statistics are written over: what a killed calibration leaves must not pass for the earlier one."""
        (self.folder / "calibration.json").unlink(missing_ok=True)

    def write_calibration(self, description: dict) -> None:
        write_json(self.folder / "calibration.json", description)

    def calibration(self) -> dict | None:
        """What was calibrated on, or None while calibration has not finished."""
        if self.calibrated is not None:
            return self.calibrated.calibration()
        return read_json(self.folder / "calibration.json")

    def write_stats(self, index: int, stats: LayerStats) -> None:
        write_tensors(self._path("stats", index), stats.tensors())

    def stats(self, index: int, device: torch.device | str = "cpu", layer: ExpertLayer | None = None) -> LayerStats:
        """Of a finished calibration, or of one that is under way.

        Raises UserError where they are gone, not what was written, or not of this layer's shape.
        """
        if self.calibrated is not None:
            return self.calibrated.stats(index, device, layer)
        path = self._path("stats", index)
        self._check_stats(index, path)
        return LayerStats.of(read_tensors(path, device), str(path), layer)

    def _check_stats(self, index: int, path: Path) -> None:
        """Once a process and layer: reading it again would hash it again."""
        if not path.is_file():
            raise UserError(f"{path}: is gone. Calibrate again.")
        if index in self._checked:
            return
        written = (self.calibration() or {}).get("files")
        if written is None:
            return
        if not isinstance(written, dict) or written.get(path.name) != file_digest(path):
            raise UserError(
                f"{path}: is not what calibration wrote. Remove {self.folder / 'calibration.json'} and calibrate again."
            )
        self._checked.add(index)

    def has_stats(self, count: int) -> bool:
        """Whether every layer's are there."""
        return all(self._path("stats", index).is_file() for index in range(count))

    def calibrated_for(self, model: StreamedModel, needs: set[str], method: str) -> dict | None:
        """What was calibrated on, None where nothing is needed of it.

        Raises UserError where it lacks what is needed, or is of other weights, another dtype or version.
        """
        if not needs:
            return None
        found = self.calibration()
        statistics = found.get("statistics") if found else None
        how = f"Run `moefactor calibrate {model.name} --run {self.folder} --method {method}` first."
        if found is None or not isinstance(statistics, list) or not needs <= {*statistics, "routing"}:
            raise UserError(
                f"{self.folder}: {method} reads {', '.join(sorted(needs))}, which is not calibrated there. {how}"
            )
        now = self.stamp(model, *CALIBRATION)
        other = differences(now, {key: found.get(key) for key in now})
        if other:
            raise UserError(f"{self.folder}: was calibrated otherwise ({'; '.join(other)}). {how}")
        return found

    def stamp(self, model: StreamedModel, *rooms: str) -> dict:
        """What numbers depend on beside text and options: the weights, the dtype they are run in, the mathematics."""
        return {"weights": self.source.digest, "dtype": str(model.dtype), "maths": maths_version(*rooms)}

    def counts(self, index: int) -> Tensor:
        """(E,) calibration tokens of each expert of a layer."""
        folder = self.calibrated or self
        return read_tensors(folder._path("stats", index), only=("count",))["count"]

    def calibrating(self, about: dict) -> dict:
        """How far an unfinished calibration is that was about the same; {} where there is none."""
        data = read_json(self.folder / "calibrating.json") or {}
        return data if data.get("about") == about else {}

    def write_calibrating(self, data: dict) -> None:
        write_json(self.folder / "calibrating.json", data)

    def write_states(self, name: str, states: list[Tensor]) -> None:
        """Hidden states, or loss gradients at them, a batch a tensor."""
        write_tensors(self._states(name), {str(index): state for index, state in enumerate(states)})

    def states(self, name: str, device: torch.device | str) -> list[Tensor]:
        states = read_tensors(self._states(name), device)
        return [states[str(index)] for index in range(len(states))]

    def drop_states(self, name: str) -> None:
        self._states(name).unlink(missing_ok=True)

    def finish_calibration(self, description: dict) -> None:
        folder = self.folder / "stats"
        files = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
        self.write_calibration({**description, "files": files})
        shutil.rmtree(self.folder / "states", ignore_errors=True)
        (self.folder / "calibrating.json").unlink(missing_ok=True)

    def _states(self, name: str) -> Path:
        return self.folder / "states" / f"{name}.safetensors"

    # -- planning --------------------------------------------------------------------------------------------------

    def pricing(self, index: int, about: str) -> dict | None:
        """What a layer can spend on, if it was priced under the same digest."""
        try:
            data = read_json(self._path("pricing", index, ".json")) or {}
        except UserError:
            return None  # damaged: it is priced anew
        return data.get("priced") if data.get("about") == about else None

    def write_pricing(self, index: int, about: str, priced: dict) -> None:
        write_json(self._path("pricing", index, ".json"), {"about": about, "priced": priced}, indent=None)

    def write_plan(self, plan: Plan) -> None:
        write_atomically(self.plan, plan.dumps().encode())
        shutil.rmtree(self.folder / "pricing", ignore_errors=True)

    # -- factorised layers ---------------------------------------------------------------------------------------

    def journal(self, about: dict) -> dict[int, Entry]:
        """Finished layers whose files still are what was written. UserError when they are about something else."""
        data = read_json(self.folder / "journal.json")
        if data is None:
            return {}
        path = self.folder / "journal.json"
        try:
            layers = {int(index): Entry(**entry) for index, entry in data["layers"].items()}
            found = differences(about, data["about"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path}: not a journal that moefactor reads. Remove it.") from None
        if found:
            raise UserError(
                f"{self.folder}: holds layers made from another plan, text or version ({'; '.join(found[:3])}). "
                f"Remove {self.folder / 'layers'} and journal.json to start again, or choose another run folder."
            )
        return {
            index: entry
            for index, entry in layers.items()
            if self.layer_file(index).is_file() and file_digest(self.layer_file(index)) == entry.sha256
        }

    def write_layer(self, index: int, tensors: dict[str, Tensor]) -> str:
        """Returns the file's SHA-256."""
        write_tensors(self.layer_file(index), tensors)
        return file_digest(self.layer_file(index))

    def enter(self, about: dict, entries: dict[int, Entry]) -> None:
        layers = {str(index): asdict(entry) for index, entry in sorted(entries.items())}
        write_json(self.folder / "journal.json", {"about": about, "layers": layers})

    def report(self) -> dict:
        """The journal, for the finished checkpoint: what was calibrated on, errors and curves of every layer.

        Without the seconds: a resumed run ends with the same bytes.
        """
        journal = read_json(self.folder / "journal.json")
        if journal is None:
            raise UserError(f"{self.folder}: no layer has been factorised here.")
        layers = {index: {k: v for k, v in e.items() if k != "seconds"} for index, e in journal["layers"].items()}
        about = journal["about"]
        return {"calibration": about.get("calibration"), "digest": digest_of(about), "about": about, "layers": layers}

    def layer_file(self, index: int) -> Path:
        return self._path("layers", index)

    def layer(self, index: int) -> dict[str, Tensor]:
        return read_tensors(self.layer_file(index))

    # --------------------------------------------------------------------------------------------------------------

    def _path(self, kind: str, index: int, suffix: str = ".safetensors") -> Path:
        return self.folder / kind / f"{index:05d}{suffix}"
