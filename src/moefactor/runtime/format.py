"""What a compressed folder says of itself: config.json, the trust_remote_code stub, the model card.

docs/format.md describes it for other engines.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..errors import UserError, required
from ..experts import ExpertLayer
from ..forms.fields import Fields as Checked
from ..forms.packing import BITS, values
from ..plan import FORMAT_VERSION, LayerPlan, Plan

QUANT_METHOD = "moefactor"
# 2: with `rest`, whose tensors a reader of 1 would miss, and might initialise.
VERSIONS = (FORMAT_VERSION, 2)
STUB = "modeling_moefactor"
STUB_CLASS = "MoefactorForCausalLM"


class Fields(Protocol):
    """Where config.json has the number of experts and their width: paths of keys, see fields.py."""

    @property
    def counts(self) -> tuple[tuple[str, ...], ...]: ...

    @property
    def widths(self) -> tuple[tuple[str, ...], ...]: ...


@dataclass(frozen=True)
class Rest:
    """What is stored in a few bits outside the experts: `rest` of the `quantization_config`.

    A tensor X of the folder is then `X_codes` and `X_scale`, see forms/packing.py; rows are of a multiple of 32.

    Args:
        tensors: name -> bits; `*` stands for a number between two dots.
        group: neighbours along the input axis that share a scale.
    """

    tensors: Mapping[str, int] = field(default_factory=dict)
    group: int = 64

    @classmethod
    def of(cls, bits: Mapping[str, int], every: Iterable[str], group: int) -> Rest:
        """bits: of the tensors themselves. every: names of all tensors there are: a pattern speaks for all that it
        fits, so those that differ from their like in other layers are named one by one."""
        alike: dict[str, set[int]] = {}
        for name in every:
            alike.setdefault(_pattern(name), set()).add(bits.get(name, 0))
        named = {_pattern(name) if len(alike[_pattern(name)]) == 1 else name: count for name, count in bits.items()}
        return cls(named, group)

    def bits(self, name: str) -> int:
        """Of the tensor of that name in the folder; 0 where it is stored as it is."""
        return self.tensors.get(name) or self.tensors.get(_pattern(name), 0)

    def numbers(self, name: str, codes: Tensor, scale: Tensor) -> Tensor:
        """(rows, columns) in the scale's dtype: what is stored of the tensor of that name, as numbers."""
        bits = self.bits(name)
        return values(codes, scale, bits, 32 * codes.shape[-1] // bits, self.group)

    def names(self, numbers: int) -> list[str]:
        """Those that there may be, with numbers below that for `*`."""
        found = []
        for name in self.tensors:
            parts = [name]
            while "*" in parts[0]:
                parts = [part.replace("*", str(number), 1) for part in parts for number in range(numbers)]
            found += parts
        return found

    def to_json(self) -> dict:
        return {"group": self.group, "tensors": dict(self.tensors)}

    @classmethod
    def from_json(cls, config: dict) -> Rest:
        """Of a `quantization_config`, which may have none. UserError for one that can't be read."""
        if "rest" not in config:
            return cls()
        data = Checked(config["rest"], "quantization_config 'rest'")
        tensors, group = data.get("tensors", dict), data.whole("group", 8, 1024)
        if odd := [name for name, bits in tensors.items() if type(bits) is not int or bits not in BITS]:
            raise data.error(f"bits of {odd[0]!r} must be one of {', '.join(map(str, BITS))}.")
        return cls(tensors, group)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def checkpoint_config(
    source: Path, plan: Plan, model_type: str, fields: Fields, auto_class: str = "AutoModelForCausalLM", *,
    without: tuple[tuple[str, ...], ...] = (), own_code: bool = False, rest: Rest | None = None,
) -> str:  # fmt: skip
    """The source's config.json with our `quantization_config`, and two guards for readers without the package.

    `experts_implementation` is a name that transformers refuses unless moefactor is imported; without it the model
    would load with random experts and still generate.

    Args:
        fields: where it says how many experts there are and how wide, for a result that is an ordinary MoE.
        auto_class: transformers' class that loads it.
        without: paths of numbers, or of yes, that become 0 and no (prediction layers that are left out).
        own_code: only the repository's own code knows the architecture. That code is named where the second guard would
            be, so there is the first alone.
        rest: what is stored in a few bits outside the experts, if anything is.
    """
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = model_type  # as it was read: kimi_k2 is deepseek_v3 to transformers
    config.pop("transformers_weights", None)  # the file that it names is not there any more
    for path in without:
        config = _with(config, path, lambda old: False if old is True else 0)
    if plan.standard():
        return json.dumps(smaller(config, plan, fields), indent=2) + "\n"
    config["quantization_config"] = quantization_config(plan)
    if rest:
        config["quantization_config"] |= {"format_version": VERSIONS[1], "rest": rest.to_json()}
    config["experts_implementation"] = QUANT_METHOD
    if not own_code:
        config["auto_map"] = {auto_class: f"{STUB}.{STUB_CLASS}"}
    return json.dumps(config, indent=2) + "\n"


def smaller(config: dict, plan: Plan, fields: Fields) -> dict:
    """config.json of an ordinary MoE with the experts and the width that are left."""
    experts, width = required(plan.standard(), "the shape of an ordinary MoE")
    layer = plan.layers[0].layer
    config = {k: v for k, v in config.items() if k != "quantization_config"}  # FP8, undone on reading
    if experts != layer.experts:
        config = with_values(config, fields.counts, layer.experts, experts)
    if width != layer.intermediate:
        config = with_values(config, fields.widths, layer.intermediate, width)
        if width % 8:
            config["experts_implementation"] = "eager"  # transformers' grouped_mm wants rows of 16 bytes
    return config


def with_values(config: dict, paths: tuple[tuple[str, ...], ...], old: int, new: int) -> dict:
    """config.json with `new` for `old` at the paths; in a list, one number for every layer, wherever `old` is."""
    for path in paths:
        config = _with(
            config, path, lambda v: [new if n == old else n for n in v] if isinstance(v, list) else new
        )  # fmt: skip
    return config


def _with(config: dict, path: tuple[str, ...], change: Callable[[object], object]) -> dict:
    """A copy with the field at `path` changed; one that only the config's class has a value for is added."""
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = change(place.get(path[-1]))
    return config


def quantization_config(plan: Plan) -> dict:
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "package_version": version("moefactor"),
        "method": plan.method,
        "ratio": plan.ratio,
        "plan_sha256": plan.digest(),
        "layers": [entry.to_json() for entry in plan.layers],
    }


