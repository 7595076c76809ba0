"""Rows that leave and rows that enter: requests share one running batch, and each leaves it when its answer ends.

A batch that is decoded from its first row's start to its last row's end mostly waits for its longest answer. A
scheduler has a number of places instead, the rows of one decode state. It draws tokens for all of them until some have
ended, hands those out, and puts the next requests into their places. A request's answer does not depend on when it
enters or on what runs beside it.

Three functions take the time, and each is compiled for few shapes: `_start` for each width that prompts are padded to,
`_advance` for each size of the state, `_insert` for both. The state grows where longer prompts enter.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pargs_jax.decoding.loop import AllParams, Decoded
from pargs_jax.decoding.state import DecodeState, RowSettings, Trace, insert, take
from pargs_jax.errors import InputError
from pargs_jax.generation.growing import GrowingAnswer
from pargs_jax.generation.plan import Batch, Numbers, Request, Settings, Widths
from pargs_jax.generation.program import DecodingProgram, Models, Programs, guide_prompts, make_guides
from pargs_jax.generation.reward_models import padded_width
from pargs_jax.models.cache import split_rows
from pargs_jax.sharding import current_mesh, on_every_device, row_shards
from pargs_jax.text.answer_text import Reader

STEPS = 32
"""The most steps of a call of `_advance`. More would hand out answers later; fewer would ask the device more often."""

REFILLED_AT_ONCE = 8
"""New requests wait until one in so many places is free, and are read together. With the lengths of HH's answers and 16
places, 92 % of the row-steps then draw a token, 87 % with 4, and 95 % if each request is read alone."""


class RequestError(InputError):
    """What is wrong with one request; the others go on."""

    def __init__(self, message: str, request: Request) -> None:
        super().__init__(message)
        self.request = request


class Ended(NamedTuple):
    """Answers that have ended. Row b of `decoded`, which is on the host, belongs to request b of the batch. `seconds`
    are the requests' shares of the device's time."""

    batch: Batch
    decoded: Decoded
    seconds: list[float]


class Grown(NamedTuple):
    """What a step added to an answer: its tokens, which are those `within` row `place` of the step's trace."""

    request: Request
    answer: GrowingAnswer
    tokens: list[int]
    trace: Trace
    place: int
    within: slice

    @property
    def numbers(self) -> Trace:
        """The numbers of the tokens, `[n ...]`, on the host."""
        return jax.tree.map(lambda x: x[self.place, self.within], self.trace)


@dataclass
class _Row:
    """A request, the tokens of its answer so far, and its share of the device's time in seconds. `answer` is watched;
    `told` of its tokens were handed out."""

    request: Request
    tokens: int = 0
    seconds: float = 0.0
    answer: GrowingAnswer | None = None
    told: int = 0

    @property
    def is_stopped(self) -> bool:
        return self.answer is not None and self.answer.is_stopped

    def grown(self, place: int, newest: "_Newest | None") -> Grown | None:
        """What has not been handed out yet; nothing again of an answer that started again."""
        if self.answer is None or len(self.answer.tokens) <= self.told:
            return None
        new = slice(self.told, len(self.answer.tokens))
        self.told = new.stop
        within = slice(new.start - newest.starts[place], new.stop - newest.starts[place])
        return Grown(self.request, self.answer, self.answer.tokens[new], newest.trace, place, within)


