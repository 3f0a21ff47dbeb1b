"""`mkdsl serve`: a checkpoint behind HTTP."""

import ipaddress
import json
import pathlib
import shlex
import signal
import socket
import sys
from typing import Annotated

import rich.console
import typer

from mkdsl.engine import BATCHES, Engine, loading_bar
from mkdsl.models import extra

KEY = "MKDSL_API_KEY"


def serve(
    directory: Annotated[pathlib.Path, typer.Argument(help="A Hugging Face checkpoint: config.json, safetensors, tokenizer.json.")],
    host: Annotated[str, typer.Option(help="The address to listen at. Another than this machine's own asks for a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar=KEY, help="What clients must give as their key.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in requests.", show_default="the directory's")] = None,
    max_batch: Annotated[int, typer.Option(help="Answers decoded together: 1, 2, 4, 8 or 16.")] = 16,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt and its answer.", show_default="2048")] = None,
    deadline: Annotated[
        float | None, typer.Option(min=0.01, help="Seconds until a kernel that hangs fails its answers.", show_default="none")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; who comes then is told to try again.")] = 64,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers have to be completed in when it is to end.")] = 600,
) -> None:
    """Serve a model by OpenAI's interface."""
    _check_host(host, api_key)
    if max_batch not in BATCHES:
        raise typer.BadParameter(f"{max_batch} is none of {', '.join(map(str, BATCHES))}", param_hint="--max-batch")
    with extra("serve"):
        import uvicorn

        from mkdsl.serve._app import create_app
    name = name or directory.resolve().name
    console = rich.console.Console(stderr=True)
    with _bound(host, port) as listening:
        with loading_bar(f"loading {directory.resolve().name}, and compiling") as progress:
            engine = Engine.load(directory, max_batch=max_batch, context=context, ahead=True, deadline=deadline, progress=progress)
        with engine:
            listening.listen()  # whoever takes the announcement at its word is not refused, and may end it
            for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them once more when all answers are complete
                signal.signal(number, lambda *_: sys.exit(0))
            _announce(console, engine, f"{name}: up to {max_batch} answers at once", _curl(host, listening.getsockname()[1], name, api_key))
            app = create_app(engine, model=name, api_key=api_key, max_open=max_batch + max_queue)
            config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=drain)
            uvicorn.Server(config).run(sockets=[listening])


def _announce(console: rich.console.Console, engine: Engine, what: str, curl: str) -> None:
    stats = engine.stats()
    room = f"each of {engine.context} tokens with its prompt, {stats.pages * stats.page_size} in all"
    console.print(f"{what}, {room}. Ctrl-C ends it. Try", style="dim", markup=False, soft_wrap=True)
    console.print(curl, highlight=False, markup=False, soft_wrap=True)


def _bound(host: str, port: int) -> socket.socket:
    """Has the address before the model is loaded: if another process has it, that is said at once."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise typer.BadParameter(f"{host}, port {port} cannot be had ({error.strerror}); give another one", param_hint="--port") from None
    return listening


def _curl(host: str, port: int, name: str, api_key: str | None) -> str:
    """A command that asks the server something. The key itself is not shown."""
    where = f"[{host}]" if ":" in host else host
    key = f' -H "Authorization: Bearer ${KEY}"' if api_key else ""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    return f"curl http://{where}:{port}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _check_host(host: str, api_key: str | None) -> None:
    if not api_key and not _is_local(host):
        raise typer.BadParameter(
            f"{host} can be reached from other machines; give --api-key (or {KEY}), or listen at 127.0.0.1", param_hint="--host"
        )


def _is_local(host: str) -> bool:
    """Of a name, only localhost: what another resolves to is not this machine's to say."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