def layer_plans(config: dict, layers: list[ExpertLayer]) -> list[LayerPlan]:
    """The layers of a `quantization_config`, checked against the model's; names match by the longest suffix,
    since wrappers (vision-language models) change prefixes."""
    _check_version(config)
    entries = {entry["name"]: entry for entry in config["layers"]}
    plans = []
    for layer in layers:
        entry = entries.get(layer.name) or entries.get(_longest_suffix(layer.name, entries))
        if entry is None:
            raise UserError(f"{layer.name}: the checkpoint's quantization_config does not describe these experts.")
        plans.append(LayerPlan.from_json(entry, layer))
    return plans


def described_layers(config: dict) -> list[LayerPlan]:
    """The layers of a `quantization_config` by what it says itself, for a reader that has not built the model."""
    _check_version(config)
    plans = []
    for entry in config["layers"]:
        gated = set(entry["stacks"]) != {"up", "down"}
        shape = {name: entry[name] for name in ("experts", "intermediate", "hidden")}
        plans.append(LayerPlan.from_json(entry, ExpertLayer(entry["name"], entry["name"], gated=gated, **shape)))
    return plans


def _check_version(config: dict) -> None:
    if config.get("format_version") not in VERSIONS:
        raise UserError(
            f"This checkpoint has format_version {config.get('format_version')!r}, the installed moefactor reads "
            f"{' and '.join(map(str, VERSIONS))}. Install a version that reads it (made with "
            f"{config.get('package_version')})."
        )


def _longest_suffix(name: str, names: dict[str, dict]) -> str | None:
    def shared(other: str) -> int:
        pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(name.count("."), other.count(".")) + 1)

    best = max(names, key=shared, default=None)
    # Layer number and module must agree at least: `layers.3.mlp.experts`.
    return best if best is not None and shared(best) >= 3 else None


def loader_stub(auto_class: str = "AutoModelForCausalLM") -> dict[str, str]:
    """File name -> content: what `trust_remote_code=True` runs. transformers itself says `pip install moefactor`
    when the import below fails."""
    content = f'''"""Loads this checkpoint with trust_remote_code=True; its experts are factorised by moefactor."""

import moefactor  # pip install moefactor
from transformers import {auto_class}


class {STUB_CLASS}:
    """Not a model of its own: hands over to the architecture that config.json names."""

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        pass

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        kwargs.pop("trust_remote_code", None)
        return {auto_class}.from_pretrained(*args, trust_remote_code=False, **kwargs)
'''
    return {f"{STUB}.py": content}


def model_card(plan: Plan, command: str, auto_class: str = "AutoModelForCausalLM") -> str:
    before, after = plan.original_count, plan.parameter_count()
    base = plan.model if not Path(plan.model).exists() else Path(plan.model).name
    needed = "" if plan.standard() else "import moefactor\n"
    return f"""---
base_model: {base}
base_model_relation: quantized
library_name: transformers
tags:
- moefactor
- mixture-of-experts
- compressed
---

# {base}, experts factorised

Made by [moefactor](https://pypi.org/project/moefactor/) {version("moefactor")} with the method `{plan.method}`.

| | before | after |
|---|---|---|
| parameters of the routed experts | {before:,} | {after:,} ({1 - after / before:.1%} removed) |

```python
{needed}from transformers import {auto_class}

model = {auto_class}.from_pretrained("this folder")
```

Made by:

    {command}
"""
