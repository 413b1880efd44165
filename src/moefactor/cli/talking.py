"""Commands that let a model speak: a server, a conversation, a few words."""

from __future__ import annotations

from typing import Annotated

import typer

from ..generate import generate as generate_verb
from ..serving import Engine, server_of
from .shared import Device, Dtype, Model, Trust, app, console


@app.command(context_settings={"allow_extra_args": True})
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
    console.print(f"{server.model} by {server.engine} at {server.url}, until Ctrl-C.", markup=False, highlight=False)
    if not server.chats:
        console.print("It has no chat template: /completions answers, /chat/completions does not.")
    server.run()


@app.command()
def generate(
    model: Model, prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="How many new ones at most.", min=1)] = 50, device: Device = None,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Continue a prompt, greedily."""
    said = generate_verb(model, prompt, tokens=tokens, device=device, trust_remote_code=trust_remote_code)
    console.print(said, markup=False, highlight=False)
