"""How a long-running verb tells its caller where it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after every step of a stage; `detail` is a short free text such as the layer's current error."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None: ...


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """The default: no output."""


class Steps:
    """Counts a stage's steps for its progress bar."""

    def __init__(self, progress: Progress, stage: str, total: int):
        self.progress, self.stage, self.total = progress, stage, total
        self.done, self.detail = 0, ""
        progress(stage, 0, total)

    def tick(self) -> None:
        self.done += 1
        self.progress(self.stage, self.done, self.total, self.detail)

    def skip(self, count: int) -> None:
        """Steps that an earlier run has done."""
        self.done += count
