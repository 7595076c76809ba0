"""A language model and its reward models, loaded and ready to answer prompts in batches."""

import dataclasses
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from pargs_jax.data.preferences import Prompt
from pargs_jax.data_config import DEMO
from pargs_jax.decoding.loop import Decoded, row_keys
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.decoding.search import Found
from pargs_jax.errors import InputError
from pargs_jax.generation.answers import Answer, AnswerReader
from pargs_jax.generation.guidance import check_roles, roles_of
from pargs_jax.generation.plan import Batch, Settings, plan_batches
from pargs_jax.generation.program import DecodingProgram, make_guides
from pargs_jax.generation.reward_models import RewardModel, load_with_tokenizer
from pargs_jax.models.model import unrolls_by_default, unstack_layers
from pargs_jax.sharding import on_every_device

SCALE_ANSWERS = 64
"""The number of answers from which the scale of rewards is measured."""


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
        self._lm, self._lm_params = loaded.model, loaded.params
        if unroll:
            self._lm, self._lm_params = unstack_layers(self._lm, self._lm_params)
        self.reward_models = [
            RewardModel.load(
                path,
                self.tokenizer,
                self._lm.config.vocab_size,
                dtype=dtype,
                unroll=unroll,
                role=role,
                weights=rm_dtype,
            )
            for path, role in zip(reward_models, roles, strict=True)
        ]
        self.remembered_forms = (
            [(model.source, model.prompt_form) for model in self.reward_models],
            [(lm, loaded.prompt_form)],
        )
        """The prompt forms that the models were trained with, as `choose_form` takes them."""
        self.lm = lm
        self._reader = AnswerReader(lm, self.tokenizer, self.reward_models)
        self._compiled: dict[Any, Callable[..., tuple[Decoded | Found, tuple[Any, ...]]]] = {}

    def answer(
        self, prompts: Sequence[Prompt], settings: Settings, answered: Bool[np.ndarray, "P n"] | None = None
    ) -> Iterator[list[Answer]]:
        """Answers prompts, shortest first; yields each batch's answers when it is done.

        Guided methods use all of the session's reward models. With other methods, the reward models score the finished
        answers. Samples that are `answered` are left out.

        Raises InputError before any decoding, if a prompt does not fit or the settings do not match the models; and
        after a batch in which a log-probability or a reward is not finite.
        """
        check_roles(settings.method, self.reward_models)
        if settings.measures_rewards:
            settings = settings.with_reward_scale(*self._reward_scale(prompts, settings))
        answer_widths = [0] * len(self.reward_models)
        batches = plan_batches(self._lm, self.tokenizer, self.reward_models, prompts, settings, answered)
        for batch in batches:
            decoded, seconds = self._decode(batch, settings, answer_widths)
            yield self._reader.read(batch, decoded, seconds / len(batch.prompts), settings)

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

    def _decode(self, batch: Batch, settings: Settings, answer_widths: list[int]) -> tuple[Decoded | Found, float]:
        """Decodes a batch; also returns the seconds that it took. `answer_widths` are the widths that the guides' texts
        have needed so far; they grow where a text needs more."""
        rows = len(batch.lm_prompts.lengths)
        numbers, samples = np.zeros((2, rows), np.uint32)
        numbers[: len(batch.prompts)] = [prompt_number(prompt.id) for prompt in batch.prompts]
        samples[: len(batch.prompts)] = batch.samples
        keys = _row_keys(settings.seed, numbers, samples)
        row_settings = settings.of_rows(batch.prompts, rows, len(self.reward_models))
        while True:
            guides, params, guide_prompts = make_guides(
                (self._lm, self._lm_params), self.reward_models, batch, settings, answer_widths, self.tokenizer.eos_ids
            )
            arguments = (self._lm_params, params), *batch.lm_prompts, keys, row_settings, guide_prompts
            program = DecodingProgram.assemble(
                self._lm,
                guides,
                settings.method,
                settings.k,
                settings.max_new_tokens,
                top_p=settings.top_p,
                eos_ids=self.tokenizer.eos_ids,
                pad_id=self.tokenizer.eos_id,
                keeps_candidates=settings.trace == "candidates",
                search_options=dict(settings.search),
            )
            run = self._compile(program, arguments)
            began = time.perf_counter()
            with input_errors_of_callbacks():
                decoded, needed = jax.block_until_ready(run(*arguments))
            seconds = time.perf_counter() - began
            # A text may need more of a reward model's tokens than expected. Then the batch is decoded again.
            is_invalid = False
            for j, most in zip(program.retokenised, map(int, needed), strict=True):
                model, own = self.reward_models[j], batch.own_prompts[j]
                if most > guides[j].answer_width:
                    answer_widths[j] = model.larger_answer_width(most, own, settings.max_new_tokens)
                    is_invalid = True
            if not is_invalid:
                return jax.device_get(decoded), seconds

    def _compile(
        self, program: DecodingProgram, arguments: tuple[Any, ...]
    ) -> Callable[..., tuple[Decoded | Found, tuple[Any, ...]]]:
        arrays, structure = jax.tree.flatten(arguments[1:])
        shape = (program, tuple(np.shape(x) for x in arrays), structure)
        if shape not in self._compiled:
            self._compiled[shape] = program.lower(*arguments).compile()
        return self._compiled[shape]


@contextmanager
def input_errors_of_callbacks() -> Iterator[None]:
    """Raises the InputError of a host callback as itself, because XLA only passes on its text."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"InputError: (.*)", str(error))
        if found is None:
            raise
        raise InputError(found[1]) from error


@jax.jit
def _row_keys(seed: int, numbers: Int[Array, "B"], samples: Int[Array, "B"]) -> PRNGKeyArray:
    first = row_keys(seed, numbers)
    # Far from the numbers of tokens, which are folded in later.
    others = jax.vmap(jax.random.fold_in)(first, jnp.uint32(2**32 - 1) - samples)
    return on_every_device(jnp.where(samples == 0, first, others))


def prompt_number(prompt_id: str) -> int:
    """A 32-bit hash of a prompt's id, for its row's randomness: the same in every batch, file and process."""
    return zlib.crc32(prompt_id.encode())
