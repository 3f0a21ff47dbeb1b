"""The command line. A command is a plain function in a file of its own, registered here; what it refuses is printed as one message."""

from typing import Any

import typer
import typer.core

from mkdsl.engine._answers import LogitsError
from mkdsl.engine._cli_build import build_command
from mkdsl.engine._cli_chat import chat
from mkdsl.engine._cli_explain import explain
from mkdsl.engine._cli_generate import generate
from mkdsl.engine._cli_probe import probe_command
from mkdsl.engine._demo import demo
from mkdsl.engine._loop import EngineError
from mkdsl.engine._sampling import SamplingError
from mkdsl.engine._scheduler import PagesError
from mkdsl.engine._tokenizer import PromptError
from mkdsl.gpu import ContextError
from mkdsl.graph import UnsupportedError
from mkdsl.models import CheckpointError, MissingExtra
from mkdsl.proof import ScheduleError

REFUSALS = (
    CheckpointError,
    ContextError,
    EngineError,
    LogitsError,
    MissingExtra,
    PagesError,
    PromptError,
    ScheduleError,
    UnsupportedError,
)  # the user's to put right: a traceback would only hide what to do
NO_GPU = ("no GPU: ", "no profile for ", "probe: ")  # how mkdsl.gpu's plain RuntimeErrors begin; XLA's own keep their traceback


class Commands(typer.core.TyperGroup):
    """Prints a command's refusal to stderr in one line, and exits with 1, or with 2 where an argument is the reason."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as refusal:
            typer.echo(f"mkdsl: {refusal.format_message()}", err=True)
            raise typer.Exit(2) from None
        except SamplingError as refusal:
            typer.echo(f"mkdsl: {refusal}", err=True)
            raise typer.Exit(2) from None
        except REFUSALS as refusal:
            typer.echo(f"mkdsl: {refusal}", err=True)
            raise typer.Exit(1) from None
        except RuntimeError as error:
            if not str(error).startswith(NO_GPU):
                raise
            typer.echo(f"mkdsl: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """Compiles a JAX decode step into one persistent GPU kernel, and generates text with it."""


app.command()(generate)
app.command()(chat)
app.command()(explain)
app.command("build")(build_command)
app.command()(demo)
app.command("probe")(probe_command)
