"""Errors that are the user's to mend; everything else that is raised is a bug of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Says what is wrong, where, and what to do. The command line prints it without a traceback and exits with 2."""


def unknown(kind: str, name: str, available: Iterable[str]) -> UserError:
    """`Unknown method 'mobee'. Did you mean 'mobe'? Available: ...`"""
    available = sorted(available)
    close = get_close_matches(name, available, n=1, cutoff=0.5)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {kind} {name!r}.{guess} Available: {', '.join(available) or 'none'}.")


def required(value: T | None, what: str) -> T:
    """The value of an Optional that has one by now; LookupError, a bug of ours, where it has none."""
    if value is None:
        raise LookupError(f"{what} is missing")
    return value


class NotFinite(UserError):
    """A number that isn't one, NaN or infinity, where a fit or a statistic should be: the run stops and says where.

    Mathematics says what; those who know the layer, the stack or the expert add it with `at`.
    """

    def __init__(self, what: str, where: str = ""):
        super().__init__(
            f"{where + ': ' if where else ''}{what} is not finite (NaN or infinity). If the model "
            "itself is sound (`moefactor evaluate` tells), its activations may overflow in the dtype it is run in; try "
            "a calibration text of another kind, or report it."
        )
        self.what, self.where = what, where

    def at(self, where: str) -> NotFinite:
        """The same, found at `where`; what was known of the place before stays behind it."""
        return self if self.where.startswith(where) else NotFinite(self.what, f"{where} {self.where}".strip())


@contextmanager
def located(where: str) -> Iterator[None]:
    """Adds `where` to what is not finite inside."""
    try:
        yield
    except NotFinite as error:
        raise error.at(where) from None
