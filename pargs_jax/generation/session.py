"""A language model and its reward models, loaded and ready to answer prompts in batches."""

import dataclasses
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.guides import Prompts
from pargs_jax.decoding.loop import Decoded, row_keys
from pargs_jax.decoding.methods import Method
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.generation.program import DecodingProgram
from pargs_jax.generation.reward_models import RewardModel, left_pad, padded_width
from pargs_jax.models.hf import load_model, resolve
from pargs_jax.models.model import unrolls_by_default, unstack_layers
from pargs_jax.sharding import current_mesh, on_every_device, row_shards
from pargs_jax.text.tokenization import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's answer.

    `finish_reason` is `stop` (an end-of-sequence token) or `length`; `log_probability` is that of all the answer's
    tokens under the language model, in nats; `kl` is the sum over its tokens of KL(q || p), where q is the distribution
    that a token was drawn from and p the language model's; `guide_rewards` are the reward models' rewards of the whole
    answer; `tokens` counts the end-of-sequence token too; `seconds` is the row's share of its batch's time, compiling
    left out.
    """

    id: str
    prompt: str
    response: str
    finish_reason: str
    log_probability: float
    kl: float
    guide_rewards: tuple[float, ...]
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode: a method, and what differs from its defaults. Raises InputError for a number that means nothing to
    the method."""

    method: Method
    weights: tuple[float, ...] = ()
    k: int | None = None
    temperature: float | None = None
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        given = {"k": self.k is not None, "weight": bool(self.weights), "temperature": self.temperature is not None}
        for name, reason in self.method.unused.items():
            if given[name]:
                raise InputError(f"--{name}: means nothing to {self.method.source}, which {reason}; leave it out")


