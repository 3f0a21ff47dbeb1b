"""`mkdsl demo`: the whole path on a real small model, with or without a GPU."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import typer

from mkdsl.engine._cli_explain import graph_of, numbers, timed
from mkdsl.engine._cli_generate import show
from mkdsl.engine._engine import Engine
from mkdsl.engine._progress import loading_bar
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._smollm2 import fetch_smollm2
from mkdsl.engine._tokenizer import Tokenizer, load_tokenizer
from mkdsl.gpu import has_gpu, jit
from mkdsl.models import DecoderConfig, decode_step, init_cache, load
from mkdsl.ops import prefill
from mkdsl.proof import verify_schedule
from mkdsl.schedule import Schedule, profile
from mkdsl.search import explain, search

QUESTION = "What is the capital of France?"
CONTEXT = 512
GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
START = 2  # layers of the first interpreted run
BUDGET = 110.0  # seconds for a second one with more: the whole demo stays under five minutes on two cores
LAUNCH = 210  # tasks that cost as much as starting 264 threads: 1 and 3 layers took 93 and 167 s (measured on two cores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model, with the prompt of the question: its parameters are the engine's too, the same arrays."""

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    prompt: list[int]


def demo() -> None:
    """Generate with a real model, search its schedule, prove it, run its kernel."""
    console = rich.console.Console()
    console.rule("1. A real model: SmolLM2-135M-Instruct")
    with console.status("fetching and converting it (cached afterwards)"):
        directory = fetch_smollm2()
    model = _load(directory)
    console.print(f"{directory}\n> {QUESTION}", highlight=False)
    with Engine.of(model.config, model.params, model.tokenizer, max_batch=1, context=CONTEXT) as engine:
        show(console, engine, model.prompt, GREEDY)
        schedule = _schedule(console, model)
        if has_gpu():
            _on_gpu(console, model, engine)
    if not has_gpu():
        _interpreted(console, model)
        _without_gpu(console, schedule)


def _load(directory: pathlib.Path) -> Model:
    tokenizer = load_tokenizer(directory)
    with loading_bar(f"loading {directory.resolve().name}") as progress:
        config, params = load(directory, progress=progress)
    return Model(config=config, params=params, tokenizer=tokenizer, prompt=tokenizer.encode_chat([{"role": "user", "content": QUESTION}]))


def _schedule(console: rich.console.Console, model: Model) -> Schedule:
    """Steps 2 and 3: search, show, prove."""
    console.rule("2. Its schedule for an H200, searched from shapes alone")
    graph, gpu = graph_of(model.config, CONTEXT), profile("H200")
    with console.status("searching"):
        schedule, seconds = timed(lambda: search(graph, batch=1, target=gpu, cache=False))
    typer.echo(explain(graph, schedule, gpu))
    typer.echo("(times in the tables are the simulator's, predicted)")
    console.rule("3. Its proof")
    _, proof = timed(lambda: verify_schedule(graph, schedule, gpu))
    console.print(
        f"searched in {seconds:.2f} s and proven in {proof:.3f} s (measured here): every item once, no deadlock, no race, shared memory fits",
        highlight=False,
    )
    return schedule


def _on_gpu(console: rich.console.Console, model: Model, engine: Engine) -> None:
    """The kernel's tokens beside the reference's."""
    console.rule("4. The kernel against the float32 reference, on this GPU")
    with console.status("generating with both"):
        ((answer,),) = engine.generate([model.prompt], GREEDY)
        ours, theirs = answer.tokens, greedy(model.config, float32(model.params), model.prompt, 48)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    for name, tokens in (("kernel", ours), ("reference", theirs)):
        console.print(f"{name}: {''.join(model.tokenizer.stream(tokens))}", highlight=False, markup=False)
    console.print(f"the first {same} of {len(theirs)} tokens are equal (measured; the reference has float32 weights and a bf16 cache)")


