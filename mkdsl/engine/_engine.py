"""The engine: a model that answers many requests at once, each as if it were alone."""

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import queue
import secrets
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Self

import jax

from mkdsl.engine._answers import Answer, Delta, Writer, answers
from mkdsl.engine._backend import SMALLEST, Backend
from mkdsl.engine._context import check_prompt, positions
from mkdsl.engine._decoder import Path, Pool, decode_path, decode_steps
from mkdsl.engine._loop import Job, Loop
from mkdsl.engine._paged import pages_that_fit
from mkdsl.engine._pages import PagePool
from mkdsl.engine._pieces import Pieces, pieces_for
from mkdsl.engine._sampler import Asked
from mkdsl.engine._sampling import SamplingError, SamplingParams
from mkdsl.engine._scheduler import BATCHES, Scheduler
from mkdsl.engine._tokenizer import PromptError, Tokenizer, load_tokenizer
from mkdsl.gpu import detect, has_gpu, keep_executables
from mkdsl.models import DecoderConfig, Progress, abstract_params, load, read_config
from mkdsl.schedule import Profile, profile

PAGE = 128  # positions: half the longest block that attention is fastest with
PIECE = 512  # positions of a prompt written at once, where there is no GPU, or where it must be the same whoever else is there
STEPS = 4  # decode steps in one dispatch at most
HOST = 0.002  # seconds: longer than the host needs to begin a dispatch, so that as many steps as last so long keep the device busy
Prompt = str | Sequence[int]

