"""FactorisedExperts: the nn.Module that stands where a model's fused experts stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor, nn

from ..experts import ExpertLayer
from ..forms import INT32, Form
from ..plan import LayerPlan
from .kernels import Kernel, Routing, Setting, choose, why_not

# What nn.Module itself keeps in an instance; everything else is the architecture's own (limits, alphas, sizes).
_MODULE_STATE = frozenset(vars(nn.Module()))


class FactorisedExperts(nn.Module):
    """Routed experts kept as factors: `experts(x, top_k_index, top_k_weights)`, routing already done.

    Parameters are `{stack}_{tensor}` of the plan's forms, plus `first_bias` and `down_bias` where the model has biases.
    How each stack is run is up to its kernel (kernels/), chosen by form, device and dtype.
    """

    has_post_expert_norm = False  # a model's own attribute only from transformers 5.20 on
    # Taken over from the model's own experts.
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    gate_of: type  # whose _apply_gate it is
    # Parameters that not every plan has.
    first_bias: nn.Parameter
    down_bias: nn.Parameter
    intercept: nn.Parameter

    def __init__(self, plan: LayerPlan, dtype: torch.dtype):
        super().__init__()
        self.layer: ExpertLayer = plan.layer
        self.forms: Mapping[str, Form] = plan.forms
        self._kernels: dict[tuple[torch.device, torch.dtype], dict[str, Kernel]] = {}
        self.intercept_ids = list(plan.intercept)
        self._intercept_at: dict[torch.device, Tensor] = {}  # the ids; made once, since a CUDA graph can't copy a list
        for name, spec in plan.tensors().items():
            whole = spec.dtype == INT32
            empty = torch.empty(spec.shape, dtype=torch.int32 if whole else dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=not whole))

    @classmethod
    def replacing(cls, original: nn.Module, plan: LayerPlan) -> FactorisedExperts:
        """Built on the meta device, with the original's activation, attributes and gate, but none of its weights."""
        module = cls(plan, next(original.parameters()).dtype)
        own = {k: v for k, v in vars(original).items() if k not in _MODULE_STATE and k != "observer"}
        module.__dict__.update(own)
        for name, child in original.named_children():
            module.add_module(name, child)
        module.gate_of = type(original)
        return module.train(original.training)

    def _apply_gate(self, first: Tensor) -> Tensor:
        """The original class's own. Not a method bound to the instance, which could not be pickled."""
        return self.gate_of._apply_gate(self, first)  # type: ignore[attr-defined]  # transformers' gated experts have it

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = Routing(top_k_index, top_k_weights, self.layer.experts)
        activations = self.activate(self._first(hidden_states, routing))
        down, factors = self.kernels["down"], self._factors("down")
        if not self.has_post_expert_norm:
            out = down.write_combined(factors, activations, routing)
            if self.layer.biased or self.intercept_ids:
                out = out + self._combined_constants(routing)
            return out.to(hidden_states.dtype)
        # The norm works on one expert's output, so nothing may be summed before it.
        pairs = down.write(factors, activations, routing)
        if self.layer.biased or self.intercept_ids:
            pairs = pairs + self._constants()[routing.expert]
        return routing.combine(self.post_expert_norm(pairs)).to(hidden_states.dtype)

    def _first(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """(pairs, 2I) gate then up, or (pairs, I) up, biases added."""
        names = [name for name in ("gate_up", "gate", "up") if name in self.forms]
        parts = [self.kernels[name].read(self._factors(name), hidden_states, routing) for name in names]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out + self.first_bias[routing.expert] if self.layer.biased else out

    def activate(self, first: Tensor) -> Tensor:
        if not self.layer.gated:
            return self.act_fn(first)
        if not self.layer.concatenated:
            gate, up = first.chunk(2, dim=1)
            first = torch.stack((gate, up), dim=2).flatten(1)
        return self._apply_gate(first)

    def _constants(self) -> Tensor:
        """(E, H): what each expert adds whatever its input, the model's bias and the intercept."""
        constants: Tensor = (
            self.down_bias if self.layer.biased else self.intercept.new_zeros(self.layer.experts, self.layer.hidden)
        )
        if not self.intercept_ids:
            return constants
        at = constants.device
        if at not in self._intercept_at:
            self._intercept_at[at] = torch.tensor(self.intercept_ids, device=at)
        return constants.index_add(0, self._intercept_at[at], self.intercept)

    def _combined_constants(self, routing: Routing) -> Tensor:
        """Σ over a token's experts of weight · constant: one small product instead of an addition for every pair."""
        share = torch.zeros(routing.tokens, routing.experts, dtype=torch.float32, device=routing.weight.device)
        share.index_put_((routing.token, routing.expert), routing.weight.float(), accumulate=True)
        constants = self._constants()
        return share.to(constants.dtype) @ constants

    @property
    def kernels(self) -> dict[str, Kernel]:
        """The kernel of each stack for the device and dtype that the factors have now."""
        at = next(p for p in self.parameters(recurse=False) if p.is_floating_point())
        key = (at.device, at.dtype)
        if key not in self._kernels:
            setting = Setting.at(*key)
            self._kernels[key] = {stack: choose(form, setting) for stack, form in self.forms.items()}
        return self._kernels[key]

    def parameter_count(self) -> int:
        """Numbers, however many bits they take."""
        stored = sum(prod(shape) for form in self.forms.values() for shape in form.shapes().values())
        meant = sum(form.parameter_count() for form in self.forms.values())
        return sum(p.numel() for p in self.parameters()) - stored + meant

    @torch.no_grad()
    def lay_out(self) -> None:
        """Lets the kernels lay their weights out, once after loading."""
        for stack, kernel in self.kernels.items():
            for name, tensor in kernel.laid_out(self._factors(stack)).items():
                getattr(self, f"{stack}_{name}").data = tensor.data

    def hindrances(self) -> list[str]:
        """Why kernels that would be faster than the chosen ones do not apply where the factors are now."""
        at = next(p for p in self.parameters(recurse=False) if p.is_floating_point())
        setting = Setting.at(at.device, at.dtype)
        return [f"{way}: {why}" for form in self.forms.values() for way, why in why_not(form, setting)]

    def _factors(self, stack: str) -> dict[str, Tensor]:
        return {name: getattr(self, f"{stack}_{name}") for name in self.forms[stack].tensors()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {type(form).__name__}" for name, form in self.forms.items())
