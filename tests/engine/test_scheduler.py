"""The scheduler against a device of plain Python, whose memory holds for each position all tokens up to it."""

import collections
import zlib
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mkdsl.engine._pages import PagePool
from mkdsl.engine._scheduler import BATCHES, Decode, PagesError, Prefill, Scheduler
from mkdsl.engine._sequence import State

END = 9
STEPS = 4
AHEAD = 2


def following(tokens):
    """The next token of the device's model, which remembers everything; about one in ten ends the answer."""
    return zlib.crc32(bytes(tokens)) % (END + 1)


def alone(prompt, max_tokens):
    """The answer that a request has when it is decoded alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and (len(tokens) == len(prompt) or tokens[-1] != END):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class Device:
    """Does what the scheduler says, in its order, and checks what it reads and writes. What was said comes back when `tell` is called."""

    def __init__(self, scheduler, batches, beside, packed):
        self.beside, self.packed = beside, packed
        self.scheduler, self.pool, self.memory = scheduler, scheduler.pool, {}
        self.batches, self.fed, self.stalled = batches, 0, collections.Counter()
        self.answers, self.ended, self.untold = collections.defaultdict(list), set(), collections.deque()

    def do(self, step):
        assert all(self.pool.holders(page) == 1 for page in step.fresh)
        for page in step.fresh:
            self.memory |= {(page, row): None for row in range(self.pool.size)}
        if isinstance(step, Prefill):
            self.prefill(step)
        else:
            self.decode(step)

    def prefill(self, step):
        assert len(step.parts) == 1 or self.packed >= len(step.parts) * max(part.stop - part.start for part in step.parts)
        written = {part.sequence for part in step.parts}
        ready = {sequence for sequence in self.scheduler.running if sequence.remaining > sequence.ahead} - written
        assert not ready or sum(part.stop - part.start for part in step.parts) <= self.beside
        self.stalled.update(ready)
        assert all(self.stalled[sequence] <= 1 for sequence in ready), "a running sequence waits for one piece at most"
        before = dict(self.memory)
        for part in step.parts:
            self.memory, mine = dict(before), self.memory  # what is written at once is not read by one another
            for position in range(part.start, part.stop):
                self.feed(part.sequence, part.sequence.prompt[: position + 1])
            self.memory = mine | {place: tokens for place, tokens in self.memory.items() if before.get(place) != tokens}

    def decode(self, step):
        """What a sequence has said is known here before the scheduler is told."""
        self.stalled.clear()
        self.check_shape(step)
        said = {sequence: [] for sequence in step.sequences}
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            for _ in range(count if sequence not in self.ended else 0):
                tokens = [*sequence.prompt, *self.answers[sequence]]
                self.feed(sequence, tokens)
                self.answers[sequence].append(following(tokens))
                said[sequence].append(self.answers[sequence][-1])
                if said[sequence][-1] == END:
                    self.ended.add(sequence)
                    break
        self.untold.append((step, said))

    def tell(self):
        """The scheduler hears of the oldest steps that it has not heard of."""
        step, said = self.untold.popleft()
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            if sequence.state is State.RUNNING:
                self.scheduler.decoded(sequence, count, said[sequence], ended=sequence in self.ended and said[sequence][-1] == END)

    def check_shape(self, step):
        assert step.batch == min(size for size in self.batches if size >= len(step.sequences))
        assert all(1 <= count <= STEPS for count in step.counts)

    def feed(self, sequence, tokens):
        """Writes the last of these tokens' position, then reads them all."""
        position, size = len(tokens) - 1, self.pool.size
        assert self.pool.holders(sequence.pages[position // size]) == 1, "a page is never written while it is shared"
        self.memory[sequence.pages[position // size], position % size] = tuple(tokens)
        self.fed += 1
        for at in range(position + 1):
            assert self.memory[sequence.pages[at // size], at % size] == tuple(tokens[: at + 1])

    def lose(self):
        """Its memory, and what was under way."""
        self.memory.clear()
        self.untold.clear()


def made(*, count=12, size=3, max_batch=4, piece=4, beside=None, packed=0, steps=STEPS, batch_invariant=False):
    pool = PagePool(count=count, size=size)
    scheduler = Scheduler(
        pool, max_batch=max_batch, piece=piece, beside=beside, packed=packed, steps=steps, batch_invariant=batch_invariant
    )
    return scheduler, Device(scheduler, (max_batch,) if batch_invariant else BATCHES, max(beside or piece, packed), packed)


def drain(scheduler, device, most=10_000):
    steps = []
    while (step := scheduler.next()) is not None or device.untold:
        if step is None:
            device.tell()
            continue
        device.do(step)
        steps.append(step)
        assert len(steps) <= most
    return steps


class Arrivals(RuleBasedStateMachine):
    """Requests arrive and are cancelled, in between the device works."""

    options: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self.scheduler, self.device = made(**self.options)
        self.requests, self.cancelled, self.started = [], set(), []

    @rule(
        prefix=st.sampled_from([(), (1, 2, 3), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8), (5,) * 12]),
        rest=st.lists(st.integers(0, 3), min_size=1, max_size=8),
        max_tokens=st.integers(1, 14),
    )
    def arrive(self, prefix, rest, max_tokens):
        self.requests.append(self.scheduler.submit((*prefix, *rest), max_tokens))

    @precondition(lambda self: len(self.device.untold) < AHEAD)
    @rule()
    def work(self):
        if (step := self.scheduler.next()) is not None:
            self.note_who_started()
            self.device.do(step)

    @precondition(lambda self: self.device.untold)
    @rule()
    def hear(self):
        self.device.tell()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.requests))
        if sequence.state is not State.FINISHED:
            self.cancelled.add(sequence)
        self.scheduler.cancel(sequence)

    @rule()
    def lose(self):
        self.device.lose()
        self.cancelled |= set(self.scheduler.lost())

    def note_who_started(self):
        self.started += [r for r in self.requests if r.slot is not None and r not in self.started]

    @property
    def admitted(self):
        return [r for r in self.requests if r.state in (State.PREFILLING, State.RUNNING)]

    @invariant()
    def every_page_is_in_one_place(self):
        pool = self.scheduler.pool
        held = [page for request in self.admitted for page in request.pages]
        assert [pool.holders(page) for page in range(pool.count)] == [held.count(page) for page in range(pool.count)]
        places = [*pool._free, *pool._kept, *set(held)]
        assert sorted(places) == list(range(pool.count))

    @invariant()
    def promises_can_be_kept(self):
        pool = self.scheduler.pool
        assert pool.promised == sum(request.promised for request in self.admitted) <= pool.available

    @invariant()
    def who_has_ended_holds_nothing(self):
        slots = [request.slot for request in self.requests if request.slot is not None]
        assert len(set(slots)) == len(slots) == len(self.admitted)
        assert all(not r.pages and not r.promised for r in self.requests if r.slot is None)

    @invariant()
    def no_token_is_lost_or_doubled(self):
        for request in self.requests:
            expected = alone(request.prompt, request.max_tokens)
            assert request.answer == (expected if request.state is State.FINISHED else expected[: len(request.answer)])

    @invariant()
    def first_come_first_served(self):
        places = [self.requests.index(request) for request in self.started]
        assert places == sorted(places)

    def teardown(self):
        """Everybody's turn comes, and what is done in one step is bounded: so nobody starves."""
        work = sum(r.unfilled + r.remaining for r in self.requests)
        while (step := self.scheduler.next()) is not None or self.device.untold:
            if step is None:
                self.device.tell()
                continue
            self.note_who_started()
            self.device.do(step)
            work -= 1
            assert work >= 0
        assert all(r.state is (State.CANCELLED if r in self.cancelled else State.FINISHED) for r in self.requests)
        self.no_token_is_lost_or_doubled()
        self.every_page_is_in_one_place()
        assert self.scheduler.pool.available == self.scheduler.pool.count
        assert self.scheduler.pool.promised == 0


class BatchInvariantArrivals(Arrivals):
    """The same, where what is done for a sequence depends on itself alone."""

    options: ClassVar[dict] = {"piece": 6, "batch_invariant": True}


class PackedArrivals(Arrivals):
    """The same, where short prompts are written together, and pieces are shorter while somebody runs."""

    options: ClassVar[dict] = {"piece": 8, "beside": 4, "packed": 8}


Arrivals.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
BatchInvariantArrivals.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
PackedArrivals.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestArrivals = pytest.mark.medium(Arrivals.TestCase)
TestBatchInvariantArrivals = pytest.mark.medium(BatchInvariantArrivals.TestCase)
TestPackedArrivals = pytest.mark.medium(PackedArrivals.TestCase)


def test_a_prefix_is_prefilled_once():
    scheduler, device = made()
    prompts = [(1, 2, 3, 4, 5, 6, 7, last) for last in range(4)]
    sequences = [scheduler.submit(prompt, 1) for prompt in prompts]
    drain(scheduler, device)
    assert [sequence.shared for sequence in sequences] == [0, 6, 6, 6]
    assert device.fed == 8 + 3 * 2
    assert all(sequence.answer == alone(sequence.prompt, 1) for sequence in sequences)


def test_an_answer_is_a_prefix_too():
    """Of the conversation's next turn."""
    scheduler, device = made()
    prompt = (1, 3)
    first = scheduler.submit(prompt, 8)
    drain(scheduler, device)
    assert len(first.answer) >= 5
    second = scheduler.submit((*prompt, *first.answer, 4, 4), 2)
    drain(scheduler, device)
    assert second.shared == (len(prompt) + len(first.answer) - 1) // 3 * 3


def test_the_whole_prompt_is_never_shared():
    """Its last token is fed to a decode step, which writes."""
    scheduler, device = made()
    for _ in range(2):
        sequence = scheduler.submit((1, 2, 3, 4, 5, 6), 1)
        drain(scheduler, device)
    assert sequence.shared == 3


def test_a_prefix_that_was_evicted_is_prefilled_again():
    scheduler, device = made(count=4)
    for prompt in ((1,) * 9, (2,) * 9, (1,) * 9):
        sequence = scheduler.submit(prompt, 3)
        drain(scheduler, device)
        assert sequence.shared == 0
        assert sequence.answer == alone(prompt, 3)


def test_pieces_and_steps_take_turns():
    scheduler, device = made()
    scheduler.submit((1,), 12)
    scheduler.submit((3,) * 12, 2)
    steps = drain(scheduler, device)
    assert [type(step) for step in steps[:5]] == [Prefill, Decode, Prefill, Decode, Prefill]
    assert [part.stop - part.start for step in steps[0:5:2] for part in step.parts] == [4, 4, 3]


def together(scheduler, device):
    """Who is written in which Prefill, and how much of them."""
    return [
        [(p.sequence.prompt[0], p.stop - p.start) for p in step.parts] for step in drain(scheduler, device) if isinstance(step, Prefill)
    ]


def test_short_prompts_are_written_together():
    """First come, first served: what is longer than its place ends a piece, and begins the next."""
    scheduler, device = made(count=40, max_batch=8, piece=16, packed=8)
    for first, length in ((1, 2), (2, 3), (3, 2), (4, 5), (5, 2)):
        scheduler.submit((first,) * length, 1)
    assert together(scheduler, device) == [[(1, 1), (2, 2), (3, 1)], [(4, 4), (5, 1)]]


def test_prompts_that_begin_alike_are_not_written_together():
    """The second finds what the first has written."""
    scheduler, device = made(count=40, piece=16, packed=16, max_batch=4)
    for last in (4, 5):
        scheduler.submit((1, 2, 3, last), 1)
    assert together(scheduler, device) == [[(1, 3)]]
    assert device.fed == 3 + 2


def test_nobody_is_written_together_with_a_prompt_that_is_cut():
    scheduler, device = made(count=40, piece=4, packed=8)
    for first, length in ((1, 8), (2, 2)):
        scheduler.submit((first,) * length, 1)
    assert together(scheduler, device) == [[(1, 4)], [(1, 3)], [(2, 1)]]


def test_steps_are_planned_before_it_is_known_what_was_said():
    """Until nobody may say more; who may say less than the others takes part as long as there is something to say."""
    scheduler, _ = made(steps=6)
    long, short = (scheduler.submit((1,), max_tokens) for max_tokens in (15, 8))
    planned = [scheduler.next() for _ in range(4)]
    assert [(step.sequences, step.counts) for step in planned[:3]] == [((long, short), (6, 6)), ((long, short), (6, 2)), ((long,), (3,))]
    assert planned[3] is None


def test_a_place_is_free_as_soon_as_it_is_known():
    scheduler, device = made(max_batch=1, steps=6)
    first, second = (scheduler.submit((token,), 20) for token in (1, 2))
    step = scheduler.next()
    scheduler.next()  # in which it has ended, and nobody knows
    scheduler.decoded(first, step.counts[0], [4, END], ended=True)
    assert scheduler.next().sequences == (second,)
    device.untold.clear()


@pytest.mark.parametrize(("sequences", "batch"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16)])
def test_the_smallest_batch_that_holds_all(sequences, batch):
    scheduler, _ = made(count=99, max_batch=16)
    for _ in range(sequences):
        scheduler.submit((1,), 4)
    assert scheduler.next().batch == batch


def test_who_does_not_fit_now_waits_and_is_not_overtaken():
    scheduler, device = made(count=5)
    first, large, small = scheduler.submit((1,), 9), scheduler.submit((2,), 12), scheduler.submit((3,), 3)
    scheduler.next()
    assert [s.state for s in (first, large, small)] == [State.RUNNING, State.WAITING, State.WAITING]
    drain(scheduler, device)
    assert [s.answer for s in (first, large, small)] == [alone(s.prompt, s.max_tokens) for s in (first, large, small)]


def test_what_is_done_for_a_sequence_depends_on_itself_alone():
    """Where that is asked for: pieces that begin where they always do, one batch, and no prefix of an answer."""
    scheduler, device = made(count=30, piece=6, batch_invariant=True)
    prompt = (1, 2, 3, 4, 5, 6, 7, 0, 1, 7)
    first = submitted(scheduler, device, prompt)
    assert {step.batch for step in first if isinstance(step, Decode)} == {4}
    again = submitted(scheduler, device, prompt)
    assert [(p.start, p.stop) for s in (*first, *again) if isinstance(s, Prefill) for p in s.parts] == [
        (0, 6),
        (6, 9),
        (6, 9),
    ]  # not from 9
    answer = alone(prompt, 8)
    assert len(answer) == 8
    longer = submitted(scheduler, device, (*prompt, *answer, 1, 1, 1))
    assert next(s.parts[0].start for s in longer if isinstance(s, Prefill)) == 6


def submitted(scheduler, device, prompt):
    scheduler.submit(prompt, 8)
    return drain(scheduler, device)


def test_what_never_fits_is_refused():
    scheduler, _ = made(count=4)
    with pytest.raises(
        PagesError,
        match=r"a prompt of 10 tokens with max_tokens=4 takes 5 pages of 3 positions, and there are 4 in all; "
        r"prompt and answer together may have 13 tokens: shorten them, or give the engine more pages",
    ):
        scheduler.submit((1,) * 10, 4)
    assert not scheduler.waiting
    scheduler.submit((1,) * 10, 3)
    assert scheduler.next() is not None


@pytest.mark.parametrize("max_batch", [0, 3, 32])
def test_batches_that_there_are_not(max_batch):
    with pytest.raises(ValueError, match=f"{max_batch=}; it is one of 1, 2, 4, 8, 16"):
        made(max_batch=max_batch)


def test_cancelled_while_it_waits():
    scheduler, device = made()
    sequence = scheduler.submit((1,), 4)
    scheduler.cancel(sequence)
    assert sequence.state is State.CANCELLED
    assert not drain(scheduler, device)
    scheduler.cancel(sequence)


def test_a_stop_in_the_middle_of_a_dispatch():
    """The host may find an end that the device does not know: of what was written past it nothing is found."""
    scheduler, _ = made(steps=6)
    sequence = scheduler.submit((1, 2), 20)
    assert isinstance(scheduler.next(), Prefill)
    assert scheduler.next().counts == (6,)
    scheduler.decoded(sequence, 6, [4, 4], ended=True)
    assert (sequence.state, sequence.answer, sequence.written) == (State.FINISHED, [4, 4], 3)
    assert scheduler.pool.published == 1
