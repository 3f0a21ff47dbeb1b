"""64 clients at once for a minute, some of whom go away."""

import collections
import concurrent.futures
import pathlib
import random
import re
import time

import openai
import pytest
from serve.conftest import KEY, served

from mkdsl.engine import SamplingParams
from mkdsl.serve import create_app

CLIENTS, SECONDS = 64, 60
ASK = {"model": "tiny", "max_tokens": 24, "logit_bias": {"257": -100}}
PROMPTS = [f"{'the same long beginning of all prompts, ' * (i % 3)}number {i}" for i in range(12)]


def resident_mib():
    return int(re.findall(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[0]) >> 10


class Client:
    """Asks one thing after the other, and checks what it gets."""

    def __init__(self, number, address, expected, end):
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)
        self.random, self.expected, self.end, self.did = random.Random(number), expected, end, collections.Counter()

    def run(self):
        with self.client:
            while time.monotonic() < self.end:
                ask = self.random.choice([self.whole, self.stream, self.leave_a_stream, self.wait_no_longer])
                try:
                    ask(self.random.randrange(len(PROMPTS)))
                    self.did[ask.__name__] += 1
                except openai.RateLimitError:
                    self.did["sent away"] += 1
                    time.sleep(0.05)
        return self.did

    def whole(self, i):
        assert self.client.completions.create(prompt=PROMPTS[i], seed=i, **ASK).choices[0].text == self.expected[i]

    def stream(self, i):
        chunks = self.client.completions.create(prompt=PROMPTS[i], seed=i, stream=True, **ASK)
        assert "".join(chunk.choices[0].text for chunk in chunks) == self.expected[i]

    def leave_a_stream(self, i):
        with self.client.completions.create(prompt=PROMPTS[i], seed=i, stream=True, **ASK) as chunks:
            for _ in zip(range(self.random.randrange(3)), chunks, strict=False):
                pass

    def wait_no_longer(self, i):
        with pytest.raises(openai.APITimeoutError):
            self.client.with_options(timeout=0.001).completions.create(prompt=PROMPTS[i], seed=i, n=2, **ASK)


@pytest.mark.slow
def test_soak(engine, capsys):
    params = [SamplingParams(seed=i, max_tokens=24, logit_bias={257: -100}) for i in range(len(PROMPTS))]
    expected = [answer.text for (answer,) in engine.generate(PROMPTS, params)]
    memory, begun = [resident_mib()], time.monotonic()
    with served(create_app(engine, model="tiny", api_key=KEY, max_open=48)) as address:
        clients = [Client(number, address, expected, begun + SECONDS) for number in range(CLIENTS)]
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(client.run) for client in clients]
            while not all(one.done() for one in running):
                time.sleep(5)
                memory.append(resident_mib())
    did = sum((one.result() for one in running), collections.Counter())
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {time.monotonic() - begun:.0f} s: {dict(did)}; MiB every 5 s: {memory}")
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.free) == (0, 0, stats.pages)
    assert all(did[what] for what in ("whole", "stream", "leave_a_stream", "wait_no_longer", "sent away"))
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 32  # what is leaked is leaked all the time; allocators settle in the beginning
