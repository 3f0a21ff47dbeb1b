"""`mkdsl build`: all that a model needs on a GPU, ahead of deployment."""

import os
import pathlib
import time
from typing import Annotated

import rich.box
import rich.console
import rich.table
import typer

from mkdsl.engine._build import Built, Order, build, compile_here
from mkdsl.engine._cli_explain import config_of, profile_of
from mkdsl.engine._context import positions
from mkdsl.engine._engine import free_bytes
from mkdsl.engine._scheduler import BATCHES
from mkdsl.gpu import is_at_hand
from mkdsl.models import SHAPES
from mkdsl.search import directory


def build_command(
    model: Annotated[str, typer.Argument(help=f"A checkpoint directory, or one of {', '.join(SHAPES)}.")],
    target: Annotated[str, typer.Option(help="The GPU, by name, or a profile's .json file.")] = "h200",
    batch: Annotated[str, typer.Option(help="Sequences decoded together; the largest is the engine's max_batch.")] = "1,2,4,8,16",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt and its answer.", show_default="2048")] = None,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Keep it in this directory, to be shipped; the process that is to find it has MKDSL_CACHE say where.",
            show_default="the cache",
        ),
    ] = None,
) -> None:
    """Search, prove, emit and assemble the kernels of a model ahead of its deployment; without a GPU, or with one compile them too."""
    order = Order(
        config=(config := config_of(model)), target=profile_of(target), context=positions(config, context), batches=batches(batch)
    )
    if out is not None:
        os.environ["MKDSL_CACHE"] = str(out.resolve())
    start, console, rows = time.perf_counter(), rich.console.Console(stderr=True), []
    with console.status("building") as status:
        for built in build(order):
            rows.append(built)
            status.update(f"building: {len(rows)} of {len(order.batches)} batches")
        if at_hand := is_at_hand(order.target.name):
            status.update("compiling for the GPU at hand")
            compile_here(order, free_bytes())
    rich.console.Console().print(table(order, rows))
    for why in {row.unassembled for row in rows} - {""}:
        typer.echo(f"not assembled: {why}")
    if not at_hand:
        typer.echo(
            f"XLA's part, and pieces of prompts, which cuDNN must be there for, are made by the first process on the {order.target.name}"
        )
    said = "all was there already" if all(row.there for row in rows) else "built"
    typer.echo(f"{said} in {time.perf_counter() - start:.1f} s: {directory('exported').parent}")


def batches(text: str) -> tuple[int, ...]:
    """Of "1,2,4"."""
    try:
        found = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not set(found) <= set(BATCHES):
        raise typer.BadParameter(f"{text!r} has other than {', '.join(map(str, BATCHES))}, with commas between", param_hint="--batch")
    return found


def table(order: Order, rows: list[Built]) -> rich.table.Table:
    """A row a batch."""
    title = f"for {order.target.name}, {order.context} tokens; us of a decode step, KiB of code"
    made = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("batch", "predicted", "floor", "registers", "spills", "KiB", "seconds", ""):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        kernel = row.kernel or {}
        code = f"{kernel['code_bytes'] / 1024:.0f}" if kernel else "-"
        numbers = [str(kernel.get(name, "-")) for name in ("registers", "spill_bytes")]
        times = f"{row.predicted_us:.0f}", f"{row.floor_us:.0f}"
        made.add_row(str(row.batch), *times, *numbers, code, f"{row.seconds:.1f}", "was there" if row.there else "built")
    return made
