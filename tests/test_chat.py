"""Conversations: what the model is shown, what comes back, and how they end."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from models import load
from moefactor.chat import Conversation
from moefactor.errors import UserError

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def deaf(piece: str) -> None:
    """Listens to nothing."""


@pytest.fixture
def plain(compressed: Callable[..., Path]) -> Path:
    """A factorised folder of a model without a chat template."""
    return compressed("qwen3_moe", "svd")


@pytest.fixture
def chatty(plain: Path, copied: Callable[[Path], Path]) -> Path:
    """The same with one."""
    folder = copied(plain)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has these lines come through a pipe."""

    def say(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return say


@torch.no_grad()
def expected(folder: Path, text: str, tokens: int) -> str:
    """transformers' own greedy continuation."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=258)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_model_is_shown_what_was_said(chatty: Path) -> None:
    conversation, pieces = Conversation(str(chatty), system="Be brief.", tokens=6, device="cpu"), []
    first = conversation.reply("Hello", pieces.append)
    shown = "[system]Be brief.[user]Hello[assistant]"
    assert first == "".join(pieces) == expected(chatty, shown, 6)
    second = conversation.reply("Why?", deaf)
    shown += f"{first}[user]Why?[assistant]"
    assert second == expected(chatty, shown, 6)
    conversation.forget()
    assert conversation.reply("Hello", deaf) == first


def test_lines_of_a_pipe_are_turns(chatty: Path, typed: Callable, command: Callable) -> None:
    typed("Hello", "", "Why?", "/clear", "Hello", "/exit", "Hello?")
    code, shown, told = command("chat", chatty, "--max-tokens", 6, "--device", "cpu", "--dtype", "float32")
    conversation = Conversation(str(chatty), tokens=6, device="cpu")
    first, second = (conversation.reply(words, deaf) for words in ("Hello", "Why?"))
    assert (code, shown, told) == (0, f"{first}\n{second}\n{first}\n", "")


def test_without_a_template_each_line_is_continued(plain: Path, typed: Callable, command: Callable) -> None:
    typed("Once upon", "    return")
    code, shown, told = command("chat", plain, "--max-tokens", 6, "--device", "cpu")
    said = [expected(plain, words, 6) for words in ("Once upon", "    return")]
    assert (code, shown) == (0, "".join(f"{text}\n" for text in said))
    assert told == f"{plain} has no chat template: each line is continued by itself.\n"
    code, _, told = command("chat", plain, "--system", "Be brief.")
    assert code == 2
    assert "no place for --system" in told


def test_it_is_drawn_as_the_model_says_or_as_is_wanted(chatty: Path) -> None:
    def said(**options: object) -> str:
        return Conversation(str(chatty), tokens=12, device="cpu", **options).reply("Hello", deaf)

    greedy = said()
    assert said(seed=1) == greedy
    assert said(temperature=3.0) == said(temperature=3.0) != greedy
    assert said(temperature=3.0, seed=1) != said(temperature=3.0)
    (chatty / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 3.0, "eos_token_id": 257, "pad_token_id": 258})
    )
    assert said() == said(temperature=3.0)
    assert said(temperature=0.0) == greedy


def test_a_full_conversation_says_so(chatty: Path, typed: Callable, command: Callable) -> None:
    """The tiny model takes 128 tokens, a token a byte."""
    typed("x" * 111)
    code, shown, told = command("chat", chatty, "--device", "cpu")
    assert (code, shown) == (2, "")
    assert "that comes to 128 tokens of the 128 that it takes" in told
    conversation = Conversation(str(chatty), device="cpu")
    said = conversation.reply("x" * 100, deaf)
    assert len(said) <= 128 - 100 - len("[user][assistant]")
    with pytest.raises(UserError, match="of the 128 that it takes"):
        conversation.reply("Hello", deaf)
    conversation.forget()
    conversation.reply("Hello", deaf)


def test_what_the_template_refuses(chatty: Path) -> None:
    (chatty / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    with pytest.raises(UserError, match="does not take these messages: not today"):
        Conversation(str(chatty), device="cpu").reply("Hello", deaf)


@pytest.fixture
def at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Has these lines come from a terminal; gives the prompts that are shown."""

    def say(*lines: str) -> list[str]:
        prompts, rest = [], iter(lines)

        def read(prompt: str) -> str:
            prompts.append(prompt)
            line = next(rest, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
        monkeypatch.setattr(builtins, "input", read)
        return prompts

    return say


def test_at_a_terminal(
    chatty: Path, at_the_terminal: Callable, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C stops a reply, what does not fit is said, and Ctrl-D ends."""
    heard: Iterator[None] = iter([None, KeyboardInterrupt])
    reply = Conversation.reply
    kept = []

    def interrupted(self: Conversation, words: str, tell: Callable[[str], None]) -> str:
        def listen(piece: str) -> None:
            tell(piece)
            if (stop := next(heard, None)) is not None:
                raise stop

        try:
            return reply(self, words, listen)
        finally:
            kept[:] = self.messages

    monkeypatch.setattr(Conversation, "reply", interrupted)
    prompts = at_the_terminal("Hello", "x" * 120, "Why?")
    code, shown, told = command("chat", chatty, "--max-tokens", 8, "--device", "cpu")
    assert code == 0
    assert len(prompts) == 4
    assert "/clear begins anew" in told
    assert [message["role"] for message in kept] == ["user", "assistant"] * 2
    assert kept[2]["content"] == "Why?"
    assert shown == f"{kept[1]['content']}\n\n{kept[3]['content']}\n"
