"""One MoE layer's routed experts, before and after compression.

Every matrix is looked at from the *hidden* side, the axis of length H that all experts share: a **stack** is a
tensor (experts, width, H) whose rows are intermediate units. gate and up are stored that way by every model; down
(H, I) is transposed. So in every stack `matrix[e] = private[e]ᵀ · basis`, whatever the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UserError, required
from .forms import Form

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertLayer:
    """Where one layer's experts live in a model and how the model lays them out.

    Args:
        name: path of the experts module, `model.layers.3.mlp.experts`.
        decoder_layer: path of the decoder layer that holds it, `model.layers.3`.
        experts, intermediate, hidden: E, I and H.
        gated: gate and up, or (nemotron_h) up alone.
        concatenated: gate rows then up rows; otherwise they alternate (gpt_oss).
        transposed: stored as (E, in, out) rather than (E, out, in).
        biased: has a bias on every projection.
        router_groups, fewest_experts: for methods that drop experts: a group-limited router needs as many left in each
            of its groups, and top-k needs at least `fewest_experts` in all.
        router: (name in the model, axis) of every tensor with an entry for each expert; empty until it is looked for.
        fixed_count, fixed_width: config.json can't say that these experts are fewer, or narrower, without changing
            something else too (shared experts, say, whose width is the routed ones').
    """

    name: str
    decoder_layer: str
    experts: int
    intermediate: int
    hidden: int
    gated: bool = True
    concatenated: bool = True
    transposed: bool = False
    biased: bool = False
    router_groups: int = 1
    fewest_experts: int = 1
    router: tuple[tuple[str, int], ...] = ()
    fixed_count: bool = False
    fixed_width: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    @property
    def bias_count(self) -> int:
        if not self.biased:
            return 0
        return self.experts * (self.intermediate * (len(self.projections) - 1) + self.hidden)

    @property
    def matrix_count(self) -> int:
        """Parameters of one projection."""
        return self.experts * self.intermediate * self.hidden

    @property
    def parameter_count(self) -> int:
        return self.matrix_count * len(self.projections) + self.bias_count

    @property
    def first_name(self) -> str:
        """The model's name of the parameter that feeds the activation."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def first_stack(self) -> str:
        """The stack that feeds the activation when gate and up are kept together."""
        return "gate_up" if self.gated else "up"

    def stack_width(self, stack: str) -> int:
        return 2 * self.intermediate if stack == "gate_up" else self.intermediate

    def stacks(self, projections: tuple[str, ...], *, joint: bool) -> dict[str, tuple[str, ...]]:
        """How the layer is cut into stacks: name -> projections. `projections` are those to compress.

        With `joint`, gate and up share their factors when both are to be compressed. A pair that is not
        compressed is one Dense stack, since the first product is one GEMM in every runtime.
        """
        if not self.gated:
            return {"up": ("up",), "down": ("down",)}
        first = [p for p in ("gate", "up") if p in projections]
        if len(first) == 0 or (joint and len(first) == 2):
            return {"gate_up": ("gate", "up"), "down": ("down",)}
        return {"gate": ("gate",), "up": ("up",), "down": ("down",)}


@dataclass(frozen=True)
class ExpertWeights:
    """A layer's expert weights in one canonical layout, whatever the model stores.

    gate, up: (E, I, H), down: (E, H, I); biases (E, I), (E, I), (E, H) where the model has them.
    """

    layer: ExpertLayer
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def from_model_layout(cls, layer: ExpertLayer, tensors: dict[str, Tensor]) -> ExpertWeights:
        """`tensors`: the experts module's own parameters by name (`gate_up_proj`, `down_proj`, their biases)."""
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        first, down = tensors[layer.first_name], tensors["down_proj"]
        if layer.transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        gate, up = _split_gate(layer, first)
        biases: dict[str, Tensor | None] = {}
        if layer.biased:
            biases["gate_bias"], biases["up_bias"] = _split_gate(layer, tensors[layer.first_name + "_bias"])
            biases["down_bias"] = tensors["down_proj_bias"]
        return cls(layer, up=up, down=down, gate=gate, **biases)

    def to_model_layout(self) -> dict[str, Tensor]:
        """The inverse of `from_model_layout`."""
        layer = self.layer
        first, down = _join_gate(layer, self.gate, self.up), self.down
        if layer.transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        tensors = {layer.first_name: first.contiguous(), "down_proj": down.contiguous()}
        if layer.biased:
            up_bias = required(self.up_bias, "up_bias")
            tensors[layer.first_name + "_bias"] = _join_gate(layer, self.gate_bias, up_bias)
            tensors["down_proj_bias"] = required(self.down_bias, "down_bias")
        return tensors

    def stack(self, name: str) -> Tensor:
        """(E, width, H) of `gate_up`, `gate`, `up` or `down`, seen from the hidden side."""
        if name == "gate_up":
            return torch.cat((required(self.gate, "gate"), self.up), dim=1)
        if name == "down":
            return self.down.transpose(1, 2)
        return getattr(self, name)

    def biases(self) -> dict[str, Tensor]:
        """What the compressed layer keeps as it is: `first_bias` (E, 2I or I) and `down_bias` (E, H)."""
        if not self.layer.biased:
            return {}
        up_bias = required(self.up_bias, "up_bias")
        first = up_bias if self.gate_bias is None else torch.cat((self.gate_bias, up_bias), dim=1)
        return {"first_bias": first, "down_bias": required(self.down_bias, "down_bias")}


def _split_gate(layer: ExpertLayer, first: Tensor) -> tuple[Tensor | None, Tensor]:
    if not layer.gated:
        return None, first
    if layer.concatenated:
        gate, up = first.chunk(2, dim=1)
        return gate, up
    return first[:, 0::2], first[:, 1::2]


def _join_gate(layer: ExpertLayer, gate: Tensor | None, up: Tensor) -> Tensor:
    if gate is None:
        return up
    if layer.concatenated:
        return torch.cat((gate, up), dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


@dataclass(frozen=True)
class CompressedExperts:
    """One layer after compression: a form for each stack and the tensors behind them.

    Args:
        layer: what the layer was.
        forms: stack name -> Form. The stacks cover gate, up and down exactly once.
        tensors: `{stack}_{tensor}` -> tensor, plus `first_bias` and `down_bias` where the model has them, and
            `intercept` (n, H) where the plan names experts for it.
        errors: stack name -> ‖W − Ŵ‖² / ‖W‖² in the metric that the method minimised.
        curves: stack name -> a solver's loss after each step.
        routers: the model's names of router tensors -> what they are now, where experts were trained together with
            their router, which only an ordinary MoE can hold.
    """

    layer: ExpertLayer
    forms: Mapping[str, Form]
    tensors: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)

    def factors(self, stack: str) -> dict[str, Tensor]:
        prefix = stack + "_"
        names = self.forms[stack].tensors()
        return {name: self.tensors[prefix + name] for name in names}

    def parameter_count(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    def stack(self, name: str) -> Tensor:
        """(E, width, H): the matrices that a stack's factors stand for."""
        form, factors = self.forms[name].expanded(self.factors(name))
        return torch.stack([form.dense(factors, expert) for expert in range(self.layer.experts)])

    def dense(self) -> ExpertWeights:
        """The experts that the factors stand for, as an ordinary layer again."""
        gate: Tensor | None = None
        if "gate_up" in self.forms:
            gate, up = self.stack("gate_up").chunk(2, dim=1)
        else:
            gate, up = self.stack("gate") if "gate" in self.forms else None, self.stack("up")
        gate_bias, up_bias = None, self.tensors.get("first_bias")
        if up_bias is not None and gate is not None:
            gate_bias, up_bias = up_bias.chunk(2, dim=1)
        return ExpertWeights(
            self.layer, gate=gate, up=up, down=self.stack("down").transpose(1, 2),
            gate_bias=gate_bias, up_bias=up_bias, down_bias=self.tensors.get("down_bias"),
        )  # fmt: skip


def check_finite(where: str, tensors: dict[str, Tensor]) -> None:
    """Raises UserError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        # Expert by expert for a stack, so that the message can say which one.
        for index, part in enumerate(tensor if tensor.ndim == 3 else [tensor]):
            # Not a float64 sum, for which torch copies the whole part; NaN comes out of both ends.
            if part.numel() and not torch.stack(part.aminmax()).isfinite().all():
                expert = f" expert {index}" if tensor.ndim == 3 else ""
                raise UserError(
                    f"{where}.{name}{expert}: has values that are not finite (NaN or infinity). "
                    "The checkpoint is damaged; download it again or repair that tensor."
                )
