"""What engines are asked to serve, and what they must say: what transformers says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moefactor
from moefactor.stages import Recipe

Answers = list[tuple[list[int], list[float]]]  # of every prompt: tokens, and the log-probability of each

PROMPTS = [[(7 * i + start) % 256 for i in range(12)] for start in (1, 50, 99)]
TOKENS = 12
QUICK = {"samples": 4, "seqlen": 64}
FORMS: dict[str, tuple[str, dict]] = {
    "svd": ("svd", {}),
    "shared_basis": ("shared_basis", QUICK),
    "rfid": ("rfid", QUICK),
    "d2moe": ("d2moe", QUICK),
    "mobe": ("mobe", {"steps": 20, "ratio": 0.2}),
    "slbf": ("slbf", {"steps": 20, "ratio": 0.2}),
    "channels": ("channels", QUICK),
    "fast": ("biaxial", {**QUICK, "refine_steps": 2}),
    "linear": ("biaxial", {**QUICK, "form": "linear", "steps": 20, "refine_steps": 2}),
    "tight": ("biaxial", {**QUICK, "form": "tight", "steps": 20, "refine_steps": 2}),
    "reap": ("reap", QUICK),
    "one_width": ("channels", {**QUICK, "widths": "model"}),
    "standard": ("biaxial", {**QUICK, "form": "standard", "refine_steps": 20}),
    "few_bits": ("biaxial", {**QUICK, "refine_steps": 2, "ratio": None, "bpw": 3.0}),  # of every precision some
}


def make(name: str, source: Path, text_file: Path, out: Path) -> Path:
    """The model compressed in the form `name`."""
    method, options = FORMS[name]
    options = dict(options)
    size = {"ratio": options.pop("ratio", 0.4), "bpw": options.pop("bpw", None)}
    own = {key: options.pop(key) for key in QUICK if key in options}
    text = {"calibration": str(text_file), **own} if Recipe.of(method, options).reads_text else {}
    return moefactor.compress(str(source), method, output=out, **size, **text, **options)


def transformers_says(folder: Path) -> Answers:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = made.sequences[0, len(prompt) :].tolist()
        answers.append((tokens, [x[0].log_softmax(-1)[t].item() for x, t in zip(made.logits, tokens, strict=True)]))
    return answers


def lose(folder: Path, tensor: str) -> None:
    """Takes a tensor out of a folder."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop(tensor, None) is not None:
            save_file(tensors, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"].pop(tensor)
        index.write_text(json.dumps(content))
