"""`mkdsl probe`: the GPU at hand, measured, as a profile to schedule for."""

import pathlib
import re
from typing import Annotated

import rich.console
import rich.table
import typer

from mkdsl.gpu import comparison, gpu_at_hand, probe, write_profile
from mkdsl.schedule import Profile


def probe_command(
    out: Annotated[
        pathlib.Path | None, typer.Option(help="The file to write, ending in .json.", show_default="~/.cache/mkdsl/profiles/NAME.json")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the profile: letters, digits and dashes.", show_default="after the GPU")] = None,
) -> None:
    """Measure the GPU at hand for the cost model: device memory, hand-offs, L2. Nothing else may be running on it."""
    if out and out.suffix != ".json":
        raise typer.BadParameter(f"{out} does not end in .json", param_hint="--out")
    if name and not re.fullmatch(r"[\w-]+", name):
        raise typer.BadParameter(f"{name!r} has more than letters, digits and dashes", param_hint="--name")
    gpu = gpu_at_hand()
    with rich.console.Console(stderr=True).status("compiling") as status:
        profile = probe(gpu, name, lambda what: status.update(f"measuring {what}"))
    rich.console.Console().print(table(profile, gpu.nearest()))
    typer.echo(f"written to {write_profile(profile, out)}: pass it as --target, or to mk.jit(target=...)")


def table(profile: Profile, built_in: Profile) -> rich.table.Table:
    """What was measured beside the built-in profile that the rest is taken over from."""
    made = rich.table.Table(title=f"{profile.name}; what is not here is taken over from {built_in.name}")
    made.add_column()
    for column in ("measured", built_in.name):
        made.add_column(column, justify="right")
    for row in comparison(profile, built_in):
        made.add_row(*row)
    return made
