"""Many requests at once on a tiny model, in float32: each has the tokens that it has alone."""

import asyncio
import dataclasses
import gc
import itertools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import models
from mkdsl.engine import (
    ContextError,
    Engine,
    EngineError,
    LogitsError,
    PagesError,
    PromptError,
    SamplingError,
    SamplingParams,
    _engine,
    load_tokenizer,
)
from mkdsl.engine._backend import Backend, _decode
from mkdsl.engine._decoder import Pool, WatchedStep, decode_steps
from mkdsl.engine._pages import PagePool
from mkdsl.engine._sampler import Asked
from mkdsl.engine._scheduler import Scheduler
from mkdsl.gpu import HangError

pytestmark = pytest.mark.medium
CONTEXT, SIZE, PIECE, STEPS = 96, 16, 32, 4
EVERYTHING = Asked.everything()
POOL = Pool(count=24, size=SIZE, width=CONTEXT // SIZE)
GREEDY = SamplingParams(temperature=0, max_tokens=10)
RANDOM = np.random.default_rng(0)
PROMPTS = [tuple(RANDOM.integers(0, 256, length).tolist()) for length in (1, 2, 17, 40, 70, 33, 5)]


@pytest.fixture(scope="session")
def config(shape):
    return dataclasses.replace(shape, eos=())


@pytest.fixture(scope="session")
def params(config):
    return models.random_params(config, jax.random.key(7), jnp.float32)


@pytest.fixture
def make(config, params, checkpoint):
    """Engines of the tiny model; all are closed in the end, and have all their pages back.

    The device always has 24 pages and 4 slots, of which the scheduler may know fewer: so nearly all tests share the executables.
    """
    made = []

    def engine(
        *, pages=24, max_batch=4, params=params, config=config, dtype=jnp.float32, batch_invariant=False, asked=EVERYTHING, packed=0, step_of=None
    ):  # fmt: skip
        pool = PagePool(count=pages, size=SIZE)
        scheduler = Scheduler(pool, max_batch=max_batch, piece=PIECE, steps=STEPS, packed=packed, batch_invariant=batch_invariant)
        backend = Backend(
            config, params, pages=24, page_size=SIZE, context=CONTEXT, max_batch=4, steps=STEPS, step_of=step_of or decode_steps(config, POOL),
            smallest=PIECE if batch_invariant else 16, packed=packed, cache_dtype=dtype, asked=asked,
        )  # fmt: skip
        tokenizer = load_tokenizer(checkpoint)
        made.append(Engine(config=config, tokenizer=tokenizer, context=CONTEXT, scheduler=scheduler, backend=backend))
        made[-1].backend = backend
        return made[-1]

    yield engine
    for engine in made:
        settle(engine)
        engine.close()
        pool = engine._scheduler.pool
        assert (pool.available, pool.promised) == (pool.count, 0)


def settle(engine):
    """Waits until the engine's thread has done what it was sent."""
    done = threading.Event()
    engine._loop._inbox.put(done.set)
    if engine._loop._thread.is_alive():
        assert done.wait(60)


@pytest.fixture(scope="session")
def decode(config):
    return jax.jit(models.decode_step(config))


@pytest.fixture
def alone(config, params, decode):
    """The logits after each token, and the greedy answer, token by token through the decode step itself."""

    def answer(prompt, count):
        kv, tokens, seen = models.init_cache(config, CONTEXT, dtype=jnp.float32), list(prompt), []
        for pos in range(len(prompt) + count - 1):
            token, logits, kv = decode(params, kv, jnp.int32(tokens[pos]), jnp.int32(pos))
            seen.append(np.asarray(logits))
            tokens += [int(token)] if pos + 1 == len(tokens) else []
        return tuple(tokens[len(prompt) :]), seen[len(prompt) - 1 :]

    return answer


def tokens_of(answers):
    return [answer.tokens for (answer,) in answers]


def test_each_has_the_tokens_it_has_alone(make, alone):
    """More than there are slots, of all lengths: they join and leave at different times."""
    engine = make()
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (10, 3, 14, 1, 26, 7, 12)]
    answers = engine.generate(PROMPTS, params)
    for prompt, wanted, (answer,) in zip(PROMPTS, params, answers, strict=True):
        assert answer.tokens == alone(prompt, wanted.max_tokens)[0]
        assert answer.finish == "length"


