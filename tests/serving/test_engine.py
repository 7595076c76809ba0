"""The engine's promises: turns, bounds, time limits, rows that are freed, and an end that loses nothing."""

import queue
import threading
import time

import jax
import pytest

from pargs_jax.data.preferences import Prompt
from pargs_jax.errors import InputError
from pargs_jax.generation.growing import GrowingAnswer
from pargs_jax.generation.plan import Request
from pargs_jax.generation.scheduler import Grown, RequestError
from pargs_jax.mesh import AXES
from pargs_jax.serving.engine import MOST_FAILURES, Engine, Failed, Finished, Order, Refused
from pargs_jax.text.answer_text import Reading


class FakeScheduler:
    """Two places, a token each step; a request's prompt tells how many steps it takes."""

    def __init__(self, places=2):
        self.places, self.running, self.grown = places, {}, []
        self.entered, self.removed = [], []
        self.gate, self.fault = threading.Event(), None
        self.gate.set()

    @property
    def free_places(self):
        return self.places - len(self.running)

    def add(self, requests):
        for request in requests:
            if request.prompt.text == "unfit":
                raise InputError("does not fit")
            self.entered.append(request.prompt.id)
            self.running[request.prompt.id] = [request, int(request.prompt.text)]

    def remove(self, request):
        self.removed.append(request.prompt.id)
        self.running.pop(request.prompt.id, None)

    def step(self):
        self.gate.wait(10)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        ended = []
        for entry in list(self.running.values()):
            entry[1] -= 1
            if entry[1] <= 0:
                del self.running[entry[0].prompt.id]
                ended.append(entry[0])
        return [ended] if ended else []


class FakeReader:
    def read(self, request, *_):
        return [request.prompt.id]


@pytest.fixture
def fake(monkeypatch):
    scheduler = FakeScheduler()
    monkeypatch.setattr("pargs_jax.serving.engine._each", lambda group: map(FakePart, group))
    engine = Engine(
        lambda: scheduler,
        FakeReader(),
        jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1]),
        places=2,
        most_waiting=4,
        warm_up=lambda _: None,
    )
    monkeypatch.setattr(engine, "_answer", lambda order, part: part.batch.requests[0].prompt.id)
    engine.wait_until_ready()
    yield engine, scheduler
    scheduler.gate.set()
    engine.close(0)


class FakePart:
    def __init__(self, request):
        self.batch = type("Batch", (), {"requests": [request]})


def order(*names, steps=1, client="", seconds=60.0):
    """An order of an answer for each name, with a queue of what is told."""
    told = queue.Queue()
    requests = [Request(Prompt(name, str(steps)), 0, None, [1], []) for name in names]
    return Order(requests, told.put, client, seconds), told


def events(told, count):
    found = []
    while len(found) < count:
        found += told.get(timeout=10)
    return found


def test_clients_take_turns(fake):
    engine, scheduler = fake
    scheduler.gate.clear()
    first, first_told = order("x1", "x2", steps=2, client="x")  # take both places
    engine.add(first)
    while len(scheduler.entered) < 2:
        time.sleep(0.01)
    many, many_told = order("a1", "a2", "a3", client="a")
    other, other_told = order("b1", client="b")
    engine.add(many)
    engine.add(other)
    scheduler.gate.set()
    assert [event.answer for event in events(first_told, 2)] == ["x1", "x2"]
    events(many_told, 3)
    events(other_told, 1)
    assert scheduler.entered == ["x1", "x2", "a1", "b1", "a2", "a3"]
    assert engine.counts == (0, 0)


def test_the_queue_is_bounded(fake):
    engine, scheduler = fake
    scheduler.gate.clear()
    engine.add(order("r1", "r2", steps=1)[0])
    while len(scheduler.entered) < 2:
        time.sleep(0.01)
    engine.add(order("w1", "w2", "w3")[0])
    with pytest.raises(Refused, match="3 answers are waiting already, of at most 4"):
        engine.add(order("w4", "w5")[0])
    last, told = order("w4")
    engine.add(last)
    scheduler.gate.set()
    assert events(told, 1) == [Finished(0, "w4")]


def test_a_dropped_order_frees_its_rows(fake):
    engine, scheduler = fake
    long, told = order("l1", "l2", "l3", steps=10**9)
    engine.add(long)
    while len(scheduler.entered) < 2:
        time.sleep(0.01)
    engine.cancel(long)
    engine.cancel(long)
    short, short_told = order("s")
    engine.add(short)
    assert events(short_told, 1) == [Finished(0, "s")]
    assert sorted(scheduler.removed) == ["l1", "l2"] and told.empty() and engine.counts == (0, 0)


def test_a_time_limit_ends_an_order(fake):
    engine, _ = fake
    late, told = order("l", steps=10**9, seconds=0.2)
    engine.add(late)
    assert events(told, 1) == [Failed("timeout", "took more than 0.2 seconds")]
    assert engine.counts == (0, 0)


