"""The plan: which layer gets which forms, groups and ranks. Readable, editable, checked on reading.

`plan.json` and the checkpoint's `quantization_config` describe layers the same way, so what was planned is what is
stored and what an engine builds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from .errors import UserError
from .experts import ExpertLayer
from .forms import INT32, Form, Quantised, TensorSpec, form_from_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes: a form for every stack (`gate_up` or `gate` and `up`, `down`).

    Args:
        layer: the experts as the model has them.
        kept: the experts that stay where some are dropped and the router cut; None for all. Forms hold these only.
        intercept: experts to whose output a constant vector is added.
    """

    layer: ExpertLayer
    forms: Mapping[str, Form]
    kept: tuple[int, ...] | None = None
    intercept: tuple[int, ...] = ()

    @property
    def remaining(self) -> ExpertLayer:
        """The layer without the experts that were dropped."""
        return self.layer if self.kept is None else replace(self.layer, experts=len(self.kept))

    @property
    def unrounded(self) -> LayerPlan:
        """The layer before anything of it is rounded to a few bits."""
        forms = {n: form.inner if isinstance(form, Quantised) else form for n, form in self.forms.items()}
        return replace(self, forms=forms)

    def bits(self, of_float: int = 16) -> int:
        """What the layer's tensors take, where floating-point numbers take `of_float` bits."""
        return sum(prod(s.shape) * (32 if s.dtype == INT32 else of_float) for s in self.tensors().values())

    def parameter_count(self) -> int:
        forms = sum(form.parameter_count() for form in self.forms.values())
        return forms + self.remaining.bias_count + len(self.intercept) * self.layer.hidden

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor that the layer stores, by its name behind the layer's."""
        layer = self.remaining
        specs = {f"{stack}_{name}": s for stack, form in self.forms.items() for name, s in form.tensors().items()}
        if layer.biased:
            specs["first_bias"] = TensorSpec((layer.experts, layer.stack_width(layer.first_stack)))
            specs["down_bias"] = TensorSpec((layer.experts, layer.hidden))
        if self.intercept:
            specs["intercept"] = TensorSpec((len(self.intercept), layer.hidden))
        return specs

    def standard(self) -> tuple[int, int] | None:
        """(experts, width) when an ordinary MoE of that shape holds the result: fewer experts, or narrower ones."""
        ordinary = [form.ordinary_widths() for form in self.forms.values()]
        if self.intercept or None in ordinary:
            return None
        widths = frozenset(width for found in ordinary if found is not None for width in found)
        if len(widths) > 1 or 0 in widths or (self.layer.fixed_width and widths - {self.layer.intermediate}):
            return None
        if self.kept is not None and self.layer.fixed_count:
            return None
        return self.remaining.experts, *(widths or {self.layer.intermediate})

    def to_json(self) -> dict:
        shape = {"experts": self.layer.experts, "intermediate": self.layer.intermediate, "hidden": self.layer.hidden}
        data = {"name": self.layer.name, **shape}
        if self.kept is not None:
            data["kept"] = list(self.kept)
        if self.intercept:
            data["intercept"] = list(self.intercept)
        return {**data, "stacks": {name: form.to_json() for name, form in self.forms.items()}}

    @classmethod
    def from_json(cls, data: dict, layer: ExpertLayer) -> LayerPlan:
        for name in ("experts", "intermediate", "hidden"):
            if data.get(name) != getattr(layer, name):
                raise UserError(
                    f"{layer.name}: the plan says {name} = {data.get(name)}, the model has {getattr(layer, name)}. "
                    "Plan again for this model."
                )
        stacks = data.get("stacks", {})
        if not isinstance(stacks, dict):
            raise UserError(f"{layer.name}: 'stacks' must be an object, found {stacks!r}.")
        allowed = [{"gate_up", "down"}, {"gate", "up", "down"}] if layer.gated else [{"up", "down"}]
        if set(stacks) not in allowed:
            choices = " or ".join("{" + ", ".join(sorted(names)) + "}" for names in allowed)
            raise UserError(f"{layer.name}: the plan has stacks {sorted(stacks)}, expected {choices}.")
        kept, intercept = data.get("kept"), data.get("intercept", [])
        if not all(_whole_numbers(ids) for ids in (kept, intercept) if ids is not None):
            raise UserError(f"{layer.name}: 'kept' and 'intercept' must be lists of experts.")
        intercept = tuple(intercept or ())
        for field_name, ids in (("kept", kept), ("intercept", intercept)):
            if ids is not None and (sorted(set(ids)) != list(ids) or not set(ids) <= set(range(layer.experts))):
                raise UserError(f"{layer.name}: {field_name!r} must be ascending experts below {layer.experts}.")
        if kept is not None and len(kept) < layer.fewest_experts:
            raise UserError(
                f"{layer.name}: the router needs {layer.fewest_experts} experts, the plan keeps {len(kept)}."
            )
        forms = {
            name: form_from_json(
                form, experts=layer.experts if kept is None else len(kept), width=layer.stack_width(name),
                hidden=layer.hidden, where=f"{layer.name} {name}",
            )
            for name, form in stacks.items()
        }  # fmt: skip
        if len({form.kept_widths for form in forms.values()} - {None}) > 1:
            raise UserError(
                f"{layer.name}: 'widths' must be the same in every stack: a channel is kept in all or in none."
            )
        entry = cls(layer, forms, kept if kept is None else tuple(kept), intercept)
        if kept is not None and entry.standard() is None:
            raise UserError(f"{layer.name}: experts can only be dropped ('kept') where the others stay dense.")
        return entry


def _whole_numbers(ids: object) -> bool:
    return isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)


