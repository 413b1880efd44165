"""In the place of SGLang's compiled kernels, which PyPI has for GPUs alone: SGLang's engine for CPUs imports names from
here, and does without them where the processor has no AMX."""

from __future__ import annotations

from collections.abc import Callable


def __getattr__(name: str) -> Callable:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise RuntimeError(f"sgl_kernel.{name} is not installed here")

    return missing
