"""Checkpoints: a lazy reader that yields the model's own layout, and an atomic sharded writer.

Reading goes through transformers' weight conversions, so any layout on disk (an expert a tensor, fused, renamed)
arrives as the skeleton has it. What is not an expert is copied as it lies on disk, name and bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from .compat import check_shapes
from .errors import UserError
from .experts import check_finite
from .files import sync_folder, write_atomically, write_tensors
from .fp8 import SCALE, Fp8Source, dequantise

if TYPE_CHECKING:
    from transformers.utils.loading_report import LoadStateDictInfo

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Copied beside the weights; everything else in a repository is somebody's documentation.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COPY_LIMIT = 1 << 30  # bytes of plain tensors held, and written to one shard, at a time
Change = Callable[[str, Tensor], dict[str, Tensor]]  # (name, tensor) -> what is written in its place


class Slice(Protocol):
    """A tensor in a file, of which only what is indexed is read."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: slice | EllipsisType) -> Tensor: ...


def resolve(name: str) -> Path:
    """The folder of a model: `name` itself, or the hub repository of that name, downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder.")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", *COMPANIONS]))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{name}: neither a folder here nor a model on the hub.") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"{name}: no such folder, and the hub can't be reached: {str(error).splitlines()[0]}") from None


class Checkpoint:
    """The safetensors files of one folder, read a tensor at a time.

    Opening checks every shard's presence and header (a truncated file fails here, not hours later).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.said_dtype: str | None = None  # in the index, by whoever saved it
        self.files = self._files()

    def _files(self) -> dict[str, Path]:
        """Tensor -> file, of the files that from_pretrained reads: the one that config.json names, or the single file,
        or the shards of the index; a shard's tensors all count, whether the index lists them or not."""
        named = self._named_file()
        if not named and (self.folder / WEIGHTS).is_file():
            named = WEIGHTS  # wins over an index beside it
        if named and not named.endswith(".json"):
            return dict.fromkeys(self._names(self.folder / named), self.folder / named)
        index = self.folder / (named or INDEX)
        if not index.is_file():
            raise UserError(f"{self.folder}: no {WEIGHTS} and no {INDEX}; only safetensors checkpoints are read.")
        try:
            data = json.loads(index.read_text())
            weight_map = dict(data["weight_map"])
            self.said_dtype = (data.get("metadata") or {}).get("dtype")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of shards (JSON with a 'weight_map'). Download it again.") from None
        files: dict[str, Path] = {}
        for shard in sorted(set(weight_map.values())):
            path = self.folder / shard
            if not path.is_file():
                raise UserError(f"{path}: this shard is missing though {INDEX} names it. Download it again.")
            names = self._names(path)
            absent = {n for n, s in weight_map.items() if s == shard} - set(names)
            if absent:
                raise UserError(f"{path}: {INDEX} promises {sorted(absent)[0]} here, and it is not. Download it again.")
            files |= dict.fromkeys(names, path)
        return files

    def _named_file(self) -> str | None:
        """The file that config.json asks for (`transformers_weights`), if it does."""
        try:
            named = json.loads((self.folder / "config.json").read_text()).get("transformers_weights")
        except (OSError, ValueError, AttributeError):
            return None  # read_config says what is wrong with it
        if named and not (self.folder / named).is_file():
            raise UserError(f"{self.folder / named}: missing, though config.json names it. Download it again.")
        return named

    @cached_property
    def dtype(self) -> torch.dtype:
        """What from_pretrained takes where config.json names none: the index's, or that of the first tensor of the
        first file that has an ordinary floating one."""
        if self.said_dtype:
            return getattr(torch, self.said_dtype.removeprefix("torch."))
        first = min(self.files.values(), default=None)
        with safe_open(first, framework="pt") as file:
            kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 (not a dict)
        return next((FLOATS[kind] for kind in kinds if kind in FLOATS), torch.float32)

    @staticmethod
    def _names(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or truncated ({error}). Download it again.") from None

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Slice]]:
        """Lazy slices of the named tensors, their files open while the context is. UserError for one that is absent."""
        absent = [name for name in names if name not in self.files]
        if absent:
            count = f" ({len(absent)} such tensors)" if len(absent) > 1 else ""
            raise UserError(f"{self.folder}: {absent[0]} is missing{count}. Download it again.")
        handles, slices = {}, {}
        for name in names:
            path = self.files[name]
            if path not in handles:
                handles[path] = safe_open(path, framework="pt")
            slices[name] = handles[path].get_slice(name)
        try:
            yield slices
        finally:
            for handle in handles.values():
                handle.__exit__(None, None, None)

    def read(self, names: list[str], source: Fp8Source | None = None) -> dict[str, Tensor]:
        """Tensors as they lie on disk, but for the FP8 that `source` undoes."""
        scales = [name + SCALE for name in names if source is not None and name + SCALE in self.files]
        with self.slices(names + scales) as slices:
            tensors = {name: view[:] if view.get_shape() else view[...] for name, view in slices.items()}
        if source is not None:
            for name in scales:
                weight = name.removesuffix(SCALE)
                tensors[weight] = dequantise(tensors[weight], tensors.pop(name), source.block, torch.bfloat16)
        return tensors

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same, read a part at a time."""
        with self.slices([first, second]) as slices:
            a, b = slices[first], slices[second]
            if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
                return False
            rows = max(1, a.get_shape()[0]) if a.get_shape() else 1
            step = max(1, COPY_LIMIT // 16 // max(1, int(torch.Size(a.get_shape()[1:]).numel())))
            return all(torch.equal(a[i : i + step], b[i : i + step]) for i in range(0, rows, step))

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.files.values()))


def dtype_of(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Of a model's weights: what config.json names, or else the tensors' own."""
    named = config.dtype or checkpoint.dtype
    assert isinstance(named, torch.dtype)  # transformers has read the name
    return named


