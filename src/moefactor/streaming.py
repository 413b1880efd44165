"""Run a model one decoder layer at a time: hidden states stay, weights come and go.

One run of the embedding with every decoder layer replaced by a recording identity yields layer 0's input and the
arguments (masks, positions) that each layer gets. Then each layer is loaded, run over all batches, and released.
"""

from __future__ import annotations

import os
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .checkpoint import Checkpoint, ModelReader, dtype_of, resolve
from .compat import has_post_expert_norm
from .discover import FusedExperts, build_skeleton, decoder_layers, find_experts, own_model, read_config, read_fields
from .errors import UserError, required
from .experts import ExpertLayer, ExpertWeights
from .fields import find_fields
from .fp8 import Fp8Source
from .routing import Routing

OBSERVED = "moefactor_observed"
ROWS = 64  # multiples of rows that 16-bit products on a CPU come in
FITS = 0.7  # of a device's memory, for the weights: what they work on needs some too
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
Witness = Callable[[Tensor, Tensor, Tensor], None]  # sees the tokens and where they are routed
Tick = Callable[[], None]


class GradientObserver(Protocol):
    """Sees the loss gradients at an expert's output and at its pre-activations; stats.LayerStats is one."""

    def add_gradient(self, expert: int, gradient: Tensor) -> None: ...
    def add_first_gradient(self, expert: int, gradient: Tensor) -> None: ...


def _nothing() -> None: ...


class _ObservedExperts(FusedExperts, Protocol):
    """With `_apply_gate` where they have a gate and `act_fn` where they have none; some have the rest."""

    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    down_proj_bias: nn.Parameter
    post_expert_norm: Callable[[Tensor], Tensor]


