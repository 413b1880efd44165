"""Which fields of config.json say how many experts there are and how wide, and which tensors the router is.

Found by trying: a field is changed, the skeleton built again, shapes compared. So nothing is guessed from names, and
what else takes the same field is known before anything is written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .discover import build_skeleton, find_experts
from .experts import ExpertLayer
from .runtime.format import with_values

Path = tuple[str, ...]  # keys into config.json, outermost first
Shapes = dict[str, tuple[int, ...]]
# Tried first; a number of heads may happen to equal that of experts.
LIKELY = {"count": re.compile("expert"), "width": re.compile("expert|moe|intermediate|ffn")}
# Read by engines though not by transformers; kept true where they are there.
ECHOES = {
    "count": {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"},
    "width": {"moe_intermediate_size"},
}


NOT_SHAPES = ("model_type", "quantization_config", "auto_map", "experts_implementation")


@dataclass(frozen=True)
class Fields:
    """counts, widths: paths in config.json to set; empty where no field does this and nothing else."""

    counts: tuple[Path, ...]
    widths: tuple[Path, ...]


def find_fields(config: PretrainedConfig, data: dict, layers: list[ExpertLayer]) -> tuple[Fields, list[ExpertLayer]]:
    """The fields, and the layers with their routers and with what config.json can't say of them.

    Args:
        config, data: as read, and the JSON behind it.
    """
    with _without_warnings():
        skeleton = skeleton_of(config, data)
        before = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        counts, routers = _first_that_fits("count", config, data, layers, before)
        widths, _ = _first_that_fits("width", config, data, layers, before)
    # A table of expert numbers (hash routing) would name experts that are gone.
    tables = [n for n, t in skeleton.state_dict().items() if not (t.is_floating_point() or t.is_complex())]
    if any(name.startswith(_block(layer)) for name in tables for layer in layers):
        counts = ()
    found = []
    for layer in layers:
        router = tuple((name, axis) for name, axis in routers.items() if name.startswith(layer.decoder_layer + "."))
        found.append(
            replace(layer, router=router, fixed_count=not (counts and router), fixed_width=not widths)
        )  # fmt: skip
    return Fields(counts, widths), found


def routers(model: PreTrainedModel) -> list[str]:
    """The router parameters of a loaded model, its experts dense or compressed; not those that take no gradient (a
    correction that only chooses experts is a parameter in some models, a buffer in others)."""
    config = model.config.to_dict()
    skeleton = skeleton_of(model.config, config)
    layers = find_experts(skeleton, type(model).__name__)
    trained = {name for name, parameter in skeleton.named_parameters() if parameter.requires_grad}
    every = [name for layer in find_fields(model.config, config, layers)[1] for name, _ in layer.router]
    return [name for name in every if name in trained]


def _config_of(config: PretrainedConfig, data: dict) -> PretrainedConfig:
    """The config that `data` would be read as."""
    changed = type(config).from_dict(copy.deepcopy({k: v for k, v in data.items() if k not in NOT_SHAPES}))
    changed.architectures = config.architectures
    return changed


def _block(layer: ExpertLayer) -> str:
    return layer.name.rpartition(".")[0] + "."


def skeleton_of(config: PretrainedConfig, data: dict) -> PreTrainedModel:
    """The model that config.json would give, `data` in its place."""
    # Code of the repository's own has been trusted, or the model would not be open.
    return build_skeleton(_config_of(config, data), "config.json", trust_remote_code=True)


def shapes(config: PretrainedConfig, data: dict) -> Shapes:
    """Name -> shape of every tensor of the model that config.json would give."""
    return {name: tuple(t.shape) for name, t in skeleton_of(config, data).state_dict().items()}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers warns of what a config says at every skeleton."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _first_that_fits(
    kind: str, config: PretrainedConfig, data: dict, layers: list[ExpertLayer], before: Shapes
) -> tuple[tuple[Path, ...], dict[str, int]]:  # fmt: skip
    """The paths of the first field that changes the experts of every layer and nothing but their routers, with these:
    name -> axis."""
    size = layers[0].experts if kind == "count" else layers[0].intermediate
    if any((layer.experts if kind == "count" else layer.intermediate) != size for layer in layers):
        return (), {}
    every = list(_candidates(config, data, size))
    every.sort(key=lambda paths: not LIKELY[kind].search(paths[0][-1]))
    for paths in every:
        try:
            # Twice as many still come in groups and are enough for every token.
            after = shapes(config, with_values(data, paths, size, 2 * size))
        except Exception:  # a size that this field can't have, in any of a hundred architectures' words
            continue
        others = _others(kind, layers, before, after)
        if others is not None:
            place = paths[0][:-1]
            echoes = [p for found in every for p in found if p[:-1] == place and p[-1] in ECHOES[kind]]
            echoes = [p for p in echoes if _at(data, p) is not None and p not in paths]
            harmless = [p for p in echoes if _same(config, data, p, size, before)]
            return (*paths, *harmless), others
    return (), {}


def _same(config: PretrainedConfig, data: dict, path: Path, size: int, before: Shapes) -> bool:
    try:
        return shapes(config, with_values(data, (path,), size, 2 * size)) == before
    except Exception:
        return False


def _others(kind: str, layers: list[ExpertLayer], before: Shapes, after: Shapes) -> dict[str, int] | None:
    """Router tensors and their axes where the change is what it should be; None where it is not."""
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if before.keys() != after.keys():
        return None
    routers = {}
    for layer in layers:
        own = {name for name in before if name.startswith(layer.name + ".") and "." not in name[len(layer.name) + 1 :]}
        size = layer.experts if kind == "count" else layer.intermediate
        down = f"{layer.name}.down_proj"
        axis = _doubled(before[down], after[down], size)
        if axis is None or (axis == 0) != (kind == "count") or f"{layer.name}.{layer.first_name}" not in changed:
            return None
        changed -= own
        for name in [n for n in changed if n.startswith(layer.decoder_layer + ".")]:
            axis = _doubled(before[name], after[name], layer.experts)
            if kind == "width" or axis is None:
                return None
            routers[name] = axis
            changed.discard(name)
    return None if changed else routers


def _doubled(before: tuple[int, ...], after: tuple[int, ...], size: int) -> int | None:
    """The one axis that went from `size` to twice that."""
    axes = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    fits = len(before) == len(after) and len(axes) == 1 and before[axes[0]] == size and after[axes[0]] == 2 * size
    return axes[0] if fits else None


def _candidates(config: PretrainedConfig, data: dict, size: int) -> Iterator[tuple[Path, ...]]:
    """Paths with that number, in config.json and among the defaults; names of one and the same field together."""
    groups: dict[Path, list[Path]] = {}
    for source in (data, config.to_dict()):
        for path, value in walk(source):
            numbers = value if isinstance(value, list) else [value]
            if any(type(n) is int and n == size for n in numbers):
                groups.setdefault(_canonical(config, path), []).append(path)
    for paths in groups.values():
        stated = [path for path in dict.fromkeys(paths) if _at(data, path) is not None]
        yield tuple(stated or paths[:1])


def walk(data: dict, prefix: Path = ()) -> Iterator[tuple[Path, object]]:
    """(path, value) of every field, in the configs inside too."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from walk(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def _canonical(config: PretrainedConfig, path: Path) -> Path:
    """The path with the name that the config's class has for this field."""
    part: object = config
    for key in path[:-1]:
        part = getattr(part, key, None)
    return (*path[:-1], getattr(type(part), "attribute_map", {}).get(path[-1], path[-1]))


def _at(data: dict, path: Path) -> object:
    found: object = data
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found
