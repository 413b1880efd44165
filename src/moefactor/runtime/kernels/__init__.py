"""How forms are run. `KERNELS` is the table: for each form the ways to run it, the fastest first, the reference last,
which is all that a form without a line here has.

Each says what it can serve (device, dtype, shapes), and why not in words. A new kernel is a class and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from ...forms import BasisMixture, Form, Quantised, Ragged
from ...routing import Routing
from .atoms import AtomsKernel, atom_hindrance
from .base import Kernel
from .basis_mixture import BasisMixtureKernel
from .composed import BasePlusDeltaKernel, LatentKernel
from .dense import DenseKernel, RaggedKernel
from .grouped import DTYPES, Linear, grouped_hindrance, grouped_linear, looped_linear
from .mixture_in_cache import MixtureInCache
from .quantised import PackedRowsKernel, QuantisedKernel, QuantisedRowsKernel, RowsByExpert, RowsByPair
from .reference import Rebuilt
from .residual import SparseResidualKernel, WindowResidualKernel
from .residual_share import ResidualShare, ResidualShareKernel, ZeroKernel
from .setting import Setting
from .shared_basis import SharedBasisKernel, SharedPrivateKernel

__all__ = ["KERNELS", "Kernel", "Routing", "Setting", "Way", "choose", "way", "why_not"]


@dataclass(frozen=True)
class Way:
    """One way to run a form.

    name: for people.  build: (form, setting) -> Kernel.  hindrance: (form, setting) -> why it can't, or None.
    device: the one it is made for, if there is one; elsewhere it is no way at all, so nothing hinders it.
    inside: whether a form inside is run by its own best way.
    """

    name: str
    build: Callable[[Any, Setting], Kernel]
    hindrance: Callable[[Any, Setting], str | None]
    device: str | None = None
    inside: bool = True


def _always(form: Form, setting: Setting) -> None:
    return None


def _uneven(form: Ragged, setting: Setting) -> str | None:
    if not form.common_width:
        return "experts kept uneven widths, and a grouped GEMM wants one"
    return grouped_hindrance(form, setting)


def _no_triton(form: Form, setting: Setting) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if isinstance(form, BasisMixture) and form.basis_rank:
        return "bases of low rank are multiplied out before they are mixed"
    return None if setting.dtype in DTYPES else f"tiles do not take {setting.dtype_name}"


def _no_packed_rows(form: Quantised, setting: Setting) -> str | None:
    if setting.dtype not in DTYPES:
        return f"codes become numbers of 16 or 32 bits, not {setting.dtype_name}"
    if form.channels or form.precision(form.channel_tensor):
        return None
    return f"{form.inner.name} has no tensor in a few bits with a row for each channel"


def _no_atoms(form: Ragged, setting: Setting) -> str | None:
    return atom_hindrance(form) or (_no_triton(form, setting) and grouped_hindrance(form, setting))


def _linear(form: Form, setting: Setting) -> Linear:
    """The fastest products with a matrix an expert that a form can have here."""
    if grouped_hindrance(form, setting) is None:
        return grouped_linear
    if setting.device != "cuda" or _no_triton(form, setting):
        return looped_linear
    from .mixture_triton import tiled_linear

    return tiled_linear


def _with(kernel: type[Kernel]) -> Callable[[Form, Setting], Kernel]:
    return lambda form, setting: kernel(form, setting, _linear(form, setting))


def _by_triton(form: BasisMixture, setting: Setting) -> Kernel:
    from .mixture_triton import TritonMixture

    return TritonMixture(form, setting, _linear(form, setting))


def _ways(kernel: type[Kernel], hindrance: Callable[..., str | None] = grouped_hindrance) -> tuple[Way, ...]:
    """A kernel whose products can be grouped, tiled or looped."""
    return (
        Way("grouped GEMM", partial(kernel, linear=grouped_linear), hindrance),
        Way("tiles by Triton", _with(kernel), _no_triton, "cuda"),
        Way("a loop over experts", partial(kernel, linear=looped_linear), _always),
        REFERENCE,
    )


def _holding(kernel: Callable[[Any, Setting, Kernel], Kernel], inner: str) -> Callable[[Form, Setting], Kernel]:
    """A kernel around the best one of the form in the field `inner`."""
    return lambda form, setting: kernel(form, setting, choose(getattr(form, inner), setting))


def _around(kernel: Callable[[Any, Setting, Kernel], Kernel], inner: str) -> tuple[Way, ...]:
    return (Way(f"around {inner}", _holding(kernel, inner), _always), REFERENCE)


def _in_rows(rows: type[PackedRowsKernel]) -> Callable[[Form, Setting], Kernel]:
    return _holding(partial(QuantisedRowsKernel, rows=rows), "inner")


def _share(form: ResidualShare, setting: Setting) -> Kernel:
    return ResidualShareKernel(form, setting, choose(form.inner, setting), choose(form.whole, setting))


REFERENCE = Way("experts rebuilt", Rebuilt, _always)
KERNELS: dict[str, tuple[Way, ...]] = {
    "dense": _ways(DenseKernel),
    "ragged": (
        Way("grouped GEMM", RaggedKernel, _uneven),
        # On a CPU a loop takes less time than tokens copied for every atom.
        Way("atoms of one width", _with(AtomsKernel), _no_atoms, "cuda"),
        *_ways(RaggedKernel)[2:],
    ),
    "shared_basis": _ways(SharedBasisKernel),
    "shared_private": _ways(SharedPrivateKernel),
    "basis_mixture": (
        Way("formed in cache", _with(MixtureInCache), _always, "cpu"),
        Way("formed by Triton", _by_triton, _no_triton, "cuda"),
        *_ways(BasisMixtureKernel),
    ),
    "latent": _around(LatentKernel, "inner"),
    "base_plus_delta": _around(BasePlusDeltaKernel, "delta"),
    "sparse_residual": _around(SparseResidualKernel, "inner"),
    "window_residual": _around(WindowResidualKernel, "inner"),
    "quantised": (
        Way("dequantised expert by expert", _in_rows(RowsByExpert), _no_packed_rows, "cpu", inside=False),
        Way("dequantised pair by pair or whole", _in_rows(RowsByPair), _no_packed_rows),
        Way("dequantised whole", _holding(QuantisedKernel, "inner"), _always),
        REFERENCE,
    ),
    "residual_share": (Way("around inner", _share, _always), REFERENCE),
    "zero": (Way("nothing", ZeroKernel, _always),),
}


def ways(form: Form, setting: Setting) -> list[Way]:
    """All ways to run a form on this device, the fastest first."""
    return [way for way in KERNELS.get(form.name, (REFERENCE,)) if way.device in (None, setting.device)]


def way(form: Form, setting: Setting) -> Way:
    """The first of the form's ways that nothing hinders; the reference serves everything."""
    return next(way for way in ways(form, setting) if way.hindrance(form, setting) is None)


def choose(form: Form, setting: Setting) -> Kernel:
    """The kernel that runs a form here."""
    return way(form, setting).build(form, setting)


def why_not(form: Form, setting: Setting) -> list[tuple[str, str]]:
    """(way, why it can't serve here) of those that would be faster than the chosen one, inner forms included."""
    found = []
    for candidate in ways(form, setting):
        hindrance = candidate.hindrance(form, setting)
        if hindrance is None:
            break
        found.append((candidate.name, hindrance))
    for inner in ("inner", "delta") if candidate.inside else ():
        if isinstance(getattr(form, inner, None), Form):
            found += why_not(getattr(form, inner), setting)
    return found
