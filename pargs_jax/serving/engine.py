"""The engine: one thread, which owns the device and answers everybody's requests in one running batch.

Other threads hand in orders and are told, event by event, how their answers grow and end. Whoever waits is served in
turn: one answer for each client, then again.
"""

import dataclasses
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pargs_jax.decoding.loop import Decoded
from pargs_jax.errors import InputError
from pargs_jax.generation.answers import Answer, AnswerReader
from pargs_jax.generation.plan import Batch, Request
from pargs_jax.generation.scheduler import Ended, Grown, RequestError, Scheduler

MOST_FAILURES = 3
"""Steps that may fail one after another before the engine gives up."""
LONGEST_WAIT = 0.5
"""Seconds after which an idle engine looks whether a time limit has passed."""


class Refused(Exception):
    """An order that cannot be taken now: the queue is full, or the engine is shutting down."""

    def __init__(self, reason: str, *, is_ending: bool = False) -> None:
        super().__init__(reason)
        self.is_ending = is_ending


class Progress(NamedTuple):
    """An answer has more tokens. `text` is the part of the response so far that nothing can change."""

    index: int
    text: str
    grown: Grown


class Finished(NamedTuple):
    """An answer has ended."""

    index: int
    answer: Answer


class Failed(NamedTuple):
    """An order is not answered, or not to its end; nothing more is told of it."""

    reason: Literal["input", "timeout", "shutdown", "defect"]
    message: str


Event = Progress | Finished | Failed


@dataclasses.dataclass(eq=False)
class Order:
    """Answers that belong together.

    Attributes:
        requests: an answer each.
        tell: takes events, in the engine's thread; must not block.
        client: whose turn it is.
        seconds: the most time that it may take.
        traced: whether the answers get traces.
        follows: whether `tell` takes each `Progress`; if not, only what there is of an answer that is cut short.
    """

    requests: Sequence[Request]
    tell: Callable[[list[Event]], None]
    client: str = ""
    seconds: float = 600.0
    traced: bool = False
    follows: bool = True
    deadline: float = 0.0
    open: int = 0
    is_over: bool = False
    newest: dict[int, Grown] = dataclasses.field(default_factory=dict)


class Counts(NamedTuple):
    """How busy the engine is, in answers."""

    running: int
    waiting: int


