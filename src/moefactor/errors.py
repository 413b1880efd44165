"""Errors that are the user's to mend; everything else that is raised is a bug of ours."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Says what is wrong, where, and what to do. The command line prints it without a traceback and exits with 2."""


def unknown(kind: str, name: str, available: Iterable[str]) -> UserError:
    """`Unknown method 'mobee'. Did you mean 'mobe'? Available: ...`"""
    available = sorted(available)
    close = get_close_matches(name, available, n=1, cutoff=0.5)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {kind} {name!r}.{guess} Available: {', '.join(available) or 'none'}.")
