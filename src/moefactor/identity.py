"""What a run is a run of: the source's weights, and the version of the mathematics.

No terabyte is read twice for it. Opening a checkpoint reads the shards' headers; a tensor is hashed when it has just
been read for something else, once a run. A shard whose size and times are what they were is believed; where they
changed, what was hashed of it is hashed again, and the run goes on only if it is the same (a folder that was copied or
downloaded anew).
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from torch import uint8

from .checkpoint import Checkpoint
from .errors import UserError
from .files import differences, digest_of, file_digest, read_json, write_json

# The rooms whose code decides numbers, by the stage that they decide.
CALIBRATION = ("stats", "streaming", "observing", "calibrate", "routing")
FACTORS = (
    "experts", "stats", "routing", "allocate", "knapsack", "plan", "forms", "fitting", "methods", "ordinary",
    "runtime/module", "runtime/kernels",  # which refining trains through
)  # fmt: skip


@cache
def maths_version(*rooms: str) -> str:
    """A digest of the package's own source in some rooms, so that no one has to remember to count a number up."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for room in rooms:
        files = [root / f"{room}.py"] if (root / f"{room}.py").is_file() else sorted((root / room).rglob("*.py"))
        for file in files:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def structure_of(checkpoint: Checkpoint) -> dict:
    """What config.json and the shards' headers say: names, types, shapes and places of all tensors, but no weights."""
    config = json.loads((checkpoint.folder / "config.json").read_text())
    headers = {path.name: _header_digest(path) for path in sorted(set(checkpoint.files.values()))}
    return {"config": digest_of(config)[:32], "headers": headers}


def _header_digest(path: Path) -> str:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")  # checked when the shard was opened
        return hashlib.sha256(file.read(size)).hexdigest()[:32]


def structure_digest(checkpoint: Checkpoint) -> str:
    """The same for a copy of the folder, and for other numbers in the same shapes."""
    return _short(structure_of(checkpoint))


def _short(structure: dict) -> str:
    return digest_of(structure)[:32]


def weights_now(checkpoint: Checkpoint) -> str:
    """A digest that any change of the weights changes, and a copy of the folder too: for what may be made again."""
    times = {path.name: _times(path) for path in sorted(set(checkpoint.files.values()))}
    return digest_of([structure_of(checkpoint), times])


def weights_record(checkpoint: Checkpoint) -> dict:
    """What other_weights knows them by again, a copy too. Reads the shards whole."""
    shards = sorted(set(checkpoint.files.values()))
    times = [_times(path) for path in shards]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        seen = zip(shards, times, pool.map(file_digest, shards), strict=True)
        known = {path.name: {"times": at, "sha256": digest} for path, at, digest in seen}
    return {"structure": structure_of(checkpoint), "shards": known}


def other_weights(record: dict, checkpoint: Checkpoint) -> list[str]:
    """Where they differ from those of the record, in words. Only shards that were touched since are read."""
    found = differences(structure_of(checkpoint), record.get("structure"))
    if found:
        return found
    shards = {path.name: path for path in set(checkpoint.files.values())}
    known = record["shards"]
    touched = [path for name, path in sorted(shards.items()) if _times(path) != known[name]["times"]]
    return [f"{path.name} has other values" for path in touched if file_digest(path) != known[path.name]["sha256"]]


class SourceRecord:
    """The source's weights as a run folder has seen them, RUN/source.json.

    Args:
        path: of the file.
        checkpoint: the source.
        name: of the model, for messages.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, name: str):
        self.path, self.checkpoint, self.name = path, checkpoint, name
        self.structure = structure_of(checkpoint)
        self.shards = {p.name: _times(p) for p in sorted(set(checkpoint.files.values()))}
        self.tensors: dict[str, str] = {}
        try:
            known = read_json(path)
            if known is not None:
                self._recognise(known)
        except (KeyError, TypeError, AttributeError):
            raise self._refusal("its source.json is damaged") from None

    @property
    def digest(self) -> str:
        """The same as structure_digest."""
        return _short(self.structure)

    def _recognise(self, known: dict) -> None:
        """Takes over what an earlier stage saw of the same weights. Raises UserError where they are others."""
        found = differences(self.structure, known.get("structure"), "")
        if found:
            raise self._refusal(found[0])
        if not set(known.get("tensors") or {}) <= {*self.checkpoint.files}:
            raise self._refusal("its source.json is damaged")
        self.tensors = dict(known.get("tensors") or {})
        changed = [shard for shard, times in self.shards.items() if times != (known.get("shards") or {}).get(shard)]
        seen = [name for name in self.tensors if self.checkpoint.files[name].name in changed]
        for name, digest in self._digests(seen).items():
            if digest != self.tensors[name]:
                raise self._refusal(f"{self.checkpoint.files[name].name}: {name} has other values")
        if changed:
            self._write()

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"{self.path.parent}: a run of other weights than {self.name} has now ({what}). "
            "Choose another run folder, or remove this one to start again."
        )

    def saw(self, names: list[str]) -> None:
        """Notes tensors that have just been read, before anything that is made of them is written."""
        new = self._digests([name for name in names if name not in self.tensors])
        if new or not self.path.is_file():
            self.tensors |= new
            self._write()

    def _digests(self, names: list[str]) -> dict[str, str]:
        with self.checkpoint.slices(names) as slices, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:

            def digest(name: str) -> str:
                view = slices[name]
                tensor = (view[:] if view.get_shape() else view[...]).contiguous()
                return hashlib.sha256(tensor.flatten().view(uint8).numpy().data).hexdigest()[:32]

            return dict(zip(names, pool.map(digest, names), strict=True))

    def _write(self) -> None:
        data = {"structure": self.structure, "shards": self.shards, "tensors": self.tensors}
        write_json(self.path, data, indent=None)


def _times(path: Path) -> list[int]:
    """Size, and when it was last written or otherwise changed, which no tool sets back."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