SAMPLED = [
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=1, max_tokens=9, temperature=0.6, top_k=40),
    SamplingParams(seed=2, max_tokens=12, top_p=0.8),
    SamplingParams(seed=3, max_tokens=12, min_p=0.3, logprobs=2),
    SamplingParams(seed=4, max_tokens=20, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.5),
    SamplingParams(seed=5, max_tokens=12, logit_bias={9: 5.0}),
    SamplingParams(temperature=0, max_tokens=12),
]


def test_seeds_whoever_else_is_there(make):
    engine = make()
    together = tokens_of(engine.generate(PROMPTS, SAMPLED))
    backwards = tokens_of(engine.generate(PROMPTS[::-1], SAMPLED[::-1]))[::-1]
    alone = [tokens_of(engine.generate([prompt], params))[0] for prompt, params in zip(PROMPTS, SAMPLED, strict=True)]
    assert together == backwards == alone


def test_the_same_bits_whoever_else_is_there(make, params):
    """In bfloat16, where a sum in another order shows: alone, in company at any place, and behind a prefix that was found."""
    weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    engine = make(params=weights, dtype=jnp.bfloat16, batch_invariant=True)
    sampled = [dataclasses.replace(s, logprobs=20) for s in SAMPLED]
    alone = [engine.generate([p], s)[0] for p, s in zip(PROMPTS, sampled, strict=True)]
    for order in (slice(None), slice(None, None, -1), slice(3, None), slice(1, None, 2)):
        assert engine.generate(PROMPTS[order], sampled[order]) == alone[order]
    fresh = make(params=weights, dtype=jnp.bfloat16, batch_invariant=True)
    assert fresh.generate(PROMPTS, sampled) == alone


def test_without_a_seed_answers_differ(make):
    answers = make().generate([PROMPTS[2]] * 2, SamplingParams(max_tokens=12))
    assert answers[0] != answers[1]


def test_several_answers_have_seeds_that_follow(make):
    engine = make()
    (several,) = engine.generate([PROMPTS[3]], SamplingParams(seed=7, max_tokens=8, n=3))
    single = engine.generate([PROMPTS[3]] * 3, [SamplingParams(seed=seed, max_tokens=8) for seed in (7, 8, 9)])
    assert list(several) == [answer for (answer,) in single]
    assert len({answer.tokens for answer in several}) == 3


def test_logprobs_are_of_the_model(make, alone):
    params = SamplingParams(seed=3, max_tokens=6, temperature=0.5, logit_bias={9: 20.0}, logprobs=3)
    ((answer,),) = make().generate([PROMPTS[1]], params)
    assert answer.tokens == (9,) * 6
    logits = alone(PROMPTS[1], 1)[1][0]
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    first = answer.logprobs[0]
    assert len(answer.logprobs) == 6 and first.token == 9
    np.testing.assert_allclose(first.logprob, expected[9], atol=1e-4)
    assert [token for token, _ in first.top] == np.argsort(-expected)[:3].tolist()
    np.testing.assert_allclose([p for _, p in first.top], np.sort(expected)[::-1][:3], atol=1e-4)


def test_no_logprobs_unless_asked_for(make):
    answers = make().generate(PROMPTS[:2], [GREEDY, dataclasses.replace(GREEDY, logprobs=0)])
    assert answers[0][0].logprobs == ()
    assert len(answers[1][0].logprobs) == 10 and not answers[1][0].logprobs[0].top


def prefilled(engine, monkeypatch):
    """The pieces of prompts that are written from now on: where each began, and its length."""
    pieces, prefill = [], engine.backend.prefill

    def noted(together):
        pieces.extend((piece.start, len(piece.tokens)) for piece in together)
        return prefill(together)

    monkeypatch.setattr(engine.backend, "prefill", noted)
    return pieces


def test_a_shared_prefix_is_prefilled_once(make, alone, monkeypatch):
    engine = make()
    pieces = prefilled(engine, monkeypatch)
    prompts = [(*PROMPTS[4][:60], token) for token in (1, 2, 3)]
    assert tokens_of(engine.generate(prompts, GREEDY)) == [alone(prompt, 10)[0] for prompt in prompts]
    assert pieces == [(0, 32), (32, 28), (48, 12), (48, 12)]


