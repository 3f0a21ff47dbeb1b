"""OpenAI's clients, in processes of their own, against the HTTP server of this process's engine."""

import collections
import contextlib
import gc
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO

import uvicorn
from _times import quantiles
from _watch import Memory, given_back, idle, left

from mkdsl.engine import Engine
from mkdsl.serve import create_app

QUEUE = 64  # as `mkdsl serve` has it
CLIENTS = pathlib.Path(__file__).parent / "clients.py"


def clients(
    engine: Engine, model: str, *, max_batch: int, count: int, seconds: float, prompt: int, answer: int, alive: Callable[[], None]
) -> tuple[dict[str, str], list[str]]:
    """A row of the table, and what is wrong. A second before, which is not counted, sees to it that all has been done once."""
    asks = [f"--vocab={engine.config.vocab}", f"--prompt={prompt}", f"--answer={answer}"]
    with _served(engine, model, max_batch + QUEUE) as address:
        _run([address + "/v1", model, *asks], min(seconds, 2), count, lambda: None)
        gc.collect()
        memory, before = Memory(), [_answered(address)]

        def look() -> None:
            memory.look()
            if before[-1] != (now := _answered(address)):
                before[1:] = [now]
                alive()

        said = _run([address + "/v1", model, *asks], seconds, count, look)
        idle(engine)
        in_all = _answered(address) - before[0]
    lost = [lost for one in said for lost in one["lost"]]
    did = sum((collections.Counter(one["did"]) for one in said), collections.Counter())
    took = max((one["seconds"] for one in said), default=seconds)
    row = {
        "clients": str(count),
        "did": ", ".join(f"{n} {what}" for what, n in sorted(did.items())),
        "lost": str(len(lost)),
        "tokens/s": f"{in_all / took:.0f}",
        "first token ms, p50, p99": quantiles([s for one in said for s in one["first"]], 1e3),
        "whole answer ms, p50, p99": quantiles([s for one in said for s in one["whole"]], 1e3),
    }
    return row | given_back(engine, memory), lost[:10] + left(engine, memory)


def _run(asks: list[str], seconds: float, count: int, look: Callable[[], None]) -> list[dict]:
    """What the clients of each process say; they go to files, which no pipe that is full can stop."""
    processes = max(1, min(count, 8, (os.cpu_count() or 2) // 2))
    with contextlib.ExitStack() as stack:
        running = []
        for number in range(processes):
            share = count // processes + (number < count % processes)
            command = [sys.executable, str(CLIENTS), *asks, f"--clients={share}", f"--seconds={seconds}", f"--seed={number}"]
            out = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            running.append((stack.enter_context(subprocess.Popen(command, stdout=out)), out))
        while any(process.poll() is None for process, _ in running):
            time.sleep(min(1.0, seconds / 10))
            look()
        return [_said(process, out) for process, out in running]


def _said(process: subprocess.Popen, out: IO[str]) -> dict:
    if process.returncode not in (0, 1):
        raise RuntimeError(f"clients ended with {process.returncode}")
    out.seek(0)
    return json.load(out)


@contextlib.contextmanager
def _served(engine: Engine, model: str, max_open: int) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(engine, model=model, max_open=max_open), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()


def _answered(address: str) -> int:
    """Tokens that the server has answered with so far."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        (tokens,) = re.findall(r"^mkdsl_answer_tokens_total (\S+)", reply.read().decode(), re.MULTILINE)
    return int(float(tokens))
