"""What the rest of a model in fewer bits costs: perplexity, bytes on disk and in memory.

    python benchmarks/rest.py
    python benchmarks/rest.py --model results/second-moe --output results/second-rest.json

The experts are those of one folder (svd, a fiftieth removed), the rest of it in 16, 8 and 4 bits; embeddings and the
head, which `--rest-bits 4` leaves at 8, in 4 too; groups of other sizes. Perplexities on the first 96 windows of 256
tokens of each text, their geometric mean as a multiple of that with the rest in 16 bits, in float32; bytes of what is
not an expert, on disk and in memory in bfloat16. Prints a table and writes JSON (default results/rest.json).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import moefactor
from moefactor import rest
from moefactor.evaluation import evaluate
from quality import MODEL, ROOT, TEXTS

# Row -> (--rest-bits, fewest bits of embeddings and the head, group).
ROWS = {
    "16": (16, 8, 64),
    "8": (8, 8, 64),
    "4": (4, 8, 64),
    "4, embeddings too": (4, 4, 64),
    "4, groups of 32": (4, 8, 32),
    "4, groups of 128": (4, 8, 128),
    "8, groups of 128": (8, 8, 128),
}


def measure(model: Path, bits: int, embeddings: int, group: int, data: Path) -> dict:
    with tempfile.TemporaryDirectory() as place, patch.multiple(rest, EMBEDDING_BITS=embeddings, GROUP=group):
        out = moefactor.compress(str(model), "svd", 0.02, Path(place) / "out", rest_bits=bits)
        texts = [str(data / file) for file in TEXTS.values()]
        found = evaluate(str(out), texts, window=256, max_windows=96, dtype="float32")
        small = evaluate(str(out), texts[:1], window=256, max_windows=1)
        # Of experts as many bytes in memory as on disk; indices and headers are some hundred.
        return {
            "perplexity": found.mean_perplexity,
            "disk": found.disk_bytes - small.expert_bytes,
            "resident": small.resident_bytes - small.expert_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "rest.json")
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    print("| rest | perplexity over 16 bits | bytes on disk | in memory |\n|---|---|---|---|")
    for row, (bits, embeddings, group) in ROWS.items():
        results[row] = found = measure(arguments.model, bits, embeddings, group, arguments.data)
        over = found["perplexity"] / results["16"]["perplexity"]
        print(f"| {row} | {over:.4f} | {found['disk']:,} | {found['resident']:,} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