class ModelReader:
    """A checkpoint seen through a skeleton: which tensor becomes which parameter, and loading of parts.

    `source` undoes the checkpoint's FP8, if it has any.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, source: Fp8Source | None = None):
        self.checkpoint = checkpoint
        self.model = model
        self.source = source
        self.dtype = model.dtype  # noted now: parameters that were released remember what they were loaded in
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.conversions = get_model_conversion_mapping(model, None, source)
        self.on_read: Callable[[list[str]], None] = lambda names: None  # told the tensors (on disk) of every load
        _return_freed_memory()

    @cached_property
    def targets(self) -> dict[str, tuple[str, ...]]:
        """Name on disk -> names in the model, several where a conversion splits (a fused q, k, v); tensors that the
        model has no place for are left out."""
        return self.targets_of(list(self.checkpoint.files))

    def targets_of(self, names: list[str]) -> dict[str, tuple[str, ...]]:
        """The same of any names, as if a checkpoint had these."""
        state = self.model.state_dict()
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        patterns = {pattern: c.target_patterns for c in converters for pattern in c.source_patterns}
        targets = {}
        for name, (target, pattern) in renamed(self.model, names, state, self.conversions).items():
            every = patterns.get(pattern, []) if pattern is not None else []
            split = [target.replace(every[0], other, 1) for other in every[1:]]
            targets[name] = (target, *(other for other in split if other in state and other != target))
        return targets

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names on disk of what becomes parameters, not buffers."""
        known = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return frozenset(name for name, targets in self.targets.items() if known.issuperset(targets))

    @cached_property
    def stand_ins(self) -> dict[str, str]:
        """Name on disk -> the model's name for the tensor that is tied to it and is not there itself (a head that the
        embedding is read from)."""
        on_disk = {target: name for name, targets in self.targets.items() for target in targets}
        tied = self.model.all_tied_weights_keys.items()
        return {on_disk[t]: source for t, source in tied if source not in on_disk and t in on_disk}

    def untie(self) -> None:
        """As from_pretrained does: what config.json ties but the checkpoint has twice, and different, is not tied."""
        on_disk = {target: name for name, targets in self.targets.items() for target in targets}
        for target, source in list(self.model.all_tied_weights_keys.items()):
            first, second = on_disk.get(target), on_disk.get(source)
            if first is not None and second is not None and not self.checkpoint.equal(first, second):
                del self.model.all_tied_weights_keys[target]

    def check_complete(self) -> None:
        """Raises UserError for a parameter that no tensor of the checkpoint is meant for, loaded here or not."""
        known = {t for targets in self.targets.values() for t in targets} | {*self.model.all_tied_weights_keys}
        known |= {*self.stand_ins.values()}
        missing = [name for name in self.model.state_dict() if name not in known]
        if missing:
            raise UserError(
                f"{missing[0]}: missing from the checkpoint ({len(missing)} such tensors). "
                "Download the model again, or check that its config.json belongs to it."
            )

    def load(self, prefix: str, device: torch.device, *, without: tuple[str, ...] = ()) -> None:
        """Fills the parameters under `prefix` (a module's path), but for those under `without`.

        Raises UserError for a missing, mis-shaped, inconvertible or non-finite tensor.
        """

        def inside(name: str) -> bool:
            return name.startswith(prefix + "." if prefix else "") and not name.startswith(
                tuple(w + "." for w in without)
            )

        wanted = {name: name for name, targets in self.targets.items() if any(map(inside, targets))}
        # What is tied to it gets its values from tie_weights.
        wanted |= {name: source for name, source in self.stand_ins.items() if inside(source)}
        self._fill(wanted, prefix, device, inside)

    def load_as(self, names: dict[str, str], prefix: str, device: torch.device) -> None:
        """Fills the module at `prefix` from tensors of other names: name on disk -> the name that the module's own
        tensors have there (of a layer that the model has no place for, read as one that it has)."""
        self._fill(names, prefix, device, lambda name: name.startswith(prefix + "."))

    def _fill(self, names: dict[str, str], prefix: str, device: torch.device, inside: Callable[[str], bool]) -> None:
        with self.checkpoint.slices(list(names)) as slices, quiet():
            views = {names[name]: view for name, view in slices.items()}
            config = LoadStateDictConfig(
                device_map={"": device}, dtype=self.dtype, hf_quantizer=self.source,
                weight_mapping=self.conversions,  # type: ignore[arg-type]  # transformers passes on the same list
            )  # fmt: skip
            report, _ = convert_and_load_state_dict_in_model(self.model, views, config)
        if self.source is not None:
            # transformers leaves the unquantised tensors of a quantised checkpoint in the dtype they have on disk.
            for parameter in self.model.get_submodule(prefix).parameters():
                if parameter.device.type != "meta" and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.dtype)
        vars(self.model)["_weight_conversions"] = None  # or a later save would revert only what this part used
        self._check(report, prefix, inside)
        self.on_read(list(names))

    def _check(self, report: LoadStateDictInfo, prefix: str, inside: Callable[[str], bool]) -> None:
        for name, why in report.conversion_errors.items():
            reason = [line for line in why.splitlines() if line.strip()][-1]
            raise UserError(f"{name}: could not be put together from the checkpoint: {reason}")
        for name, found, expected in report.mismatched_keys:
            raise UserError(f"{name}: has shape {tuple(found)} in the checkpoint, the model expects {tuple(expected)}.")
        missing = sorted(name for name in report.missing_keys if inside(name))
        tied = set(self.model.all_tied_weights_keys)
        missing = [name for name in missing if name not in tied]
        if missing:
            raise UserError(
                f"{missing[0]}: missing from the checkpoint ({len(missing)} such tensors under {prefix}). "
                "Download the model again, or check that its config.json belongs to it."
            )
        module = self.model.get_submodule(prefix)
        check_shapes(module, prefix, self.shapes)
        check_finite(prefix, {n: p for n, p in module.named_parameters() if p.device.type != "meta"})
        module.requires_grad_(False)

    def release(self, prefix: str) -> None:
        """Returns the parameters under `prefix` to the meta device."""
        for module in self.model.get_submodule(prefix).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        _return_freed_memory()

    def disk_layout(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors named and shaped as in the model -> as this kind of checkpoint has them on disk."""
        assert self.targets is not None  # reading the names tells which prefixes this checkpoint leaves out or adds
        used = {repr(c) for c in self.conversions if c.was_used()}
        conversions = get_model_conversion_mapping(self.model, add_legacy=False)
        # Where nothing was renamed on reading, nothing must be on writing; the others tell by the names themselves.
        kept = [c for c in conversions if type(c).__name__ != "PrefixChange" or repr(c) in used]
        vars(self.model)["_weight_conversions"] = kept
        try:
            found = revert_weight_conversion(self.model, tensors)
        finally:
            vars(self.model)["_weight_conversions"] = None
        return {k: v.contiguous() for k, v in found.items()}


def renamed(
    model: PreTrainedModel, names: list[str], state: dict[str, Tensor], conversions: list | None = None
) -> dict[str, tuple[str, str | None]]:
    """Name on disk -> (name in the model, pattern of the conversion that it goes through, or None), of those that
    `state`, the model's or one like it, has a place for."""
    if conversions is None:
        conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for name in sorted(names):  # some renamings begin only at a name that comes before the others
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            found[name] = target, pattern
    return found


def _return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MB for itself; over 64 small layers that came to 380 MB."""
    with suppress(OSError, AttributeError):  # not Linux, or another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: larger blocks go straight back when freed
        libc.malloc_trim(0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bar, which would draw over ours for every layer."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# -- writing -------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Builds a checkpoint folder beside its final place and moves it there when the context ends well.

    Shards are numbered as they come; the index is written last, then the folder is renamed. An error leaves nothing.
    """

    def __init__(self, output: Path):
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._shards: list[tuple[str, list[str], int]] = []  # file, tensor names, bytes

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:  # gone when it was moved; what a full disk cut short in _finish must not stay either
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        name = self._next()
        write_tensors(self.folder / name, tensors)
        self._note(name)

    def adopt(self, file: Path) -> None:
        """Takes over a finished safetensors file, without a copy where the file system allows."""
        name = self._next()
        try:
            os.link(file, self.folder / name)
        except OSError:
            shutil.copy2(file, self.folder / name)
        self._note(name)

    def copy_plain(
        self, checkpoint: Checkpoint, names: list[str], *, source: Fp8Source | None = None,
        change: Change = lambda name, tensor: {name: tensor}, checked: Container[str] | None = None,
    ) -> None:  # fmt: skip
        """Tensors as they lie on disk, at most COPY_LIMIT bytes at a time.

        Args:
            source: undoes FP8 on the way; scales are not copied then.
            change: (name, tensor) -> what is written instead, by name.
            checked: names on disk whose values must be finite, all of them if None; a buffer may hold an infinity and
                mean it.
        """
        if source is not None:
            names = [name for name in names if not name.endswith(SCALE)]
        batch: list[str] = []
        size = 0
        for name in names:
            with checkpoint.slices([name]) as slices:
                view = slices[name]
                count = int(torch.Size(view.get_shape()).numel())
            bytes_ = count * item_size(view.get_dtype())
            if batch and size + bytes_ > COPY_LIMIT:
                self._copy(checkpoint, batch, source, change, checked)
                batch, size = [], 0
            batch.append(name)
            size += bytes_
        if batch:
            self._copy(checkpoint, batch, source, change, checked)

    def _copy(
        self, checkpoint: Checkpoint, names: list[str], source: Fp8Source | None, change: Change,
        checked: Container[str] | None,
    ) -> None:  # fmt: skip
        written: dict[str, Tensor] = {}
        tensors = checkpoint.read(names, source)
        for name in list(tensors):
            made = change(name, tensors.pop(name))
            if checked is None or name in checked:
                numbers = {n: t for n, t in made.items() if t.is_floating_point() and t.dtype.itemsize > 1}
                check_finite(checkpoint.folder.name, numbers)
            written |= made
        self.add(written)

    def text(self, name: str, content: str) -> None:
        write_atomically(self.folder / name, content.encode())

    def companions(self, source: Path, *, skip: tuple[str, ...] = ()) -> None:
        """Tokenizer, chat template, generation config and remote code of the source."""
        for pattern in COMPANIONS:
            for file in sorted(source.glob(pattern)):
                if file.name not in (*skip, INDEX, "config.json") and not (self.folder / file.name).exists():
                    shutil.copy2(file, self.folder / file.name)

    def _finish(self) -> None:
        total, count = sum(size for *_, size in self._shards), len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (file, names, _) in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / file).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(self.folder / INDEX, json.dumps(index, indent=2).encode())
        sync_folder(self.folder)
        self.folder.rename(self.output)
        sync_folder(self.output.parent)

    def _next(self) -> str:
        return f"shard-{len(self._shards):05d}.safetensors"

    def _note(self, name: str) -> None:
        path, size = self.folder / name, 0
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for tensor in names:
                view = file.get_slice(tensor)
                size += int(torch.Size(view.get_shape()).numel()) * item_size(view.get_dtype())
        self._shards.append((name, names, size))


def item_size(dtype: str) -> int:
    """Bytes of a safetensors dtype: F32, BF16, F8_E4M3, I64, BOOL ..."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


def refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already. Choose another output, or remove it.")
