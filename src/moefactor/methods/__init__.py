"""The methods: one paper a file, pure mathematics, no I/O. `METHODS` is the table."""

from __future__ import annotations

from ..errors import unknown
from . import biaxial, channels, d2moe, mobe, reap, rfid, shared_basis, slbf, svd, whitened_svd
from .base import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (svd, whitened_svd, shared_basis, rfid, mobe, d2moe, slbf, reap, channels, biaxial)
}


def get(name: str) -> Method:
    """The method of that name; raises UserError with a suggestion."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
