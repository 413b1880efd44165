"""Peak memory of `moefactor compress`: it follows the largest layer, not the model.

    python benchmarks/memory.py                              two sizes, five methods
    python benchmarks/memory.py --sizes ten --methods svd

Random Qwen3-MoE checkpoints with the reference's tokenizer: `ten` has ten times the reference's parameters, `long`
ten times those of `ten`'s in layers of the same size. Each compression is a process of its own; its peak is the
kernel's maximum resident set, which counts Python, torch and transformers too. Held against it: four times the largest
layer as the checkpoint stores it, plus 500 MB. Prints a table and writes JSON (default results/memory.json).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from moefactor.stages import Recipe

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
METHODS = ("svd", "whitened_svd", "shared_basis", "rfid", "biaxial")
MEGABYTE = 1_000_000
ALLOWANCE = 500 * MEGABYTE  # Python, torch, transformers, the calibration text

# Name -> what differs from the reference's config.
SIZES = {
    "ten": {"hidden_size": 256, "num_experts": 64, "moe_intermediate_size": 96, "num_hidden_layers": 6},
    "long": {"hidden_size": 256, "num_experts": 64, "moe_intermediate_size": 96, "num_hidden_layers": 64},
    "wide": {"hidden_size": 512, "num_experts": 64, "moe_intermediate_size": 192, "num_hidden_layers": 12},
}


@dataclass(frozen=True)
class Peak:
    """One compression, in bytes and seconds."""

    size: str
    method: str
    model: int
    largest_layer: int
    limit: int
    peak: int
    seconds: float


def build(name: str, folder: Path, seed: int = 0) -> None:
    """Writes the checkpoint of a size in shards of 50 MB."""
    config = AutoConfig.from_pretrained(REFERENCE)
    config.update({**SIZES[name], "num_local_experts": SIZES[name]["num_experts"]})
    config.dtype = torch.bfloat16
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    for file in REFERENCE.glob("tokenizer*"):
        shutil.copy(file, folder)


def largest_layer(folder: Path) -> int:
    """Bytes of the decoder layer that has most of them."""
    layers: dict[str, int] = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in list(file.keys()):
                if ".layers." in name:
                    layer = name.split(".layers.")[1].split(".")[0]
                    size = file.get_tensor(name).nbytes
                    layers[layer] = layers.get(layer, 0) + size
    return max(layers.values())


def measure(size: str, method: str, model: Path, folder: Path, samples: int) -> Peak:
    command = [
        sys.executable, "-m", "moefactor.cli", "compress", str(model), "--method", method, "--ratio", "0.4",
        "--device", "cpu", "--output", str(folder / "out"),
    ]  # fmt: skip
    if Recipe.of(method, {}).reads_text:  # of its own it would write some, which holds the whole model
        command += ["--samples", str(samples), "--seqlen", "256", "--own-text", "0"]
    started = time.perf_counter()
    with open(folder / "log", "w+") as log:
        # Threads that wait for each other on small matrices can take fifty times as long.
        child = subprocess.Popen(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ})
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit status {child.returncode}\n{log.read()[-2000:]}")
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "out")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    layer = largest_layer(model)
    total = sum(shard.stat().st_size for shard in model.glob("*.safetensors"))
    return Peak(size, method, total, layer, 4 * layer + ALLOWANCE, peak, round(seconds, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="ten,long", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument("--output", type=Path, default=Path("results/memory.json"))
    arguments = parser.parse_args()
    peaks = []
    print(f"{'':6}{'method':14}{'model MB':>10}{'layer MB':>10}{'limit MB':>10}{'peak MB':>10}{'seconds':>9}")
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder, model = Path(name), Path(name) / "model"
            # Elsewhere: a process starts with the peak of the one that it was forked from, and this one forks.
            builder = multiprocessing.get_context("spawn").Process(target=build, args=(size, model))
            builder.start()
            builder.join()
            for method in arguments.methods.split(","):
                peak = measure(size, method, model, folder, arguments.samples)
                peaks.append(peak)
                figures = (peak.model, peak.largest_layer, peak.limit, peak.peak)
                over = "" if peak.peak <= peak.limit else "  over the limit"
                print(
                    f"{size:6}{method:14}" + "".join(f"{f / MEGABYTE:10.1f}" for f in figures)
                    + f"{peak.seconds:9.1f}{over}", flush=True,
                )  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps([asdict(peak) for peak in peaks], indent=1) + "\n")


if __name__ == "__main__":
    main()