def test_short_prompts_are_written_together(make, alone, monkeypatch):
    """Each as if it were alone; one that is longer comes after them."""
    engine = make(packed=32)
    together, prefill = [], engine.backend.prefill
    monkeypatch.setattr(
        engine.backend, "prefill", lambda pieces: together.append([len(piece.tokens) for piece in pieces]) or prefill(pieces)
    )
    prompts = [PROMPTS[6], PROMPTS[1], (7, 8, 9), PROMPTS[3]]
    assert tokens_of(engine.generate(prompts, GREEDY)) == [alone(prompt, 10)[0] for prompt in prompts]
    assert together == [[4, 1, 2], [32], [7]]


def test_a_conversation_goes_on_from_its_answer(make, alone, monkeypatch):
    engine = make()
    ((first,),) = engine.generate([PROMPTS[3]], dataclasses.replace(GREEDY, max_tokens=20))
    pieces = prefilled(engine, monkeypatch)
    prompt = (*PROMPTS[3], *first.tokens, 1, 2, 3, 4, 5, 6, 7)
    assert tokens_of(engine.generate([prompt], GREEDY)) == [alone(prompt, 10)[0]]
    assert pieces == [(48, 18)]


def test_pages_are_used_again(make, alone):
    """A pool of one sequence's pages: everybody waits for the one before, and what was kept is evicted."""
    engine = make(pages=6)
    for _ in range(2):
        assert tokens_of(engine.generate(PROMPTS, GREEDY)) == [alone(prompt, 10)[0] for prompt in PROMPTS]


def test_what_a_page_held_before_does_not_matter(make, alone):
    engine = make()
    engine.backend._pages = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), engine.backend._pages)
    assert tokens_of(engine.generate(PROMPTS[1:4], GREEDY)) == [alone(prompt, 10)[0] for prompt in PROMPTS[1:4]]


def test_end_tokens(make, alone):
    engine = make()
    expected, _ = alone(PROMPTS[2], 10)
    end = expected[4]
    first = expected.index(end)
    ((answer,),) = engine.generate([PROMPTS[2]], dataclasses.replace(GREEDY, stop_tokens=(end,)))
    assert (answer.tokens, answer.finish) == (expected[:first], "stop")


def test_the_models_own_end_tokens(make, config, alone):
    expected, _ = alone(PROMPTS[2], 10)
    never = next(token for token in range(256) if token not in expected)
    engine = make(config=dataclasses.replace(config, eos=(never, expected[4])))
    ((answer,),) = engine.generate([PROMPTS[2]], GREEDY)
    assert (answer.tokens, answer.finish) == (expected[: expected.index(expected[4])], "stop")


@pytest.fixture
def says(make, monkeypatch):
    """An engine whose decode steps say a text."""

    def engine(text):
        engine = make()
        script, decode = engine.tokenizer.model.encode(text, add_special_tokens=False).ids, engine.backend.decode

        said = iter(script)

        def scripted(lanes, **options):
            flight = decode(lanes, **options)
            return types.SimpleNamespace(
                land=lambda: [dataclasses.replace(s, tokens=list(itertools.islice(said, len(s.tokens)))) for s in flight.land()]
            )

        monkeypatch.setattr(engine.backend, "decode", scripted)
        return engine

    return engine


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("b c",), "a日", 7),
        (("日b",), "a", 5),
        (("x", "c d", "b c d"), "a日", 9),
        (("xyz",), "a日b c déf..", 14),
        (("f",), "a日b c dé", 12),
    ],
)
def test_stop_strings_across_token_borders(says, stop, text, tokens):
    """A token is a byte here."""
    params = SamplingParams(max_tokens=14, stop=stop, temperature=0)
    ((answer,),) = says("a日b c déf...").generate(["hello"], params)
    assert (answer.text, len(answer.tokens)) == (text, tokens)
    assert answer.finish == ("length" if stop == ("xyz",) else "stop")


async def collected(stream):
    return [delta async for delta in stream]


