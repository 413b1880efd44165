"""Run a model one decoder layer at a time: hidden states stay, weights come and go.

One run of the embedding with every decoder layer replaced by a recording identity yields layer 0's input and the
arguments (masks, positions) that each layer gets. Then each layer is loaded, run over all batches, and released.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .checkpoint import Checkpoint, ModelReader, resolve
from .compat import has_post_expert_norm
from .discover import build_skeleton, decoder_layers, find_experts, own_model, read_config
from .errors import UserError
from .experts import ExpertLayer, ExpertWeights
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


def _observed_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
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
            y = module.post_expert_norm(y)
        rows.append(y)
        if observer is not None:
            g = routing.weight[start:end].detach()
            seen = g != 0  # skipped pairs are routed to the last expert with weight 0
            observer(expert, x[seen].detach(), h[seen].detach(), y[seen].detach(), g[seen])
    out = routing.combine(torch.cat(rows)).to(hidden_states.dtype)
    if watcher is not None and out.requires_grad:
        out.register_hook(lambda gradient: _show_gradients(watcher, routing, gradient))
    return out


def _show_gradients(watcher: GradientObserver, routing: Routing, gradient: Tensor) -> None:
    """The output is Σ g·y over a token's experts, so the gradient at y is g times the output's."""
    for expert, (start, end) in enumerate(routing.bounds):
        if end > start:
            weight = routing.weight[start:end].detach().unsqueeze(1)
            watcher.add_gradient(expert, gradient[routing.token[start:end]] * weight)


def _show_first(watcher: GradientObserver, module: nn.Module, expert: int, gradient: Tensor) -> None:
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


@dataclass
class Activations:
    """Hidden states entering a layer, and each layer's other arguments; one entry a batch.

    Between layers the states have the checkpoint's dtype, as in the model itself: half of the memory of float32.
    """

    states: list[Tensor]  # (batch, tokens, H)
    arguments: list[dict[str, tuple[tuple, dict]]]  # decoder layer -> args after the hidden states, kwargs


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
        self.stored_dtype: torch.dtype = self.config.dtype or torch.float32
        self.dtype = dtype or compute_dtype(self.stored_dtype, self.device)
        self.model = build_skeleton(self.config, name, self.dtype, trust_remote_code)
        self.experts: list[ExpertLayer] = find_experts(self.model, name)
        self.decoder_layers = decoder_layers(self.model, self.experts)
        self.reader = ModelReader(Checkpoint(self.folder), self.model, source)
        self.reader.check_complete()
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
        states, arguments = [], []
        layers = {name: self.model.get_submodule(name) for name in self.decoder_layers}
        try:
            for ids in batches:
                record: dict[str, tuple[tuple, dict]] = {}
                for name, layer in layers.items():
                    layer.forward = _recorder(name, record)
                decoder(input_ids=ids.to(self.device), use_cache=False)
                states.append(record[self.decoder_layers[0]][0][0].to(self.stored_dtype))
                rest = {name: (args[1:], kwargs) for name, (args, kwargs) in record.items()}
                arguments.append(_share(rest, arguments[0]) if arguments else rest)
        finally:
            for layer in layers.values():
                del layer.forward
        self.reader.release(path)
        return Activations(states, arguments)

    @torch.no_grad()
    def run(self, decoder_layer: str, activations: Activations, *, keep: bool = True, tick: Tick = _nothing) -> None:
        """Runs the loaded layer over all batches; its outputs replace the hidden states unless `keep` is off."""
        layer = self.model.get_submodule(decoder_layer)
        for index, state in enumerate(activations.states):
            args, kwargs = activations.arguments[index][decoder_layer]
            out = layer(state.to(self.dtype), *args, **kwargs)
            if keep:
                activations.states[index] = (out[0] if isinstance(out, tuple) else out).to(self.stored_dtype)
            tick()

    def loss_gradients(self, batches: list[Tensor], activations: Activations, tick: Tick = _nothing) -> list[Tensor]:
        """∂(Σ next-token loss)/∂(what the last decoder layer puts out), a batch at a time: (batch, tokens, H).

        The whole model is run with its decoder layers left out, so norms, heads and logit scalings are its own.
        """
        owner = self.decoder_layers[0].rpartition(".")[0]
        self.reader.load("", self.device, without=(owner,))
        _to_device(self.model, self.device)
        self.model.tie_weights()
        layers = [self.model.get_submodule(name) for name in self.decoder_layers]
        gradients = []
        try:
            for ids, state in zip(batches, activations.states, strict=True):
                rows = []
                # A sequence at a time: logits of a large vocabulary are the largest tensor of all.
                for row, entering in zip(ids.to(self.device).split(1), state.split(1), strict=True):
                    leaf = entering.to(self.dtype, copy=True).requires_grad_()
                    for layer in layers:
                        layer.forward = lambda hidden_states, *args, leaf=leaf, **kwargs: leaf
                    logits = self.model(input_ids=row, use_cache=False).logits[:, :-1].float()
                    loss = nn.functional.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="sum")
                    rows.append(torch.autograd.grad(loss, leaf)[0])
                gradients.append(torch.cat(rows))
                tick()
        finally:
            for layer in layers:
                del layer.forward
        self.reader.release("")
        return gradients

    def backward(
        self, decoder_layer: str, activations: Activations, gradients: list[Tensor],
        after_batch: Callable[[], None] = _nothing, *, keep: bool = True,
    ) -> None:  # fmt: skip
        """Takes the gradients at the loaded layer's outputs back to its inputs, in place unless `keep` is off."""
        layer = self.model.get_submodule(decoder_layer)
        for index, state in enumerate(activations.states):
            args, kwargs = activations.arguments[index][decoder_layer]
            leaf = state.to(self.dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                out = layer(leaf, *args, **kwargs)
                torch.autograd.backward(out[0] if isinstance(out, tuple) else out, gradients[index])
            if keep:
                gradients[index] = leaf.grad
            after_batch()


def _recorder(name: str, record: dict) -> Callable:
    def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        record[name] = ((hidden_states, *args), kwargs)
        return hidden_states

    return forward


def _share(value: object, other: object) -> object:
    """`value` with every tensor that equals the one at the same place in `other` replaced by that one.

    Masks and positions are the same in every batch; kept once, they cost nothing.
    """
    if isinstance(value, Tensor):
        same = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
        return other if same and torch.equal(value, other) else value
    if isinstance(value, dict):
        known = other if isinstance(other, dict) else {}
        return {key: _share(item, known.get(key)) for key, item in value.items()}
    if type(value) in (tuple, list):
        known = other if isinstance(other, tuple | list) and len(other) == len(value) else [None] * len(value)
        return type(value)(_share(a, b) for a, b in zip(value, known, strict=True))
    return value


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


def _quantised_source(config: object, name: str) -> Fp8Source | None:
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
