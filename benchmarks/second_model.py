"""Trains a second small MoE, made differently from the reference model, to see that nothing was tuned to the first.

    python benchmarks/second_model.py -o results/second-moe      about an hour on one core
    python benchmarks/quality.py --model results/second-moe --output results/second.json

DeepSeek-V3's kind: multi-head latent attention, a dense first layer, 16 experts of width 96 (top 2) and a shared one,
sigmoid and group-limited routing, balanced by a bias that training moves instead of by an auxiliary loss. Trained on
the two calibration texts and on the source of Python's standard library, with the reference model's tokenizer; the
best state on WikiText-2 and PTB valid is written.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from moefactor.evaluation import window_losses
from moefactor.text import tokenise

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "assets" / "reference-moe"
WINDOW, BATCH = 256, 16
BIAS_STEP = 1e-3  # DeepSeek-V3's γ
CHARACTERS_OF_CODE = 3_000_000


def build(vocabulary: int) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=vocabulary, hidden_size=160, intermediate_size=480, moe_intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=2, n_shared_experts=1, n_group=4,
        topk_group=2, norm_topk_prob=True, routed_scaling_factor=1.5, first_k_dense_replace=1,
        max_position_embeddings=WINDOW, tie_word_embeddings=True, rope_theta=10000.0, pad_token_id=0, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def routers(model: DeepseekV3ForCausalLM) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


class Balance:
    """Moves each router's bias against its load after every step (auxiliary-loss-free balancing, arXiv 2408.15664)."""

    def __init__(self, model: DeepseekV3ForCausalLM):
        self.pairs = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
                load = torch.zeros(model.config.n_routed_experts)
                layer.mlp.experts.register_forward_pre_hook(self._count(load))
                self.pairs.append((layer.mlp.gate.e_score_correction_bias, load))

    @staticmethod
    def _count(load: Tensor) -> object:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            load.add_(torch.bincount(args[1].flatten().cpu(), minlength=len(load)))

        return hook

    @torch.no_grad()
    def step(self) -> None:
        for bias, load in self.pairs:
            bias.add_(BIAS_STEP * (load.mean() - load).sign().to(bias))
            load.zero_()


def read(data: Path, tokenizer: object) -> tuple[Tensor, Tensor]:
    """Token ids to train on and to choose by, in windows."""
    texts = [(data / name).read_text() for name in ("calibration-proportional.txt", "calibration-mix.txt")]
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts.append("\n\n".join(s.read_text(errors="replace") for s in sources)[:CHARACTERS_OF_CODE])
    valid = [(data / name / "valid.txt").read_text()[:150_000] for name in ("wikitext2", "ptb")]

    def cut(parts: list[str]) -> Tensor:
        ids = torch.cat([tokenise(tokenizer, part) for part in parts])
        return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)

    return cut(texts), cut(valid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", "-o", type=Path, default=Path("results/second-moe"))
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    train, valid = read(arguments.data, tokenizer)
    model = build(len(tokenizer)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {train.numel():,} tokens, {device}", flush=True)
    balance = Balance(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 200)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    best, order, started = float("inf"), torch.empty(0, dtype=torch.long), time.perf_counter()
    for step in range(arguments.steps):
        if len(order) < BATCH:
            order = torch.randperm(len(train))
        chosen, order = order[:BATCH], order[BATCH:]
        ids = train[chosen].to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        balance.step()
        if (step + 1) % 300 == 0 or step + 1 == arguments.steps:
            model.eval()
            held = torch.cat([window_losses(model, part.to(device)).cpu() for part in valid.split(BATCH)]).mean().item()
            model.train()
            for _, load in balance.pairs:
                load.zero_()
            print(
                f"step {step + 1}: train {loss.item():.3f}, held out {held:.3f} (perplexity {math.exp(held):.1f}), "
                f"{time.perf_counter() - started:.0f} s", flush=True,
            )  # fmt: skip
            if held < best:
                best = held
                model.save_pretrained(arguments.output)
                tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
