"""The command line: thin, a function a verb.

`shared.py` has the options that several commands take, `running.py` the commands that make something, `looking.py`
those that look, `talking.py` those that let a model speak, `tables.py` what they print.
"""

from __future__ import annotations

import errno
import sys
import warnings
from typing import Annotated, TextIO

import typer
from rich.text import Text as RichText

from ..errors import UserError
from ..files import FULL
from . import looking, running, talking  # noqa: F401 (whose functions are the commands)
from .shared import app, errors, method_options
from .tables import coverage_table

__all__ = ["app", "coverage_table", "main", "method_options"]

# Of the system's errors, those about a place that the user named; others are bugs of ours.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@app.callback()
def _root(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    vars(_root)["debug"] = debug


def main() -> None:
    """Entry point: a user's mistake is one red line and exit code 2, a warning of ours a yellow one."""
    shown = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        if category is UserWarning and "moefactor" in filename:
            errors.print(RichText.assemble(("note:", "bold yellow"), f" {message}"), soft_wrap=True)
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        app()
    except (UserError, OSError) as error:
        # Of the system's errors, those that no command of ours can do anything about; others are bugs of ours.
        theirs = isinstance(error, UserError) or error.errno in (*FULL, *REFUSED)
        if getattr(_root, "debug", False) or not theirs:
            raise
        # Assembled, not marked up: [brackets] in a name are not tags.
        errors.print(RichText.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)
    finally:
        warnings.showwarning = shown
