"""`mkdsl explain`: the schedule that would be used for a model on a GPU, from shapes alone."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from mkdsl.engine._decoder import check_context, shapes
from mkdsl.engine._page import page
from mkdsl.gpu import has_gpu, measure
from mkdsl.graph import OpGraph, build_graph
from mkdsl.lower import Program, lower
from mkdsl.models import SHAPES, CheckpointError, DecoderConfig, decode_step, init_cache, random_params, read_config
from mkdsl.proof import verify_schedule
from mkdsl.schedule import Profile, Schedule, profile, shared_memory
from mkdsl.search import explain as report
from mkdsl.search import floor_us, search, without_k_split
from mkdsl.simulate import Timeline, simulate, trace_events


def explain(
    model: Annotated[str, typer.Argument(help=f"A checkpoint directory, or one of {', '.join(SHAPES)}.")],
    target: Annotated[str, typer.Option(help="The GPU, by name, or a profile's .json file.")] = "h200",
    batch: Annotated[int, typer.Option(min=1, max=16, help="Sequences decoded together.")] = 1,
    context: Annotated[int, typer.Option(min=8, help="Positions in the KV cache, a multiple of 8.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers and the schedule, as JSON.")] = False,
    k_split: Annotated[
        bool, typer.Option("--k-split/--no-k-split", help="Without: every resident whole, no fold split over workers, no limit.")
    ] = True,
    html: Annotated[
        pathlib.Path | None,
        typer.Option(help="Write one page with all of it: the predicted timeline, shared memory, what bounds each phase."),
    ] = None,
    trace: Annotated[
        pathlib.Path | None,
        typer.Option(help="Write the timeline, SM by time, for ui.perfetto.dev."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--measured", help="Run it with random weights, and show the kernel's own time stamps too. Needs the GPU.")
    ] = False,
) -> None:
    """Show the schedule of a model on a GPU: what was chosen and what came second, shared memory, predicted time and what bounds it."""
    check_context(context)
    check_writable(html, "--html")
    check_writable(trace, "--trace")
    gpu = profile_of(target)
    if run:
        check_measurable(gpu, k_split)
    made = found(model, gpu, batch=batch, context=context, k_split=k_split, run=run)
    if html is not None:
        html.write_text(made.page(), encoding="utf-8")
    if trace is not None:
        trace.write_text(json.dumps(made.trace()), encoding="utf-8")
    typer.echo(json.dumps(made.numbers()) if as_json else made.text())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explained:
    """A schedule, and all that is said of it. gpu: the profile it is for. alternatives: whether there are any. took: seconds of search and proof."""

    model: str
    graph: OpGraph
    schedule: Schedule
    gpu: Profile
    alternatives: bool
    took: tuple[float, float]
    measured: Timeline | None

    def text(self) -> str:
        told = report(self.graph, self.schedule, self.gpu, alternatives=self.alternatives, model=self.model, measured=self.measured)
        return f"{told}\nsearched in {self.took[0]:.2f} s, proven in {self.took[1]:.3f} s"

    def page(self) -> str:
        device = jax.devices()[0].device_kind if self.measured else ""
        return page(self.model, self.graph, self.schedule, self.gpu, measured=self.measured, device=device, alternatives=self.alternatives)

    def trace(self) -> dict[str, Any]:
        return trace_events(simulate(self.graph, self.schedule, self.gpu, whole=True), self.measured)

    def numbers(self) -> dict[str, Any]:
        """For scripts: what was asked, the numbers, and the schedule, which `Schedule.from_json` takes."""
        asked = {"model": self.model, "target": self.gpu.name, "batch": self.schedule.batch, "context": self.graph.context}
        seconds = dict(zip(("search_seconds", "verify_seconds"), self.took, strict=True))
        measured = {"measured_us": self.measured.us} if self.measured else {}
        return asked | numbers(self.graph, self.schedule, self.gpu) | measured | seconds | {"schedule": self.schedule.to_json()}


def found(model: str, gpu: Profile, *, batch: int, context: int, k_split: bool, run: bool) -> Explained:
    """Searches, proves, and runs if that is wanted."""
    config = config_of(model)
    graph, tree = traced(config, context)
    (schedule, holds), search_seconds = timed(lambda: _search(graph, batch, gpu, k_split))
    _, proof_seconds = timed(lambda: verify_schedule(graph, schedule, holds))
    return Explained(
        model=model,
        graph=graph,
        schedule=schedule,
        gpu=gpu,
        alternatives=k_split,
        took=(search_seconds, proof_seconds),
        measured=run_on_gpu(config, lower(graph, schedule, gpu, tree)) if run else None,
    )


def check_writable(path: pathlib.Path | None, option: str) -> None:
    """Opens a file that is written at the end: what is wrong with it is said at the beginning."""
    try:
        if path is not None:
            path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written ({error.strerror})", param_hint=option) from None


def check_measurable(gpu: Profile, k_split: bool) -> None:
    """Refuses to measure where the kernel cannot run, before the search."""
    if problem := _not_measurable(gpu, k_split):
        raise typer.BadParameter(problem, param_hint="--measured")


def _not_measurable(gpu: Profile, k_split: bool) -> str:
    if not has_gpu():
        return f"it runs the kernel, and there is no GPU here: jax's backend is {jax.default_backend()!r}; leave it out for the prediction alone"
    if not k_split:
        return "it runs the kernel, and one without K-splitting need not fit; leave out --no-k-split"
    here, capability = jax.devices()[0], ".".join(map(str, gpu.capability))
    if here.compute_capability == capability and here.core_count >= gpu.workers:
        return ""
    return (
        f"{gpu.name} has {gpu.workers} SMs of compute capability {capability}, and {here.device_kind} here {here.core_count} of "
        f"{here.compute_capability}; name its profile by --target"
    )


def _search(graph: OpGraph, batch: int, gpu: Profile, k_split: bool) -> tuple[Schedule, Profile]:
    """A schedule, and a GPU that holds it: without K-splitting that may be one of more shared memory."""
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


def traced(config: DecoderConfig, context: int) -> tuple[OpGraph, Any]:
    """The operator DAG of a model's decode step, without its weights, and the structure of its results."""
    return build_graph(decode_step(config), *shapes(config, context))


def graph_of(config: DecoderConfig, context: int) -> OpGraph:
    """The operator DAG alone."""
    return traced(config, context)[0]


def run_on_gpu(config: DecoderConfig, program: Program) -> Timeline:
    """What the kernel's stamps say on random weights and a random cache, at its last position."""
    batch, context = program.schedule.batch, program.graph.context
    params = jax.jit(lambda key: random_params(config, key))(jax.random.key(0))
    empty = init_cache(config, context, batch=batch)
    kv = jax.tree.map(lambda x: (jax.random.normal(jax.random.key(1), x.shape) * 0.5).astype(x.dtype), empty)
    return measure(program, params, kv, jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, context - 1, jnp.int32))


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
