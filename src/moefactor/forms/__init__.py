"""How a compressed stack is stored, counted, applied and rebuilt: one file a form.

A form is a description without tensors (what a plan holds and config.json carries); the tensors travel beside it in
a dict by the names of `shapes()`. `FORMS` is the table of all of them.
"""

from __future__ import annotations

from ..errors import UserError, unknown
from .base import Form, Routing, grouped_linear
from .base_plus_delta import BasePlusDelta
from .basis_mixture import BasisMixture
from .dense import Dense
from .latent import Latent
from .ragged import Ragged
from .residual import SparseResidual
from .shared_basis import SharedBasis
from .shared_private import SharedPrivate

__all__ = ["FORMS", "BasePlusDelta", "BasisMixture", "Dense", "Form", "Latent", "Ragged", "Routing", "SharedBasis",
           "SharedPrivate", "SparseResidual", "form_from_json", "grouped_linear", "low_rank"]  # fmt: skip

FORMS: dict[str, type[Form]] = {
    "dense": Dense,
    "low_rank": SharedBasis,
    "shared_basis": SharedBasis,
    "shared_private": SharedPrivate,
    "basis_mixture": BasisMixture,
    "base_plus_delta": BasePlusDelta,
    "latent": Latent,
    "ragged": Ragged,
    "sparse_residual": SparseResidual,
}


def low_rank(experts: int, width: int, hidden: int, ranks: tuple[int, ...]) -> SharedBasis:
    """LowRank: every expert has factors of its own, which is a shared basis whose groups hold one expert each."""
    return SharedBasis(experts, width, hidden, groups=tuple((e,) for e in range(experts)), ranks=ranks)


def form_from_json(data: dict, *, experts: int, width: int, hidden: int, where: str) -> Form:
    """Builds and checks a form from its JSON; `where` begins the error message."""
    if not isinstance(data, dict) or "form" not in data:
        raise UserError(f"{where}: expected an object with a field 'form', found {data!r}.")
    if data["form"] not in FORMS:
        raise UserError(f"{where}: {unknown('form', str(data['form']), FORMS)}")
    try:
        return FORMS[data["form"]].from_json(data, experts=experts, width=width, hidden=hidden, where=where)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: field {error} is missing or of the wrong type.") from error
