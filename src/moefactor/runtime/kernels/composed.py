"""Forms that hold another form: what they add, around the kernel that runs the inner one."""

from __future__ import annotations

from torch import Tensor

from ...forms import BasePlusDelta, Latent
from ...forms.base import Factors
from ...routing import Routing
from .base import Kernel
from .setting import Setting


class LatentKernel(Kernel[Latent]):
    """The basis works once a token, whatever the number of experts."""

    def __init__(self, form: Latent, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner.linear)
        self.inner = inner

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        basis = factors["basis"]
        return self.inner.read(self.form.inner_factors(factors), tokens.to(basis.dtype) @ basis.T, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write(self.form.inner_factors(factors), activations, routing) @ factors["basis"]

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write_combined(self.form.inner_factors(factors), activations, routing) @ factors["basis"]


class BasePlusDeltaKernel(Kernel[BasePlusDelta]):
    """The base works once a token: its product is shared by a token's experts, or made of their weighted sum."""

    def __init__(self, form: BasePlusDelta, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner.linear)
        self.delta = inner

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        shared = self._through_base(factors, tokens)  # (T, width)
        return shared[routing.token] + self.delta.read(self.form.delta_factors(factors), tokens, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        delta = self.delta.write(self.form.delta_factors(factors), activations, routing)
        return self._through_base(factors, activations) + delta

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        shared = self._through_base(factors, routing.combine(activations))
        return shared + self.delta.write_combined(self.form.delta_factors(factors), activations, routing)

    def _through_base(self, factors: Factors, rows: Tensor) -> Tensor:
        """rows (n, H) or (n, width) through the columns that this call uses."""
        form = self.form
        base = factors["base"] if form.writes else factors["base"].T  # (kept, out)
        rows = rows.to(base.dtype)
        if form.kept < form.columns:
            rows = rows[:, factors["base_columns"].long()]
        used = form.kept - int(form.dynamic * form.kept)
        if used < form.kept:
            score = base.float().norm(dim=1) * rows.float().norm(dim=0)
            chosen = score.topk(used).indices.sort().values
            base, rows = base[chosen], rows[:, chosen]
        return rows @ base
