"""The fields of a form's JSON, checked one by one where they are read: whoever wrote a bad one is told which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar, overload

from ..errors import UserError, required, unknown

if TYPE_CHECKING:
    from .base import Form

T = TypeVar("T")
MISSING = object()


class Fields:
    """One JSON object.

    Args:
        where: begins every message.
        inner: (name, hidden size) -> the form in the field of that name.

    >>> Fields({"rank": 3}, "model.layers.0.mlp.experts down").whole("rank", 1, 8)
    3
    """

    def __init__(self, data: object, where: str, inner: Callable[..., Form] | None = None):
        if not isinstance(data, dict):
            raise UserError(f"{where}: expected an object with a field 'form', found {data!r}.")
        self.data, self.where, self._inner = data, where, inner

    def error(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")

    @overload
    def get(self, name: str, kind: type[T], default: object = MISSING) -> T: ...

    @overload
    def get(self, name: str, kind: tuple[type[int], type[float]], default: object = MISSING) -> float: ...

    def get(self, name: str, kind: type | tuple[type, ...], default: object = MISSING) -> object:
        value = self.data.get(name, default)
        if value is MISSING or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"field {name!r} is missing or of the wrong type.")
        return value

    def text(self, name: str) -> str:
        return self.get(name, str)

    def choice(self, name: str, choices: Iterable[str]) -> str:
        value = self.text(name)
        if value not in choices:
            raise self.error(str(unknown(name, value, choices)))
        return value

    def flag(self, name: str) -> bool:
        return self.get(name, bool)

    def whole(self, name: str, low: int, high: int, default: object = MISSING) -> int:
        """A whole number from low to high."""
        return self.within(name, self.get(name, (int, float), default), low, high)

    def fraction(self, name: str) -> float:
        value = self.get(name, (int, float))
        if not 0 <= value < 1:
            raise self.error(f"{name!r} must be from 0 to below 1, found {value!r}.")
        return value

    def list(self, name: str, default: object = MISSING) -> tuple:
        return tuple(self.get(name, list, default))

    def inner(self, name: str, *hidden: int) -> Form:
        """The form in a field, of this one's hidden size or another."""
        return required(self._inner, "a reader of forms inside forms")(name, *hidden)

    def within(self, what: str, value: object, low: int, high: int, *, of: str = "", why: str = "") -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            bounds = f"it must be a whole number from {low} to {high}"
            raise self.error(f"{what} {value!r}{of} does not fit; {bounds}{why}.")
        return value

    def groups(self, name: str, count: int, experts: int, what: str) -> tuple[tuple[int, ...], ...]:
        """`0 0 1 …`, a group below `count`, the number of `what`, for each expert -> the experts of each group."""
        words = self.text(name).split()
        if len(words) != experts:
            raise self.error(f"{name!r} names {len(words)} experts, the layer has {experts}.")
        if {*words} != {str(group) for group in range(count)}:
            raise self.error(f"{count} {what} are for the groups 0 to {count - 1}, and {name!r} must name them all.")
        return tuple(tuple(e for e, word in enumerate(words) if word == str(group)) for group in range(count))
