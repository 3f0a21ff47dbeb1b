"""The engine's one thread: it asks the scheduler what to do, has the backend begin it, and hands out what came of it.

Everything that changes the scheduler or the backend happens there. Others send it functions to call. While the device does one thing the next is begun,
so that it never waits for the host.
"""

import collections
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many

import jax

from mkdsl.engine._answers import DAMAGED, Delta, LogitsError, Writer, is_broken
from mkdsl.engine._backend import Backend, Flight, Lane, Piece, Said
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._scheduler import Decode, Prefill, Scheduler
from mkdsl.engine._sequence import Sequence, State

AHEAD = 2  # things begun at the same time: what is done, and what follows
Emit = Callable[[Delta | Exception], None]


class EngineError(RuntimeError):
    """A step failed on the device, or the engine was closed, before an answer was complete."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """One answer asked for.

    Attributes:
      prompt: token ids.
      max_tokens: of the answer.
      params: how its tokens are chosen.
      seed: of this answer.
      ends: all tokens that end it.
      writer: makes its deltas.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    seed: int
    ends: tuple[int, ...]
    writer: Writer


class Loop:
    """Runs from when it is made until it is closed."""

    def __init__(self, scheduler: Scheduler, backend: Backend) -> None:
        self._scheduler, self._backend = scheduler, backend
        self._work: dict[Sequence, tuple[Job, Emit]] = {}  # of all sequences that have not ended
        self._of: dict[Job, Sequence] = {}
        self._occupied: set[Sequence] = set()
        self._under_way: collections.deque[tuple[Prefill, jax.Array] | tuple[Decode, Flight]] = collections.deque()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="mkdsl engine", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it takes nothing any more."""
        return self._closed

    def submit(self, jobs: Many[Job], emit: Emit) -> None:
        """Begins some answers. `emit` is called in the engine's thread, with deltas until each has one with a finish; or with an exception.

        Raises:
          EngineError: the engine is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed; load it again")
            self._inbox.put(functools.partial(self._begin, jobs, emit))

    def cancel(self, jobs: Many[Job]) -> None:
        """Ends these answers. Nothing more is emitted once the engine's thread has heard of it; those that have ended stay as they are."""
        self._inbox.put(functools.partial(self._forget, jobs))

    def close(self) -> None:
        """Ends the thread. Whatever is not complete fails with EngineError."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        failure = "the engine was closed before this answer was complete"
        try:
            idle = True
            while self._listen(wait=idle):
                step = self._scheduler.next() if len(self._under_way) < AHEAD else None
                idle = step is None and not self._under_way
                if not idle:
                    self._attempt(step)
        except BaseException as error:
            failure = f"the engine's thread ended ({type(error).__name__}: {error})"
            raise
        finally:
            self._end(failure)

    def _listen(self, *, wait: bool) -> bool:
        """Does what others have sent, waiting for it if there is nothing else to do; False if they have closed the engine."""
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                return False
            message()
            wait = False
        return True

    def _end(self, failure: str) -> None:
        with self._lock:
            self._closed = True
        while not self._inbox.empty():  # what came in before it was closed gets its answer too
            if message := self._inbox.get():
                message()
        for _, emit in self._work.values():
            emit(EngineError(failure))

    def _begin(self, jobs: Many[Job], emit: Emit) -> None:
        for job in jobs:
            self._of[job] = sequence = self._scheduler.submit(job.prompt, job.max_tokens)
            self._work[sequence] = job, emit

    def _forget(self, jobs: Many[Job]) -> None:
        for job in jobs:
            if sequence := self._of.get(job):
                self._scheduler.cancel(sequence)
                self._drop(sequence)

    def _drop(self, sequence: Sequence) -> Emit:
        """Nothing more is done for a sequence that has ended."""
        job, emit = self._work.pop(sequence)
        del self._of[job]
        self._occupied.discard(sequence)
        return emit

    def _attempt(self, step: Prefill | Decode | None) -> None:
        """A step that fails takes with it what had something on the device; those that wait go on."""
        try:
            self._advance(step)
        except Exception as error:
            self._under_way.clear()
            self._backend.reset()
            lost = self._scheduler.lost()
            failure = f"a step failed on the device ({type(error).__name__}: {error}), and with it the {len(lost)} answers under way"
            for sequence in lost:
                self._drop(sequence)(EngineError(failure))

    def _advance(self, step: Prefill | Decode | None) -> None:
        """Begins a step; or where enough is under way, or nothing is to do before it is known what came of that, waits for the oldest."""
        if isinstance(step, Prefill):
            self._under_way.append((step, self._prefill(step)))
        elif isinstance(step, Decode):
            self._under_way.append((step, self._decode(step)))
        else:
            self._land(*self._under_way.popleft())

    def _land(self, step: Prefill | Decode, done: jax.Array | Flight) -> None:
        if isinstance(done, jax.Array):
            done.block_until_ready()
            return
        assert isinstance(step, Decode)
        for sequence, count, said in zip(step.sequences, step.counts, done.land(), strict=True):
            if sequence.state is State.RUNNING:  # it has neither ended since nor been cancelled
                self._tell(sequence, count, said)

    def _occupy(self, sequence: Sequence) -> None:
        """A sequence that was admitted just now gets its slot on the device."""
        if sequence not in self._occupied:
            assert sequence.slot is not None
            job, _ = self._work[sequence]
            self._backend.occupy(
                sequence.slot, params=job.params, seed=job.seed, prompt=job.prompt, ends=job.ends, max_tokens=job.max_tokens
            )
            self._occupied.add(sequence)

    def _prefill(self, step: Prefill) -> jax.Array:
        self._backend.clear(step.fresh)
        return self._backend.prefill(
            [Piece(tokens=p.sequence.prompt[p.start : p.stop], start=p.start, pages=p.sequence.pages) for p in step.parts]
        )

    def _decode(self, step: Decode) -> Flight:
        self._backend.clear(step.fresh)
        for sequence in step.sequences:
            self._occupy(sequence)
        return self._backend.decode([self._lane(sequence) for sequence in step.sequences], batch=step.batch)

    def _lane(self, sequence: Sequence) -> Lane:
        assert sequence.slot is not None
        return Lane(slot=sequence.slot, pages=sequence.pages, params=self._work[sequence][0].params)

    def _tell(self, sequence: Sequence, count: int, said: Said) -> None:
        """Tells the scheduler and the caller what a sequence said, of so many tokens that it might have."""
        job, emit = self._work[sequence]
        if is_broken(said.tokens):
            self._scheduler.cancel(sequence)
            at = len(sequence.prompt) + len(sequence.answer) + len(said.tokens) - 1
            self._drop(sequence)(LogitsError(f"the logits after {at} tokens are NaN or infinite; {DAMAGED}"))
            return
        ended = said.tokens[-1] in job.ends
        delta, taken = job.writer.write(said.tokens, said.logprobs, ended=ended, last=len(said.tokens) == sequence.remaining)
        self._scheduler.decoded(sequence, count, said.tokens[:taken], ended=delta.finish is not None)
        if sequence.state is State.FINISHED:
            self._drop(sequence)
        emit(delta)
