"""Stage 4: the checkpoint, out of the journal's layers and all the rest of the model as it lies on disk.

Whatever is not a compressed expert is kept, name, shape, dtype and bytes: towers of wrappers, buffers, layers of
multi-token prediction that transformers does not build. With `rest_bits` the larger matrices among it are rounded to
fewer bits as they pass (rest.py). A plan whose result is an ordinary, smaller MoE is written as
one; then prediction layers, which the same config.json speaks of, are cut like the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .checkpoint import CheckpointWriter
from .discover import auto_class
from .errors import UserError
from .methods import Method
from .ordinary import Smaller, new_routers, ordinary_experts
from .plan import Plan
from .prediction import Prediction
from .rest import describe_rest, expert_tensors, packing
from .rest import rest_bits as bits_of_rest
from .run_folder import RunFolder
from .runtime.format import checkpoint_config, loader_stub, model_card
from .streaming import StreamedModel


def check_method(
    model: StreamedModel, method: Method, options: dict, *, drop_mtp: bool = False, rest_bits: int = 16
) -> None:  # fmt: skip
    """Raises UserError, before anything is run, where no plan of this method could be written for this model."""
    if rest_bits != 16 and method.standard(options):
        raise _ordinary(model)
    prediction = Prediction.of(model)
    if drop_mtp and not prediction.names and not prediction.promised:
        raise UserError(f"{model.name}: has no multi-token-prediction layers; leave --drop-mtp out.")
    smaller = method.standard(options)
    if smaller == "both" and all(layer.fixed_count and layer.fixed_width for layer in model.experts):
        raise UserError(
            f"{model.name} ({model.config.model_type}): config.json can say neither that its experts are fewer nor "
            "that they are narrower, so no ordinary checkpoint holds them. Use --form fast, linear or tight."
        )
    if smaller == "count" and any(layer.fixed_count for layer in model.experts):
        raise UserError(
            f"{model.name} ({model.config.model_type}): its experts can't be dropped. Its router has more outputs than "
            "experts, or names them in a table, or no field of config.json counts them alone. Keep the router whole "
            "(reap --intercept), or choose a method that keeps every expert."
        )
    narrows = smaller == "width" and not model.experts[0].fixed_width
    if (smaller in ("count", "both") or narrows) and not drop_mtp:
        prediction.check_readable()


def write_checkpoint(
    model: StreamedModel, plan: Plan, run: RunFolder, output: Path, command: str, *, drop_mtp: bool = False,
    rest_bits: int = 16,
) -> None:  # fmt: skip
    """Puts the journal's layers and the rest of the model together; the output appears whole or not at all.

    Args:
        drop_mtp: leave out the multi-token-prediction layers, and let config.json say that there are none.
        rest_bits: of the matrices that rest.rest_tensors names; 16 leaves them as they are.
    """
    standard, prediction = plan.standard(), Prediction.of(model)
    if standard is None and any(entry.kept is not None for entry in plan.layers):
        raise UserError(
            f"{model.name}: the plan drops experts, which only an ordinary, smaller MoE can hold: as many in every "
            "layer, where config.json can say so. Plan again."
        )
    if standard and rest_bits != 16:
        raise _ordinary(model)
    bits = bits_of_rest(model, rest_bits)
    config = checkpoint_config(
        model.folder, plan, model.config.model_type, model.fields, auto_class(model.config).__name__,
        without=prediction.promised if drop_mtp else (), own_code=model.own_code,
        rest=describe_rest(model, bits) if bits else None,
    )  # fmt: skip
    if standard:
        Smaller(model, plan)  # refuses what config.json can't describe
    gone = expert_tensors(model)
    packed = packing(model, bits)
    routers: dict[str, Callable[[Tensor], Tensor]] = {}
    with CheckpointWriter(output) as writer:
        for index, entry in enumerate(plan.layers):
            if standard:
                tensors = run.layer(index)
                writer.add(model.reader.disk_layout(ordinary_experts(entry, tensors)))
                routers |= new_routers(model, entry, tensors)
            else:
                writer.adopt(run.layer_file(index))
        if drop_mtp:
            gone |= prediction.names
        elif standard and standard != (plan.layers[-1].layer.experts, plan.layers[-1].layer.intermediate):
            for block in prediction.blocks:
                writer.add(prediction.cut(block, plan.layers[-1]))
                gone |= block.names.keys()

        def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
            return {name: routers[name](tensor)} if name in routers else packed(name, tensor)

        rest = [name for name in model.reader.checkpoint.files if name not in gone]
        reader = model.reader
        writer.copy_plain(
            reader.checkpoint, rest, source=reader.source, change=change, checked=reader.parameters
        )  # fmt: skip
        writer.companions(model.folder)
        writer.text("config.json", config)
        writer.text("plan.json", plan.dumps())
        writer.text("compression.json", json.dumps(run.report(), indent=1) + "\n")
        if not standard and not model.own_code:
            for name, content in loader_stub(auto_class(model.config).__name__).items():
                writer.text(name, content)
        writer.text("README.md", model_card(plan, command, auto_class(model.config).__name__))


def _ordinary(model: StreamedModel) -> UserError:
    return UserError(
        f"{model.name}: --rest-bits is for folders with factors, and the result is an ordinary checkpoint, in which "
        "other formats are at home: leave --rest-bits out, then `moefactor export --quantised` the result."
    )
