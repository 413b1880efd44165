"""What a model writes is from its own distribution, whatever its generation_config says; `generate` never stumbles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moefactor import UserError
from moefactor.calibrate import Calibration
from moefactor.generate import generate
from moefactor.loading import load
from moefactor.streaming import StreamedModel
from moefactor.text import load_tokenizer, write_windows

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
# What people's generation_config.json hold; each leaked in, or crashed.
SETTINGS = {
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "sampling": {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.5},
    "cutoffs": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_h": 0.5},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "suppressed": {"suppress_tokens": list(range(1, 2000)), "begin_suppress_tokens": [5, 6]},
    "bad words": {"bad_words_ids": [[7], [8, 9]], "sequence_bias": [[[11], -5.0]]},
    "forced": {"forced_bos_token_id": 3, "forced_eos_token_id": 4, "exponential_decay_length_penalty": [5, 1.5]},
    "stop strings": {"stop_strings": ["the", "."], "max_time": 0.001},
    "ends": {"eos_token_id": [0, 5, 11], "pad_token_id": 17, "min_length": 3, "max_length": 20},
    "form": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "cache": {"use_cache": False, "renormalize_logits": True, "remove_invalid_values": True},
    "static cache": {"cache_implementation": "static"},
    "guidance": {"guidance_scale": 2.0},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "watermark": {"watermarking_config": {"bias": 4.0, "greenlist_ratio": 0.25}},
}


def with_settings(folder: Path, **settings: object) -> Path:
    """A copy of the reference model whose authors recommend `settings`."""
    shutil.copytree(REFERENCE, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.fixture(scope="module")
def plainly() -> torch.Tensor:
    return write_windows(load(str(REFERENCE), device="cpu", dtype=torch.float32), load_tokenizer(REFERENCE), 3, 24, 0)


@pytest.mark.parametrize("kind", SETTINGS)
def test_own_text_is_the_models_own(kind: str, plainly: torch.Tensor, tmp_path: Path) -> None:
    folder = with_settings(tmp_path / "model", **SETTINGS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = model.generation_config.to_dict()
    assert torch.equal(write_windows(model, load_tokenizer(folder), 3, 24, 0), plainly)
    assert model.generation_config.to_dict() == before  # the model is given back as it was


def test_own_text_ignores_how_a_repository_generates(plainly: torch.Tensor) -> None:
    model = load(str(REFERENCE), device="cpu", dtype=torch.float32)
    model.generate = lambda *a, **how: pytest.fail("a repository's own generate ran")
    assert torch.equal(write_windows(model, load_tokenizer(REFERENCE), 3, 24, 0), plainly)


def test_own_text_follows_the_models_distribution() -> None:
    """The first tokens of many windows have the frequencies that the model gives."""
    model, tokenizer = load(str(REFERENCE), device="cpu", dtype=torch.float32), load_tokenizer(REFERENCE)
    first = write_windows(model, tokenizer, 1500, 2, 0)[:, 0]
    with torch.no_grad():
        wanted = model(torch.tensor([[tokenizer.eos_token_id]])).logits[0, -1].softmax(-1)
    top = wanted.topk(5).indices
    found = torch.stack([(first == token).float().mean() for token in top])
    assert torch.allclose(found, wanted[top], atol=0.04)


# With these transformers loads no model; a list is no settings at all.
@pytest.mark.parametrize("odd", [{"num_return_sequences": 3}, {"max_new_tokens": 0}, {"cache_implementation": "x"}, []])
def test_settings_that_transformers_refuses(odd: object, plainly: torch.Tensor, tmp_path: Path) -> None:
    folder = with_settings(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(odd))
    model = load(str(folder), device="cpu", dtype=torch.float32)
    assert torch.equal(write_windows(model, load_tokenizer(folder), 3, 24, 0), plainly)
    assert generate(str(folder), "The company said", tokens=6).startswith("The company said")


@pytest.mark.parametrize("kind", SETTINGS)
def test_generate_never_stumbles(kind: str, tmp_path: Path) -> None:
    said = generate(str(with_settings(tmp_path / "model", **SETTINGS[kind])), "The company said", tokens=6)
    assert said.startswith("The company said")


def test_generate_follows_what_ends_a_text_and_what_is_not_to_be_said(tmp_path: Path) -> None:
    plain = generate(str(REFERENCE), "The company said", tokens=12)
    ids = load_tokenizer(REFERENCE)(plain)["input_ids"]
    stop = load_tokenizer(REFERENCE)("The company said")["input_ids"]
    third = ids[len(stop) + 2]
    ended = generate(str(with_settings(tmp_path / "ends", eos_token_id=[0, third])), "The company said", tokens=12)
    assert plain.startswith(ended)
    assert len(ended) < len(plain)
    stopped = generate(str(with_settings(tmp_path / "stop", stop_strings=["going"])), "The company said", tokens=12)
    assert stopped.endswith("going")
    kept = generate(str(with_settings(tmp_path / "kept", suppress_tokens=[third])), "The company said", tokens=12)
    assert third not in load_tokenizer(REFERENCE)(kept)["input_ids"][len(stop) : len(stop) + 3]


@pytest.mark.parametrize("odd", [{"bad_words_ids": [[99_999]]}, {"repetition_penalty": 0}, {"eos_token_id": "x"}])
def test_settings_that_do_not_fit_are_named(odd: dict, tmp_path: Path) -> None:
    folder = with_settings(tmp_path / "model", **odd)
    with pytest.raises(UserError, match=r"model: its generation_config\.json does not fit it"):
        generate(str(folder), "The company said", tokens=3)


def test_prompts_that_are_empty_or_no_text(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    assert generate(str(REFERENCE), "", tokens=3)
    for prompt in ("caf\udce9", "\ud800"):  # bytes that are not UTF-8, as Python hands them on
        code, _, said = command("generate", REFERENCE, prompt)
        assert code == 2
        assert "not UTF-8" in said
    folder = Path(shutil.copytree(REFERENCE, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None, "pad_token": None}))
    with pytest.raises(UserError, match="prompt is empty"):
        generate(str(folder), "", tokens=3)
    assert generate(str(folder), "abc", tokens=2).startswith("abc")


def test_tokens_beyond_the_embedding(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """A tokenizer with added tokens whose embedding was never resized, wherever text is read."""
    folder, chat = Path(shutil.copytree(REFERENCE, tmp_path / "model")), tmp_path / "chat.txt"
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(folder)
    chat.write_text("<|im_start|>user\nHow is it going?\n" * 400)
    short = ("--samples", 4, "--seqlen", 16, "--calibration", chat)
    for line in (
        ("compress", folder, "-m", "whitened_svd", *short, "-o", tmp_path / "out"),
        ("calibrate", folder, "-m", "whitened_svd", *short, "--run", tmp_path / "run"),
        ("evaluate", folder, "--text", chat),
        ("generate", folder, "<|im_start|>user"),
    ):
        code, _, said = command(*line)
        assert code == 2
        assert "model: its tokenizer makes token 4096 ('<|im_start|>')" in said
    with pytest.raises(UserError, match="token 4096"):
        Calibration.read(StreamedModel(str(folder)), f"{chat},self", samples=4, seqlen=16)
    text = tmp_path / "plain.txt"
    text.write_text("How is it going?\n" * 400)  # without them it works
    assert Calibration.read(StreamedModel(str(folder)), str(text), samples=4, seqlen=16).batches
