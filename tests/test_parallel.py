"""What ranks of a parallel engine hold: their outputs add up to the layer's, and their private factors to its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from moefactor.errors import UserError
from moefactor.experts import ExpertLayer
from moefactor.forms import (
    BasePlusDelta,
    BasisMixture,
    Dense,
    Form,
    Latent,
    Quantised,
    Ragged,
    SharedBasis,
    SharedPrivate,
    SparseResidual,
    WindowResidual,
    low_rank,
)  # fmt: skip
from moefactor.plan import LayerPlan
from moefactor.runtime.engine import EngineExperts, gated, layer_index, plans_by_index
from moefactor.runtime.parallel import Share, share_of_layer

EXPERTS, WIDTH, HIDDEN = 8, 16, 24
LAYER = ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", EXPERTS, WIDTH, HIDDEN)
BIASED = replace(LAYER, biased=True)
WIDTHS = (16, 8, 0, 12, 4, 16, 8, 8)
PRECISIONS = ((6, (16, 0, 0, 5, 0, 8, 8, 1)), (4, (0, 7, 0, 0, 4, 8, 0, 1)), (2, (0, 1, 0, 7, 0, 0, 0, 6)))
UNGROUPED = ((0, 5), (1, 2, 3), (4, 6, 7))


def stack(name: str, halves: int) -> Form:
    """The form `name` of a stack of `halves` · WIDTH rows."""
    width, narrow = halves * WIDTH, halves == 1
    shape, ragged = (EXPERTS, width, HIDDEN), {"widths": WIDTHS, "halves": halves}
    pairs = low_rank(*shape, (2,) * EXPERTS)
    mixture = BasisMixture(*shape, bases=2, rank=6, groups=2)
    made = {
        "dense": Dense(*shape),
        "ragged": Ragged(*shape, **ragged),
        "low_rank": low_rank(*shape, (3, 4, 3, 2, 5, 4, 3, 3)),
        "shared_basis": SharedBasis(*shape, groups=UNGROUPED, ranks=(4, 6, 4)),
        "shared_private": SharedPrivate(*shape, rank=5),
        "mixture": mixture,
        "low_rank_mixture": replace(mixture, basis_rank=2),
        "ragged_mixture": replace(mixture, groups=1, **ragged),
        "base_plus_delta": BasePlusDelta(*shape, pairs, kept=WIDTH if narrow else HIDDEN, writes=narrow),
        "pruned_base": BasePlusDelta(*shape, SharedPrivate(*shape, rank=2), kept=11 if narrow else 20, writes=narrow),
        "hashed_residual": SparseResidual(*shape, mixture, UNGROUPED, sizes=(50, 70, 60), seed=3),
        "window_residual": WindowResidual(*shape, pairs, UNGROUPED, sizes=(3 * width,) * 3, seed=3),
        "latent": Latent(*shape, rank=7, inner=Ragged(EXPERTS, width, 7, **ragged)),
    }
    made |= {
        "few_bits_dense": Quantised(*shape, made["dense"], 8, (("weight", 4),)),
        "few_bits_ragged": Quantised(*shape, made["ragged"], 16, (("weight", 3),)),
        "few_bits_latent": Quantised(*shape, made["latent"], 8, (("basis", 8),), PRECISIONS),
        "few_bits_mixture": Quantised(*shape, made["ragged_mixture"], 8, (("basis", 5), ("mix", 8)), PRECISIONS),
        "few_bits_shared_basis": Quantised(*shape, made["shared_basis"], 8, (("basis_r4", 8), ("basis_r6", 6))),
    }
    return made[name]


FORMS = ("dense", "ragged", "low_rank", "shared_basis", "shared_private", "mixture", "low_rank_mixture",
         "ragged_mixture", "base_plus_delta", "pruned_base", "latent", "hashed_residual",
         "window_residual", "few_bits_dense", "few_bits_ragged", "few_bits_latent", "few_bits_mixture",
         "few_bits_shared_basis")  # fmt: skip


def tensors_of(plan: LayerPlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, spec in plan.tensors().items():
        if name.endswith("pivots"):
            made[name] = torch.arange(spec.shape[-1], dtype=torch.int32).expand(spec.shape)
        elif "_codes" in name:
            made[name] = torch.randint(-(2**31), 2**31, spec.shape, generator=generator, dtype=torch.int32)
        elif name.endswith("columns"):
            made[name] = torch.arange(1, spec.shape[0] + 1, dtype=torch.int32)
        else:
            made[name] = torch.randn(spec.shape, generator=generator, dtype=torch.float32) / 4
    return made


def module(plan: LayerPlan, tensors: dict[str, torch.Tensor]) -> EngineExperts:
    made = EngineExperts(plan, torch.float32, gated("silu"))
    made.load_state_dict(tensors, assign=True)
    return made


def call(ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, HIDDEN, generator=generator, dtype=torch.float32)
    own = torch.rand(9, EXPERTS, generator=generator).topk(3).indices
    weights = torch.rand(9, 3, generator=generator, dtype=torch.float32)
    return x, own if ids is None else ids, weights


def plan_of(name: str, layer: ExpertLayer = LAYER, **more: object) -> LayerPlan:
    return LayerPlan(layer, {"gate_up": stack(name, 2), "down": stack(name, 1)}, **more)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", FORMS)
def test_channels_over_ranks_add_up(name: str, size: int) -> None:
    plan = plan_of(name, BIASED, intercept=(1, 4))
    tensors = tensors_of(plan)
    total = torch.zeros(9, HIDDEN, dtype=torch.float32)
    for rank in range(size):
        local, own = share_of_layer(plan, tensors, Share.of_channels(plan, rank, size))
        assert {n: tuple(t.shape) for n, t in own.items()} == {n: s.shape for n, s in local.tensors().items()}
        total += module(local, own)(*call())
    torch.testing.assert_close(total, module(plan, tensors)(*call()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", [name for name in FORMS if "residual" not in name])
def test_experts_over_ranks_add_up(name: str, size: int) -> None:
    """Whole on their rank, or cut again among `size` ranks."""
    plan = plan_of(name, BIASED, intercept=(1, 4))
    tensors = tensors_of(plan)
    x, ids, weights = call()
    total = torch.zeros_like(x)
    for held, rank in product(((0, 1, 2, 3), (4, 5, 6, 7)), range(size)):
        local, own = share_of_layer(plan, tensors, Share.of_experts(plan, held, rank, size))
        assert {n: tuple(t.shape) for n, t in own.items()} == {n: s.shape for n, s in local.tensors().items()}
        place = torch.full((EXPERTS,), len(held))
        place[list(held)] = torch.arange(len(held))
        total += module(local, own)(x, place[ids], weights)
    torch.testing.assert_close(total, module(plan, tensors)(x, ids, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["ragged", "latent", "ragged_mixture", "low_rank", "shared_basis", "mixture", "few_bits_latent"]
)
def test_private_factors_are_cut_and_not_copied(name: str) -> None:
    plan = plan_of(name)
    tensors = tensors_of(plan)
    private = [n for n in tensors if "basis" not in n and "mix" not in n]
    parts = [share_of_layer(plan, tensors, Share.of_channels(plan, rank, 2))[1] for rank in range(2)]
    held = [sum(t.numel() for n, t in part.items() if n in private) for part in parts]
    assert sum(held) == sum(tensors[n].numel() for n in private)
    assert max(held) <= 0.6 * sum(held)


def test_widths_keep_their_multiple() -> None:
    """A kernel made for runs of 4 channels finds them on every rank."""
    shares = [Share.of_channels(plan_of("ragged"), rank, 2) for rank in range(2)]
    assert all(width % 4 == 0 for share in shares for width in share.widths)
    assert [sum(pair) for pair in zip(*(s.widths for s in shares), strict=True)] == list(WIDTHS)


def test_another_shape_than_planned_is_named() -> None:
    plan = plan_of("dense")
    tensors = tensors_of(plan) | {"down_weight": torch.zeros(EXPERTS, WIDTH, HIDDEN - 1)}
    with pytest.raises(UserError, match=r"experts.down_weight: has shape \(8, 16, 23\)"):
        share_of_layer(plan, tensors, Share.of_channels(plan, 0, 1))


def test_what_cannot_be_cut_says_so() -> None:
    narrow = plan_of("dense")
    with pytest.raises(UserError, match="16 channels can't be cut into 17"):
        Share.of_channels(narrow, 0, 17)
    mixed = LayerPlan(LAYER, {"gate_up": stack("ragged", 2), "down": stack("dense", 1)})
    with pytest.raises(UserError, match="only some of its stacks"):
        Share.of_channels(mixed, 0, 2)
    dynamic = replace(stack("base_plus_delta", 1), dynamic=0.5)
    plan = LayerPlan(LAYER, {"gate_up": stack("dense", 2), "down": dynamic})
    with pytest.raises(UserError, match=r"experts down: .*--dynamic"):
        share_of_layer(plan, tensors_of(plan), Share.of_channels(plan, 0, 2))
    with pytest.raises(UserError, match="--dynamic"):
        share_of_layer(plan, tensors_of(plan), Share.of_experts(plan, (0, 1, 2, 3)))
    plan = plan_of("window_residual")
    with pytest.raises(UserError, match="serve it tensor parallel"):
        share_of_layer(plan, tensors_of(plan), Share.of_experts(plan, (0, 1, 2, 3)))
    plan = plan_of("mixture")
    with pytest.raises(UserError, match="cut through groups of 4"):
        share_of_layer(plan, tensors_of(plan), Share.of_experts(plan, (0, 1, 4)))
    rounded = Quantised(EXPERTS, WIDTH, HIDDEN, stack("shared_private", 1), 8, (("private", 4),))
    plan = LayerPlan(LAYER, {"gate_up": stack("dense", 2), "down": rounded})
    with pytest.raises(UserError, match="experts down: private is in 4 bits, in groups along the channels"):
        share_of_layer(plan, tensors_of(plan), Share.of_channels(plan, 0, 2))
    share_of_layer(plan, tensors_of(plan), Share.of_experts(plan, (0, 1)))  # whole, they need not be cut


def test_layers_are_known_by_their_index_and_prediction_layers_are_not_ours() -> None:
    assert layer_index("model.layers.3.mlp.experts") == 3
    assert layer_index("language_model.model.layers.11.block_sparse_moe.experts") == 11
    assert layer_index("mtp.layers.0.mlp.experts") is layer_index("model.mtp_block.0.experts") is None


def test_a_newer_format_is_refused_by_every_reader() -> None:
    config = {"format_version": 99, "package_version": "9.0", "layers": []}
    with pytest.raises(UserError, match="format_version 99, the installed moefactor reads 1"):
        plans_by_index(config)
