"""Seconds from a process's start to its first token, with nothing on disk and then with what the first left there.

    python benchmarks/startup.py smollm2-135m llama-3.2-1b [--context 2048] [--max-batch 1] [--prompt 32] [--processes 3] [--ahead]

Each process is a fresh one: it makes random weights on the device, an engine, and asks it for one token. Making the weights is not counted. A
line a process, in seconds: the total, and of what it consists: imports, JAX's backend, the engine (on a GPU with search, proof and emission of the kernel
for one sequence), the first token. Then what JAX says of the last two: how much of them it lowered (which is where kernels are emitted) and compiled (XLA,
Mosaic's passes and ptxas), and how many executables were found on disk, and how many were not.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

COLUMNS = ("total", "import", "device", "engine", "first token", "second token", "lowering", "compiling", "found", "compiled")
EVENTS = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
    "/jax/compilation_cache/cache_hits": "found",
    "/jax/compilation_cache/cache_misses": "compiled",
}


def child(model: str, context: int, max_batch: int, prompt: int, ahead: bool, started: float) -> None:
    """One process: prints its numbers as JSON."""
    laps: dict[str, float] = collections.defaultdict(float)
    last = started

    def lap(name: str) -> None:
        nonlocal last
        now = time.time()
        laps[name] += now - last
        last = now

    import jax

    from mkdsl.engine import Engine, SamplingParams, Tokenizer, load_tokenizer
    from mkdsl.models import SHAPES, random_params

    lap("import")

    def note(event: str, amount: float) -> None:
        laps[EVENTS.get(event, "")] += amount

    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: note(event, duration_secs))
    jax.monitoring.register_event_listener(lambda event, **_: note(event, 1))

    def tokenizer(vocab: int) -> Tokenizer:
        """One whose tokens are numbers."""
        with tempfile.TemporaryDirectory() as folder:
            words = {str(i): i for i in range(vocab)}
            text = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"}}
            pathlib.Path(folder, "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
            return load_tokenizer(pathlib.Path(folder))

    config = SHAPES[model]
    jax.block_until_ready(jax.device_put(0))
    lap("device")
    params = jax.block_until_ready(random_params(config, jax.random.key(0)))
    words = tokenizer(config.vocab)
    lap("weights")
    for name in ("lowering", "compiling", "found", "compiled"):
        laps[name] = 0  # those of the weights
    engine = Engine.of(config, params, words, max_batch=max_batch, context=context, ahead=ahead)
    lap("engine")
    for name in ("first token", "second token"):
        ((answer,),) = engine.generate([list(range(prompt))], SamplingParams(temperature=0, max_tokens=1))
        lap(name)
    laps["total"] = sum(laps[name] for name in ("import", "device", "engine", "first token"))
    engine.close()
    print(json.dumps(laps | {"token": answer.tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to a process's first token.")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--processes", type=int, default=3, help="one after the other; the first finds nothing on disk")
    parser.add_argument("--ahead", action="store_true", help="compile everything before the first token")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.started:
        child(args.models[0], args.context, args.max_batch, args.prompt, args.ahead, args.started)
        return
    print(f"{'':14}" + "".join(f"{name:>14}" for name in COLUMNS))
    for model in args.models:
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(args.processes):
                options = [
                    f"--context={args.context}",
                    f"--max-batch={args.max_batch}",
                    f"--prompt={args.prompt}",
                    *["--ahead"] * args.ahead,
                ]
                command = [sys.executable, __file__, model, *options, f"--started={time.time()}"]
                done = subprocess.run(command, env=os.environ | {"MKDSL_CACHE": cache}, stdout=subprocess.PIPE, text=True, check=True)
                laps = json.loads(done.stdout.splitlines()[-1])
                print(f"{model:14}" + "".join(f"{laps.get(name, 0):14.2f}" for name in COLUMNS), laps["token"], flush=True)


if __name__ == "__main__":
    main()
