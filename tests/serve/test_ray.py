"""examples/ray_serve.py on a Ray cluster of this machine's own: two replicas, on the CPU. It needs the extra `ray`."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
from serve.test_serve import ON, wait_until

ROOT = pathlib.Path(__file__).parents[2]
LONG = [[first, *range(80, 180)] for first in (1, 2, 3)]  # as tokens: more than a block of text
pytestmark = pytest.mark.slow


def children(pid):
    """All processes that one has started, and those that they have: their command lines by their ids."""
    parents, lines = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(path.name)] = (path / "cmdline").read_text()
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: lines[child] for child in found - {pid}}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(session_checkpoint, tmp_path_factory):
    """`serve run`, as docs/ray.md has it: the process, and the server's address. Whatever it has started is gone afterwards."""
    pytest.importorskip("ray", reason='it needs Ray: pip install -e ".[ray]"')
    port, directory = free_port(), tmp_path_factory.mktemp("ray")
    arguments = {"directory": str(session_checkpoint), "replicas": 2, "gpus": 0, "name": "tiny", "max_batch": 2, "context": 256}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "mkdsl", "import_path": "ray_serve:app", "args": arguments}],
    }
    (directory / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HOME": str(directory)}  # where Ray keeps the cluster's token
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(directory / "config.yaml")]
    with (
        open(directory / "log", "w") as log,
        subprocess.Popen(command, cwd=ROOT / "examples", env=environment, stderr=log, stdout=log) as running,
    ):
        started = {}
        try:
            until(lambda: running.poll() is not None or healthy(port), 300)
            assert running.poll() is None, (directory / "log").read_text()
            yield running, f"http://127.0.0.1:{port}"
        finally:
            started = children(running.pid)
            running.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
                running.wait(90)
                until(lambda: not any(map(alive, started)), 30)
            left = {pid: started.get(pid, "serve run") for pid in (running.pid, *started) if alive(pid)}
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert not left, f"{left}: {(directory / 'log').read_text()}"


def alive(pid):
    with contextlib.suppress(OSError):
        return (pathlib.Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come about in {seconds} s"
        time.sleep(0.2)


def healthy(port):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
        return reply.status == 200
    return False


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster[1]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def asked(client, prompt, **options):
    """(the replica, the answer)."""
    reply = client.completions.with_raw_response.create(model="tiny", prompt=prompt, logit_bias=ON, **({"max_tokens": 4} | options))
    return reply.headers["x-replica"], reply.parse()


def metric(address, name):
    """Of all replicas, in turn."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]


def test_both_replicas_answer(client, cluster):
    assert len({asked(client, "hello")[0] for _ in range(4)}) == 2
    assert all(tokens > 0 for tokens in metric(cluster[1], "mkdsl_answer_tokens_total"))
    assert metric(cluster[1], "mkdsl_pages")[1:]


def test_a_stream_is_the_answer(client):
    ask = {"temperature": 0, "max_tokens": 12}
    _, whole = asked(client, "hello", **ask)
    chunks = list(client.completions.create(model="tiny", prompt="hello", logit_bias=ON, stream=True, **ask))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 1
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=3)
    assert chat.choices[0].message.role == "assistant"


def test_equal_beginnings_meet(client):
    found = collections.defaultdict(set)
    for turn in range(5):
        for beginning in LONG:
            found[beginning[0]].add(asked(client, [*beginning, *range(turn)])[0])  # in turn, an odd number would not meet
    assert [len(replicas) for replicas in found.values()] == [1, 1, 1]


def test_errors_are_the_servers(client, cluster):
    with pytest.raises(openai.BadRequestError, match="takes 301 tokens of a context of 256") as caught:
        asked(client, "x" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        client.completions.create(model="gpt", prompt="hello")
    with pytest.raises(urllib.error.HTTPError) as wrong:
        urllib.request.urlopen(f"{cluster[1]}/nowhere", timeout=60)
    with wrong.value as error:
        assert (error.code, "Not Found" in json.load(error)["error"]["message"]) == (404, True)


def test_a_client_that_goes_away_frees_its_place(client, cluster):
    before = sum(metric(cluster[1], "mkdsl_answer_tokens_total"))
    stream = client.completions.create(model="tiny", prompt="hello", max_tokens=240, logit_bias=ON, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: sum(metric(cluster[1], "mkdsl_running")) == 0)
    assert sum(metric(cluster[1], "mkdsl_answer_tokens_total")) - before < 240
    assert metric(cluster[1], "mkdsl_pages") == metric(cluster[1], "mkdsl_free")


def test_a_replica_that_is_killed(client, cluster):
    """Its stream ends with an error and the other's does not; the other answers meanwhile, and there are two again."""
    before = {asked(client, "hello")[0] for _ in range(4)}
    streams = [client.completions.create(model="tiny", prompt="hello", max_tokens=240, logit_bias=ON, stream=True) for _ in before]
    firsts = [next(iter(stream)) for stream in streams]
    os.kill(
        next(pid for pid, line in children(cluster[0].pid).items() if line.startswith("ray::ServeReplica:mkdsl:Replica")), signal.SIGKILL
    )
    ends = []
    for stream in streams:
        try:
            ends.append(list(stream)[-1].choices[0].finish_reason)
        except openai.APIError as error:
            ends.append(error.code)
    assert all(first.choices for first in firsts)
    assert sorted(ends) == ["length", "replica_lost"]
    left = {asked(client, "hello")[0] for _ in range(4)}
    assert len(left & before) == 1
    until(lambda: len({asked(client, "hello")[0] for _ in range(4)} - before) == 1, 180)
