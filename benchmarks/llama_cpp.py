"""Whether llama.cpp says what transformers says: greedy tokens of a model and of the GGUF that is made of it.

    pip install xllamacpp        # llama.cpp's server as a package; its converter is found as `moefactor export` does it
    python benchmarks/llama_cpp.py OUT ... --pre-tokenizer qwen2

Token ids go in and come out, so that the two tokenizers do not matter. Compare in f32: rounding turns routers aside,
and quantised models differ after some tokens even when they are sound. Ends with 1 unless all prompts agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moefactor.export import export_gguf
from moefactor.loading import load
from moefactor.text import continue_text, load_tokenizer

PROMPTS = (
    "def main():\n    ", "The quick brown fox", "A class is a ", "import os\n", "In Python, the statement",
)  # fmt: skip
TOKENS = 20


def transformers_tokens(folder: str) -> list[tuple[list[int], list[int], list[float]]]:
    """For each prompt its ids, those that follow, and their log-probabilities; in float32."""
    tokenizer = load_tokenizer(folder)
    model = load(folder, device="cpu", dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        whole = continue_text(model, tokenizer, ids, TOKENS, {})
        with torch.no_grad():
            scores = model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
        said = whole[0, ids.shape[1] :]
        places = torch.arange(ids.shape[1] - 1, whole.shape[1] - 1)
        found.append((ids[0].tolist(), said.tolist(), scores[places, said].tolist()))
    return found


class LlamaCpp:
    """llama.cpp's server, within this process, on one thread."""

    def __init__(self, file: Path):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.port = 256, 1, 0
        settings.cpuparams.n_threads = 1
        settings.verbosity, settings.warmup = -1, False
        # Exactly, where it would take half precision to be faster.
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(settings)

    def tokens(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """The ids that follow, and their log-probabilities."""
        body = {
            "prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True, "n_probs": 1,
            "cache_prompt": False,
        }  # fmt: skip
        request = urllib.request.Request(
            self.server.listening_address + "/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)
        return said["tokens"], [place["logprob"] for place in said.get("completion_probabilities", [])]


def compared(folder: str, gguf: Path) -> int:
    """Prompts whose tokens are equal; prints each."""
    expected = transformers_tokens(folder)
    server = LlamaCpp(gguf)
    equal = 0
    for prompt, (ids, tokens, scores) in zip(PROMPTS, expected, strict=True):
        said, said_scores = server.tokens(ids, len(tokens))
        pairs = zip(said, tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(said), len(tokens)))
        farthest = max((abs(a - b) for a, b in zip(said_scores[:same], scores[:same], strict=True)), default=0.0)
        equal += said == tokens
        verdict = "equal" if said == tokens else f"differ from token {same} on"
        print(f"    {prompt!r:30} {verdict}, log-probabilities within {farthest:.1e} before")
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="what transformers loads; compressed ones too")
    parser.add_argument("--quant", default="f32")
    parser.add_argument("--llama-cpp")
    parser.add_argument("--pre-tokenizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    equal = 0
    with TemporaryDirectory() as scratch:
        for number, folder in enumerate(arguments.folders):
            gguf = export_gguf(
                folder, Path(scratch) / f"{number}.gguf", quant=arguments.quant, llama_cpp=arguments.llama_cpp,
                pre_tokenizer=arguments.pre_tokenizer,
            )  # fmt: skip
            print(f"{Path(folder).name}, {arguments.quant}, {gguf.stat().st_size / 1e6:.2f} MB")
            found = compared(folder, gguf)
            print(f"    {found} of {len(PROMPTS)} equal", flush=True)
            equal += found
    sys.exit(equal < len(PROMPTS) * len(arguments.folders))


if __name__ == "__main__":
    main()
