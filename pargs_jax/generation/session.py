"""A language model and its reward models, loaded and ready to answer prompts in batches."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, PRNGKeyArray

from pargs_jax.data.preferences import Prompt
from pargs_jax.data_config import DEMO
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.decoding.search import Found
from pargs_jax.errors import InputError
from pargs_jax.generation.answers import Answer, AnswerReader
from pargs_jax.generation.guidance import check_roles, roles_of
from pargs_jax.generation.plan import Batch, Numbers, Request, Settings, count_rows, plan_requests
from pargs_jax.generation.program import DecodingProgram, Models, Programs, guide_prompts, make_guides, run_batch
from pargs_jax.generation.reward_models import RewardModel, load_with_tokenizer, padded_width
from pargs_jax.generation.scheduler import Scheduler
from pargs_jax.models.model import unrolls_by_default, unstack_layers
from pargs_jax.sharding import on_every_device

SCALE_ANSWERS = 64
"""The number of answers from which the scale of rewards is measured."""


STREAMED_STEPS = 4
"""Tokens that are drawn between two pieces of a stream."""


class Piece(NamedTuple):
    """New text of answer number `sample` to a prompt. The last piece has the `answer`, whose response is the text of
    all its pieces."""

    id: str
    sample: int
    text: str
    answer: Answer | None


class Session:
    """Loaded models. `answer` may be called many times; each shape is compiled once."""

    def __init__(
        self,
        lm: str,
        reward_models: Sequence[str] = (),
        *,
        method: Method | None = None,
        dtype: str = "float32",
        lm_dtype: str | None = None,
        rm_dtype: str | None = None,
        unroll: bool | None = None,
        rm_format: str = "same",
    ) -> None:
        """Loads everything, and checks that the models fit together.

        Args:
            lm, reward_models: Hugging Face folders, hub ids, or folders of training runs.
            method: the method that the reward models will guide, which determines the kind of each model. Without it,
                they are models with a scalar head.
            dtype: the dtype of parameters and computation; softmax and rewards stay float32.
            lm_dtype, rm_dtype: another dtype for the weights of the language model, or of all reward models: `float32`,
                `bfloat16`, or `int8` (`pargs_jax.models.int8`), which computes in `dtype`.
            unroll: whether to run layers one by one instead of in a scan; by default yes, except on TPU (see
                `CausalModel`).
            rm_format: `auto` for reward models that read all prompts in their own chat template, if they have one
                (`RewardModel.load`).

        Raises InputError if a model cannot be used.
        """
        if lm == DEMO:
            raise InputError(f"lm: {DEMO!r} is a word of the commands; in Python give pargs_jax.demo.task.DEMO_LM")
        unroll = unrolls_by_default(jax.default_backend()) if unroll is None else unroll
        roles = roles_of(method, reward_models)
        loaded, self.tokenizer = load_with_tokenizer(lm, "vocabulary", dtype, lm_dtype)
        if loaded.model.lora is not None:
            raise InputError(
                f"{lm}: takes a preference vector, so it is not a language model; use it as the reward model of parm"
            )
        model, params = unstack_layers(loaded.model, loaded.params) if unroll else (loaded.model, loaded.params)
        self.reward_models = [
            RewardModel.load(
                path,
                self.tokenizer,
                model.config.vocab_size,
                dtype=dtype,
                unroll=unroll,
                role=role,
                weights=rm_dtype,
                prefers_template=rm_format == "auto",
            )
            for path, role in zip(reward_models, roles, strict=True)
        ]
        self._models = Models(model, params, self.tokenizer.eos_ids, self.tokenizer.eos_id, self.reward_models)
        self.remembered_forms = (
            [(model.source, model.prompt_form) for model in self.reward_models],
            [(lm, loaded.prompt_form)],
        )
        """The prompt forms that the models were trained with, as `choose_form` takes them."""
        self.lm = lm
        self.answers = AnswerReader(lm, self.tokenizer, self.reward_models)
        self._programs = Programs()

    def answer(
        self, prompts: Sequence[Prompt], settings: Settings, answered: Bool[np.ndarray, "P n"] | None = None
    ) -> Iterator[list[Answer]]:
        """Answers prompts, shortest first; yields answers as they end. `settings.batch_size` rows are decoded together,
        and the next prompt enters where an answer has ended (`Scheduler`). A search decodes whole batches.

        Guided methods use all of the session's reward models. With other methods, the reward models score the finished
        answers. Samples that are `answered` are left out.

        Raises InputError before any decoding, if a prompt does not fit or the settings do not match the models; and
        after an answer in which a log-probability or a reward is not finite.
        """
        check_roles(settings.method, self.reward_models)
        if settings.measures_rewards:
            settings = settings.with_reward_scale(*self._reward_scale(prompts, settings))
        requests = plan_requests(self._models.lm, self.tokenizer, self.reward_models, prompts, settings, answered)
        rows = count_rows(settings.batch_size, len(requests))
        if settings.method.search is not None:
            yield from self._search(requests, settings, rows)
            return
        reader = self.answers.text_reader if settings.stop else None
        scheduler = Scheduler(self._models, self._programs, settings, rows, reader=reader)
        scheduler.add(requests)
        while not scheduler.is_idle:
            answers = [answer for ended in scheduler.step() for answer in self.answers.read(*ended, settings)]
            if answers:
                yield answers

    def stream(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Piece]:
        """Answers prompts as `answer` does, and yields each answer piece by piece while it is written.

        Raises InputError as `answer` does, and for a search, which has no answer before its end.
        """
        if settings.method.search is not None:
            raise InputError(f"{settings.method.source}: is a search, whose answers cannot be streamed; use answer")
        check_roles(settings.method, self.reward_models)
        requests = self.plan(prompts, settings)
        scheduler = self.scheduler(settings, count_rows(settings.batch_size, len(requests)), steps=STREAMED_STEPS)
        scheduler.add(requests)
        lengths = dict.fromkeys(((each.prompt.id, each.sample) for each in requests), 0)

        def piece(key: tuple[str, int], text: str, answer: Answer | None = None) -> Piece:
            start, lengths[key] = lengths[key], len(text)
            return Piece(*key, text[start:], answer)

        while not scheduler.is_idle:
            ended = scheduler.step()
            for request, growing, *_ in scheduler.grown:
                key = request.prompt.id, request.sample
                if len(growing.lasting_text) > lengths[key]:
                    yield piece(key, growing.lasting_text)
            for answer in (answer for part in ended for answer in self.answers.read(*part, settings)):
                yield piece((answer.id, answer.sample), answer.response, answer)

    @property
    def lm_vocab_size(self) -> int:
        """The number of tokens that the language model proposes."""
        return self._models.lm.config.vocab_size

    @property
    def context(self) -> int:
        """The most tokens of a prompt with its answer, in the tokens of the model that takes fewest."""
        models = [self._models.lm, *(each.model for each in self.reward_models)]
        return min(model.config.max_positions for model in models)

    def plan(
        self, prompts: Sequence[Prompt], settings: Settings, encoded: Sequence[list[int]] | None = None
    ) -> list[Request]:
        """`plan_requests` with the session's models."""
        return plan_requests(self._models.lm, self.tokenizer, self.reward_models, prompts, settings, encoded=encoded)

    def scheduler(self, settings: Settings, places: int, **options: Any) -> Scheduler:
        """A running batch of the session's models, whose answers are read while they grow (`Scheduler`)."""
        return Scheduler(self._models, self._programs, settings, places, reader=self.answers.text_reader, **options)

    def _reward_scale(self, prompts: Sequence[Prompt], settings: Settings) -> tuple[float, float]:
        """Mean and standard deviation of the weighted rewards of unguided answers to the first prompts: one answer per
        prompt, or several if there are few prompts."""
        first = prompts[:SCALE_ANSWERS]
        if not first:
            return 0.0, 1.0
        own = dataclasses.replace(
            settings,
            method=METHODS["top_k"],
            weights=(),
            k=settings.candidates,
            temperature=settings.sampling_temperature,
            n=-(-SCALE_ANSWERS // len(first)),
            search=(),
        )
        weights = settings.guide_weights(len(self.reward_models))
        rewards = [np.dot(answer.guide_rewards, weights) for batch in self.answer(first, own) for answer in batch]
        if not np.std(rewards) > 0:
            raise InputError(
                "the language model's own answers all have the same reward; give search.mean and search.deviation"
            )
        return float(np.mean(rewards)), float(np.std(rewards))

    def _search(self, requests: Sequence[Request], settings: Settings, rows: int) -> Iterator[list[Answer]]:
        """Answers requests by a search, in batches of so many rows."""
        answer_widths = [0] * len(self.reward_models)
        for first in range(0, len(requests), rows):
            batch = Batch.of(requests[first : first + rows], rows, self.reward_models)
            found, seconds = self._search_batch(batch, settings, answer_widths)
            yield self.answers.read(batch, found, [seconds / len(batch.requests)] * len(batch.requests), settings)

    def _search_batch(self, batch: Batch, settings: Settings, answer_widths: list[int]) -> tuple[Found, float]:
        """Also returns the seconds that it took. `answer_widths` are the widths that the guides' texts have needed so
        far; they grow where a text needs more, and the batch is then searched again."""
        while True:
            guides, params = make_guides(self._models, settings, answer_widths)
            program = DecodingProgram.of(self._models, guides, settings)
            keys, _ = self._programs(_keys, (), batch.numbers)
            own_prompts = guide_prompts(settings.method, self.reward_models, batch)
            arguments = (*batch.lm_prompts, keys, batch.settings(len(self.reward_models)), own_prompts)
            params = self._models.lm_params, params
            (found, needed), seconds = self._programs(run_batch, (program,), params, *arguments)
            is_invalid = False
            for j, most in zip(program.retokenised, map(int, needed), strict=True):
                longest = int(batch.own_prompts[j].lengths.max())
                if not self.reward_models[j].fits(guides[j], most, longest):
                    answer_widths[j] = padded_width(most)
                    is_invalid = True
            if not is_invalid:
                return jax.device_get(found), seconds


@jax.jit
def _keys(numbers: Numbers) -> PRNGKeyArray:
    return on_every_device(numbers.keys())
