"""Commands that let a model speak: a server, a conversation, a few words."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated

import typer

from ..chat import Conversation
from ..errors import UserError
from ..generate import generate as generate_verb
from ..serving import Engine, server_of
from .shared import DTYPES, USE, Device, Dtype, Model, Seed, Trust, app, errors, say


@app.command(context_settings={"allow_extra_args": True}, rich_help_panel=USE)
def serve(
    context: typer.Context, model: Model, host: Annotated[str, typer.Option(help="To listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="To listen on.", min=1, max=65535)] = 8000,
    dtype: Annotated[Dtype, typer.Option(help="To run in; auto: the checkpoint's own.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share each layer; vLLM.", min=1)] = 1,
    engine: Annotated[Engine, typer.Option(help="auto: vLLM where it is installed.")] = "auto",
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Serve a model with OpenAI's API: vLLM where it is installed, else transformers' own server.

    What follows -- goes to the engine as it is: moefactor serve OUT -- --max-model-len 4096
    """
    server = server_of(
        model, host=host, port=port, dtype=dtype, tensor_parallel_size=tensor_parallel_size, engine=engine,
        trust_remote_code=trust_remote_code, options=context.args,
    )  # fmt: skip
    say(f"{server.model} by {server.engine} at {server.url}, until Ctrl-C.")
    if not server.chats:
        say("It has no chat template: /completions answers, /chat/completions does not.")
    if server.engine == "vllm":
        server.become_vllm()
    _transformers_serve(server.arguments)


def _transformers_serve(arguments: Sequence[str]) -> None:
    """The command of transformers' own line, in this process, where the plug-in is registered."""
    from transformers.cli.serve import Serve

    theirs = typer.Typer(add_completion=False)
    theirs.command()(Serve)
    if code := theirs(arguments, prog_name="transformers serve", standalone_mode=False):
        raise typer.Exit(code)


@app.command(rich_help_panel=USE)
def chat(
    model: Model, system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of one reply.", min=1)] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: the likeliest token each time.", show_default="as generation_config.json says", min=0),
    ] = None,
    seed: Seed = 0, device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="To run in; auto: the checkpoint's own.")] = "auto",
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Talk with a model. /clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops a reply.

    Where the input is no terminal, each of its lines is a turn, and the replies alone are written.
    """
    conversation = Conversation(
        model, system=system, tokens=max_tokens, temperature=temperature, seed=seed, device=device,
        dtype=DTYPES.get(dtype, dtype), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if not conversation.has_template:
        say(f"{model} has no chat template: each line is continued by itself.", errors)
    asked = sys.stdin.isatty()
    for words in _turns(asked):
        if words.strip() == "/clear":
            conversation.forget()
            continue
        try:
            conversation.reply(words, _tell)
        except KeyboardInterrupt:
            if not asked:
                raise
        except UserError as error:
            if not asked:
                raise
            say(f"{error} /clear begins anew.", errors, style="yellow")
        print(flush=True)


def _tell(piece: str) -> None:
    print(piece, end="", flush=True)


def _turns(asked: bool) -> Iterator[str]:
    """Lines, empty ones left out, until /exit or their end."""
    if asked:
        with suppress(ImportError):
            import readline  # noqa: F401 (arrows and history in `input`)
    while True:
        try:
            words = input("> " if asked else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("The input is not UTF-8 text.") from None
        if words.strip() == "/exit":
            return
        if words.strip():
            yield words


@app.command(rich_help_panel=USE)
def generate(
    model: Model, prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="How many new ones at most.", min=1)] = 50, device: Device = None,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Continue a prompt, greedily."""
    said = generate_verb(model, prompt, tokens=tokens, device=device, trust_remote_code=trust_remote_code)
    say(said)
