"""reap and channels against brute force: remove it, measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import moefactor
from layers import LAYERS, UNUSED, factorised, random_stats, random_weights, routed_tokens, stacked
from models import IDS, load, logits, on_disk
from moefactor.calibrate import Calibration, calibrate
from moefactor.evaluation import window_losses
from moefactor.experts import ExpertWeights
from moefactor.fitting.metrics import RIDGE
from moefactor.fitting.stack import Stack
from moefactor.methods import METHODS, accepted, channels
from moefactor.methods.reap import best_in_groups, saliency
from moefactor.plan import Plan
from moefactor.run_folder import RunFolder
from moefactor.runtime.module import FactorisedExperts
from moefactor.stages import Recipe, Run
from moefactor.stats import STATISTICS, LayerStats
from moefactor.streaming import StreamedModel
from moefactor.text import load_tokenizer, tokenise

TEXT = Calibration([IDS], {"source": "ids", "samples": 2, "seqlen": 24})
# Plain; group-limited, with shared experts and a dense first layer; biases on router and experts.
DROPPED = ["qwen3_moe", "deepseek_v3", "gpt_oss"]


def staged(source: Path, method: str, ratio: float, folder: Path, **options: object) -> tuple[Path, Plan, RunFolder]:
    """A compressed folder with the plan and the run folder behind it."""
    run = RunFolder(folder / "run")
    work = Run(StreamedModel(str(source)), Recipe.of(method, options, ratio=ratio), run)
    vars(work)["text"] = TEXT
    return folder / "out", work.all(folder / "out"), run


# -- reap ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DROPPED)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


Staged = dict[str, tuple[Path, Path, Plan, RunFolder]]


@pytest.fixture(scope="module")
def everything(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Staged:
    """Name -> (source, standard checkpoint, plan, run) of all the tests below."""
    made = {}
    for kind in DROPPED:
        source = tiny_model(kind)
        if kind != "qwen3_moe":
            source = livelier(source, tmp_path_factory.mktemp("livelier") / kind)
        made[kind] = (source, *staged(source, "reap", 0.3, tmp_path_factory.mktemp(kind)))
        folder = tmp_path_factory.mktemp("standard")
        made[f"standard {kind}"] = (source, *staged(source, "biaxial", 0.45, folder, form="standard", width_multiple=8))
    for kind in ("qwen3_moe", "gpt_oss"):
        source = tiny_model(kind)
        folder = tmp_path_factory.mktemp("narrow")
        made[f"narrow {kind}"] = (source, *staged(source, "channels", 0.3, folder, widths="model"))
    return made


def livelier(source: Path, folder: Path) -> Path:
    """A model whose corrections of the router's scores choose other experts, and whose tokens differ beside biases."""
    model = load(source)
    model.get_input_embeddings().weight.data.normal_(generator=torch.Generator().manual_seed(0))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0.4, 0, len(buffer)))
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(everything: Staged, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits of the standard checkpoints in a process that can't import moefactor."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.save({"ids": IDS, "folders": {name: str(out) for name, (_, out, *_) in everything.items()}}, folder / "in")
    code = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moefactor":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
given, found = torch.load({str(folder / "in")!r}), {{}}
for name, path in given["folders"].items():
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (name, info)
    with torch.no_grad():
        found[name] = model.eval()(input_ids=given["ids"], use_cache=False).logits
torch.save(found, {str(folder / "out")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out")


@contextmanager
def without(router: nn.Module, dropped: list[int]) -> Iterator[None]:
    """The router's logits for dropped experts are −∞ before any top-k."""
    plain, forward = nn.functional.linear, router.forward

    def masked(*args: object) -> Tensor:
        out = plain(*args)
        return out.index_fill(-1, torch.tensor(dropped, dtype=torch.long), -torch.inf)

    def blind(*args: object, **kwargs: object) -> object:
        with patch.object(nn.functional, "linear", masked):
            return forward(*args, **kwargs)

    correction = getattr(router, "e_score_correction_bias", None)
    if correction is not None:  # sigmoid(−∞) is 0, to which the correction is added
        correction[dropped] = -torch.inf
    router.forward = blind
    yield
    router.forward = forward


def router_of(model: nn.Module, experts: str) -> nn.Module:
    block = model.get_submodule(experts.rpartition(".")[0])
    return block.router if hasattr(block, "router") else block.gate


def test_dropping_is_masking_the_router(kind: str, everything: Staged, elsewhere: dict[str, Tensor]) -> None:
    """In plain transformers; the dense model that may not choose the dropped experts says the same."""
    source, _, plan, _ = everything[kind]
    dense = load(source)
    with ExitStack() as blinded:
        for entry in plan.layers:
            dropped = [e for e in range(8) if e not in entry.kept]
            assert dropped
            blinded.enter_context(without(router_of(dense, entry.layer.name), dropped))
        expected = logits(dense)
    scale = float(expected.abs().max())
    torch.testing.assert_close(elsewhere[kind], expected, atol=2e-5 * scale, rtol=0)
    assert float((expected - logits(load(source))).abs().max()) > 1e-3 * scale


def test_the_checkpoint_is_an_ordinary_smaller_one(kind: str, everything: Staged) -> None:
    source, out, plan, _ = everything[kind]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    count = next(n for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in before)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert changed == {count}
    assert after[count] == len(plan.layers[0].kept) < before[count]
    assert plan.parameter_count() <= 0.7 * plan.original_count
    model = load(out)
    assert not [m for m in model.modules() if isinstance(m, FactorisedExperts)]
    assert "modeling_moefactor.py" not in {p.name for p in out.iterdir()}
    # Cut to the expert, and in the source's names; all that is no expert is the source's.
    stored, original = on_disk(out), on_disk(source)
    assert stored.keys() <= original.keys()
    for entry in plan.layers:
        block = entry.layer.name.rpartition(".")[0]
        routers = [n for n in stored if n.startswith(block) and "gate." in n.replace("router.", "gate.")]
        routers = [n for n in routers if "experts." not in n and "shared" not in n]
        assert routers
        for name in routers:
            assert torch.equal(stored[name], original[name][list(entry.kept)])


def test_fewer_and_narrower_at_once(kind: str, everything: Staged, elsewhere: dict[str, Tensor]) -> None:
    """biaxial's `standard` in a process without moefactor: nothing missing or left over, the same logits."""
    source, out, plan, _ = everything[f"standard {kind}"]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    experts, width = plan.standard()
    changed = {k: after.get(k) for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert set(changed.values()) <= {experts, width, "eager"}
    assert changed
    assert plan.parameter_count() <= 0.55 * plan.original_count
    here = logits(load(out))
    torch.testing.assert_close(elsewhere[f"standard {kind}"], here, atol=1e-5 * float(here.abs().max()), rtol=0)


def test_groups_keep_equal_numbers(everything: Staged) -> None:
    _, _, plan, run = everything["deepseek_v3"]
    for index, entry in enumerate(plan.layers):
        halves = [[e for e in entry.kept if e // 4 == group] for group in (0, 1)]
        assert len(halves[0]) == len(halves[1]) >= 2  # DeepSeek-V3 ranks groups by their two best
        scores = saliency(run.stats(index))
        for group, half in enumerate(halves):
            gone = [e for e in range(4 * group, 4 * group + 4) if e not in half]
            assert min(scores[half]) >= max(scores[gone])


def test_best_in_groups() -> None:
    scores = torch.tensor([5.0, 1, 2, 9, 0, 0, 7, 3])
    assert best_in_groups(scores, 1, 3) == (0, 3, 6)
    assert best_in_groups(scores, 2, 2) == (0, 3, 6, 7)
    assert best_in_groups(scores, 4, 1) == (0, 3, 4, 6)


def test_saliency_is_the_mean_routed_output(everything: Staged) -> None:
    """Σ g‖f(x)‖ / tokens, token by token, from the dense model."""
    source, _, plan, run = everything["qwen3_moe"]
    model = load(source)
    for index, entry in enumerate(plan.layers):
        module, seen = model.get_submodule(entry.layer.name), []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        logits(model)
        handle.remove()
        x, chosen, g = seen[0]
        sums, tokens = torch.zeros(8), torch.zeros(8)
        for t in range(len(x)):
            for expert, weight in zip(chosen[t].tolist(), g[t], strict=True):
                gate, up = (module.gate_up_proj[expert] @ x[t]).chunk(2)
                out = module.down_proj[expert] @ (nn.functional.silu(gate) * up)
                sums[expert] += (weight * out.norm()).detach()
                tokens[expert] += 1
        expected = (sums / tokens.clamp(min=1)).double()
        torch.testing.assert_close(saliency(run.stats(index)), expected, atol=1e-5, rtol=1e-4)
        assert entry.kept == tuple(expected.topk(len(entry.kept)).indices.sort().values.tolist())


def test_an_intercept_is_the_dropped_experts_mean(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The router stays whole; a dropped expert gives Σ g² f(x) / Σ g²; the others are untouched."""
    out, plan, _ = staged(tiny_model("qwen3_moe"), "reap", 0.3, tmp_path, intercept=True)
    assert plan.standard() is None
    assert plan.parameter_count() <= 0.7 * plan.original_count
    dense, entry = load(tiny_model("qwen3_moe")), plan.layers[0]  # which sees the dense model's tokens
    module, seen = dense.get_submodule(entry.layer.name), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(dense)
    x, chosen, g = seen[0]
    compressed = load(out).get_submodule(entry.layer.name)
    for expert in range(8):
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=1)
        outputs = (nn.functional.silu(gate) * up) @ module.down_proj[expert].T
        share = ((chosen == expert) * g**2).sum(1, keepdim=True)
        expected = outputs
        if expert in entry.intercept:
            expected = ((share * outputs).sum(0) / share.sum().clamp(min=1e-30)).expand_as(outputs)
        with torch.no_grad():
            found = compressed(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))
        torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_dropped_expert_without_tokens_adds_nothing() -> None:
    weights = random_weights()
    plan, result = factorised(METHODS["reap"], weights, random_stats(weights), units=4, intercept=True)
    assert UNUSED in plan.intercept
    assert torch.equal(result.tensors["intercept"][plan.intercept.index(UNUSED)], torch.zeros(24).double())


# -- channels ------------------------------------------------------------------------------------------------------


def test_narrow_is_the_ragged_model(everything: Staged, elsewhere: dict[str, Tensor]) -> None:
    """`widths=model`: the standard checkpoint in plain transformers says what the factors in our runtime say."""
    for name in ("narrow qwen3_moe", "narrow gpt_oss"):
        source, out, plan, run = everything[name]
        widths = {w for entry in plan.layers for form in entry.forms.values() for w in form.widths}
        (width,) = widths
        config = json.loads((out / "config.json").read_text())
        assert config.get("moe_intermediate_size", config["intermediate_size"]) == width < 24
        if "moe_intermediate_size" in config:
            assert config["intermediate_size"] == 48  # that of dense layers
        assert "quantization_config" not in config
        assert plan.parameter_count() <= 0.7 * plan.original_count
        ragged = load(source)
        for index, entry in enumerate(plan.layers):
            parent, _, leaf = entry.layer.name.rpartition(".")
            original = ragged.get_submodule(entry.layer.name)
            module = FactorisedExperts.replacing(original, entry)
            stored = {k.removeprefix(entry.layer.name + "."): v for k, v in run.layer(index).items()}
            module.load_state_dict(stored, assign=True)
            setattr(ragged.get_submodule(parent), leaf, module)
        expected = logits(ragged)
        scale = float(expected.abs().max())
        torch.testing.assert_close(elsewhere[name], expected, atol=2e-5 * scale, rtol=0)


@pytest.fixture(scope="module")
def trained(
    reference_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Tensor, ExpertWeights, Tensor]:
    """The reference model, some text, the experts of its last layer and what `importance` says of their channels."""
    model = load(reference_moe, dtype=torch.float32)
    ids = tokenise(load_tokenizer(reference_moe), "\n\n".join(topics[name] for name in sorted(topics))[:20_000])
    ids = ids[: 16 * 128].view(16, 128)
    streamed, run = StreamedModel(str(reference_moe), dtype=torch.float32), RunFolder(tmp_path_factory.mktemp("run"))
    calibrate(streamed, run, Calibration([ids], {"source": "ids"}), {"output_gradient", "hidden_square"})
    weights = streamed.expert_weights(streamed.experts[3])
    return model, ids, weights, channels.importance(weights, run.stats(3))


def test_importance_predicts_what_removal_costs(trained: tuple) -> None:
    """One channel at a time set to nought, and to double; the mean of both leaves the estimate's second order.

    Half of it alone is no measure on so few tokens: at ±3 nats the first order hides the second of 0.1 to 1. Behind
    the last layer's experts comes only what works on each token alone, so the other tokens need not be run.
    """
    model, ids, weights, scores = trained
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(weights.layer.name).register_forward_pre_hook(
            lambda _, args: seen.update(zip(("x", "chosen", "g"), args, strict=True))
        ),
        model.model.norm.register_forward_pre_hook(lambda _, args: seen.update(last=args[0].flatten(0, 1))),
    ]
    whole = float(window_losses(model, ids).double().sum())
    for hook in hooks:
        hook.remove()
    following = torch.cat((ids[:, 1:], torch.full((16, 1), -100)), dim=1).flatten()

    @torch.no_grad()
    def loss(rows: Tensor, tokens: Tensor) -> float:
        out = model.lm_head(model.model.norm(rows))
        return float(
            nn.functional.cross_entropy(out, following[tokens], reduction="none", ignore_index=-100).double().sum()
        )

    assert loss(seen["last"], torch.arange(len(following))) == pytest.approx(whole, rel=1e-5)
    order = scores.flatten().argsort()
    picked = order[torch.linspace(len(order) // 4, len(order) - 1, 40).long()].tolist()
    costs = []
    for index in picked:
        expert, k = divmod(index, weights.layer.intermediate)
        tokens, slot = (seen["chosen"] == expert).nonzero(as_tuple=True)
        x, last = seen["x"][tokens], seen["last"][tokens]
        h = nn.functional.silu(x @ weights.gate[expert, k]) * (x @ weights.up[expert, k])
        part = torch.outer(seen["g"][tokens, slot] * h, weights.down[expert, :, k])
        costs.append((loss(last - part, tokens) + loss(last + part, tokens)) / 2 - loss(last, tokens))
    estimates, costs = scores.flatten()[picked], torch.tensor(costs)
    assert spearman(estimates, costs) > 0.7
    assert 0.4 < float(costs.sum() / estimates.sum()) < 2.5  # in nats, not only in order


def test_the_least_important_channels_are_the_least_missed(trained: tuple) -> None:
    """A quarter of all channels gone at once: by far the smallest rise of the loss is that of the lowest quarter."""
    model, ids, weights, scores = trained
    down, order = model.get_submodule(weights.layer.name).down_proj, scores.flatten().argsort().chunk(4)
    kept, before, rises = down.detach().clone(), window_losses(model, ids).mean(), []
    for quarter in (0, 2, 3):
        gone = torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order[quarter], True).view_as(scores)
        down.data.copy_(kept.masked_fill(gone.unsqueeze(1), 0))
        rises.append(float(window_losses(model, ids).mean() - before))
    down.data.copy_(kept)
    assert abs(rises[0]) < 0.2 * rises[1] < 0.5 * rises[2]


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_importance_is_the_formula() -> None:
    """½ Σ_t h_k² · d_kᵀ (Σ ∇∇ᵀ / n) d_k, channel by channel."""
    weights = random_weights()
    stats = random_stats(weights)
    found = channels.importance(weights, stats)
    for expert, _, h, _, g in routed_tokens(weights):
        metric = stats.output_gradient[expert] / len(g)
        for k in range(16):
            d = weights.down[expert, :, k]
            expected = 0.5 * float((h[:, k] ** 2).sum()) * float(d @ metric @ d)
            assert float(found[expert, k]) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(found[UNUSED], torch.zeros(16).double())


def test_ranking_by_the_mean_is_of_a_token_of_the_expert() -> None:
    """Rare experts' channels count as much as frequent ones'; within an expert the order stays."""
    weights = random_weights()
    stats = random_stats(weights)
    offered = {
        ranking: METHODS["channels"].price(weights, stats, None, seed=0, ranking=ranking).offers
        for ranking in ("sum", "mean")
    }
    for expert, (summed, mean) in enumerate(zip(offered["sum"], offered["mean"], strict=True)):
        torch.testing.assert_close(mean.gains * stats.count[expert].clamp(min=1).double(), summed.gains)


def test_the_cheapest_channels_go(everything: Staged) -> None:
    _, _, plan, run = everything["narrow qwen3_moe"]
    width = plan.layers[0].forms["down"].widths[0]
    source = StreamedModel(str(everything["narrow qwen3_moe"][0]))
    for index, entry in enumerate(plan.layers):
        weights = source.expert_weights(entry.layer)
        scores = channels.importance(weights, run.stats(index))
        rows = run.layer(index)[entry.layer.name + ".gate_up_weight"].view(8, 2, width, 32)
        for expert in range(8):
            best = scores[expert].topk(width).indices.sort().values
            if index == 0:  # later layers score their own inputs again
                assert torch.equal(rows[expert, 0], weights.gate[expert][best])
                assert torch.equal(rows[expert, 1], weights.up[expert][best])


@pytest.mark.parametrize("intercept", [False, True])
def test_refit_is_weighted_least_squares(intercept: bool) -> None:
    """argmin ‖(D − D'_K)h‖² + ridge‖D'_K − D_K‖² under the expert's second moment of h, by lstsq."""
    weights, kept = random_weights(), torch.tensor([0, 2, 3, 7, 11])
    stats = random_stats(weights)
    stack = Stack("down", weights.stack("down"), stats)
    for expert in range(8):
        rows, _ = channels.refitted_down(stack, expert, kept, refit=True, centred=intercept)
        down = weights.down[expert].T.double()  # (I, H)
        if expert == UNUSED:
            torch.testing.assert_close(rows, down[kept])
            continue
        moment = stack.moment(expert)
        if intercept:
            mean = stats.hidden_sum[expert].double() / stats.weight_square[expert]
            # The moment borrows from the layer; only the expert's own share of it has the expert's mean.
            own = float(stats.count[expert] / (stats.count[expert] + len(mean)))
            moment = moment - own * torch.outer(mean, mean)
        root = torch.linalg.cholesky(moment)
        level = moment.diagonal()[kept].mean()
        ridge = float(RIDGE * (1 + 64 / stats.count[expert]) * level) ** 0.5
        eye = torch.eye(5, dtype=torch.float64)
        left = torch.cat((root[kept].T, ridge * eye))
        right = torch.cat((root.T @ down, ridge * down[kept]))
        torch.testing.assert_close(rows, torch.linalg.lstsq(left, right).solution, atol=1e-6, rtol=1e-6)


def lost_outputs(weights: ExpertWeights, **options: object) -> list[Tensor]:
    """Of each expert in use: g² · (what it gives − what is left of it gives), its calibration tokens × H."""
    plan, result = factorised(METHODS["channels"], weights, random_stats(weights), units=6, **options)
    rebuilt, lost = result.dense(), []
    for expert, x, _, y, g in routed_tokens(weights):
        up = x @ rebuilt.up[expert].T.float()
        h = nn.functional.silu(x @ rebuilt.gate[expert].T.float()) * up
        found = h @ rebuilt.down[expert].T.float()
        if plan.intercept:
            found = found + result.tensors["intercept"][expert].float()
        lost.append(g.square().unsqueeze(1) * (y - found))
    return lost


def test_refitting_pays() -> None:
    energy = [
        sum(float(rows.square().sum()) for rows in lost_outputs(random_weights(), **options))
        for options in ({"refit": False}, {}, {"intercept": True})
    ]
    assert energy[1] < 0.8 * energy[0]
    assert energy[2] < energy[1]


@pytest.mark.parametrize("refit", [False, True])
def test_the_intercept_leaves_no_mean_error(refit: bool) -> None:
    for rows in lost_outputs(random_weights(), intercept=True, refit=refit):
        assert float(rows.sum(0).abs().max()) < 1e-4 * float(rows.abs().sum())
    worst = max(float(r.sum(0).abs().max() / r.abs().sum()) for r in lost_outputs(random_weights(), refit=refit))
    assert worst > 1e-3


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_experts_of_no_width(kind: str, intercept: bool) -> None:
    """A global ranking empties experts; what is left of them is a constant or nothing, never NaN."""
    weights = random_weights(LAYERS[kind])
    stats = random_stats(weights)
    method = METHODS["channels"]
    options = method.complete({"intercept": intercept})
    offers = method.price(weights, stats, None, seed=0, **options)
    for bought in ([0] * 8, [0, 16, 0, 3, 0, 1, 5, 0]):
        plan = method.build(offers, bought)
        result = method.factorise(weights, stats, plan, seed=0, **accepted(method.factorise, options))
        assert all(torch.isfinite(tensor).all() for tensor in result.tensors.values())
        assert result.parameter_count() == plan.parameter_count()
        assert 0 <= result.errors["down"] <= 1 + 1e-6
        assert plan.standard() is None
        rebuilt = stacked(result.dense())
        for expert, width in enumerate(bought):
            assert all((rebuilt[name][expert] != 0).any() == (width > 0) for name in rebuilt)


def test_a_model_with_empty_experts_runs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out, plan, _ = staged(tiny_model("qwen3_moe"), "channels", 0.9, tmp_path, intercept=True)
    assert 0 in {w for entry in plan.layers for w in entry.forms["down"].widths}
    assert plan.parameter_count() <= 0.1 * plan.original_count
    model = load(out)
    assert torch.isfinite(logits(model)).all()
    assert model.generate(IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)


def test_equal_widths_by_layer_are_not_standard(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out, plan, _ = staged(tiny_model("mixtral"), "channels", 0.4, tmp_path, widths="layer")
    widths = [set(entry.forms["down"].widths) for entry in plan.layers]
    assert all(len(of_layer) == 1 for of_layer in widths)
    assert torch.isfinite(logits(load(out))).all()


def test_nothing_else_is_written_for_a_standard_checkpoint(everything: Staged) -> None:
    """A standard checkpoint is no compressed folder: there is nothing to export."""
    with pytest.raises(moefactor.UserError, match="not a checkpoint of moefactor's"):
        moefactor.export_dense(str(everything["qwen3_moe"][1]), everything["qwen3_moe"][1].parent / "dense")


def test_statistics_of_a_layer_without_tokens() -> None:
    weights = random_weights()
    empty = LayerStats.zeros(LAYERS["gated"], STATISTICS)
    assert torch.equal(saliency(empty), torch.zeros(8).double())
    assert torch.equal(channels.importance(weights, empty), torch.zeros(8, 16).double())