log = logging.getLogger("mkdsl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """How busy an engine is.

    Attributes:
      waiting: answers that have not begun.
      running: answers that prefill or decode.
      pages: there are in all.
      page_size: positions in each.
      free: pages that nobody holds; the content of some may be kept.
      published: pages whose content is found by its prefix.
    """

    waiting: int
    running: int
    pages: int
    page_size: int
    free: int
    published: int


class Engine:
    """A model that answers many requests at once. Its methods may be called from any thread.

    Attributes:
      config: the model's shape.
      tokenizer: its tokenizer; `encode_chat` makes a prompt of a conversation.
      context: tokens that a prompt and its answer may have together.
    """

    def __init__(self, *, config: DecoderConfig, tokenizer: Tokenizer, context: int, scheduler: Scheduler, backend: Backend) -> None:
        """Puts an engine together; `Engine.load` does that for a checkpoint. Scheduler and backend are its own from here on."""
        self.config, self.tokenizer, self.context = config, tokenizer, context
        self._scheduler, self._loop = scheduler, Loop(scheduler, backend)
        self._close = weakref.finalize(self, self._loop.close)  # at the latest when nobody has the engine, or Python ends

    @classmethod
    def load(
        cls,
        directory: str | pathlib.Path,
        *,
        max_batch: int = 16,
        context: int | None = None,
        batch_invariant: bool = False,
        ahead: bool = False,
        deadline: float | None = None,
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Loads a Hugging Face checkpoint.

        Args:
          directory: the checkpoint.
          max_batch: sequences decoded together at most: 1, 2, 4, 8 or 16. Others wait.
          context: positions in each one's cache; by default 2048, or the whole tiles of what the model has been made for if that is less.
          batch_invariant: an answer with a seed has the same bits whoever else there is. All decode steps are of max_batch sequences then, prompts
            are written 512 tokens at a time, and of a prefix only as many are shared.
          ahead: compile everything now. Else each batch and each length of a piece is compiled when it is first needed, and all wait for it.
          deadline: seconds after which a decode step's kernel, if its workers still wait for each other, ends, and the answers under way fail; see
            `mk.jit`. None: the engine would hang with the kernel.
          tokenizer: the checkpoint's, where it has been loaded already.
          progress: called with the bytes of the weights that are read, and of how many.

        Returns:
          The engine, running.

        Raises:
          CheckpointError: the checkpoint cannot be used.
          ContextError: the model has not been made for so long a context.
          PagesError: the device's memory does not hold the cache of one sequence.
          UnsupportedError, ScheduleError: a kernel does not take the model, on a GPU.
          ValueError: max_batch is another number, or deadline none for the kernel, on a GPU.
          MissingExtra: safetensors or tokenizers is not installed.
        """
        keep_executables()
        config = read_config(directory)
        context = positions(config, context)
        width = -(-context // PAGE)
        pool = Pool(count=width, size=PAGE, width=width)
        decode_steps(config, pool, deadline)  # what a kernel does not take is refused before a weight is read
        tokenizer = tokenizer or load_tokenizer(directory)
        config, params = load(directory, progress=progress)
        return cls.of(
            config, params, tokenizer, max_batch=max_batch, context=context, ahead=ahead, batch_invariant=batch_invariant, deadline=deadline
        )

    @classmethod
    def of(
        cls, config: DecoderConfig, params: Any, tokenizer: Tokenizer, *, max_batch: int = 16, context: int, ahead: bool = False,
        batch_invariant: bool = False, deadline: float | None = None,
    ) -> Self:  # fmt: skip
        """An engine of a model that is there already. Arguments, and what is raised, as for `load`; params in bfloat16, on the device."""
        keep_executables()
        gpu = profile(detect()) if has_gpu() else None
        pieces = pieces_of(config, gpu, batch_invariant=batch_invariant)
        options = backend_options(config, pieces, context=context, max_batch=max_batch, free=free_bytes(), gpu=gpu)
        pool = pool_of(options)
        log.info("%d pages of %d positions: %.1f sequences of %d", pool.count, PAGE, pool.count * PAGE / context, context)
        scheduler = Scheduler(
            PagePool(count=pool.count, size=PAGE),
            max_batch=max_batch,
            piece=pieces.alone,
            beside=pieces.beside,
            packed=pieces.packed,
            steps=options["steps"],
            batch_invariant=batch_invariant,
        )
        asked = Asked.everything() if batch_invariant else None
        backend = Backend(config, params, step_of=decode_steps(config, pool, deadline), asked=asked, **options)
        if ahead:
            backend.compile([max_batch] if batch_invariant else [size for size in BATCHES if size <= max_batch], pieces.alone)
        return cls(config=config, tokenizer=tokenizer, context=context, scheduler=scheduler, backend=backend)

    @property
    def path(self) -> Path:
        """What decodes: the kernel, or where there is no GPU the reference, its plain JAX meaning."""
        return decode_path()

    def close(self) -> None:
        """Ends it after the step that is under way; answers that are not complete fail with EngineError."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[tuple[Answer, ...]]:
        """Answers all of some prompts.

        Args:
          prompts: text, or token ids. Text gets the model's beginning-of-sequence token.
          sampling: for all of them, or one for each; None for `SamplingParams()`.

        Returns:
          The n answers of each prompt.

        Raises:
          ContextError, CheckpointError, SamplingError, PromptError, PagesError: a prompt or its sampling cannot be; nothing has begun then.
          LogitsError, EngineError: an answer could not be completed; the others are cancelled then.
        """
        jobs = self._jobs(prompts, sampling)
        said: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        deltas: list[Delta] = []
        try:
            self._loop.submit(jobs, said.put)
            missing = len(jobs)
            while missing:
                delta = said.get()
                if isinstance(delta, Exception):
                    raise delta
                deltas.append(delta)
                missing -= delta.finish is not None
        finally:
            self._loop.cancel(jobs)
        return answers(deltas)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> AsyncGenerator[Delta]:
        """Answers a prompt bit by bit.

        Args:
          prompt: text, or token ids.
          sampling: None for `SamplingParams()`.

        Returns:
          An asynchronous iterator of deltas; each of the n answers has one with a `finish` as its last. Closing it, or cancelling the task
          that iterates, ends the answers. Nothing has begun before the first is asked for.

        Raises:
          As `generate`; what cannot be is raised here, and what could not be completed by the iterator.
        """
        return self.stream_all([prompt], sampling)

    def stream_all(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> AsyncGenerator[Delta]:
        """Answers some prompts bit by bit, as they come: arguments are those of `generate`, and the rest is as for `stream`."""
        return self._stream(self._jobs(prompts, sampling))

    def stats(self) -> Stats:
        """How busy it is now."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        running = len(scheduler.running) + (scheduler.prefilling is not None)
        return Stats(
            waiting=len(scheduler.waiting), running=running, pages=pool.count, page_size=pool.size, free=pool.available,
            published=pool.published,
        )  # fmt: skip

    @property
    def closed(self) -> bool:
        """Whether it answers nothing any more: it was closed, or its thread has failed."""
        return self._loop.closed

    async def _stream(self, jobs: Sequence[Job]) -> AsyncGenerator[Delta]:
        loop, said = asyncio.get_running_loop(), asyncio.Queue()

        def emit(delta: Delta | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody listens
                loop.call_soon_threadsafe(said.put_nowait, delta)

        try:
            self._loop.submit(jobs, emit)
            missing = len(jobs)
            while missing:
                delta = await said.get()
                if isinstance(delta, Exception):
                    raise delta
                missing -= delta.finish is not None
                yield delta
        finally:
            self._loop.cancel(jobs)

    def _jobs(self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None) -> list[Job]:
        """One for each of n answers to each prompt. What cannot be is refused here, in the caller's thread."""
        if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
            raise PromptError("generate takes several prompts; put the one into a list: generate([prompt])")
        several = sampling if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(prompts)
        if len(several) != len(prompts):
            raise SamplingError(f"{len(prompts)} prompts and {len(several)} SamplingParams; give one for each, or one for all")
        return [job for number, (p, s) in enumerate(zip(prompts, several, strict=True)) for job in self._jobs_of(number, p, s)]

    def _jobs_of(self, number: int, prompt: Prompt, params: SamplingParams) -> list[Job]:
        tokens = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not isinstance(prompt, str) and (outside := [token for token in tokens if not 0 <= token < self.config.vocab]):
            raise PromptError(f"the prompt has the token {outside[0]}; token ids are 0 to {self.config.vocab - 1}")
        check_prompt(self.config, self.context, tokens, params.max_tokens)
        self._check_vocabulary(params)
        max_tokens = params.max_tokens or self.context - len(tokens)
        self._scheduler.check(len(tokens), max_tokens)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        ends = (*self.config.eos, *params.stop_tokens)

        def job(choice: int) -> Job:
            writer = Writer(number, choice, params, self.tokenizer.text_after(tokens))
            return Job(prompt=tokens, max_tokens=max_tokens, params=params, seed=seed + choice, ends=ends, writer=writer)

        return [job(choice) for choice in range(params.n)]

    def _check_vocabulary(self, params: SamplingParams) -> None:
        for name, tokens in {"logit_bias": params.logit_bias, "stop_tokens": params.stop_tokens}.items():
            if past := [token for token in tokens if token >= self.config.vocab]:
                raise SamplingError(
                    f"{name} names token {past[0]}, past the vocabulary of {self.config.vocab}; the token is another model's"
                )


def pieces_of(config: DecoderConfig, gpu: Profile | None, *, batch_invariant: bool = False) -> Pieces:
    """How prompts are cut, on a GPU or without one."""
    if batch_invariant:
        return Pieces(smallest=PIECE, beside=PIECE, alone=PIECE)
    return pieces_for(config, gpu) if gpu else Pieces(smallest=SMALLEST, beside=PIECE, alone=PIECE)


def steps_of(config: DecoderConfig, gpu: Profile | None) -> int:
    """Decode steps in one dispatch: one without a GPU, and of a model that takes long for it; else they would keep those waiting who arrive."""
    seconds = HOST if gpu is None else sum(2 * leaf.size for leaf in jax.tree.leaves(abstract_params(config))) / gpu.bandwidth
    return next((n for n in (1, 2) if n * seconds >= HOST), STEPS)


def backend_options(
    config: DecoderConfig, pieces: Pieces, *, context: int, max_batch: int, free: int | None, gpu: Profile | None
) -> dict[str, Any]:
    """What an engine's backend is made with: `free` bytes on the device, if it says so; the GPU, if there is one."""
    pages = pages_that_fit(config, size=PAGE, context=context, max_batch=max_batch, free=free)
    sizes = {"pages": pages, "page_size": PAGE, "context": context, "max_batch": max_batch, "steps": steps_of(config, gpu)}
    return sizes | {"smallest": pieces.smallest, "packed": pieces.packed}


def pool_of(options: dict[str, Any]) -> Pool:
    """The pages of `backend_options`."""
    return Pool(count=options["pages"], size=PAGE, width=-(-options["context"] // PAGE))


def free_bytes() -> int | None:
    """Of the device's memory; None where it does not say, as a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None
