"""Text to calibrate and measure on, as people have it: named by sources, read as documents, cut into windows."""

from .documents import BUILT_IN, read_documents, read_text
from .mixture import Reading, all_windows, draw_windows
from .own import (
    SAMPLED,
    continue_text,
    generation_settings,
    kept_windows,
    without_generation_config,
    write_windows,
)
from .sources import OWN, own_weight, parse_sources, sources, with_own
from .tokenizer import (
    Tokenizer,
    chat_ids,
    check_vocabulary,
    load_tokenizer,
    names_own_code,
    prompt_ids,
    separator,
    start_token,
)
from .windows import model_length, read_ids, sample_windows, tokenise, tokenise_documents, vocabulary_of, windows

__all__ = [
    "BUILT_IN", "OWN", "SAMPLED", "Reading", "Tokenizer", "all_windows", "chat_ids", "check_vocabulary",
    "continue_text", "draw_windows", "generation_settings", "kept_windows", "load_tokenizer", "model_length",
    "names_own_code", "own_weight", "parse_sources", "prompt_ids", "read_documents", "read_ids", "read_text",
    "sample_windows", "separator", "sources", "start_token", "tokenise", "tokenise_documents", "vocabulary_of",
    "windows", "with_own", "without_generation_config", "write_windows",
]  # fmt: skip