def _observed_forward(
    module: _ObservedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts module's forward, expert by expert, which shows each expert's tokens to `module.observer` and, in a
    backward pass, the loss gradient at each expert's output to `module.gradient_observer`.

    Registered with transformers' ExpertsInterface, so it sees the experts call of every architecture.
    """
    routing = Routing(top_k_index, top_k_weights, module.down_proj.shape[0])
    observer: Observer | None = getattr(module, "observer", None)
    first_name = "gate_up_proj" if module.has_gate else "up_proj"
    watcher: GradientObserver | None = getattr(module, "gradient_observer", None)
    witness: Witness | None = getattr(module, "witness", None)
    if witness is not None:
        witness(hidden_states.detach(), top_k_index, top_k_weights.detach())
    # Unbound once: indexing in the loop would give the backward pass a gradient of the whole stack for every expert.
    first, down = getattr(module, first_name).unbind(), module.down_proj.unbind()
    rows = []
    for expert, (start, end) in enumerate(routing.bounds):
        if start == end:
            continue
        x = hidden_states[routing.token[start:end]]
        h = _multiply(x, first[expert], module.is_transposed)
        if module.has_bias:
            h = h + getattr(module, first_name + "_bias")[expert]
        if watcher is not None and h.requires_grad:
            h.register_hook(partial(_show_first, watcher, module, expert))
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        y = _multiply(h, down[expert], module.is_transposed)
        if module.has_bias:
            y = y + module.down_proj_bias[expert]
        if has_post_expert_norm(module):
            if watcher is not None and y.requires_grad:
                y.register_hook(partial(watcher.add_gradient, expert))
            y = module.post_expert_norm(y)
        rows.append(y)
        if observer is not None:
            g = routing.weight[start:end].detach()
            seen = g != 0  # skipped pairs are routed to the last expert with weight 0
            observer(expert, x[seen].detach(), h[seen].detach(), y[seen].detach(), g[seen])
    out = routing.combine(torch.cat(rows)).to(hidden_states.dtype)
    if watcher is not None and out.requires_grad and not has_post_expert_norm(module):
        out.register_hook(lambda gradient: _show_gradients(watcher, routing, gradient))
    return out


def _show_gradients(watcher: GradientObserver, routing: Routing, gradient: Tensor) -> None:
    """The output is Σ g·y over a token's experts, so the gradient at y is g times the output's."""
    for expert, (start, end) in enumerate(routing.bounds):
        if end > start:
            weight = routing.weight[start:end].detach().unsqueeze(1)
            watcher.add_gradient(expert, gradient[routing.token[start:end]] * weight)


def _show_first(watcher: GradientObserver, module: FusedExperts, expert: int, gradient: Tensor) -> None:
    if module.has_gate and not module.is_concatenated:
        gradient = torch.cat((gradient[:, 0::2], gradient[:, 1::2]), dim=1)
    watcher.add_first_gradient(expert, gradient)


def _multiply(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """On a CPU, oneDNN compiles 16-bit products for every number of rows and keeps a thousand of them: hundreds of
    megabytes. So rows are filled up to few different numbers."""
    missing = -len(x) % ROWS if x.device.type == "cpu" and x.dtype.itemsize == 2 else 0
    if missing:
        return _multiply(nn.functional.pad(x, (0, 0, 0, missing)), weight, transposed)[: len(x)]
    return x @ weight if transposed else x @ weight.T


ALL_EXPERTS_FUNCTIONS.register(OBSERVED, _observed_forward)


class Pool(UserDict):
    """A dictionary that layers fill for those behind them; knows whether any did read it."""

    read = False

    def __getitem__(self, key: object) -> object:
        self.read = True
        return super().__getitem__(key)


@dataclass
class Activations:
    """Hidden states entering a layer, and each layer's other arguments; one entry a batch.

    Between layers the states have the checkpoint's dtype, as in the model itself: half of the memory of float32.

    Args:
        handed: what the layer before handed on besides the states (indices that layers share, a router's states).
        flowing: the loss gradients at what is handed on, while a backward pass goes through; place -> tensor.
        pools: what layers fill for those behind them (keys and values that they share).
    """

    states: list[Tensor]  # (batch, tokens, H)
    arguments: list[dict[str, tuple[tuple, dict]]]  # decoder layer -> args after the hidden states, kwargs
    handed: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    flowing: list[dict[int, Tensor]] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All that enters a layer, to be kept for the backward pass."""
        none = torch.empty(0, dtype=torch.uint8)
        return [*self.states, *(none if t is None else t for handed in self.handed for t in handed)]

    def gradients(self, states: list[Tensor]) -> list[Tensor]:
        """The loss gradients at the states, and at what is handed on beside them, to be kept for a resumed run."""
        none = torch.empty(0, dtype=torch.uint8)
        places = range(max((len(handed) for handed in self.handed), default=0))
        return [*states, *(flowing.get(place, none) for flowing in self.flowing for place in places)]

    def flow(self, tensors: list[Tensor]) -> list[Tensor]:
        """Takes back what `gradients` gave, and returns those at the states."""
        count, rest = len(self.arguments), iter(tensors[len(self.arguments) :])
        places = range((len(tensors) - count) // max(1, count))
        found = [{place: next(rest) for place in places} for _ in range(count)]
        self.flowing = [{p: t for p, t in of.items() if t.dtype != torch.uint8 or t.numel()} for of in found]
        return tensors[:count]

    def enter(self, tensors: list[Tensor]) -> None:
        """Takes back what `tensors` gave."""
        count, rest = len(self.arguments), iter(tensors[len(self.arguments) :])
        self.states = tensors[:count]
        handed = [[next(rest) for _ in old] for old in self.handed]
        self.handed = [tuple(None if t.dtype == torch.uint8 and not t.numel() else t for t in ts) for ts in handed]


@dataclass(frozen=True)
class Handed:
    """Stands, in a layer's arguments, for the `place`-th thing that the layer before hands on."""

    place: int


class StreamedModel:
    """A model whose decoder layers are loaded one at a time.

    Args:
        name: folder or hub name.
        device: where layers are loaded and run.
        dtype: that they are run in; None for the checkpoint's own, or float32 on a CPU without bfloat16 instructions,
            where emulation takes three times as long.
        trust_remote_code: whether code from the model's repository may run, for what transformers lacks.
    """

    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ):  # fmt: skip
        self.name, self.trust_remote_code = name, trust_remote_code
        self.device = checked_device(device)
        self.folder: Path = resolve(name)
        self.config = read_config(self.folder, name, trust_remote_code)
        self.own_code = own_model(self.config, name, trust_remote_code)  # the model's class is its repository's
        source = _quantised_source(self.config, name)
        checkpoint = Checkpoint(self.folder)
        self.stored_dtype = dtype_of(self.config, checkpoint)
        self.dtype = dtype or compute_dtype(self.stored_dtype, self.device)
        self.model = build_skeleton(self.config, name, self.dtype, trust_remote_code)
        self.config_json = read_fields(self.folder)
        self.fields, self.experts = find_fields(self.config, self.config_json, find_experts(self.model, name))
        self.decoder_layers = decoder_layers(self.model, self.experts)
        self.reader = ModelReader(checkpoint, self.model, source)
        self.reader.untie()
        self.reader.check_complete()
        self._extras: int | None = _UNKNOWN  # things that its layers hand on beside the states; see _handed_on
        self.model.set_experts_implementation(OBSERVED)

    def fits_in_memory(self) -> bool:
        """Whether the whole model, in the dtype that it is run in, takes at most FITS of its device's memory.

        Of all of it, not of what happens to be free: the same run must find the same again when it is resumed.
        """
        tied = self.model.all_tied_weights_keys
        count = sum(p.numel() for name, p in self.model.named_parameters() if name not in tied)
        return count * self.dtype.itemsize <= FITS * memory_of(self.device)

    def experts_of(self, decoder_layer: str) -> ExpertLayer | None:
        return next((e for e in self.experts if e.decoder_layer == decoder_layer), None)

    @contextmanager
    def loaded(self, prefix: str) -> Iterator[nn.Module]:
        """The module at `prefix` with its weights, for the length of the context."""
        self.reader.load(prefix, self.device)
        try:
            yield self.model.get_submodule(prefix)
        finally:
            self.reader.release(prefix)

    def expert_weights(self, layer: ExpertLayer) -> ExpertWeights:
        """One layer's experts; nothing stays behind in the skeleton."""
        with self.loaded(layer.name) as module:
            return ExpertWeights.from_model_layout(layer, dict(module.named_parameters(recurse=False)))

    @torch.no_grad()
    def embed(self, batches: list[Tensor]) -> Activations:
        """batches of token ids (batch, tokens) -> what enters the first decoder layer."""
        decoder = self.model.get_decoder()
        path = next(name for name, module in self.model.named_modules() if module is decoder)
        owner = self.decoder_layers[0].rpartition(".")[0]
        self.reader.load(path, self.device, without=(owner,))
        _to_device(decoder, self.device)
        states: list[Tensor] = []
        arguments: list[dict[str, tuple[tuple, dict]]] = []
        if self._extras is _UNKNOWN:
            self._extras = self._handed_on(decoder, batches[0][:1].to(self.device))
        layers = {name: self.model.get_submodule(name) for name in self.decoder_layers}
        try:
            for ids in batches:
                record = _Record(self.name, self.decoder_layers, self._extras)
                for name, layer in layers.items():
                    layer.forward = record.of(name)
                record.run(decoder, ids.to(self.device))
                states.append(record.calls[self.decoder_layers[0]][0][0].to(self.stored_dtype))
                rest = {name: (args[1:], kwargs) for name, (args, kwargs) in record.calls.items()}
                arguments.append(_share(rest, arguments[0] if arguments else None, {}))
        finally:
            for layer in layers.values():
                del layer.forward
        self.reader.release(path)
        handed: list[tuple[Tensor | None, ...]] = [(None,) * (self._extras or 0)] * len(states)
        pools = [v for args, kwargs in arguments[0].values() for v in (*args, *kwargs.values()) if isinstance(v, Pool)]
        return Activations(states, arguments, handed, pools=pools)

    def _handed_on(self, decoder: nn.Module, ids: Tensor) -> int | None:
        """How many things a decoder layer returns behind the hidden states; None where it returns these alone.

        The first layer is run to see it: a model takes a tuple apart by its length, so stand-ins must have the same.
        """
        first = self.decoder_layers[0]
        layer, calls = self.model.get_submodule(first), []

        def stop(*args: object, **kwargs: object) -> None:
            calls.append((args, kwargs))
            raise _Stop

        layer.forward = stop
        try:
            with suppress(_Stop):
                decoder(input_ids=ids, use_cache=False)
        finally:
            del layer.forward
        args, kwargs = calls[0]
        with self.loaded(first) as layer:
            out = layer(*args, **kwargs)
        return len(out) - 1 if isinstance(out, tuple) else None

    @torch.no_grad()
    def run(self, decoder_layer: str, activations: Activations, *, keep: bool = True, tick: Tick = _nothing) -> None:
        """Runs the loaded layer over all batches; its outputs replace what entered it unless `keep` is off."""
        layer = self.model.get_submodule(decoder_layer)
        for index, state in enumerate(activations.states):
            args, kwargs = _filled(activations.arguments[index][decoder_layer], activations.handed[index])
            out = layer(state.to(self.dtype), *args, **kwargs)
            if keep:
                activations.states[index] = (out[0] if isinstance(out, tuple) else out).to(self.stored_dtype)
                activations.handed[index] = tuple(out[1:]) if isinstance(out, tuple) else ()
            tick()

    def loss_gradients(self, batches: list[Tensor], activations: Activations, tick: Tick = _nothing) -> list[Tensor]:
        """∂(Σ next-token loss)/∂(what the last decoder layer puts out), a batch at a time: (batch, tokens, H).

        The whole model is run with its decoder layers left out, so norms, heads and logit scalings are its own.
        """
        if any(pool.read for pool in activations.pools):
            raise UserError(
                f"{self.name}: its layers share keys and values, through which no gradient is taken here. Choose a "
                "method or option that needs none (--allocation score; rfid, shared_basis, whitened_svd, reap)."
            )
        owner = self.decoder_layers[0].rpartition(".")[0]
        self.reader.load("", self.device, without=(owner,))
        _to_device(self.model, self.device)
        self.model.tie_weights(recompute_mapping=False)
        layers = [self.model.get_submodule(name) for name in self.decoder_layers]
        gradients = []
        try:
            for ids, state in zip(batches, activations.states, strict=True):
                rows = []
                # A sequence at a time: logits of a large vocabulary are the largest tensor of all.
                for row, entering in zip(ids.to(self.device).split(1), state.split(1), strict=True):
                    leaf = entering.to(self.dtype, copy=True).requires_grad_()
                    out = leaf if self._extras is None else (leaf, *[None] * self._extras)
                    for layer in layers:
                        layer.forward = lambda hidden_states, *args, out=out, **kwargs: out
                    logits = self.model(input_ids=row, use_cache=False).logits[:, :-1].float()
                    loss = nn.functional.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="sum")
                    rows.append(torch.autograd.grad(loss, leaf)[0])
                gradients.append(torch.cat(rows))
                tick()
        finally:
            for layer in layers:
                del layer.forward
        self.reader.release("")
        activations.flowing = [{} for _ in gradients]
        return gradients

    def backward(
        self, decoder_layer: str, activations: Activations, gradients: list[Tensor],
        after_batch: Callable[[], None] = _nothing, *, keep: bool = True,
    ) -> None:  # fmt: skip
        """Takes the gradients at the loaded layer's outputs back to its inputs, in place unless `keep` is off."""
        layer = self.model.get_submodule(decoder_layer)
        for index, state in enumerate(activations.states):
            leaf = state.to(self.dtype, copy=True).requires_grad_()
            handed = tuple(
                t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
                for t in activations.handed[index]
            )
            args, kwargs = _filled(activations.arguments[index][decoder_layer], handed)
            with torch.enable_grad():
                out = layer(leaf, *args, **kwargs)
                outs = out if isinstance(out, tuple) else (out,)
                ends = {0: gradients[index], **{place + 1: g for place, g in activations.flowing[index].items()}}
                torch.autograd.backward([outs[n] for n in ends], list(ends.values()))
            if keep:
                gradients[index] = required(leaf.grad, "a gradient")
                given = {place: t.grad for place, t in enumerate(handed) if t is not None and t.requires_grad}
                activations.flowing[index] = {place: grad for place, grad in given.items() if grad is not None}
            after_batch()


_UNKNOWN = -1


class _Stop(Exception):
    """Ends a model's run where the first decoder layer would begin."""


class _Record:
    """What each decoder layer is given in one run of the model around them, none of them being run.

    Raises UserError where the model does something to the states between its layers, which one layer at a time would
    leave out.
    """

    def __init__(self, name: str, layers: list[str], extras: int | None):
        self.name, self.layers, self.extras = name, layers, extras
        self.calls: dict[str, tuple[tuple, dict]] = {}
        self.last: Tensor | None = None

    def of(self, layer: str) -> Callable:
        def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            if layer in self.calls or (self.last is not None and hidden_states is not self.last):
                raise self.refusal(layer)
            # A new object, which only this layer gives, and which what is made of it needs a gradient for.
            self.last = hidden_states.detach().requires_grad_()
            if any(t.requires_grad for t in _tensors((args, kwargs))):
                raise self.refusal(layer)
            self.calls[layer] = ((hidden_states, *args), kwargs)
            return self.last if self.extras is None else (self.last, *map(Handed, range(self.extras)))

        return forward

    def run(self, decoder: nn.Module, ids: Tensor) -> None:
        try:
            with torch.enable_grad():
                decoder(input_ids=ids, use_cache=False)
        except (TypeError, AttributeError) as error:
            if self.extras is None:
                raise
            raise self.refusal(next(reversed(self.calls), self.layers[0])) from error  # it worked on a Handed
        if list(self.calls) != self.layers:
            raise self.refusal(next((n for n in self.layers if n not in self.calls), self.layers[0]))

    def refusal(self, layer: str) -> UserError:
        return UserError(
            f"{self.name}: between its decoder layers (at {layer}) the model does more than hand on what they return, "
            "so it can't be run a layer at a time. Methods that read no text (svd, mobe) work on it."
        )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | UserDict | tuple | list):
        for part in value.values() if isinstance(value, dict | UserDict) else value:
            yield from _tensors(part)


