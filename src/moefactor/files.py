"""Files that are whole or not there, checked on reading, and locks. Every file of ours is written here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there when the context ends well is synced and takes the place of `path`.

    A kill at any moment leaves the old file or the new one. Raises UserError where the system says why it can't be.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        raise _explained(path, error) from None
    finally:
        partial.unlink(missing_ok=True)


def _explained(path: Path, error: Exception) -> Exception:
    """A UserError for what the system refuses; the error itself for what is a bug."""
    code = getattr(error, "errno", None)
    if isinstance(error, SafetensorError | RuntimeError):
        # Both wrap the system's error in text: `I/O error: No space left on device (os error 28)`.
        code = next(
            (number for number in FULL if f"os error {number})" in str(error) or os.strerror(number) in str(error)),
            None,
        )
        if code is None and "PytorchStreamWriter" in str(error):
            code = errno.ENOSPC
    if code in FULL:
        return UserError(f"{path}: {FULL[code]}. Make room, then give the same command again: it goes on from here.")
    if isinstance(error, OSError):
        return UserError(f"{path}: can't be written: {error.strerror or error}.")
    return error


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    with suppress(OSError, AttributeError):  # systems that can't open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, data: object, indent: int | None = 1) -> None:
    write_atomically(path, (json.dumps(data, indent=indent) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """The object in a file of ours, None where there is no file. UserError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}. Remove it.") from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{path}: not what moefactor writes there. Remove it.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not what moefactor writes there. Remove it.")
    return data


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict | None = None) -> None:
    """A safetensors file, written atomically; with `about`, JSON that its header holds, see read_about."""
    with replacing(path) as partial:
        ready = {k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)}
        said = {} if about is None else {"moefactor": json.dumps(about)}
        save_file(ready, partial, metadata={"format": "pt", **said})
        partial.chmod(0o666 & ~_umask())  # the library makes it private to the user


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_tensors(
    path: Path, device: torch.device | str = "cpu", only: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """All of a file's tensors, or `only` some. Raises UserError for a file that is damaged or not there."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in only or list(file.keys())}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated ({error}). Remove it and run the stage again.") from None
    except FileNotFoundError:
        raise UserError(f"{path}: is gone. Run the stage again that writes it.") from None


def read_about(path: Path) -> dict | None:
    """What write_tensors was given as `about`; None of a file that has no such thing."""
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("moefactor")
        data = None if said is None else json.loads(said)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or truncated, or no file of tensors ({error}).") from None
    return data if isinstance(data, dict) else None


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keeps a second process from working on `path` at the same time; raises UserError where one does.

    The system gives the lock back when its process ends, however that happens.
    """
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        while not path.exists():  # its last owner took it away between our opening and locking it
            lock.release()
            lock.acquire()
    except Timeout:
        raise UserError(f"{what}: another moefactor is at work on it. Wait for that one, or choose another.") from None
    except OSError as error:
        raise UserError(f"{path}: can't be locked: {error.strerror or error}.") from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened it before finds it taken, later ones make a new file
        lock.release()


def digest_of(value: object) -> str:
    """SHA-256 of something that JSON holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def differences(ours: object, theirs: object, where: str = "") -> list[str]:
    """Where two JSON values differ, in words: `calibration.source: a.txt, now b.txt`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for key in dict.fromkeys([*theirs, *ours]):
            found += differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
        return found
    ours, theirs = (list(value) if isinstance(value, tuple) else value for value in (ours, theirs))
    return [] if ours == theirs else [f"{where}: {_short(theirs)}, now {_short(ours)}"]


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:18] + "…" + text[-18:]