def greedy(config: DecoderConfig, params: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The plain decode step's answer, token by token, without its end token."""
    step, kv = jax.jit(decode_step(config), donate_argnums=1), filled(config, params, prompt[:-1])
    token, said = jnp.int32(prompt[-1]), []
    for pos in range(len(prompt) - 1, len(prompt) - 1 + count):
        token, _, kv = step(params, kv, token, jnp.int32(pos))
        if int(token) in config.eos:
            break
        said.append(int(token))
    return said


def filled(config: DecoderConfig, params: Any, tokens: Sequence[int]) -> Any:
    """A cache that holds these tokens."""
    fill = jax.jit(lambda *args: prefill(decode_step(config))(*args)[-1])  # the cache only: XLA drops the logits
    return fill(params, init_cache(config, CONTEXT), jnp.array(tokens, jnp.int32), jnp.arange(len(tokens)))


def _interpreted(console: rich.console.Console, model: Model) -> None:
    """Without a GPU: the same kernels in interpret mode, as many layers as the time allows."""
    console.rule("4. Its kernel on these weights, interpreted under the race detector")
    with console.status("prefilling the question"):
        kv = filled(model.config, model.params, model.prompt[:-1])
    state = model.prompt[-1], len(model.prompt) - 1
    layers = affordable(model.config, _run(console, model, kv, state, START))
    if layers >= 2 * START:
        _run(console, model, kv, state, layers)


def _without_gpu(console: rich.console.Console, schedule: Schedule) -> None:
    """What a GPU would do, and how fast by the simulator."""
    console.rule("With a GPU")
    console.print(
        f"predicted on an H200: {schedule.predicted_us:.0f} us of kernel time a token, without the host's part of a step.",
        highlight=False,
    )
    console.print(
        "`mkdsl demo` would generate this answer through one persistent kernel per token: the schedule above in one launch, with "
        "hand-offs between its workers in device memory. docs/measurements.md has what that took on an H200.",
        highlight=False,
    )


def _run(console: rich.console.Console, model: Model, kv: Any, state: tuple[int, int], layers: int) -> float:
    """One decode step of the first layers and the head; prints how it compares, returns its seconds."""
    config, params, kv = first_layers(model.config, model.params, kv, layers)
    step, (token, pos) = decode_step(config), state
    compiled = jit(step, target="H200", interpret=True)
    with console.status(f"interpreting {layers} of {model.config.layers} layers and the head, on 132 workers as two threads each"):
        (ours, logits, _), seconds = timed(lambda: compiled(params, kv, token, pos))  # raises RaceError if there is one
    theirs, expected, _ = jax.jit(step)(float32(params), float32(kv), token, pos)
    which = "the whole model" if layers == model.config.layers else f"the first {layers} of {model.config.layers} layers and the head"
    tokens = f"token {int(ours)} {''.join(model.tokenizer.stream([int(ours)]))!r}, reference {int(theirs)}"
    console.print(
        f"{which}: {seconds:.0f} s, no races; logits within {error(logits, expected):.4f} of float32 (relative L2); {tokens} (all measured here)",
        highlight=False,
    )
    return seconds


def affordable(config: DecoderConfig, seconds: float) -> int:
    """How many layers the budget allows, from the seconds that the first START layers and the head took."""
    one, two = work(config, 1), work(config, 2)
    layer, ends = two - one, 2 * one - two
    return max(1, min(config.layers, int((BUDGET / seconds * (START * layer + ends) - ends) / layer)))


def work(config: DecoderConfig, layers: int) -> int:
    """What interpreting a step of so many layers costs, relative to one task."""
    graph = graph_of(dataclasses.replace(config, layers=layers), CONTEXT)
    counted = numbers(graph, search(graph, batch=1, target="H200"), profile("H200"))
    return counted["tasks"] + LAUNCH * counted["phases"]


def first_layers(config: DecoderConfig, params: Any, kv: Any, layers: int) -> tuple[DecoderConfig, Any, Any]:
    """The model cut to its first layers, with its embedding, norm and head."""

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda a: a[:layers], tree)

    return dataclasses.replace(config, layers=layers), params | {"layers": cut(params["layers"])}, cut(kv)


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def error(ours: Any, theirs: Any) -> float:
    """Relative L2 distance."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
