"""`moefactor` and `python -m moefactor`: the command line, or what to install for it."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .cli import main as command_line
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print("error: The library is here, its command line is not: pip install 'moefactor[cli]'", file=sys.stderr)
        sys.exit(2)
    command_line()


if __name__ == "__main__":
    main()