class Scheduler:
    """Decodes requests of one method in a fixed number of places.

    With several processes, each has a scheduler with the same requests, and all of them take the same steps.
    """

    def __init__(
        self,
        models: Models,
        programs: Programs,
        settings: Settings,
        places: int,
        *,
        reader: Reader | None = None,
        steps: int | None = None,
        prompt_widths: Sequence[int] = (),
    ) -> None:
        """
        Args:
            models: the language model and the reward models.
            programs: keeps what is compiled, also for later schedulers.
            settings: the method, and the most candidates and tokens of an answer that a request may ask for.
            places: the number of rows; a multiple of the parts that the mesh splits rows into.
            reader: reads the answers while they grow: each step then fills `grown`, and answers end at their
                requests' `stop`.
            steps: the most steps of a call; `STEPS` if there is no reason for another number.
            prompt_widths: the only widths that prompts are padded to, in every model's tokens, if any are given.
        """
        self.grown: list[Grown] = []
        """What the newest step added to each answer, for a scheduler with a reader."""
        self._reader, self._steps, self._prompt_widths = reader, steps or STEPS, sorted(prompt_widths)
        self._models, self._programs, self._settings = models, programs, settings
        self._waiting: deque[_Row] = deque()
        self._dropped: deque[RequestError] = deque()
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
        """Whether no request waits or runs, and nothing is left to say of one that was dropped."""
        return not self._waiting and not any(self._places) and not self._dropped

    @property
    def free_places(self) -> int:
        """The number of places that no request runs in or waits for; negative where more wait."""
        return self._places.count(None) - len(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Queues requests. Raises InputError for one that asks for another method, or for more than the scheduler's
        settings."""
        limits = self._settings
        for request in requests:
            own, prompt = request.settings, f"prompt {request.prompt.id!r}"
            alike = ("method", "top_p", "look_ahead", *(("trace", "alternatives") if own.trace == "candidates" else ()))
            for name in ("shape", *(("k",) if own.method.candidates == "all" else ())):
                if (getattr(own, name) is None) != (getattr(limits, name) is None):
                    raise InputError(f"{prompt}: must have a {name} like the running batch, or none like it")
            if own.stop and self._reader is None:
                raise InputError(f"{prompt}: has texts that end an answer, but nothing reads the running batch")
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

        Raises RequestError if a reward model has too few positions for an answer. That request was dropped in the step
        before, which was completed for all others.
        """
        self.grown = []
        if self._dropped:
            raise self._dropped.popleft()
        self._fill()
        if not any(self._places):
            return []
        status = self._advance()
        self._queue_again(status)
        self.grown = [grown for place, row in self._running() if (grown := row.grown(place, status.newest))]
        return self._take_ended(status)

    def warm_up(self, make_request: Callable[[int, bool], Request]) -> None:
        """Compiles all that requests with prompts of the given widths need, by answering some. The state has room for
        the widest from then on, so that no later prompt lets it grow. `make_request` gives a request for a width, which
        takes bare steps or not (`Settings.takes_bare_steps`)."""
        widths = self._prompt_widths
        for width, is_bare in [(widths[-1], True), *((width, False) for width in widths)]:
            self.add([make_request(width, is_bare)])
            while not self.is_idle:
                self.step()

    def _make_program(self) -> None:
        """The program, and its parameters; its guides have the widths that answers have needed so far."""
        guides, params = make_guides(self._models, self._settings, self._answer_widths)
        self._program = DecodingProgram.of(self._models, guides, self._settings)
        self._params = self._models.lm_params, params

    def _program_for(self, rows: Iterable[_Row]) -> DecodingProgram:
        """The program that does all that these rows ask for, and no more."""
        is_bare = all(row.request.settings.takes_bare_steps for row in rows)
        return self._program.bare if is_bare else self._program

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
            if self._prompt_widths:
                longest = max(len(ids) for row in rows for ids in (row.request.lm_ids, *row.request.own_ids))
                width = next(width for width in self._prompt_widths if width >= longest)
                chosen = Widths(width, (width,) * len(models))
                least = chosen if least is None else chosen.widened(least)
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
                if self._reader is not None:
                    row.answer = GrowingAnswer(self._reader, row.request.lm_ids, row.request.settings.stop)
                row.seconds += seconds / len(rows)
                self._places[place] = row

    def _advance(self) -> "_Status":
        """Draws tokens for every row, until enough rows have ended for others to enter."""
        enough = min(self._least_free, len(self._waiting)) if self._waiting else len(self._places)
        is_free = np.array([row is None for row in self._places])
        (self._state, status), seconds = self._programs(
            _advance,
            (self._program_for(filter(None, self._places)), self._steps, self._reader is not None),
            self._params,
            self._state,
            is_free,
            np.int32(enough),
        )
        status = jax.device_get(status)
        drawn = {place: int(status.lengths[place]) - row.tokens for place, row in self._running()}
        for place, row in self._running():
            row.tokens += drawn[place]
            row.seconds += seconds * drawn[place] / max(1, sum(drawn.values()))
            if row.answer is not None:
                row.answer.add(status.newest.tokens[place, : drawn[place]].tolist())
        return status

    def _queue_again(self, status: "_Status") -> None:
        """Takes rows back whose text did not fit a guide; they start again with wider guides."""
        for place, row in reversed(list(self._running())):
            for j, needed in zip(self._program.retokenised, status.needed, strict=True):
                model, guide = self._models.reward_models[j], self._program.guides[j]
                most = int(needed[place])
                try:
                    fits = model.fits(guide, most, len(row.request.own_ids[j]))
                except InputError as error:
                    self._dropped.append(RequestError(str(error), row.request))
                    self._places[place] = None
                    break
                if not fits:
                    # At least twice as wide, because each width takes compiling, and this answer may grow further.
                    wider = padded_width(max(most, 2 * guide.answer_width))
                    self._answer_widths[j] = max(self._answer_widths[j], wider)
                    self._is_too_narrow = True
                    self._places[place] = None
            else:
                if self._places[place] is None:
                    self._waiting.appendleft(row)

    def _take_ended(self, status: "_Status") -> list[Ended]:
        """Takes the rows that have ended out of their places."""
        ended = [(place, row) for place, row in self._running() if status.done[place] or row.is_stopped]
        found = []
        for first in range(0, len(ended), self._group):
            places, rows = zip(*ended[first : first + self._group], strict=True)
            where = np.array([*places, *[places[0]] * (self._group - len(places))], np.int32)
            filler = self._group - len(rows)
            lengths = [len(row.answer.tokens) if row.is_stopped else row.tokens for row in rows] + [0] * filler
            program = self._program_for(rows)
            decoded, _ = self._programs(_read, (program,), self._state, where, np.array(lengths, np.int32))
            decoded = jax.device_get(decoded)
            is_stopped = np.array([row.is_stopped for row in rows] + [False] * filler)
            batch = Batch.of([row.request for row in rows], self._group, self._models.reward_models)
            decoded = decoded._replace(finished=decoded.finished | is_stopped)
            found.append(Ended(batch, decoded, [row.seconds for row in rows]))
            for place in places:
                self._places[place] = None
        return found

    def _running(self) -> list[tuple[int, _Row]]:
        """The places that are not free, with their rows."""
        return [(place, row) for place, row in enumerate(self._places) if row is not None]


class _Newest(NamedTuple):
    """The tokens of some steps: of row b those from number `starts[b]` of its answer."""

    starts: Int[Array, "B"]
    tokens: Int[Array, "B S"]
    trace: Trace


class _Status(NamedTuple):
    """What the host asks after some steps, whole on every device. `needed` are the tokens that each retokenised guide
    has needed for an answer (see `RetokenisedGuide`)."""

    done: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    needed: tuple[Int[Array, "B"], ...]
    newest: _Newest | None


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


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _advance(
    program: DecodingProgram,
    steps: int,
    hands_out: bool,
    params: AllParams,
    state: DecodeState,
    is_free: Bool[Array, "B"],
    enough: Int[Array, ""],
) -> tuple[DecodeState, _Status]:
    """Draws tokens until `enough` rows have ended, free ones included; at most `steps`. If it `hands_out` the newest
    tokens, the status has them."""
    state = state._replace(done=state.done | is_free)
    starts = state.text.answer_lengths
    state = split_rows(program.decoder.advance(params, state, steps, enough))
    needed = tuple(state.guides[j].needed for j in program.retokenised)
    newest = _newest(_recorded(program, state), starts, steps) if hands_out else None
    return state, on_every_device(_Status(state.done, state.text.answer_lengths, needed, newest))


def _recorded(program: DecodingProgram, state: DecodeState) -> DecodeState:
    """A state whose trace has only what the program records."""
    keeps = program.decoder.keeps_candidates
    return state if keeps else state._replace(trace=state.trace._replace(candidates=None))


def _newest(state: DecodeState, starts: Int[Array, "B"], steps: int) -> _Newest:
    rows = jnp.arange(len(starts))[:, None]
    at = starts[:, None] + jnp.arange(steps)
    in_text = jnp.minimum(state.text.prompt_lengths[:, None] + at, state.text.tokens.shape[1] - 1)
    in_trace = jnp.minimum(at, state.trace.log_probs.shape[1] - 1)
    return _Newest(starts, state.text.tokens[rows, in_text], jax.tree.map(lambda x: x[rows, in_trace], state.trace))


@partial(jax.jit, static_argnums=0)
def _read(program: DecodingProgram, state: DecodeState, rows: Int[Array, "N"], lengths: Int[Array, "N"]) -> Decoded:
    """The answers of some rows, up to these lengths."""
    taken = take(_recorded(program, state), rows)
    text = taken.text._replace(lengths=jnp.minimum(taken.text.lengths, taken.text.prompt_lengths + lengths))
    return on_every_device(program.decoder.read(taken._replace(text=text)))
