"""For engines that know nothing of us: an ordinary MoE checkpoint again, every expert rebuilt, layer by layer; GGUF."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, CheckpointWriter, ModelReader, dtype_of, refuse_existing, resolve
from .discover import build_skeleton, find_experts, own_code_refused, read_config
from .errors import UserError
from .experts import CompressedExperts
from .files import locked, replacing
from .llama_cpp import (
    BLOCKS,
    CONVERTED,
    checked_type,
    convert,
    find_converter,
    find_quantiser,
    instead_of,
    quantise,
)
from .loading import Model
from .plan import LayerPlan
from .progress import Progress, Steps, silent
from .rest import unpacking
from .runtime.format import QUANT_METHOD, STUB, layer_plans
from .runtime.module import FactorisedExperts
from .text import names_own_code

TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # llama.cpp's names


def export_dense(
    name: str, output: str | Path, *, trust_remote_code: bool = False, progress: Progress = silent
) -> Path:
    """Writes the dense equivalent of a compressed folder, in the layout that its kind of model has on disk.

    The result has the size of the original model; what is lost in compression stays lost.
    """
    output = Path(output).expanduser()
    refuse_existing(output)
    folder = resolve(name)
    config = read_config(folder, name, trust_remote_code)
    quantisation = _taken_description(config)
    if not quantisation:
        raise UserError(f"{name}: not a checkpoint of moefactor's; there is nothing to rebuild.")
    checkpoint = Checkpoint(folder)
    skeleton = build_skeleton(config, name, dtype_of(config, checkpoint), trust_remote_code)
    plans = layer_plans(quantisation, find_experts(skeleton, name))
    if any(plan.intercept for plan in plans):
        raise UserError(f"{name}: adds constants to experts' outputs (--intercept), which a dense MoE can't hold.")
    reader = ModelReader(checkpoint, skeleton)
    steps = Steps(progress, "export", len(plans))
    ours = {name for plan in plans for name in _factors(plan)}
    plain = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "experts_implementation"):
        plain.pop(key, None)
    if STUB in str(plain.get("auto_map")):  # not the one of a model with code of its own
        plain.pop("auto_map")
    with CheckpointWriter(output) as writer:
        for plan in plans:
            steps.detail = plan.layer.decoder_layer
            writer.add(reader.disk_layout(_dense_layer(checkpoint, plan)))
            steps.tick()
        kept = [n for n in checkpoint.files if n not in ours]
        writer.copy_plain(checkpoint, kept, change=unpacking(checkpoint, quantisation), checked=reader.parameters)
        writer.companions(folder, skip=("plan.json", "compression.json", f"{STUB}.py"))
        writer.text("config.json", json.dumps(plain, indent=2) + "\n")
    return output


def export_gguf(
    name: str, file: str | Path, *, quant: str | None = None, llama_cpp: str | Path | None = None,
    pre_tokenizer: str | None = None, trust_remote_code: bool = False, progress: Progress = silent,
) -> Path:  # fmt: skip
    """Writes a GGUF by llama.cpp's own programs, of an ordinary checkpoint or, compressed, of its dense equivalent.

    Warns beforehand of matrices whose rows the blocks of `quant` don't divide; llama.cpp gives them a larger type.

    Args:
        quant: llama.cpp's name of a type (llama_cpp.BLOCKS); by default what the weights have.
        llama_cpp: folder of llama.cpp; by default LLAMA_CPP's, or what is on the PATH.
        pre_tokenizer: for a tokenizer that llama.cpp's converter does not know, its name of one that splits text alike.
    """
    file, tools = Path(file).expanduser(), Path(llama_cpp) if llama_cpp else None
    refuse_existing(file)
    folder, title = resolve(name), Path(name).expanduser().resolve().name
    config = read_config(folder, name, trust_remote_code)
    checkpoint = Checkpoint(folder)
    own = TYPES.get(dtype_of(config, checkpoint), "bf16")  # FP8 and the like are undone on reading
    kind = checked_type(quant or own)
    converter = find_converter(tools)
    quantiser = None if kind in CONVERTED else find_quantiser(tools)
    if names_own_code(folder) and not trust_remote_code:  # which llama.cpp's converter would run unasked
        raise own_code_refused(name, "Its tokenizer")
    compressed = bool(_taken_description(config))
    for warning in _fallbacks(build_skeleton(config, name, trust_remote_code=trust_remote_code), name, kind):
        warnings.warn(warning, stacklevel=2)
    steps = Steps(progress, "gguf", 1 + bool(quantiser))
    with (
        locked(file.with_name(f".{file.name}.lock"), str(file)),
        replacing(file) as partial,
        _workplace(file.with_name(f".{file.name}.parts")) as beside,
    ):
        if compressed:
            folder = export_dense(name, beside / title, trust_remote_code=trust_remote_code, progress=progress)
        if not trust_remote_code:
            folder = _without_code(folder, beside / "without code" / title)
        converted = beside / "converted.gguf" if quantiser else partial
        steps.detail = f"converting to {own if quantiser else kind}"
        convert(converter, folder, converted, own if quantiser else kind, name=title, pre_tokenizer=pre_tokenizer)
        steps.tick()
        if quantiser:
            quantise(quantiser, converted, partial, kind)
            steps.tick()
    return file


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder, gone afterwards; what a killed run left in it goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _without_code(source: Path, folder: Path) -> Path:
    """The files of a model as links in `folder`, but for code and what names it: llama.cpp's converter opens some
    models' configuration and tokenizer with trust_remote_code=True, unasked."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json" and '"auto_map"' in (text := path.read_text()):
            content = json.loads(text)
            content.pop("auto_map", None)
            (folder / path.name).write_text(json.dumps(content))
        elif path.suffix != ".py":
            (folder / path.name).symlink_to(path.resolve())
    return folder


