"""What every form says of itself: its tensors, their number and bits, what an expert rebuilt from them is, and JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from .fields import Fields

if TYPE_CHECKING:
    from .ragged import Ragged

Factors = dict[str, Tensor]
FLOAT = "float"  # whatever the checkpoint's floating-point type is
INT32 = "int32"


class TensorSpec(NamedTuple):
    """Shape of a stored tensor, and its type: FLOAT or INT32."""

    shape: tuple[int, ...]
    dtype: str = FLOAT


@dataclass(frozen=True)
class Form(ABC):
    """A way to store a stack: E matrices (width, H) that share their hidden side. A description: it holds no tensors,
    knows nothing of devices, and can be pickled.

    Args:
        experts: E.
        width: rows of each matrix, I for one projection, 2I for gate and up together.
        hidden: H.
    """

    experts: int
    width: int
    hidden: int

    name: ClassVar[str]  # in JSON and in `FORMS`

    @abstractmethod
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor stored."""

    @abstractmethod
    def dense(self, factors: Factors, expert: int) -> Tensor:
        """(width, H) of one expert, rebuilt: what the tensors mean. How they are run is a kernel's matter."""

    @abstractmethod
    def to_json(self) -> dict: ...

    @classmethod
    @abstractmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> Form: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.tensors().items()}

    def parameter_count(self) -> int:
        return sum(prod(spec.shape) for spec in self.tensors().values())

    def bits(self, of_float: int = 16) -> int:
        """What is stored, where floating-point numbers take `of_float` bits."""
        return sum(prod(spec.shape) * (32 if spec.dtype == INT32 else of_float) for spec in self.tensors().values())

    def units(self) -> tuple[int, ...]:
        """What a budget was spent on, offer by offer: ranks, widths, the bases or their rank."""
        return ()

    def with_units(self, units: Iterable[int]) -> Form:
        """The same form after another purchase; the inverse of `units`."""
        raise TypeError(f"{self.name} has nothing to buy")

    def summary(self) -> str:
        """One line for people: `shared_basis, ranks 24 22 20`."""
        return self.name

    @property
    def channel_tensor(self) -> str:
        """The tensor that has a row for each channel that an expert kept; '' where there is none."""
        return ""

    def expanded(self, factors: Factors) -> tuple[Form, Factors]:
        """The form and its tensors with nothing packed: itself, but of a quantised one what it holds."""
        return self, factors

    @property
    def mixes_bases(self) -> bool:
        """Whether a weight moves with its factor, with the mixing and with every base."""
        return False

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        """Channels that each expert kept; None where all have all of theirs."""
        return None

    def ordinary_widths(self) -> frozenset[int] | None:
        """The widths of its experts when an ordinary checkpoint could hold them as they are (empty: all of theirs);
        None when it needs moefactor to run."""
        return None

    def rows(self) -> Ragged:
        """The part that has a row for each channel that an expert kept; for forms that are cut channel by channel."""
        raise TypeError(f"{self.name} is not cut channel by channel")


def nested(own: Iterable[str], inner: Form) -> dict[str, str]:
    """Name of each of the inner form's tensors -> its name in the outer form, which has tensors of its own.

    The same, but for a name that is taken: that gets `inner_` before it until it is free.
    """
    taken = {*own, *inner.tensors()}
    names = {}
    for name in inner.tensors():
        outer = name
        if name in own:
            while outer in taken:
                outer = "inner_" + outer
            taken.add(outer)
        names[name] = outer
    return names


def listed(what: str, values: Iterable[int]) -> str:
    """`ranks 24 22 20`, or `ranks 21 × 16, 20 × 16` where there are many."""
    values = list(values)
    if len(values) <= 12:
        return f"{what} {' '.join(map(str, values))}"
    return f"{what} " + ", ".join(f"{v} × {values.count(v)}" for v in sorted(set(values), reverse=True))