class Engine:
    """Answers orders until it is closed."""

    def __init__(
        self,
        make_scheduler: Callable[[], Scheduler],
        reader: AnswerReader,
        mesh: Mesh,
        *,
        places: int,
        most_waiting: int,
        warm_up: Callable[[Scheduler], None],
    ) -> None:
        """Starts the thread, which compiles everything first.

        Args:
            make_scheduler: makes the running batch.
            reader: reads the answers.
            mesh: its devices.
            places: the answers that run at once.
            most_waiting: the most answers that may wait.
            warm_up: compiles what requests need.
        """
        self._make_scheduler, self._warm_up = make_scheduler, warm_up
        self._reader, self._mesh = reader, mesh
        self._places, self._most_waiting = places, most_waiting
        self._changed = threading.Condition()
        self._queue: OrderedDict[str, deque[tuple[Order, int]]] = OrderedDict()
        self._owners: dict[int, tuple[Order, int, Request]] = {}
        self._orders: set[Order] = set()
        self._removed: list[Request] = []
        self._waiting = 0
        self._ends_at: float | None = None
        self._is_closing = False
        self.is_ready = False
        self.failure: str | None = None
        """Why the engine stopped answering, if it did."""
        self.on_step: Callable[[float, int], None] = lambda seconds, tokens: None
        """Is told of each step: its seconds, and the tokens that all answers got."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, order: Order) -> None:
        """Queues an order. Raises Refused."""
        with self._changed:
            if self.failure is not None or self._is_closing:
                raise Refused(self.failure or "the server is shutting down", is_ending=True)
            if self._waiting + len(order.requests) > self._most_waiting + self._places - len(self._owners):
                raise Refused(f"{self._waiting} answers are waiting already, of at most {self._most_waiting}")
            order.deadline = time.monotonic() + order.seconds
            order.open = len(order.requests)
            self._orders.add(order)
            self._queue.setdefault(order.client, deque()).extend((order, n) for n in range(order.open))
            self._waiting += order.open
            self._changed.notify()

    def cancel(self, order: Order) -> None:
        """Drops an order; its rows are free at the next step. Does nothing after its end."""
        with self._changed:
            self._drop(order)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Takes no more orders, finishes those that run or wait, and after so many seconds hands back what there is of
        the rest."""
        with self._changed:
            self._is_closing = True
            self._ends_at = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 60)

    @property
    def counts(self) -> Counts:
        with self._changed:
            return Counts(len(self._owners), self._waiting)

    def wait_until_ready(self) -> None:
        """Blocks until requests are answered. Raises InputError if they never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_ready or self.failure is not None)
        if self.failure is not None:
            raise InputError(self.failure)

    def _run(self) -> None:
        failures, scheduler = 0, None
        with jax.set_mesh(self._mesh):
            while scheduler is None or self._admit(scheduler):
                try:
                    if scheduler is None:
                        scheduler = self._started_scheduler()
                    else:
                        self._step(scheduler)
                        failures = 0
                except RequestError as error:
                    self._fail(error.request, "input", str(error))
                except Exception as error:
                    failures += 1
                    if not self.is_ready:
                        return self._give_up(f"the models cannot be run: {error}")
                    self._fail_all("defect", f"the step failed: {type(error).__name__}")
                    if failures == MOST_FAILURES:
                        return self._give_up(f"{failures} steps failed one after another: {error}")
                    scheduler = None  # its state may be lost

    def _started_scheduler(self) -> Scheduler:
        """A new running batch, for which everything is compiled."""
        scheduler = self._make_scheduler()
        self._warm_up(scheduler)
        with self._changed:
            self.is_ready = True
            self._changed.notify_all()
        return scheduler

    def _admit(self, scheduler: Scheduler) -> bool:
        """Waits for work; lets waiting answers enter free places, and dropped ones leave. False when all is done and
        the engine is closing."""
        with self._changed:
            while not (self._owners or self._waiting or self._removed or self._is_closing):
                self._changed.wait(LONGEST_WAIT)
            now = time.monotonic()
            for order in [order for order in self._orders if order.deadline < now]:
                order.tell([Failed("timeout", f"took more than {order.seconds:g} seconds")])
                self._drop(order)
            for request in self._removed:
                scheduler.remove(request)
            self._removed.clear()
            if self._ends_at is not None and now > self._ends_at:
                self._hand_back()
                return False
            entering = []
            while self._waiting and scheduler.free_places > len(entering):
                order, index = self._next()
                self._owners[id(order.requests[index])] = order, index, order.requests[index]
                entering.append(order.requests[index])
            is_over = self._is_closing and not self._owners and not self._waiting
        for request in entering:
            try:
                scheduler.add([request])
            except InputError as error:
                self._fail(request, "input", str(error))
        return not is_over

    def _next(self) -> tuple[Order, int]:
        """The next answer of the client whose turn it is."""
        client, orders = self._queue.popitem(last=False)
        found = orders.popleft()
        if orders:
            self._queue[client] = orders  # behind all others
        self._waiting -= 1
        return found

    def _step(self, scheduler: Scheduler) -> None:
        began = time.perf_counter()
        ended = [part for group in scheduler.step() for part in _each(group)]
        self.on_step(time.perf_counter() - began, sum(len(grown.tokens) for grown in scheduler.grown))
        events: dict[Order, list[Event]] = {}
        for grown in scheduler.grown:
            if owner := self._owners.get(id(grown.request)):
                order, index, _ = owner
                if order.follows:
                    events.setdefault(order, []).append(_progress(index, grown))
                else:
                    order.newest[index] = grown._replace(tokens=grown.answer.tokens)
        for part in ended:
            request = part.batch.requests[0]
            if owner := self._owners.get(id(request)):
                order, index, _ = owner
                try:
                    event = Finished(index, self._answer(order, part))
                except InputError as error:
                    event = Failed("input", str(error))
                events.setdefault(order, []).append(event)
        with self._changed:
            for order, told in events.items():
                if order.is_over:  # it was dropped meanwhile
                    continue
                order.tell(told)
                for event in told:
                    if isinstance(event, Finished):
                        del self._owners[id(order.requests[event.index])]
                        order.newest.pop(event.index, None)
                        order.open -= 1
                if any(isinstance(event, Failed) for event in told) or not order.open:
                    self._drop(order)

    def _answer(self, order: Order, part: Ended) -> Answer:
        own = part.batch.requests[0].settings
        return self._reader.read(*part, own if order.traced else dataclasses.replace(own, trace=None))[0]

    def _drop(self, order: Order) -> None:
        """Forgets an order: what waits, and what runs."""
        if order.is_over:
            return
        order.is_over = True
        self._orders.discard(order)
        if order.client in self._queue:
            left = deque(each for each in self._queue[order.client] if each[0] is not order)
            self._waiting -= len(self._queue[order.client]) - len(left)
            self._queue[order.client] = left
            if not left:
                del self._queue[order.client]
        for request in order.requests:
            if self._owners.pop(id(request), None):
                self._removed.append(request)

    def _fail(self, request: Request, reason: str, message: str) -> None:
        with self._changed:
            if owner := self._owners.get(id(request)):
                owner[0].tell([Failed(reason, message)])
                self._drop(owner[0])

    def _fail_all(self, reason: str, message: str) -> None:
        with self._changed:
            for order in list(self._orders):
                order.tell([Failed(reason, message)])
                self._drop(order)
            self._removed.clear()

    def _hand_back(self) -> None:
        for order in list(self._orders):
            grown = [_progress(index, grown) for index, grown in order.newest.items()]
            order.tell([*grown, Failed("shutdown", "the server is shutting down")])
            self._drop(order)

    def _give_up(self, message: str) -> None:
        with self._changed:
            self.failure = message
            self._changed.notify_all()
        self._fail_all("defect", message)


def _progress(index: int, grown: Grown) -> Progress:
    return Progress(index, grown.answer.lasting_text, grown)


def _each(ended: Ended) -> Iterator[Ended]:
    """A part for each answer, so that what is wrong with one says nothing of the others."""
    for row, request in enumerate(ended.batch.requests):

        def of_row(x: np.ndarray, row: int = row) -> np.ndarray:
            return x[row : row + 1]

        batch = Batch([request], *jax.tree.map(of_row, (ended.batch.lm_prompts, ended.batch.own_prompts)))
        decoded: Decoded = jax.tree.map(of_row, ended.decoded)
        yield Ended(batch, decoded, ended.seconds[row : row + 1])
