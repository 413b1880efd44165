"""What a compressed stack is: one file a form.

A form is a description without tensors (what a plan holds and config.json carries); the tensors travel beside it in
a dict by the names of `tensors()`. `FORMS` is the table of all of them. How a form is run is a kernel's matter
(runtime/kernels); nothing here needs more than torch, so that any engine can read it.
"""

from __future__ import annotations

from .base import FLOAT, INT32, Form, TensorSpec
from .base_plus_delta import BasePlusDelta
from .basis_mixture import BasisMixture
from .dense import Dense
from .fields import Fields
from .latent import Latent
from .quantised import Quantised
from .ragged import Ragged
from .residual import SparseResidual, WindowResidual
from .shared_basis import SharedBasis
from .shared_private import SharedPrivate

__all__ = ["FLOAT", "FORMS", "INT32", "BasePlusDelta", "BasisMixture", "Dense", "Form", "Latent", "Quantised", "Ragged",
           "SharedBasis", "SharedPrivate", "SparseResidual", "TensorSpec", "WindowResidual",
           "form_from_json", "low_rank"]  # fmt: skip

FORMS: dict[str, type[Form]] = {
    "dense": Dense,
    "low_rank": SharedBasis,
    "shared_basis": SharedBasis,
    "shared_private": SharedPrivate,
    "basis_mixture": BasisMixture,
    "base_plus_delta": BasePlusDelta,
    "latent": Latent,
    "quantised": Quantised,
    "ragged": Ragged,
    "sparse_residual": SparseResidual,
    "window_residual": WindowResidual,
}
DEEPEST = 8  # forms inside forms, in a file that somebody wrote


def low_rank(experts: int, width: int, hidden: int, ranks: tuple[int, ...]) -> SharedBasis:
    """LowRank: every expert has factors of its own, which is a shared basis whose groups hold one expert each."""
    return SharedBasis(experts, width, hidden, groups=tuple((e,) for e in range(experts)), ranks=ranks)


def form_from_json(data: object, *, experts: int, width: int, hidden: int, where: str, depth: int = 0) -> Form:
    """Builds and checks a form from its JSON; `where` begins the error message. Raises UserError."""

    def inner(name: str, hidden: int = hidden) -> Form:
        return form_from_json(
            fields.get(name, dict), experts=experts, width=width, hidden=hidden, where=where, depth=depth + 1
        )

    fields = Fields(data, where, inner)
    if "form" not in fields.data:
        raise fields.error(f"expected an object with a field 'form', found {data!r}.")
    if depth > DEEPEST:
        raise fields.error(f"forms inside forms, more than {DEEPEST} deep.")
    kind = FORMS[fields.choice("form", FORMS)]
    if depth and kind is Quantised:
        raise fields.error("a quantised form is the outermost one: what it holds is in few bits, not what holds it.")
    return kind.from_json(fields, experts=experts, width=width, hidden=hidden)