@dataclass(frozen=True)
class Plan:
    """Everything `factorise` reads besides weights and statistics.

    Args:
        model: folder or hub name, as the user wrote it.
        method, options: which method and its keyword arguments.
        ratio: fraction of the routed experts' parameters to remove, or None for a plan without a budget.
        seed: of everything random.
        layers: one entry a layer, in the model's order.
        expected_loss: the rise of the loss that the method expects, in nats a token, or None if it can't say.
        made_for: digests of what it was made for: the source, the calibration it goes by, the mathematics.
        budget: bits that the experts may take, or None where the budget is a ratio.
    """

    model: str
    method: str
    ratio: float | None
    seed: int
    layers: tuple[LayerPlan, ...]
    options: dict = field(default_factory=dict)
    expected_loss: float | None = None
    made_for: dict = field(default_factory=dict)
    budget: int | None = None

    @property
    def original_count(self) -> int:
        return sum(entry.layer.parameter_count for entry in self.layers)

    def parameter_count(self) -> int:
        return sum(entry.parameter_count() for entry in self.layers)

    def bits(self, of_float: int = 16) -> int:
        """What the experts take, where floating-point numbers take `of_float` bits."""
        return sum(entry.bits(of_float) for entry in self.layers)

    def standard(self) -> tuple[int, int] | None:
        """(experts, width) when the result is an ordinary, smaller MoE; None when it needs moefactor to run."""
        shapes = {entry.standard() for entry in self.layers}
        return shapes.pop() if len(shapes) == 1 else None

    def achieved_ratio(self) -> float:
        return 1 - self.parameter_count() / self.original_count

    def to_json(self) -> dict:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "method": self.method,
            "options": self.options,
            "ratio": self.ratio,
            **({} if self.budget is None else {"budget": self.budget}),
            "seed": self.seed,
            "expert_parameters": {"before": self.original_count, "after": self.parameter_count()},
            "expected_loss": self.expected_loss,
            "made_for": self.made_for,
            "layers": [entry.to_json() for entry in self.layers],
        }

    def digest(self) -> str:
        """SHA-256 of what decides the result; editing white space or the counts does not change it."""
        data = self.to_json()
        for told in ("model", "expert_parameters", "expected_loss", "made_for"):
            data.pop(told)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def dumps(self) -> str:
        """JSON with every list of numbers on one line, so that ranks can be read and edited."""
        text = json.dumps(self.to_json(), indent=1)
        return re.sub(r"\[[-\d\s,.e]*\]", lambda m: " ".join(m.group().split()), text) + "\n"

    @classmethod
    def read(cls, path: Path, layers: list[ExpertLayer]) -> Plan:
        """Reads and checks a plan against the model's layers; raises UserError naming the field that is wrong."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no plan there. Run `moefactor plan` first.") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}.") from None
        except (UnicodeDecodeError, RecursionError):
            raise UserError(f"{path}: not a plan: it holds no readable JSON.") from None
        if not isinstance(data, dict):
            raise UserError(f"{path}: not a plan: expected a JSON object.")
        if data.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {data.get('format_version')!r}; this moefactor reads {FORMAT_VERSION}."
            )
        missing = [key for key in ("model", "method", "ratio", "seed", "layers") if key not in data]
        if missing:
            raise UserError(f"{path}: the plan lacks {', '.join(missing)}. Plan again.")
        for key, kind in (
            ("layers", list),
            ("seed", int),
            ("options", dict),
            ("ratio", float | int | None),
            ("method", str),
            ("made_for", dict),
            ("expected_loss", float | int | None),
            ("budget", int | None),
        ):
            if not isinstance(data.get(key, {} if key in ("options", "made_for") else None), kind):
                raise UserError(f"{path}: {key!r} is {data[key]!r}, which is of the wrong type. Plan again.")
        if data["ratio"] is not None and not 0 <= data["ratio"] < 1:
            raise UserError(f"{path}: 'ratio' is {data['ratio']!r}; it must be from 0 to below 1, or null.")
        if not 0 <= data["seed"] < 1 << 63:
            raise UserError(f"{path}: 'seed' is {data['seed']}; it must be from 0 to below 2^63.")
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in data["layers"]):
            raise UserError(f"{path}: every one of 'layers' must be a JSON object with a 'name'. Plan again.")
        entries = {entry.get("name"): entry for entry in data["layers"]}
        names = [layer.name for layer in layers]
        if list(entries) != names:
            odd = sorted(set(entries) ^ set(names), key=str)
            raise UserError(f"{path}: the plan's layers are not the model's; they differ in {odd or 'their order'}.")
        plan = cls(
            model=data["model"], method=data["method"], options=data.get("options", {}), ratio=data["ratio"],
            seed=data["seed"], layers=tuple(LayerPlan.from_json(entries[layer.name], layer) for layer in layers),
            expected_loss=data.get("expected_loss"), made_for=data.get("made_for", {}), budget=data.get("budget"),
        )  # fmt: skip
        plan.check_budget()
        return plan

    def check_budget(self) -> None:
        """Raises UserError when the ranks keep more than the ratio allows (ranks edited by hand)."""
        if self.budget is not None and self.standard() is None and self.bits() > self.budget:
            raise UserError(
                f"The plan takes {self.bits():,} bits for the experts, its budget is {self.budget:,}. Lower some "
                'widths, ranks or bits, or raise "budget" in the plan (null for none).'
            )
        if self.ratio is None:
            return
        budget = round((1 - self.ratio) * self.original_count)
        if self.parameter_count() > budget:
            raise UserError(
                f"The plan keeps {self.parameter_count():,} expert parameters, ratio {self.ratio} allows {budget:,}. "
                f'Lower some ranks, or set "ratio" in the plan to '
                f"{math.floor(self.achieved_ratio() * 1e4) / 1e4} or less (null for no budget)."
            )
