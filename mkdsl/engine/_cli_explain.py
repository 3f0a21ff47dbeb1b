"""`mkdsl explain`: the schedule that would be used for a model on a GPU, from shapes alone."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mkdsl.engine._decoder import check_context, shapes
from mkdsl.graph import OpGraph, build_graph
from mkdsl.models import SHAPES, CheckpointError, DecoderConfig, decode_step, read_config
from mkdsl.proof import verify_schedule
from mkdsl.schedule import Profile, Schedule, profile, shared_memory
from mkdsl.search import explain as report
from mkdsl.search import floor_us, search, without_k_split
from mkdsl.simulate import simulate, trace_events


def explain(
    model: Annotated[str, typer.Argument(help=f"A checkpoint directory, or one of {', '.join(SHAPES)}.")],
    target: Annotated[str, typer.Option(help="The GPU, by name, or a profile's .json file.")] = "h200",
    batch: Annotated[int, typer.Option(min=1, max=16, help="Sequences decoded together.")] = 1,
    context: Annotated[int, typer.Option(min=8, help="Positions in the KV cache, a multiple of 8.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers only, as JSON.")] = False,
    k_split: Annotated[
        bool, typer.Option("--k-split/--no-k-split", help="Without: every resident whole, no fold split over workers, no limit.")
    ] = True,
    trace: Annotated[
        pathlib.Path | None,
        typer.Option(help="Write the predicted timeline, SM by time, for ui.perfetto.dev."),
    ] = None,
) -> None:
    """Show the schedule of a model on a GPU: what was chosen and what came second, shared memory, predicted time and what bounds it."""
    check_context(context)
    if trace is not None:
        check_writable(trace)
    gpu, graph = profile_of(target), graph_of(config_of(model), context)
    (schedule, gpu), seconds = timed(lambda: _search(graph, batch, gpu, k_split))
    _, proof = timed(lambda: verify_schedule(graph, schedule, gpu))
    if trace is not None:
        trace.write_text(json.dumps(trace_events(simulate(graph, schedule, gpu, whole=True))), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(numbers(graph, schedule, gpu) | {"search_seconds": seconds, "verify_seconds": proof}))
    else:
        typer.echo(report(graph, schedule, gpu, alternatives=k_split))
        typer.echo(f"searched in {seconds:.2f} s, proven in {proof:.3f} s")


def check_writable(path: pathlib.Path) -> None:
    """Opens a file that is written at the end: what is wrong with it is said at the beginning."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written ({error.strerror})", param_hint="--trace") from None


def _search(graph: OpGraph, batch: int, gpu: Profile, k_split: bool) -> tuple[Schedule, Profile]:
    schedule = search(graph, batch=batch, target=gpu, cache=False)
    return (schedule, gpu) if k_split else without_k_split(graph, schedule, gpu)


def config_of(model: str) -> DecoderConfig:
    """The shape of a built-in model or a checkpoint directory."""
    if model in SHAPES:
        return SHAPES[model]
    if not pathlib.Path(model).is_dir():
        raise CheckpointError(f"{model!r} is no directory and no built-in shape; those are {', '.join(SHAPES)}")
    return read_config(model)


def profile_of(target: str) -> Profile:
    """The profile of a GPU, or a message that lists those there are."""
    try:
        return profile(target)
    except ValueError as unknown:
        raise typer.BadParameter(str(unknown), param_hint="--target") from None


def graph_of(config: DecoderConfig, context: int) -> OpGraph:
    """The operator DAG of a model's decode step, without its weights."""
    return build_graph(decode_step(config), *shapes(config, context))[0]


def numbers(graph: OpGraph, schedule: Schedule, gpu: Profile) -> dict[str, Any]:
    """What a script wants of a schedule."""
    s = schedule
    memory = shared_memory(graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)
    runs = [(graph.iterations(graph.phase(p.name)), p) for p in s.phases]
    return {
        "smem_peak_bytes": memory.total,
        "smem_peak_phase": memory.peak,
        "predicted_us": s.predicted_us,
        "floor_us": round(floor_us(graph, s.batch, gpu), 3),
        "tasks": sum(times * n for times, p in runs for part in p.tasks for _, n in part),
        "phases": sum(times for times, _ in runs),
    }


def timed(f: Callable[[], Any]) -> tuple[Any, float]:
    """(f's result, seconds it took)."""
    start = time.perf_counter()
    result = f()
    return result, time.perf_counter() - start