def test_streams_are_what_generate_gives(make):
    engine = make()

    async def all_at_once():
        return await asyncio.gather(*(collected(engine.stream(p, s)) for p, s in zip(PROMPTS, SAMPLED, strict=True)))

    whole = engine.generate(PROMPTS, SAMPLED)
    for deltas, (answer,) in zip(asyncio.run(all_at_once()), whole, strict=True):
        assert [delta.finish is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert "".join(delta.text for delta in deltas) == answer.text
        assert tuple(token for delta in deltas for token in delta.tokens) == answer.tokens
        assert len(deltas) > 1


def test_streams_of_several_answers(make):
    engine, params = make(), SamplingParams(seed=7, max_tokens=8, n=2)
    deltas = asyncio.run(collected(engine.stream(PROMPTS[3], params)))
    (answers,) = engine.generate([PROMPTS[3]], params)
    for choice, answer in enumerate(answers):
        assert tuple(token for delta in deltas if delta.choice == choice for token in delta.tokens) == answer.tokens


def test_streams_of_several_prompts(make):
    engine = make()
    deltas = asyncio.run(collected(engine.stream_all(PROMPTS, SAMPLED)))
    for number, (answer,) in enumerate(engine.generate(PROMPTS, SAMPLED)):
        assert "".join(delta.text for delta in deltas if delta.prompt == number) == answer.text


def test_how_busy_it_is(make, monkeypatch):
    engine, seen = make(), []
    decode = engine.backend.decode
    monkeypatch.setattr(engine.backend, "decode", lambda *args, **options: seen.append(engine.stats()) or decode(*args, **options))
    engine.generate([*PROMPTS[:4], *PROMPTS[5:]], dataclasses.replace(GREEDY, max_tokens=30))
    settle(engine)
    assert (seen[0].waiting, seen[0].running) == (3, 3)  # one without a prefill, one after its, and one before
    assert max(stats.running for stats in seen) == 4
    assert min(stats.free for stats in seen) < 24
    after = engine.stats()
    assert (after.waiting, after.running, after.pages, after.free) == (0, 0, 24, 24)
    assert after.published > 0


def test_who_stops_listening_frees_their_place(make, alone):
    engine = make(max_batch=1)

    async def leave():
        stream = engine.stream(PROMPTS[3], dataclasses.replace(GREEDY, max_tokens=50))
        async for _ in stream:
            break
        await stream.aclose()
        return await asyncio.wait_for(collected(engine.stream(PROMPTS[2], GREEDY)), 60)

    deltas = asyncio.run(leave())
    assert tuple(token for delta in deltas for token in delta.tokens) == alone(PROMPTS[2], 10)[0]


def test_a_cancelled_task_frees_its_place(make):
    engine = make(max_batch=1)

    async def leave():
        task = asyncio.create_task(collected(engine.stream(PROMPTS[3], dataclasses.replace(GREEDY, max_tokens=50))))
        waiting = asyncio.create_task(collected(engine.stream(PROMPTS[4], GREEDY)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)

    asyncio.run(leave())
    settle(engine)
    assert not engine._scheduler.running and not engine._scheduler.waiting and not engine._loop._work


def test_logits_that_are_no_numbers(make, params):
    engine = make(params=params | {"norm": params["norm"].at[3].set(jnp.nan)})
    with pytest.raises(LogitsError, match=r"the logits after 17 tokens are NaN or infinite; .* download the checkpoint again"):
        engine.generate([PROMPTS[2]], GREEDY)


def test_a_single_logit_that_is_no_number(make, config, params):
    """Whichever it is, and whenever: what is drawn says nothing then."""
    plain = decode_steps(config, POOL)(4)

    def step(params, kv, tokens, positions):
        logits, kv = plain(params, kv, tokens, positions)
        return jnp.where((positions == params["bad"])[:, None] & (jnp.arange(config.vocab) == 17), params["value"], logits), kv

    for value in (np.nan, np.inf):
        for tokens in (0, 6):
            bad = {"bad": jnp.int32(len(PROMPTS[2]) - 1 + tokens), "value": jnp.float32(value)}
            engine = make(params=params | bad, step_of=lambda _: step)
            with pytest.raises(LogitsError, match=rf"the logits after {len(PROMPTS[2]) + tokens} tokens are NaN or infinite"):
                engine.generate([PROMPTS[2]], GREEDY)


def test_numbers_come_back_not_logits(make, monkeypatch):
    """For each token one: neither sampling nor the search for NaN costs a copy of the logits to the host."""
    engine, sizes, get = make(), [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: sizes.append(sum(a.size for a in jax.tree.leaves(tree))) or get(tree))
    engine.generate(PROMPTS[:3], SamplingParams(seed=1, max_tokens=5))
    assert set(sizes) == {batch * STEPS for batch in (1, 2, 4)}


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_a_step_that_fails_takes_its_own_with_it(make, alone, monkeypatch, what):
    """Also what the pages held; the engine goes on."""
    engine, does = make(), []
    tokens_of(engine.generate(PROMPTS[3:5], GREEDY))
    works = getattr(engine.backend, what)

    def fails(*args, **kwargs):
        does.append(what)
        if len(does) == 2:
            raise RuntimeError("out of luck")
        return works(*args, **kwargs)

    monkeypatch.setattr(engine.backend, what, fails)
    with pytest.raises(
        EngineError, match=r"a step failed on the device \(RuntimeError: out of luck\), and with it the . answers under way"
    ):
        engine.generate([(*PROMPTS[2], *PROMPTS[3]), PROMPTS[5]], GREEDY)
    assert tokens_of(engine.generate(PROMPTS[3:5], GREEDY)) == [alone(prompt, 10)[0] for prompt in PROMPTS[3:5]]


class HangsAt(WatchedStep):
    """The plain step as a kernel with a deadline that hangs where a sequence is at a position: it still ends, and its logits are numbers."""

    def __init__(self, config, position):
        object.__setattr__(self, "plain", decode_steps(config, POOL)(1))
        object.__setattr__(self, "position", position)

    def watched(self, params, kv, tokens, positions):
        return *self.plain(params, kv, tokens, positions), jnp.any(positions == self.position)[None].astype(jnp.int32)

    def check(self, counters):
        if counters.any():
            raise HangError("mk.jit: 131 of 132 workers gave up", ())


def test_a_kernel_that_hangs_fails_its_answers(make, alone, config):
    """In the middle of a flight of several steps; and the engine goes on."""
    step = HangsAt(config, 22)
    engine = make(step_of=lambda batch: step)
    with pytest.raises(EngineError, match=r"a step failed on the device \(HangError: mk\.jit: 131 of 132 workers gave up\), and with it"):
        engine.generate([PROMPTS[2]], GREEDY)
    assert tokens_of(engine.generate([PROMPTS[1]], GREEDY)) == [alone(PROMPTS[1], 10)[0]]


def test_closed(make):
    engine = make()
    engine.close()
    engine.close()
    assert engine.closed
    with pytest.raises(EngineError, match="the engine is closed; load it again"):
        engine.generate([PROMPTS[0]])


def test_closed_in_the_middle(make):
    engine = make()

    async def close():
        stream = engine.stream(PROMPTS[3], dataclasses.replace(GREEDY, max_tokens=50))
        async for _ in stream:
            engine.close()

    with pytest.raises(EngineError, match="the engine was closed before this answer was complete"):
        asyncio.run(close())
    engine._scheduler.lost()


def test_a_thread_that_ends_says_so(make, monkeypatch):
    """What is no fault of a step is a mistake of mkdsl's: nobody waits for ever then."""
    engine = make()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._scheduler, "next", lambda: 1 / 0)
    with pytest.raises(EngineError, match="the engine's thread ended \\(ZeroDivisionError: division by zero\\)"):
        engine.generate([PROMPTS[0]])


def test_nobody_has_it_any_more(checkpoint):
    engine = Engine.load(checkpoint, max_batch=1)
    thread = engine._loop._thread
    del engine
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ((), {"max_tokens": 1}, PromptError, "the prompt has no tokens"),
        ((1,) * 90, {"max_tokens": 7}, ContextError, "takes 90 tokens of a context of 96, and 7 more are asked for; ask for at most 6"),
        ((260,), {"max_tokens": 1}, PromptError, "the prompt has the token 260; token ids are 0 to 259"),
        ((1, -1), {"max_tokens": 1}, PromptError, "the prompt has the token -1; token ids are 0 to 259"),
        ((1,), {"logit_bias": {260: 1.0}}, SamplingError, "logit_bias names token 260, past the vocabulary of 260"),
        ((1,), {"stop_tokens": (999,)}, SamplingError, "stop_tokens names token 999, past the vocabulary of 260"),
        ((1,) * 60, {}, PagesError, r"a prompt of 60 tokens with max_tokens=36 takes 6 pages of 16 positions, and there are 5 in all"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(make, prompt, params, error, message):
    engine = make(pages=5)
    for ask in (
        lambda: engine.generate([PROMPTS[0], prompt], [GREEDY, SamplingParams(**params)]),
        lambda: engine.stream(prompt, SamplingParams(**params)),
    ):
        with pytest.raises(error, match=message):
            ask()
    settle(engine)
    assert not engine._loop._work


@pytest.mark.parametrize("prompts", ["hello", (1, 2, 3)])
def test_one_prompt_that_is_no_list(make, prompts):
    with pytest.raises(PromptError, match=r"generate takes several prompts; put the one into a list: generate\(\[prompt\]\)"):
        make().generate(prompts)


def test_as_many_sampling_parameters_as_prompts(make):
    with pytest.raises(SamplingError, match="3 prompts and 2 SamplingParams; give one for each, or one for all"):
        make().generate(PROMPTS[:3], [GREEDY] * 2)


def test_as_many_tokens_as_the_context_holds(make):
    ((answer,),) = make().generate([PROMPTS[4]], SamplingParams(temperature=0))
    assert len(answer.tokens) == CONTEXT - len(PROMPTS[4])


@pytest.mark.slow
def test_one_executable_for_each_batch_and_what_it_asks_for(make):
    """However many steps it runs, and whatever the numbers are."""
    engine = make(asked=None)
    sampled = SamplingParams(top_p=0.8, max_tokens=3, seed=1)
    for count in (1, 2, 4):
        engine.generate(PROMPTS[:count], GREEDY)
        engine.generate(PROMPTS[:count], sampled)
    before = _decode._cache_size()
    for count in (1, 3, 2, 4):
        engine.generate(PROMPTS[:count], [dataclasses.replace(GREEDY, max_tokens=n + 1) for n in range(count)])
        engine.generate(PROMPTS[:count], [dataclasses.replace(sampled, temperature=0.5 + n, top_p=0.9) for n in range(count)])
    assert _decode._cache_size() == before


@pytest.mark.slow
def test_compiled_ahead(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(_engine, "PIECE", 32)
    with Engine.load(checkpoint, max_batch=2, context=80, ahead=True) as engine:
        jax.config.update("jax_log_compiles", True)
        try:
            engine.generate([PROMPTS[1], PROMPTS[2], PROMPTS[3]], GREEDY)
            engine.generate([PROMPTS[1], PROMPTS[2], PROMPTS[3]], SamplingParams(temperature=0.7, max_tokens=3))
            assert not [what for what in ("jit(_decode)", "jit(_fill)", "jit(_clear)") if what in caplog.text]
            engine.generate([PROMPTS[1]], SamplingParams(top_p=0.7, max_tokens=3))
            assert "Compiling jit(_decode)" in caplog.text  # which nobody has asked for before
        finally:
            jax.config.update("jax_log_compiles", False)


def test_a_checkpoint_is_loaded(checkpoint):
    with Engine.load(checkpoint, max_batch=2, context=80) as engine:
        ((answer,), (same,)) = engine.generate(["hé", "hé"], GREEDY)
    assert answer == same
    assert len(answer.tokens) <= 10
    assert answer.text == "".join(engine.tokenizer.stream(answer.tokens))


def test_a_tokenizer_that_is_there_is_not_loaded_again(checkpoint):
    tokenizer, seen = load_tokenizer(checkpoint), []
    (checkpoint / "tokenizer.json").unlink()
    with Engine.load(checkpoint, max_batch=1, tokenizer=tokenizer, progress=lambda *now: seen.append(now)) as engine:
        assert engine.tokenizer is tokenizer
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(("stats", "pages"), [(None, 4), ({"bytes_limit": 10 << 30, "bytes_in_use": 1 << 30}, 4)])
def test_pages_of_a_device(checkpoint, monkeypatch, stats, pages):
    device = type("Device", (), {"memory_stats": lambda self: stats})()
    monkeypatch.setattr(_engine.jax, "local_devices", lambda: [device])
    with Engine.load(checkpoint, max_batch=2) as engine:
        assert engine._scheduler.pool.count == pages
