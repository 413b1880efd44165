"""How close the kept part of a distribution comes to the whole divergence (docs/evaluation.md).

    python benchmarks/divergence.py COMPRESSED --text wikitext2/test.txt --text heldout/code.txt

For each number of likeliest tokens: the lower bound, all others as one, and the estimate with tokens drawn from these
others, each with what is missing from the exact divergence; and the deviation of the estimate's mean over the tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from moefactor.contrast import DRAWN
from moefactor.divergence import cells, draw_others, kl_of_cells, kl_of_others
from moefactor.evaluation import next_logits
from moefactor.loading import load
from moefactor.text import load_tokenizer, read_ids, vocabulary_of, windows

MODEL = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
TOPS = (1, 8, 32, 64, 128, 256)


@torch.no_grad()
def log_probs(name: str, texts: list[str], window: int, count: int) -> Tensor:
    """(tokens, vocabulary) of the first windows of each text."""
    model, tokenizer = load(name, device="cpu", dtype=torch.float32), load_tokenizer(name)
    ids = [windows(read_ids(text, tokenizer, vocabulary_of(model)), window, text)[:count] for text in texts]
    return torch.cat([next_logits(model, part).flatten(0, 1).log_softmax(-1) for part in torch.cat(ids).split(8)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed")
    parser.add_argument("--against", default=str(MODEL))
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=12, help="of each text")
    arguments = parser.parse_args()
    how = arguments.text, arguments.window, arguments.windows
    p, q = log_probs(arguments.against, *how), log_probs(arguments.compressed, *how)
    exact = (p.exp() * (p - q)).sum(-1)
    print(f"{len(p):,} tokens, exact {exact.mean():.5f}\n")
    print("| likeliest | mass of the others | lower bound | | estimate | | deviation |\n|---|---|---|---|---|---|---|")
    for count in TOPS:
        top = p.topk(count).indices
        drawn = draw_others(p, top, DRAWN, torch.Generator().manual_seed(0))
        p_cells, q_cells = cells(p, top), cells(q, top)
        bound = kl_of_cells(p_cells, q_cells)
        found = bound + kl_of_others(p_cells, q_cells, p.gather(1, drawn), q.gather(1, drawn))
        shown = [f"{e.mean():.5f} | {e.mean() / exact.mean() - 1:+.1%}" for e in (bound, found)]
        deviation = (found - exact).std() / len(found) ** 0.5
        print(f"| {count} | {p_cells[:, -1].exp().mean():.1%} | {' | '.join(shown)} | {deviation:.5f} |")


if __name__ == "__main__":
    main()
