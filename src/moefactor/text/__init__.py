"""Text to calibrate and measure on, as people have it: named by sources, read as documents, cut into windows."""

from .documents import BUILT_IN, read_documents, read_text
from .mixture import Reading, all_windows, draw_windows
from .own import continue_text, generation_settings, kept_windows, without_generation_config, write_windows
from .sources import OWN, own_weight, parse_sources, sources, with_own
from .tokenizer import Tokenizer, check_vocabulary, load_tokenizer, separator, start_token
from .windows import model_length, read_ids, sample_windows, tokenise, tokenise_documents, vocabulary_of, windows

__all__ = [
    "BUILT_IN", "OWN", "Reading", "Tokenizer", "all_windows", "check_vocabulary", "continue_text", "draw_windows",
    "generation_settings", "kept_windows",
    "load_tokenizer", "model_length", "own_weight", "parse_sources", "read_documents", "read_ids", "read_text",
    "sample_windows", "separator", "sources", "start_token", "tokenise", "tokenise_documents", "vocabulary_of",
    "windows", "with_own", "without_generation_config", "write_windows",
]  # fmt: skip