class Session:
    """Loaded models. `answer` may be called many times; each shape compiles once."""

    def __init__(
        self,
        lm: str,
        reward_models: Sequence[str] = (),
        *,
        dtype: str = "float32",
        unroll: bool | None = None,
    ) -> None:
        """Loads everything, and checks that the models go together.

        Args:
            lm, reward_models: Hugging Face folders, hub ids, or folders of runs.
            dtype: of the parameters and of the computation; softmax and rewards stay float32.
            unroll: run layers one by one and not as a scan; by default everywhere but on TPU (see `CausalModel`).

        Raises:
            InputError: if a model cannot be used.
        """
        unroll = unrolls_by_default(jax.default_backend()) if unroll is None else unroll
        folder = resolve(lm)
        loaded = load_model(folder, "vocabulary", dtype=dtype)
        self._lm, self._lm_params = loaded.model, loaded.params
        if unroll:
            self._lm, self._lm_params = unstack_layers(self._lm, self._lm_params)
        self.tokenizer = TextTokenizer.load(folder, loaded.eos_ids)
        self.tokenizer.check_embeddings(self._lm.config.vocab_size, lm)
        self.reward_models = [
            RewardModel.load(path, self.tokenizer, self._lm.config.vocab_size, dtype=dtype, unroll=unroll)
            for path in reward_models
        ]
        self.remembered_forms = (
            [(model.source, model.prompt_form) for model in self.reward_models],
            [(lm, loaded.prompt_form)],
        )
        """The prompt forms that the models were trained with, as `choose_form` takes them."""
        self._compiled: dict[Any, Callable[..., tuple[Decoded, tuple[Any, ...]]]] = {}

    def answer(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[list[Answer]]:
        """Answers prompts, shortest first; yields the answers of each batch as it is done.

        Guided methods use all of the session's reward models; with others, the reward models score the finished
        answers.

        Raises:
            InputError: before any decoding, if a prompt does not fit or the settings do not suit the models; and after
                the batch in which a log-probability or a reward is not finite.
        """
        encoded = [self.tokenizer.encode_prompt(prompt.text) for prompt in prompts]
        own_encoded = [list(map(model.encode_prompt, prompts, encoded)) for model in self.reward_models]
        self._check_lengths(prompts, encoded, own_encoded, settings.max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        shards = row_shards(current_mesh())
        rows = -(-max(1, min(settings.batch_size, len(prompts))) // shards) * shards
        rooms = [0] * len(self.reward_models)
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            lm_ids = [encoded[i] for i in chosen]
            batch = _Batch(
                [prompts[i] for i in chosen],
                lm_ids,
                left_pad(lm_ids, rows, padded_width(max(map(len, lm_ids)))),
                [
                    model.pad_prompts([own[i] for i in chosen], rows)
                    for model, own in zip(self.reward_models, own_encoded, strict=True)
                ],
            )
            decoded, seconds = self._decode(batch, settings, rooms)
            yield self._read(batch, decoded, seconds / len(chosen), settings)

    def _decode(self, batch: "_Batch", settings: Settings, rooms: list[int]) -> tuple[Decoded, float]:
        """Decodes a batch; also the seconds that it took. `rooms` are those that the guides' texts needed so far, and
        grow where a text needs more."""
        guiding = list(zip(self.reward_models, batch.own_prompts, strict=True)) if settings.method.guided else []
        rows = len(batch.lm_prompts.lengths)
        numbers = [prompt_number(prompt.id) for prompt in batch.prompts]
        keys = _row_keys(settings.seed, np.array(numbers + [0] * (rows - len(numbers)), np.uint32))
        params = tuple(model.params for model, _ in guiding)
        guide_prompts = tuple(model.guide_prompts(own, batch.lm_prompts) for model, own in guiding)
        row_settings = self._row_settings(settings, rows)
        arguments = (self._lm_params, params), *batch.lm_prompts, keys, row_settings, guide_prompts
        while True:
            guides = tuple(
                model.guide(own, settings.max_new_tokens, room)
                for (model, own), room in zip(guiding, rooms[: len(guiding)], strict=True)
            )
            program = DecodingProgram.assemble(
                self._lm,
                guides,
                settings.method,
                settings.k,
                settings.max_new_tokens,
                eos_ids=self.tokenizer.eos_ids,
                pad_id=self.tokenizer.eos_id,
            )
            run = self._compile(program, arguments)
            began = time.perf_counter()
            with input_errors_of_callbacks():
                decoded, needed = jax.block_until_ready(run(*arguments))
            seconds = time.perf_counter() - began
            # A text may take more of a reward model's tokens than was thought: then the batch is done again.
            is_void = False
            for j, most in zip(program.by_text, map(int, needed), strict=True):
                model, own = guiding[j]
                if most > guides[j].answer_width:
                    rooms[j] = model.larger_room(most, own, settings.max_new_tokens)
                    is_void = True
            if not is_void:
                return jax.device_get(decoded), seconds

    def _compile(
        self, program: DecodingProgram, arguments: tuple[Any, ...]
    ) -> Callable[..., tuple[Decoded, tuple[Any, ...]]]:
        arrays, structure = jax.tree.flatten(arguments[1:])
        shape = (program, tuple(np.shape(x) for x in arrays), structure)
        if shape not in self._compiled:
            self._compiled[shape] = program.lower(*arguments).compile()
        return self._compiled[shape]

    def _read(self, batch: "_Batch", decoded: Decoded, seconds: float, settings: Settings) -> list[Answer]:
        """The answers of a decoded batch; `seconds` are those of each row."""
        tokens = [decoded.tokens[row, : decoded.lengths[row]].tolist() for row in range(len(batch.prompts))]
        texts = list(map(self.tokenizer.decode_answer, batch.lm_ids, tokens))
        rewards = self._final_rewards(batch, decoded, texts, settings.method.guided)
        self._check_finite(batch, decoded, rewards)
        return [
            Answer(
                prompt.id,
                prompt.text,
                texts[row],
                "stop" if decoded.finished[row] else "length",
                float(decoded.trace.log_probs[row].sum()),
                float(decoded.trace.kls[row].sum()),
                tuple(map(float, rewards[row])),
                int(decoded.lengths[row]),
                seconds,
            )
            for row, prompt in enumerate(batch.prompts)
        ]

    def _row_settings(self, settings: Settings, rows: int) -> RowSettings:
        method = settings.method
        weights: Sequence[float] = ()
        if method.guided:
            weights = settings.weights or (method.weight,)
            if not self.reward_models:
                raise InputError("a guided method needs a reward model; give --rm PATH")
            if len(weights) not in (1, len(self.reward_models)):
                raise InputError(
                    f"{len(weights)} weights for {len(self.reward_models)} reward models; give one, or one for each"
                )
            weights = np.broadcast_to(np.asarray(weights, np.float32), len(self.reward_models))
        return RowSettings.alike(
            rows,
            weights=weights,
            temperature=method.temperature if settings.temperature is None else settings.temperature,
            candidates=settings.k or method.k,
            max_new_tokens=settings.max_new_tokens,
        )

    def _check_lengths(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[list[int]],
        own_encoded: Sequence[Sequence[list[int]]],
        max_new_tokens: int,
    ) -> None:
        room = self._lm.config.max_positions
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) + max_new_tokens > room:
                raise InputError(
                    f"prompt {prompt.id!r} has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} that is more "
                    f"than the language model's context of {room} tokens"
                )
            if ids and max(ids) >= self._lm.config.vocab_size:
                raise InputError(f"prompt {prompt.id!r} has tokens that the language model does not know")
        for model, own in zip(self.reward_models, own_encoded, strict=True):
            for prompt, ids in zip(prompts, own, strict=True):
                model.check_prompt(prompt, ids, max_new_tokens)

    def _final_rewards(
        self, batch: "_Batch", decoded: Decoded, texts: Sequence[str], guided: bool
    ) -> Float[np.ndarray, "B J"]:
        """Every reward model's reward of the whole answers."""
        if guided:
            return decoded.rewards
        finished = decoded.finished[: len(texts)]
        scored = [
            model.score(own, decoded.tokens, decoded.lengths, texts, finished)
            for model, own in zip(self.reward_models, batch.own_prompts, strict=True)
        ]
        return np.stack(scored, axis=1) if scored else np.zeros((len(texts), 0))

    def _check_finite(self, batch: "_Batch", decoded: Decoded, final_rewards: Float[np.ndarray, "B J"]) -> None:
        """Raises InputError for the first row with a number that no answer can have."""
        for row, prompt in enumerate(batch.prompts):
            if not np.isfinite(decoded.trace.log_probs[row]).all():
                raise InputError(f"prompt {prompt.id!r}: a log-probability of the language model is not finite")
            guided = decoded.trace.rewards[row] if decoded.trace.rewards.shape[-1] else final_rewards[row][None]
            for j, reward_model in enumerate(self.reward_models):
                if not np.isfinite(guided[:, j]).all():
                    raise InputError(
                        f"prompt {prompt.id!r}: a reward of {reward_model.source} is not finite; "
                        "its weights may be damaged, or too large for --dtype"
                    )


class _Batch(NamedTuple):
    """Prompts that are decoded together: in the language model's tokens, and in each reward model's."""

    prompts: list[Prompt]
    lm_ids: list[list[int]]
    lm_prompts: Prompts
    own_prompts: list[Prompts]


@contextmanager
def input_errors_of_callbacks() -> Iterator[None]:
    """Raises the InputError of a host callback as itself: XLA knows it as text only."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"InputError: (.*)", str(error))
        if found is None:
            raise
        raise InputError(found[1]) from error


@jax.jit
def _row_keys(seed: int, numbers: Int[Array, "B"]) -> PRNGKeyArray:
    return on_every_device(row_keys(seed, numbers))


def prompt_number(prompt_id: str) -> int:
    """A 32-bit number of a prompt's id, for its row's randomness: the same in every batch, file and process."""
    return zlib.crc32(prompt_id.encode())
