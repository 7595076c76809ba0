"""Rows that leave and rows that enter: requests share one running batch, and each leaves it when its answer ends.

A batch that is decoded from its first row's start to its last row's end mostly waits for its longest answer. A
scheduler has a number of places instead, the rows of one decode state. It draws tokens for all of them until some have
ended, hands those out, and puts the next requests into their places. A request's answer does not depend on when it
enters or on what runs beside it.

Three functions take the time, and each is compiled for few shapes: `_start` for each width that prompts are padded to,
`_advance` for each size of the state, `_insert` for both. The state grows where longer prompts enter.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from pargs_jax.decoding.loop import AllParams, Decoded
from pargs_jax.decoding.state import DecodeState, RowSettings, insert, take
from pargs_jax.errors import InputError
from pargs_jax.generation.plan import Batch, Numbers, Request, Settings, Widths
from pargs_jax.generation.program import DecodingProgram, Models, Programs, guide_prompts, make_guides
from pargs_jax.generation.reward_models import padded_width
from pargs_jax.models.cache import split_rows
from pargs_jax.sharding import current_mesh, on_every_device, row_shards

STEPS = 32
"""The most steps of a call of `_advance`. More would hand out answers later; fewer would ask the device more often."""

REFILLED_AT_ONCE = 8
"""New requests wait until one in so many places is free, and are read together. With the lengths of HH's answers and 16
places, 92 % of the row-steps then draw a token, 87 % with 4, and 95 % if each request is read alone."""


class Ended(NamedTuple):
    """Answers that have ended. Row b of `decoded`, which is on the host, belongs to request b of the batch. `seconds`
    are the requests' shares of the device's time."""

    batch: Batch
    decoded: Decoded
    seconds: list[float]


@dataclass
class _Row:
    """A request, the tokens of its answer so far, and its share of the device's time in seconds."""

    request: Request
    tokens: int = 0
    seconds: float = 0.0


