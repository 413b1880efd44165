"""How large the result may be: what was asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from .allocate import Rounding
from .errors import UserError
from .forms.packing import BITS

MIXED = "mixed"
DEFAULT_RATIO = 0.4
GROUP = 64
SMALLEST_GROUP, LARGEST_GROUP = 16, 256


@dataclass(frozen=True)
class Size:
    """One of three budgets, and what private factors are rounded to.

    Args:
        ratio: fraction of the routed experts' parameters to remove.
        bpw: bits that the experts may take, over their parameters before anything is removed.
        target_gb: gigabytes (1e9 bytes) that all tensors of the checkpoint may take.
        bits: of private factors; 0: every channel's own; None: they stay as they are.
        group: neighbours that share a scale.
    """

    ratio: float | None = None
    bpw: float | None = None
    target_gb: float | None = None
    bits: int | None = None
    group: int = GROUP

    @classmethod
    def of(
        cls, ratio: float | None = None, bits: int | str | None = None, bpw: float | None = None,
        target_gb: float | None = None, group: int | None = None,
    ) -> Size:  # fmt: skip
        """Fills in what was not said: with `bits` alone nothing is removed; with a size alone every channel has its own
        bits; with nothing at all DEFAULT_RATIO goes and nothing is rounded. Raises UserError."""
        given = {"--ratio": ratio, "--bpw": bpw, "--target-gb": target_gb}
        budgets = [name for name, value in given.items() if value is not None]
        if len(budgets) > 1:
            raise UserError(f"{' and '.join(budgets)} both say how large the result may be; give one of them.")
        of_channels = None if bits is None else _bits(bits)
        if bpw is not None or target_gb is not None:
            of_channels = 0 if bits is None else of_channels
        elif of_channels == 0:
            raise UserError("--bits mixed spends bits channel by channel: say how many, with --bpw or --target-gb.")
        elif ratio is None:
            ratio = DEFAULT_RATIO if of_channels is None else 0.0
        if group is not None and of_channels is None:
            raise UserError("--bits-group is how many neighbours share a scale; it goes with --bits or --bpw.")
        group = GROUP if group is None else group
        if not SMALLEST_GROUP <= group <= LARGEST_GROUP or group & (group - 1):
            raise UserError(
                f"--bits-group must be a power of two from {SMALLEST_GROUP} to {LARGEST_GROUP}, found {group}."
            )
        if ratio is not None and not (0 < ratio < 1 or (ratio == 0 and of_channels is not None)):
            raise UserError(
                f"ratio must lie between 0 and 1, found {ratio}: it is the fraction of the routed experts' parameters "
                "to remove (0.4 keeps 60 %). To remove none and only round, say --bits 4."
            )
        if bpw is not None and not 0 < bpw <= 16:
            raise UserError(f"--bpw must be above 0 and at most 16, found {bpw}: bits a parameter of the experts.")
        if target_gb is not None and not target_gb > 0:
            raise UserError(f"--target-gb must be above 0, found {target_gb}: gigabytes that the checkpoint may take.")
        return cls(ratio, bpw, target_gb, of_channels, group)

    @property
    def rounding(self) -> Rounding | None:
        return None if self.bits is None else Rounding(self.bits, self.group)

    def told(self) -> str:
        """The flags that say so."""
        flags = {
            "--ratio": self.ratio, "--bpw": self.bpw, "--target-gb": self.target_gb, "--bits": self.bits or None,
            "--bits-group": None if self.bits is None or self.group == GROUP else self.group,
        }  # fmt: skip
        return " ".join(f"{name} {value}" for name, value in flags.items() if value is not None)


def _bits(bits: int | str) -> int | None:
    if str(bits) == MIXED:
        return 0
    if str(bits) == "16":
        return None
    if str(bits) not in map(str, BITS):
        raise UserError(f"--bits must be one of {', '.join(map(str, BITS))}, 16 or {MIXED}, found {bits!r}.")
    return int(bits)
