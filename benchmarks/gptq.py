"""GPTQ of the dense model's experts through llm-compressor: what quantising alone costs, done well.

    python -m venv ENV && ENV/bin/pip install llmcompressor -e .     0.14 wants a transformers of its own, 5.17 at most
    ENV/bin/python benchmarks/gptq.py                                4, 3 and 2 bits, calibrated on like text
    ENV/bin/python benchmarks/gptq.py --bits 3 --calibrations like,unlike --symmetric

Layer after layer, on inputs from layers that are quantised already, each expert by the tokens that are routed to it.
Scales are those of least squared error, in bfloat16, and there is a zero point of as many bits as a code: symmetric
levels have one more below zero than above, which costs little at 4 bits and much at 2. Groups of 32 weights along the
inputs of gate and up. Those of down are the expert's width, 48 on the reference model, which 32 does not divide: there
groups of 24, as many as 32 and the 16 left over would be. Texts and windows as in quality.py. Prints a table as it goes
and writes JSON (default results/gptq.json); rows already there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from moefactor.checkpoint import Checkpoint, CheckpointWriter
from moefactor.text import Reading, draw_windows, load_tokenizer
from quality import CALIBRATIONS, MODEL, ROOT, TEXTS, calibration_of, measure

GROUP = 32
WINDOW, SAMPLES, SEED = 256, 256, 0  # of calibration text, as in quality.py
BATCH = 16  # windows at a time


def group_of(inputs: int) -> int:
    """The largest that divides a row and needs no more scales than groups of GROUP with a shorter last."""
    return inputs // next(n for n in range(-(-inputs // GROUP), inputs + 1) if inputs % n == 0)


def bits_of(model: Path, bits: int, symmetric: bool = False) -> float:
    """Of an expert's parameter, scales and zero points and all."""
    config = json.loads((model / "config.json").read_text())
    rows = (config["hidden_size"], config["hidden_size"], config["moe_intermediate_size"])  # gate, up, down: one size
    return bits + sum((16 + (0 if symmetric else bits)) / group_of(inputs) for inputs in rows) / len(rows)


def gptq(
    model: Path, calibration: str, bits: int, folder: Path, *, symmetric: bool = False, every_token: bool = False
) -> Path:
    """The model with its experts quantised, as numbers again (float32): the new folder `folder`/out.

    Args:
        calibration: SAMPLES windows are drawn from it.
        symmetric: without zero points.
        every_token: each expert is calibrated by all tokens, as llm-compressor does unless told otherwise.
    """
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # three lines for every matrix
    from llmcompressor import oneshot  # not in the environment of other benchmarks
    from llmcompressor.modifiers.gptq import GPTQModifier

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = dense.config

    def scheme(projections: str, inputs: int) -> dict:
        weights = {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
            "group_size": group_of(inputs), "observer": "memoryless_mse", "scale_dtype": torch.bfloat16,
            "observer_kwargs": {"maxshrink": 0.8, "patience": 80, "norm": 2.0},
        }  # fmt: skip
        return {"targets": [rf"re:.*\.experts\.\d+\.({projections})_proj$"], "weights": weights}

    recipe = GPTQModifier(
        config_groups={
            "in": scheme("gate|up", config.hidden_size),
            "out": scheme("down", config.moe_intermediate_size),
        }
    )
    tokenizer = load_tokenizer(str(model))
    reading = Reading(tokenizer, config.vocab_size, WINDOW)
    drawn, _ = draw_windows(reading, calibration, SAMPLES, SEED)
    quantised = oneshot(
        model=dense,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=DataLoader([{"input_ids": window} for window in drawn], batch_size=BATCH),
        num_calibration_samples=len(drawn),
        moe_calibrate_all_experts=every_token,
        pipeline="sequential",
    )
    checkpoint = Checkpoint(model)
    values = quantised.state_dict()
    tensors = checkpoint.read(list(checkpoint.files))
    tensors |= {name: values[name].contiguous() for name in tensors if ".experts." in name}
    out = folder / "out"
    with CheckpointWriter(out) as writer:
        writer.add(tensors)
        writer.companions(model)
        settings = json.loads((model / "config.json").read_text())
        writer.text("config.json", json.dumps({**settings, "dtype": "float32"}))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--calibrations", default="like", help=f"of {', '.join(CALIBRATIONS)}")
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument("--every-token", action="store_true", help="calibrate each expert by all tokens")
    parser.add_argument("--windows", type=int, default=96, help="of each text, to measure on")
    parser.add_argument("--output", type=Path, default=Path("results/gptq.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results.setdefault("dense", measure(arguments.model, arguments.data, arguments.windows))
    dense = results["dense"]
    kind = ("symmetric" if arguments.symmetric else "asymmetric") + (", all tokens" * arguments.every_token)
    print(f"{'':26}{'text':>10}{'bits':>7}" + "".join(f"{t:>10}" for t in TEXTS) + f"{'× dense':>9}{'seconds':>9}")
    print(f"{'dense':43}" + "".join(f"{p:10.2f}" for p in dense["perplexity"].values()) + f"{1:9.3f}")
    for text in arguments.calibrations.split(","):
        for bits in map(int, arguments.bits.split(",")):
            key = f"{kind}/{bits}/{text}"
            if key not in results:
                with tempfile.TemporaryDirectory() as work:
                    started = time.perf_counter()
                    calibration = calibration_of(text, arguments.data)
                    out = gptq(
                        arguments.model, calibration, bits, Path(work),
                        symmetric=arguments.symmetric, every_token=arguments.every_token,
                    )  # fmt: skip
                    seconds = time.perf_counter() - started
                    results[key] = {"seconds": seconds, **measure(out, arguments.data, arguments.windows)}
                arguments.output.write_text(json.dumps(results, indent=1))
            row = results[key]
            values = "".join(f"{p:10.2f}" for p in row["perplexity"].values())
            multiple = math.exp(math.log(row["mean"]) - math.log(dense["mean"]))
            size = bits_of(arguments.model, bits, arguments.symmetric)
            print(f"{kind:26}{text:>10}{size:7.2f}{values}{multiple:9.3f}{row['seconds']:9.1f}", flush=True)


if __name__ == "__main__":
    main()
