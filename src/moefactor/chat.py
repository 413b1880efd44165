"""A conversation with a model, dense or compressed, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from .checkpoint import resolve
from .errors import UserError
from .loading import load
from .streaming import checked_device
from .text import (
    SAMPLED,
    chat_ids,
    check_vocabulary,
    continue_text,
    generation_settings,
    load_tokenizer,
    model_length,
    prompt_ids,
    vocabulary_of,
)


class Conversation:
    """One that goes on with every `reply`.

    A model without a chat template has none: each turn is text, and what it goes on with.

    Args:
        system: what the model is told first, by its chat template.
        tokens: of one reply at most.
        temperature: 0 for the likeliest token each time; None for what the model's generation_config says, of top_p
            and the like too.
        seed: of what is drawn.
    """

    def __init__(
        self, name: str, *, system: str | None = None, tokens: int = 512, temperature: float | None = None,
        seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
    ):  # fmt: skip
        folder = resolve(name)
        self.name, self.tokens, self.seed = name, tokens, seed
        self.tokenizer = load_tokenizer(folder, trust_remote_code)
        self.has_template = bool(self.tokenizer.chat_template)
        if system and not self.has_template:
            raise UserError(f"{name}: has no chat template, so there is no place for --system.")
        drawn = generation_settings(folder, SAMPLED)
        if temperature is not None:
            drawn |= {"do_sample": temperature > 0, "temperature": temperature}
        self.settings = generation_settings(folder) | (drawn if drawn.get("do_sample") else {})
        self.first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.first)
        self.model = load(name, device=checked_device(device), dtype=dtype, trust_remote_code=trust_remote_code)
        self.length = model_length(self.model.config, None, default=sys.maxsize)

    def forget(self) -> None:
        """Begins anew."""
        self.messages = list(self.first)

    def reply(self, words: str, tell: Callable[[str], None]) -> str:
        """What the model says to that; `tell` gets it piece by piece. What was told before an interruption counts."""
        asked = [*self.messages, {"role": "user", "content": words}]
        ids = chat_ids(self.tokenizer, asked) if self.has_template else prompt_ids(self.tokenizer, words)
        check_vocabulary(ids, self.tokenizer, vocabulary_of(self.model))
        room = min(self.tokens, self.length - len(ids))
        if room < 1:
            raise UserError(f"{self.name}: that comes to {len(ids)} tokens of the {self.length} that it takes.")
        told: list[str] = []

        def heard(piece: str) -> None:
            told.append(piece)
            tell(piece)

        try:
            # Another seed each turn, or the same question would have the same draws.
            continue_text(
                self.model, self.tokenizer, ids.unsqueeze(0).to(self.model.device), room, self.settings,
                seed=self.seed + len(self.messages), tell=heard,
            )  # fmt: skip
        finally:
            said = "".join(told)
            if self.has_template and told:
                self.messages = [*asked, {"role": "assistant", "content": said}]
        return said