def _filled(call: tuple[tuple, dict], handed: tuple[Tensor | None, ...]) -> tuple[tuple, dict]:
    """A layer's arguments with what the layer before handed on."""

    def fill(value: object) -> object:
        return handed[value.place] if isinstance(value, Handed) else value

    args, kwargs = call
    return tuple(map(fill, args)), {key: fill(value) for key, value in kwargs.items()}


def _share(value: Any, other: Any, seen: dict[int, Any]) -> Any:
    """`value` with every tensor that equals the one at the same place in `other` replaced by that one.

    Masks and positions are the same in every batch; kept once, they cost nothing. An object that several layers are
    given (keys and values that they share) stays one object; `seen` knows it by its id.
    """
    if id(value) in seen:
        return seen[id(value)]
    found = value
    if isinstance(value, Tensor):
        same = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
        found = other if same and torch.equal(value, other) else value
    elif isinstance(value, dict | UserDict) and not value:
        found = Pool()
    elif type(value) is dict:
        known = other if isinstance(other, dict) else {}
        found = {key: _share(item, known.get(key), seen) for key, item in value.items()}
    elif type(value) in (tuple, list):
        others = other if isinstance(other, tuple | list) and len(other) == len(value) else [None] * len(value)
        found = type(value)(_share(a, b, seen) for a, b in zip(value, others, strict=True))
    seen[id(value)] = found
    return found


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What to run in: the stored dtype, or float32 on a CPU that only emulates it."""
    slow = device.type == "cpu" and stored.itemsize < 4 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if slow else stored


def _to_device(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers, which are real from the start; parameters arrive where they are wanted."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                part._buffers[name] = buffer.to(device)


def _quantised_source(config: PretrainedConfig, name: str) -> Fp8Source | None:
    """What reads the checkpoint's quantised tensors; UserError for a quantisation that can't be undone here."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    kind = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if kind == "fp8":
        source = Fp8Source(config)
        del config.quantization_config
        return source
    if kind == "moefactor":
        raise UserError(f"{name}: compressed by moefactor already. Start from the model it came from.")
    raise UserError(f"{name}: quantised with {kind}; compress the unquantised checkpoint, then quantise.")


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device of that name, or the default; UserError for one that is not there."""
    try:
        device = torch.device(device) if device is not None else default_device()
    except RuntimeError:
        raise UserError(f"Unknown device {str(device)!r}; cpu, cuda, cuda:1 ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here; use --device cpu.")
    return device


def default_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_of(device: torch.device) -> int:
    """Bytes of a device; of the host, what a container may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else ""
    return min(installed_memory(), int(limit) if limit.isdigit() else sys.maxsize)


def installed_memory() -> int:
    """Bytes of the machine; Windows has no sysconf, and is trusted to have enough."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
