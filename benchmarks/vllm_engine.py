"""A whole model served by vLLM, dense beside compressed: tokens a second, and what the process keeps in memory.

    make .venv-vllm/.ready
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_engine.py

A Qwen3-MoE of random weights, larger than caches; what it says is noise, how fast it says it is not. Both engines are
in one process and take turns; memory is that of a process apiece, what is its own and not the files' (RssAnon). Prints
tokens a second over dense's as median and spread, and bytes saved over those that the plan says are saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefactor

ROWS: dict[str, tuple[str, dict]] = {
    "one_width": ("channels", {"widths": "model"}),
    "standard": ("biaxial", {"form": "standard", "refine_steps": 0}),
    "fast": ("biaxial", {"form": "fast", "refine_steps": 0}),
    "linear": ("biaxial", {"form": "linear", "steps": 5, "refine_steps": 0}),
    "tight": ("biaxial", {"form": "tight", "steps": 5, "refine_steps": 0}),
    "svd": ("svd", {}),
}
TEXT = {"samples": 4, "seqlen": 128, "own_text": 0.0}


def build(folder: Path, arguments: argparse.Namespace) -> None:
    """A random model of the shape asked for, with the reference model's tokenizer."""
    reference = Path(__file__).parent.parent / "assets" / "reference-moe"
    vocabulary = json.loads((reference / "config.json").read_text())["vocab_size"]
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, head_dim=64,
        num_attention_heads=arguments.hidden // 64, num_key_value_heads=max(1, arguments.hidden // 256),
        moe_intermediate_size=arguments.intermediate, num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k, intermediate_size=2 * arguments.hidden, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (reference / name).exists():
            (folder / name).write_bytes((reference / name).read_bytes())


def engine(folder: Path, dtype: str) -> object:
    import vllm

    return vllm.LLM(str(folder), dtype=dtype, enforce_eager=True, max_model_len=1024, max_num_seqs=16)


def seconds(model: object, prompts: list[list[int]], tokens: int) -> float:
    import vllm

    sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - started


def resident(folder: Path, dtype: str) -> int:
    """Bytes of a process's own that serves the folder, after a first answer."""
    command = [sys.executable, __file__, "--resident", str(folder), "--dtype", dtype]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(answer.stderr[-2000:])
    return int(answer.stdout.split()[-1])


def own_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def saved_by_plan(dense: Path, folder: Path, size: int) -> int:
    """Bytes that the routed experts take less, in a dtype of `size` bytes."""

    def stored(where: Path) -> int:
        numbers = 0
        for path in where.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
                numbers += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        return numbers

    return size * (stored(dense) - stored(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 1024), ("intermediate", 512), ("experts", 64), ("top-k", 8), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--output", type=Path, default=Path("results/vllm_engine.json"))
    parser.add_argument("--resident", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resident:
        seconds(engine(arguments.resident, arguments.dtype), [list(range(16))], 4)
        print(own_memory())
        return
    work = arguments.work or Path(tempfile.mkdtemp())
    dense = work / "dense"
    if not dense.exists():
        build(dense, arguments)
    size = getattr(torch, arguments.dtype).itemsize
    cases = {"decode 1": (1, 16, 64), "decode 8": (8, 16, 32), "prefill 512": (1, 512, 1)}
    whole = resident(dense, arguments.dtype)
    dense_engine = engine(dense, arguments.dtype)
    print(f"{'':22}" + "".join(f"{case:>22}" for case in cases) + f"{'saved / planned':>18}")
    results = {}
    for row in arguments.rows.split(","):
        method, options = ROWS[row]
        out = work / row
        if not out.exists():
            text = {} if method == "svd" else {k: v for k, v in TEXT.items() if method == "biaxial" or k != "own_text"}
            moefactor.compress(str(dense), method, arguments.ratio, out, **options, **text)
        saved = (whole - resident(out, arguments.dtype)) / saved_by_plan(dense, out, size)
        model, cells = engine(out, arguments.dtype), {}
        for case, (batch, prompt, tokens) in cases.items():
            prompts = [[(7 * i + 31 * b) % 250 for i in range(prompt)] for b in range(batch)]
            for warm in (dense_engine, model):
                seconds(warm, prompts, tokens)
            ratios = sorted(
                seconds(dense_engine, prompts, tokens) / seconds(model, prompts, tokens)
                for _ in range(arguments.repeats)
            )
            cells[case] = {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        shown = "".join(f"{c['median']:.2f} ({c['low']:.2f}-{c['high']:.2f})".rjust(22) for c in cells.values())
        print(f"{row:22}{shown}{saved:18.3f}", flush=True)
        results[row] = {"tokens_a_second_over_dense": cells, "saved_over_planned": saved}
        model.llm_engine.engine_core.shutdown()
        del model
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"arguments": vars(arguments), "rows": results}, default=str, indent=1))


if __name__ == "__main__":
    main()
