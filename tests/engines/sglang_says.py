"""`python sglang_says.py FOLDER RANKS`: SGLang's answers to the prompts, as the last line, in JSON. A program of its
own, since an SGLang engine that fails ends the process that started it."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

PROGRAM = Path(__file__)
# One core a rank; and of SGLang's kernels what its engine for CPUs imports.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1"}
if find_spec("sgl_kernel") is None:
    stubs = str(PROGRAM.parent / "stubs")
    sys.path.append(stubs)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), stubs]))

if __name__ == "__main__":
    folder, ranks = sys.argv[1], int(sys.argv[2])
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    import sglang

    from served import PROMPTS, TOKENS

    engine = sglang.Engine(
        model_path=folder, device="cpu", dtype="float32", tp_size=ranks, attention_backend="torch_native",
        sampling_backend="pytorch", skip_tokenizer_init=True, disable_cuda_graph=True, max_total_tokens=512,
        max_running_requests=4, context_length=64, mem_fraction_static=0.3, log_level="error",
    )  # fmt: skip
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    answers = engine.generate(input_ids=PROMPTS, sampling_params=sampling, return_logprob=True)
    said = [(a["output_ids"], [p[0] for p in a["meta_info"]["output_token_logprobs"]]) for a in answers]
    print(json.dumps(said), flush=True)
    engine.shutdown()