def _fallbacks(model: Model, name: str, kind: str) -> Iterator[str]:
    """A sentence for each length of rows that the blocks of `kind` don't divide, the most weights first."""
    experts, others = Counter[int](), Counter[int]()
    for layer in find_experts(model, name):
        matrix = layer.experts * layer.intermediate * layer.hidden
        experts[layer.intermediate] += matrix  # down
        others[layer.hidden] += matrix * (len(layer.projections) - 1)
    for path, module in model.named_modules():
        tied = f"{path}.weight" in model.all_tied_weights_keys
        if isinstance(module, nn.Linear | nn.Embedding) and not tied:
            others[module.weight.shape[1]] += module.weight.numel()
    total, block = (experts + others).total(), BLOCKS[kind]
    for rows, what in ((experts, "the experts' down projections"), (others, "other matrices")):
        for row, weights in rows.most_common():
            instead = instead_of(kind, row)
            if instead is None:
                continue
            fitting = sorted({max(block, row // block * block), -(-row // block) * block})
            hint = f" Experts {' or '.join(map(str, fitting))} wide keep it." if rows is experts else ""
            yield (
                f"{kind} packs {block} weights of a row at a time, which rows of {row} don't divide into: {what} "
                f"({weights / total:.0%} of the weights) become {instead}.{hint}"
            )


def _taken_description(config: Any) -> dict:
    """Takes what says that a model is compressed out of its config; {} where it is not."""
    quantisation = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != QUANT_METHOD:
        return {}
    del config.quantization_config
    config.experts_implementation = None
    return quantisation


def _factors(plan: LayerPlan) -> list[str]:
    """Names in the folder of what a layer's forms are made of; other tensors may live in the same module."""
    made = FactorisedExperts(plan, torch.float32)
    return [f"{plan.layer.name}.{name}" for name, _ in made.named_parameters()]


def _dense_layer(checkpoint: Checkpoint, plan: LayerPlan) -> dict[str, Tensor]:
    """Model name -> dense tensor of one layer's experts, in the dtype of its factors."""
    prefix = plan.layer.name + "."
    with checkpoint.slices(_factors(plan)) as slices:
        stored = {name.removeprefix(prefix): view[:] for name, view in slices.items()}
    dtype = next(tensor.dtype for tensor in stored.values() if tensor.is_floating_point())
    # Products in float32, then rounded once.
    tensors = {key: t.to(torch.float32) if t.is_floating_point() else t for key, t in stored.items()}
    dense = CompressedExperts(plan.layer, plan.forms, tensors).dense().to_model_layout()
    return {prefix + key: tensor.to(dtype) for key, tensor in dense.items()}
