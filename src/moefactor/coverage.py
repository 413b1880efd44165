"""What a calibration text reached: how many tokens each expert saw."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NAMED = 6  # layers, and experts of each, at most in the warning


@dataclass(frozen=True)
class Coverage:
    """Tokens that were routed to the experts of one layer.  unreached: the experts that saw none."""

    layer: str
    experts: int
    least: int
    median: int
    most: int
    unreached: list[int]


def coverage(counts: dict[str, Tensor]) -> list[Coverage]:
    """counts: layer -> (E,) tokens an expert, LayerStats.count."""
    return [_of_layer(layer, count) for layer, count in counts.items()]


def _of_layer(layer: str, count: Tensor) -> Coverage:
    ordered = count.cpu().long().sort().values
    unreached = (count == 0).nonzero().flatten().tolist()
    least, median, most = (int(ordered[place]) for place in (0, (len(ordered) - 1) // 2, -1))
    return Coverage(layer, len(ordered), least, median, most, unreached)


def unreached(rows: list[Coverage]) -> str | None:
    """A sentence that names the experts which saw no token; None where there are none."""
    gaps = [row for row in rows if row.unreached]
    if not gaps:
        return None
    total, experts = sum(len(row.unreached) for row in gaps), sum(row.experts for row in rows)
    named = "; ".join(f"{row.layer}: {_first(row.unreached)}" for row in gaps[:NAMED])
    rest = f"; and {len(gaps) - NAMED} more layers" if len(gaps) > NAMED else ""
    return (
        f"The calibration text did not reach {total} of {experts} experts ({named}{rest}). What they do is judged by "
        "their layer's other experts; give more text, or of more kinds."
    )


def _first(experts: list[int]) -> str:
    more = f" and {len(experts) - NAMED} more" if len(experts) > NAMED else ""
    return ("expert " if len(experts) == 1 else "experts ") + ", ".join(map(str, experts[:NAMED])) + more
