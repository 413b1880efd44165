"""What `--calibration` names: one source or several with weights, and whether the model writes a part itself.

a.jsonl:2,wikitext2:1,self      half of the windows from a.jsonl, a quarter each from wikitext2 and the model
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

OWN = "self"  # the name of the text that the model writes
WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class Source:
    """name: a file, a folder, a dataset or OWN.  weight: its share of the windows, relative to the others'.
    given: whether the weight was said in so many words."""

    name: str
    weight: float = 1.0
    given: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.weight:g}" if self.given else self.name


def parse_sources(text: str | None) -> list[Source]:
    """`a.jsonl:2,wikitext2,self` -> its sources; none for None, which is the text that every Python has."""
    if text is None:
        return []
    found, pieces = [], text.split(",")
    while pieces:
        # A name on disk may hold commas: the longest run of pieces that is there is one name.
        length = next((n for n in range(len(pieces), 1, -1) if _there(",".join(pieces[:n]))), 1)
        found.append(_source(",".join(pieces[:length]).strip(), text))
        del pieces[:length]
    names = [source.name for source in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{text}: names {twice!r} twice; give it one weight.")
    return found


def _source(piece: str, text: str) -> Source:
    if not piece:
        raise UserError(
            f"{text!r}: an empty name among the sources of text; expected FILE, FILE:2,OTHER:1 or FILE,{OWN}."
        )
    weighted = WEIGHTED.fullmatch(piece)
    if not weighted or _on_disk(piece):
        return Source(piece)
    if not float(weighted[2]) > 0:
        raise UserError(f"{piece}: the weight of a source must be above 0.")
    return Source(weighted[1], float(weighted[2]), given=True)


def _there(name: str) -> bool:
    weighted = WEIGHTED.fullmatch(name)
    return _on_disk(name) or (weighted is not None and _on_disk(weighted[1]))


def _on_disk(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a NUL
        return False


def sources(name: str | None) -> tuple[str | None, bool]:
    """`FILE`, `self` or `FILE,self` -> what to read, and whether the model writes (a part of) the text itself."""
    every = parse_sources(name)
    read = [str(source) for source in every if source.name != OWN]
    return ",".join(read) or None, len(read) < len(every)


def own_weight(name: str | None) -> float:
    """The share of the windows that a name leaves to the model, 0 to 1: `FILE,self` is half."""
    every = parse_sources(name)
    return sum(s.weight for s in every if s.name == OWN) / sum(s.weight for s in every) if every else 0.0


def with_own(name: str | None) -> str:
    """The same sources with as much text that the model writes beside them; that alone where none was named."""
    every = parse_sources(name)
    if name is not None and any(source.name == OWN for source in every):
        return name
    if len(every) > 1:
        return f"{name},{Source(OWN, sum(source.weight for source in every), given=True)}"
    return f"{every[0].name},{OWN}" if every else OWN


def shares(count: int, weights: list[float]) -> list[int]:
    """`count` windows divided by weight, by largest remainder; what is rounded away goes to the first of equals.

    None is left without any, as long as there are as many windows as sources.

    >>> shares(256, [2, 1])
    [171, 85]
    """
    wanted = [count * weight / sum(weights) for weight in weights]
    found = [math.floor(share) for share in wanted]
    behind = sorted(range(len(weights)), key=lambda i: found[i] - wanted[i])
    for index in behind[: count - sum(found)]:
        found[index] += 1
    for index in [i for i, share in enumerate(found) if share == 0 and count >= len(weights)]:
        found[found.index(max(found))] -= 1
        found[index] = 1
    return found
