"""The reference for every form: each expert that has rows is rebuilt by the form's own `dense` and multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from ...forms import Form
from ...forms.base import Factors
from ...routing import Routing
from .base import Kernel


class Rebuilt(Kernel[Form]):
    """Plain torch, any device and dtype, no index maps: slow, and what the others are checked against."""

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        rows = [
            self._at_home(tokens[routing.token[a:b]], factors) @ self.form.dense(factors, e).T
            for e, (a, b) in enumerate(routing.bounds)
            if b > a
        ]
        return torch.cat(rows) if rows else tokens.new_zeros(0, self.form.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        rows = [
            self._at_home(activations[a:b], factors) @ self.form.dense(factors, e)
            for e, (a, b) in enumerate(routing.bounds)
            if b > a
        ]
        return torch.cat(rows) if rows else activations.new_zeros(0, self.form.hidden)

    @staticmethod
    def _at_home(rows: Tensor, factors: Factors) -> Tensor:
        return rows.to(next(t.dtype for t in factors.values() if t.is_floating_point()))
