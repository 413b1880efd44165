"""The methods: one paper a file, pure mathematics, no I/O. `METHODS` is the table.

Other packages add to it by an entry point of the group `moefactor.methods` that names a Method:

    [project.entry-points."moefactor.methods"]
    mine = "my_package.mine:METHOD"
"""

from __future__ import annotations

from importlib.metadata import entry_points

from ..errors import UserError, unknown
from . import biaxial, channels, d2moe, mobe, reap, rfid, shared_basis, slbf, svd, whitened_svd
from .base import Method, accepted, kind_of

__all__ = ["METHODS", "Method", "accepted", "get", "kind_of"]

GROUP = "moefactor.methods"
METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (svd, whitened_svd, shared_basis, rfid, mobe, d2moe, slbf, reap, channels, biaxial)
}


def available() -> list[str]:
    """All names, those of other packages too."""
    return [*METHODS, *(point.name for point in entry_points(group=GROUP) if point.name not in METHODS)]


def get(name: str) -> Method:
    """The method of that name, ours or another package's; raises UserError with a suggestion."""
    if name not in METHODS:
        point = next((point for point in entry_points(group=GROUP) if point.name == name), None)
        if point is None:
            raise unknown("method", name, available())
        try:
            found = point.load()
        except Exception as error:  # whatever the other package raises
            raise UserError(f"Method {name!r}, from {point.value}, can't be loaded: {error}") from error
        if not isinstance(found, Method):
            raise UserError(f"Method {name!r}: {point.value} is a {type(found).__name__}, not a moefactor Method.")
        METHODS[name] = found
    return METHODS[name]
