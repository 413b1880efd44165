"""The files of one run: what each stage reads and writes.

RUN/calibration.json        what was calibrated on
RUN/stats/00003.safetensors one file a layer, by the layer's place among the expert layers
RUN/own.safetensors         the windows of text that the model wrote itself
RUN/plan.json
RUN/layers/00003.safetensors  the compressed tensors of a layer
RUN/journal.json            the finished layers: file, checksum, errors, loss curves, seconds
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import file_digest, read_tensors, write_atomically, write_tensors
from .errors import UserError
from .plan import Plan
from .stats import LayerStats


@dataclass(frozen=True)
class Entry:
    """One finished layer in the journal."""

    sha256: str
    errors: dict[str, float]
    seconds: float
    curves: dict[str, list[float]]


class RunFolder:
    """`calibrated`: another run folder whose calibration this one reads instead of having its own."""

    def __init__(self, folder: str | Path, *, calibrated: RunFolder | None = None):
        self.folder = Path(folder).expanduser()
        self.calibrated = calibrated

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def own_text(self) -> Path:
        """The calibration windows that the model wrote itself."""
        return self.folder / "own.safetensors"

    # -- calibration ---------------------------------------------------------------------------------------------

    def forget_calibration(self) -> None:
        """Before statistics are written over: what a killed calibration leaves must not pass for the earlier one."""
        (self.folder / "calibration.json").unlink(missing_ok=True)

    def write_calibration(self, description: dict) -> None:
        self._write_json("calibration.json", description)

    def calibration(self) -> dict | None:
        """What was calibrated on, or None while calibration has not finished."""
        if self.calibrated is not None:
            return self.calibrated.calibration()
        return self._read_json("calibration.json")

    def write_stats(self, index: int, stats: LayerStats) -> None:
        path = self._path("stats", index)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, stats.tensors())

    def stats(self, index: int, device: torch.device | str = "cpu") -> LayerStats | None:
        if self.calibrated is not None:
            return self.calibrated.stats(index, device)
        path = self._path("stats", index)
        return LayerStats(**read_tensors(path, device)) if path.is_file() else None

    def write_activations(self, number: int, states: list[Tensor]) -> None:
        """What enters a decoder layer, kept for the backward pass."""
        path = self._path("activations", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({str(index): state.cpu().contiguous() for index, state in enumerate(states)}, path)

    def activations(self, number: int, device: torch.device | str) -> list[Tensor]:
        states = read_tensors(self._path("activations", number), device)
        return [states[str(index)] for index in range(len(states))]

    def drop_activations(self) -> None:
        shutil.rmtree(self.folder / "activations")

    def write_plan(self, plan: Plan) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        plan.write(self.plan)

    # -- factorised layers ---------------------------------------------------------------------------------------

    def journal(self, digest: str) -> dict[int, Entry]:
        """Finished layers whose files still are what was written. UserError when they belong to another plan."""
        data = self._read_json("journal.json")
        if data is None:
            return {}
        if data["plan"] != digest:
            raise UserError(
                f"{self.folder}: holds layers made from another plan or other options. Remove {self.folder / 'layers'} "
                "and journal.json to start again, or choose another run folder."
            )
        entries = {int(index): Entry(**entry) for index, entry in data["layers"].items()}
        return {
            index: entry
            for index, entry in entries.items()
            if self.layer_file(index).is_file() and file_digest(self.layer_file(index)) == entry.sha256
        }

    def write_layer(self, index: int, tensors: dict[str, Tensor]) -> str:
        self.layer_file(index).parent.mkdir(parents=True, exist_ok=True)
        return write_tensors(self.layer_file(index), tensors)

    def enter(self, digest: str, entries: dict[int, Entry]) -> None:
        layers = {str(index): asdict(entry) for index, entry in sorted(entries.items())}
        self._write_json("journal.json", {"plan": digest, "layers": layers})

    def report(self) -> dict:
        """The journal and what was calibrated on, for the finished checkpoint.

        Without the seconds: a resumed run ends with the same bytes.
        """
        journal = self._read_json("journal.json")
        layers = {index: {k: v for k, v in e.items() if k != "seconds"} for index, e in journal["layers"].items()}
        return {"calibration": self.calibration(), **journal, "layers": layers}

    def layer_file(self, index: int) -> Path:
        return self._path("layers", index)

    def layer(self, index: int) -> dict[str, Tensor]:
        return read_tensors(self.layer_file(index))

    # --------------------------------------------------------------------------------------------------------------

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / kind / f"{index:05d}.safetensors"

    def _write_json(self, name: str, data: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / name, (json.dumps(data, indent=1) + "\n").encode())

    def _read_json(self, name: str) -> dict | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict):
                raise UserError(f"{path}: not what moefactor writes there. Remove it.")
            return data
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}. Remove it.") from None
