"""Datasets of the `datasets` library: by name, and as folders that it saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError

# Name -> (repository, configuration, text column); the splits are train to calibrate on and test to measure on.
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence"),
}
# Their rows are lines of one text; what stands between them. Other datasets' rows are documents.
LINES = {"wikitext2": "", "ptb": "\n\n"}
STREAMED_DOCUMENTS = 20_000  # of c4 and other unbounded sets; more than any calibration reads


def named_rows(name: str, split: str) -> list[dict]:
    """The first rows of a dataset on the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder, and reading a dataset needs datasets (pip install datasets)."
        ) from None
    repository, configuration, _ = DATASETS.get(name, (name, None, None))
    split = "validation" if name == "c4" and split == "test" else split
    try:
        rows = load_dataset(repository, configuration, split=split, streaming=True)
        return list(rows.take(STREAMED_DOCUMENTS))
    except Exception as error:  # the library raises a different type for every way a download fails
        known = ", ".join(DATASETS)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: neither a text file here nor a dataset that can be loaded now ({reason}). Named ones: {known}."
        ) from None


def saved_rows(folder: Path, split: str) -> Iterable[dict]:
    """The rows of a folder that `save_to_disk` wrote; of several splits the one of that name, or the only one."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise UserError(f"{folder}: a saved dataset; reading it needs datasets (pip install datasets).") from None
    try:
        found = load_from_disk(str(folder))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: a saved dataset that can't be loaded: {reason}") from None
    if not isinstance(found, DatasetDict):
        return found
    if split not in found and len(found) > 1:
        raise UserError(f"{folder}: this dataset has no split {split!r}; name the folder of one: {', '.join(found)}.")
    return found[split] if split in found else next(iter(found.values()))