class Scheduler:
    """Decodes requests of one method in a fixed number of places.

    With several processes, each has a scheduler with the same requests, and all of them take the same steps.
    """

    def __init__(self, models: Models, programs: Programs, settings: Settings, places: int) -> None:
        """
        Args:
            models: the language model and the reward models.
            programs: keeps what is compiled, also for later schedulers.
            settings: the method, and the most candidates and tokens of an answer that a request may ask for.
            places: the number of rows; a multiple of the parts that the mesh splits rows into.
        """
        self._models, self._programs, self._settings = models, programs, settings
        self._waiting: deque[_Row] = deque()
        self._places: list[_Row | None] = [None] * places
        shards = row_shards(current_mesh())
        few = max(1, places // REFILLED_AT_ONCE)
        self._group = -(-few // shards) * shards
        # Where the mesh makes a group larger, it is better filled than read early, unless too many places would wait.
        self._least_free = max(few, min(self._group, places // 4))
        self._state: DecodeState | None = None
        self._widths = Widths(0, (0,) * len(models.reward_models))
        self._answer_widths = [0] * len(models.reward_models)
        self._is_too_narrow = False
        self._make_program()

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not any(self._places)

    def add(self, requests: Iterable[Request]) -> None:
        """Queues requests. Raises InputError for one that asks for another method, or for more than the scheduler's
        settings."""
        limits = self._settings
        for request in requests:
            own, prompt = request.settings, f"prompt {request.prompt.id!r}"
            alike = ("method", "top_p", "look_ahead", "trace", *(("k",) if own.method.candidates == "all" else ()))
            for name in alike:
                if getattr(own, name) != getattr(limits, name):
                    raise InputError(f"{prompt}: its {name} differs from that of the running batch, must be the same")
            for name in ("candidates", "max_new_tokens"):
                if (asked := getattr(own, name)) > (most := getattr(limits, name)):
                    raise InputError(f"{prompt}: {name} is {asked}, must be at most {most} in the running batch")
            self._waiting.append(_Row(request))

    def remove(self, request: Request) -> None:
        """Drops a request that waits or runs; its place is free at once. Does nothing after its end."""
        self._waiting = deque(row for row in self._waiting if row.request is not request)
        self._places = [None if row is not None and row.request is request else row for row in self._places]

    def step(self) -> list[Ended]:
        """Fills free places, draws tokens for all rows, and returns the answers that have ended.

        Raises InputError if a reward model has too few positions for an answer; that request is dropped.
        """
        self._fill()
        if not any(self._places):
            return []
        status = self._advance()
        self._queue_again(status)
        return self._take_ended(status)

    def _make_program(self) -> None:
        """The program, and its parameters; its guides have the widths that answers have needed so far."""
        guides, params = make_guides(self._models, self._settings, self._answer_widths)
        self._program = DecodingProgram.of(self._models, guides, self._settings)
        self._params = self._models.lm_params, params

    def _fill(self) -> None:
        """Reads waiting requests into free places, a group at a time."""
        models = self._models.reward_models
        while self._waiting:
            free = [place for place, row in enumerate(self._places) if row is None]
            if len(free) < min(self._least_free, len(self._waiting)) and not self._is_too_narrow:
                return
            least = None
            if self._is_too_narrow:
                # The group's state is then as wide as that of the longest prompts, and the other rows grow to it.
                self._make_program()
                least, self._is_too_narrow = self._widths, False
            count = len(self._places) if self._state is None else self._group
            rows = [self._waiting.popleft() for _ in range(min(count, len(free), len(self._waiting)))]
            batch = Batch.of([row.request for row in rows], count, models, least)
            prompts = guide_prompts(self._settings.method, models, batch)
            arguments = (*batch.lm_prompts, batch.numbers, batch.settings(len(models)), prompts)
            started, seconds = self._programs(_start, (self._program,), self._params, *arguments)
            if self._state is not None:
                nowhere = [len(self._places)] * (count - len(rows))
                where = np.array([*free[: len(rows)], *nowhere], np.int32)
                started, more_seconds = self._programs(_insert, (), self._state, started, where)
                seconds += more_seconds
            self._state = started
            self._widths = self._widths.widened(batch.widths)
            for place, row in zip(free, rows, strict=False):
                row.tokens = 0
                row.seconds += seconds / len(rows)
                self._places[place] = row

    def _advance(self) -> "_Status":
        """Draws at most `STEPS` tokens for every row, until enough rows have ended for others to enter."""
        enough = min(self._least_free, len(self._waiting)) if self._waiting else len(self._places)
        is_free = np.array([row is None for row in self._places])
        (self._state, status), seconds = self._programs(
            _advance, (self._program, STEPS), self._params, self._state, is_free, np.int32(enough)
        )
        status = jax.device_get(status)
        drawn = {place: int(status.lengths[place]) - row.tokens for place, row in self._running()}
        for place, row in self._running():
            row.tokens += drawn[place]
            row.seconds += seconds * drawn[place] / max(1, sum(drawn.values()))
        return status

    def _queue_again(self, status: "_Status") -> None:
        """Takes rows back whose text did not fit a guide; they start again with wider guides."""
        for place, row in reversed(list(self._running())):
            for j, needed in zip(self._program.retokenised, status.needed, strict=True):
                model, guide = self._models.reward_models[j], self._program.guides[j]
                most = int(needed[place])
                try:
                    fits = model.fits(guide, most, len(row.request.own_ids[j]))
                except InputError:
                    self._places[place] = None
                    raise
                if not fits:
                    # At least twice as wide, because each width takes compiling, and this answer may grow further.
                    wider = padded_width(max(most, 2 * guide.answer_width))
                    self._answer_widths[j] = max(self._answer_widths[j], wider)
                    self._is_too_narrow = True
                    self._places[place] = None
            if self._places[place] is None:
                self._waiting.appendleft(row)

    def _take_ended(self, status: "_Status") -> list[Ended]:
        """Takes the rows that have ended out of their places."""
        ended = [(place, row) for place, row in self._running() if status.done[place]]
        found = []
        for first in range(0, len(ended), self._group):
            places, rows = zip(*ended[first : first + self._group], strict=True)
            where = np.array([*places, *[places[0]] * (self._group - len(places))], np.int32)
            decoded, _ = self._programs(_read, (self._program,), self._state, where)
            batch = Batch.of([row.request for row in rows], self._group, self._models.reward_models)
            found.append(Ended(batch, jax.device_get(decoded), [row.seconds for row in rows]))
            for place in places:
                self._places[place] = None
        return found

    def _running(self) -> list[tuple[int, _Row]]:
        """The places that are not free, with their rows."""
        return [(place, row) for place, row in enumerate(self._places) if row is not None]


class _Status(NamedTuple):
    """What the host asks after some steps, whole on every device. `needed` are the tokens that each retokenised guide
    has needed for an answer (see `RetokenisedGuide`)."""

    done: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    needed: tuple[Int[Array, "B"], ...]


@partial(jax.jit, static_argnums=0)
def _start(
    program: DecodingProgram,
    params: AllParams,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    numbers: Numbers,
    settings: RowSettings,
    guide_prompts: tuple[Any, ...],
) -> DecodeState:
    """A new state, whose rows have read these prompts."""
    rows = prompts, lengths, numbers.keys(), settings
    return split_rows(program.decoder.start(params, *rows, program.max_new_tokens, guide_prompts))


@partial(jax.jit, donate_argnums=0)
def _insert(state: DecodeState, new: DecodeState, rows: Int[Array, "N"]) -> DecodeState:
    """`insert`, in place where the state does not grow."""
    return split_rows(insert(state, new, rows))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(
    program: DecodingProgram,
    steps: int,
    params: AllParams,
    state: DecodeState,
    is_free: Bool[Array, "B"],
    enough: Int[Array, ""],
) -> tuple[DecodeState, _Status]:
    """Draws tokens until `enough` rows have ended, free ones included; at most `steps`."""
    state = state._replace(done=state.done | is_free)
    state = split_rows(program.decoder.advance(params, state, steps, enough))
    needed = tuple(state.guides[j].needed for j in program.retokenised)
    return state, on_every_device(_Status(state.done, state.text.answer_lengths, needed))


@partial(jax.jit, static_argnums=0)
def _read(program: DecodingProgram, state: DecodeState, rows: Int[Array, "N"]) -> Decoded:
    """The answers of some rows."""
    return on_every_device(program.decoder.read(take(state, rows)))