def test_what_is_wrong_with_one_request_is_told_to_it_alone(fake):
    engine, scheduler = fake
    other, other_told = order("fine", steps=30)
    engine.add(other)
    unfit, unfit_told = order("u")
    unfit.requests[0] = unfit.requests[0]._replace(prompt=Prompt("u", "unfit"))
    engine.add(unfit)
    assert events(unfit_told, 1) == [Failed("input", "does not fit")]
    late, late_told = order("late", steps=10**9)
    engine.add(late)
    while "late" not in scheduler.running:
        time.sleep(0.01)
    scheduler.fault = RequestError("too long for a guide", late.requests[0])
    assert events(late_told, 1) == [Failed("input", "too long for a guide")]
    assert events(other_told, 1) == [Finished(0, "fine")]


def test_a_failed_step_fails_what_ran_and_nothing_after_it(fake):
    engine, scheduler = fake
    hit, told = order("hit", steps=10**9)
    engine.add(hit)
    while not scheduler.running:
        time.sleep(0.01)
    scheduler.fault = RuntimeError("the device is on fire")
    assert events(told, 1) == [Failed("defect", "the step failed: RuntimeError")]
    scheduler.running.clear()
    after, told = order("after")
    engine.add(after)
    assert events(told, 1) == [Finished(0, "after")]
    assert engine.failure is None


def test_a_batch_that_cannot_be_made_again_ends_the_engine(fake):
    engine, scheduler = fake
    hit, told = order("hit", steps=10**9)
    engine.add(hit)
    while not scheduler.running:
        time.sleep(0.01)

    def fail(_):
        raise RuntimeError("out of memory")

    engine._warm_up = fail
    scheduler.fault = RuntimeError("the device is on fire")
    events(told, 1)
    deadline = time.monotonic() + 5
    while engine.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.failure == "3 steps failed one after another: out of memory"


def test_an_engine_whose_steps_always_fail_says_so(fake):
    engine, scheduler = fake
    step = scheduler.step
    scheduler.step = lambda: (_ for _ in ()).throw(RuntimeError("no device"))
    for number in range(MOST_FAILURES):
        hit, told = order(f"h{number}")
        engine.add(hit)
        events(told, 1)
    scheduler.step = step
    deadline = time.monotonic() + 5
    while engine.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.failure == "3 steps failed one after another: no device"
    with pytest.raises(Refused, match="no device"):
        engine.add(order("later")[0])


def test_closing_finishes_what_runs_and_waits(fake):
    engine, scheduler = fake
    scheduler.gate.clear()
    running, told = order("r1", "r2", "r3", steps=3)
    engine.add(running)
    threading.Timer(0.2, scheduler.gate.set).start()
    engine.close(20)
    assert sorted(event.answer for event in events(told, 3)) == ["r1", "r2", "r3"]
    with pytest.raises(Refused, match="shutting down"):
        engine.add(order("late")[0])


def test_closing_hands_back_what_takes_too_long(fake):
    engine, _ = fake
    endless, told = order("e", steps=10**9)
    engine.add(endless)
    engine.close(0.1)
    assert events(told, 1) == [Failed("shutdown", "the server is shutting down")]


def test_an_order_that_does_not_follow_is_told_only_what_is_left_at_the_end(fake):
    engine, scheduler = fake
    whole, told = order("w", steps=3)
    whole.follows = False
    endless, endless_told = order("e", steps=10**9)
    endless.follows = False
    answers = {id(each.requests[0]): GrowingAnswer(LetterReader(), [1]) for each in (whole, endless)}
    step = scheduler.step

    def noted():
        scheduler.grown = []
        for request, _ in scheduler.running.values():
            answer = answers[id(request)]
            answer.add([len(answer.tokens)])
            scheduler.grown.append(Grown(request, answer, answer.tokens[-1:], None, 0, slice(0)))
        return step()

    scheduler.step = noted
    engine.add(whole)
    engine.add(endless)
    assert events(told, 1) == [Finished(0, "w")]
    engine.close(0)
    progress, failed = events(endless_told, 2)
    assert failed.reason == "shutdown"
    tokens = progress.grown.tokens
    assert len(tokens) > 2 and tokens == list(range(len(tokens))) and progress.text == "x" * len(tokens)
    assert told.empty()


class LetterReader:
    """Every token is an x."""

    def begin(self, prompt_ids):
        return 0

    def extend(self, state, token):
        return state + 1

    def read(self, state):
        return Reading("x" * state, state)


def test_models_that_cannot_run_end_the_engine():
    def fail(_):
        raise InputError("its weights are missing")

    engine = Engine(FakeScheduler, FakeReader(), jax.make_mesh((1,), ("x",)), places=1, most_waiting=1, warm_up=fail)
    with pytest.raises(InputError, match="cannot be run: its weights are missing"):
        engine.wait_until_ready()
