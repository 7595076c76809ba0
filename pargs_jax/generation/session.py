"""A language model and its reward models, loaded and ready to answer prompts in batches."""

import dataclasses
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.data.preferences import Prompt
from pargs_jax.data.tokenization import TextTokenizer
from pargs_jax.decoding.loop import Decoded, Decoder, decode, row_keys
from pargs_jax.decoding.methods import Method
from pargs_jax.decoding.rules import Rule
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel, padded_width
from pargs_jax.models.hf import load_model, resolve
from pargs_jax.models.model import unstack_layers
from pargs_jax.sharding import current_mesh, on_every_device, row_shards


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's answer.

    `finish_reason` is `stop` (an end-of-sequence token) or `length`; `log_probability` is that of all the answer's
    tokens under the language model, in nats; `guide_rewards` are the reward models' rewards of the whole answer;
    `tokens` counts the end-of-sequence token too; `seconds` is the row's share of its batch's time, compiling left out.
    """

    id: str
    prompt: str
    response: str
    finish_reason: str
    log_probability: float
    guide_rewards: tuple[float, ...]
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode: a method, and what differs from its defaults."""

    method: Method
    weights: tuple[float, ...] = ()
    k: int | None = None
    temperature: float | None = None
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0


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
        unroll = jax.default_backend() != "tpu" if unroll is None else unroll
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
        self._compiled: dict[Any, Callable[..., Decoded]] = {}

    def answer(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[list[Answer]]:
        """Answers prompts, shortest first; yields the answers of each batch as it is done.

        Guided methods use all of the session's reward models; with others, the reward models score the finished
        answers.

        Raises:
            InputError: before any decoding, if a prompt does not fit or the settings do not suit the models.
        """
        encoded = [self.tokenizer.encode_prompt(prompt.text) for prompt in prompts]
        self._check_lengths(prompts, encoded, settings.max_new_tokens)
        guiding = self.reward_models if settings.method.guided else []
        weights = self._weights(settings)
        rule = settings.method.make_rule(settings.temperature)
        params = tuple(reward_model.params for reward_model in guiding)
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        shards = row_shards(current_mesh())
        batch_rows = -(-max(1, min(settings.batch_size, len(prompts))) // shards) * shards
        rooms = [0] * len(guiding)
        for first in range(0, len(order), batch_rows):
            rows = order[first : first + batch_rows]
            ids, lengths = left_pad([encoded[i] for i in rows], batch_rows)
            numbers = [prompt_number(prompts[i].id) for i in rows] + [0] * (batch_rows - len(rows))
            keys = _row_keys(settings.seed, np.array(numbers, np.uint32))
            texts_of = ids, lengths, settings.max_new_tokens
            guides = [model.guide(*texts_of, room) for model, room in zip(guiding, rooms, strict=True)]
            while True:
                decoder = Decoder(
                    self._lm,
                    tuple(guides),
                    k=settings.k or settings.method.k,
                    eos_ids=self.tokenizer.eos_ids,
                    pad_id=self.tokenizer.eos_id,
                    base=settings.method.base,
                )
                run = self._compile(decoder, params, ids, lengths, keys, weights, rule, settings.max_new_tokens)
                began = time.perf_counter()
                with input_errors_of_callbacks():
                    decoded = jax.block_until_ready(run(self._lm_params, params, ids, lengths, keys, weights, rule))
                seconds = (time.perf_counter() - began) / len(rows)
                # A text may take more of a reward model's tokens than was thought: then the batch is done again.
                wider = [model.with_more_room(guide, *texts_of) for model, guide in zip(guiding, guides, strict=True)]
                if not any(wider):
                    break
                guides = [new or old for new, old in zip(wider, guides, strict=True)]
                rooms = [new.answer_width if new else room for new, room in zip(wider, rooms, strict=True)]
            decoded = jax.device_get(decoded)
            texts = [
                self.tokenizer.decode_answer(encoded[i], decoded.tokens[row, : decoded.lengths[row]].tolist())
                for row, i in enumerate(rows)
            ]
            rewards = self._final_rewards(decoded, ids, lengths, texts, settings.method.guided)
            yield [
                Answer(
                    prompts[i].id,
                    prompts[i].text,
                    texts[row],
                    "stop" if decoded.finished[row] else "length",
                    float(decoded.log_probs[row].sum()),
                    tuple(map(float, rewards[row])),
                    int(decoded.lengths[row]),
                    seconds,
                )
                for row, i in enumerate(rows)
            ]

    def _compile(self, decoder: Decoder, params: Any, ids: Any, lengths: Any, keys: Any, weights: Any, rule: Rule,
                 max_new_tokens: int) -> Callable[..., Decoded]:  # fmt: skip
        shape = (decoder, ids.shape, type(rule), max_new_tokens)
        if shape not in self._compiled:
            lowered = decode.lower(decoder, self._lm_params, params, ids, lengths, keys, weights, rule, max_new_tokens)
            self._compiled[shape] = lowered.compile()
        return self._compiled[shape]

    def _weights(self, settings: Settings) -> Float[np.ndarray, "J"]:
        """One reward weight a guide."""
        if not settings.method.guided:
            return np.zeros(0, np.float32)
        given = settings.weights or (settings.method.weight,)
        if not self.reward_models:
            raise InputError("a guided method needs a reward model; give --rm PATH")
        if len(given) not in (1, len(self.reward_models)):
            raise InputError(
                f"{len(given)} weights for {len(self.reward_models)} reward models; give one, or one for each"
            )
        return np.broadcast_to(np.asarray(given, np.float32), len(self.reward_models))

    def _check_lengths(self, prompts: Sequence[Prompt], encoded: list[list[int]], max_new_tokens: int) -> None:
        room = self._lm.config.max_positions
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) + max_new_tokens > room:
                raise InputError(
                    f"prompt {prompt.id!r} has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} that is more "
                    f"than the language model's context of {room} tokens"
                )
            if ids and max(ids) >= self._lm.config.vocab_size:
                raise InputError(f"prompt {prompt.id!r} has tokens that the language model does not know")
            for reward_model in self.reward_models:
                reward_model.check_prompt(prompt.id, prompt.text, ids, max_new_tokens)

    def _final_rewards(
        self,
        decoded: Decoded,
        ids: Int[np.ndarray, "B P"],
        lengths: Int[np.ndarray, "B"],
        texts: Sequence[str],
        guided: bool,
    ) -> Float[np.ndarray, "B J"]:
        """Every reward model's reward of the whole answers."""
        if guided:
            last = np.maximum(decoded.lengths - 1, 0)
            return np.take_along_axis(decoded.rewards, last[:, None, None], axis=1)[:, 0]
        finished = decoded.finished[: len(texts)]
        scored = [m.score(ids, lengths, decoded.tokens, decoded.lengths, texts, finished) for m in self.reward_models]
        return np.stack(scored, axis=1) if scored else np.zeros((len(ids), 0))


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


def left_pad(prompts: Sequence[Sequence[int]], rows: int) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """Left-padded token ids and lengths. Missing rows are filler of length 0."""
    width = padded_width(max(map(len, prompts)))
    ids = np.zeros((rows, width), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return ids, lengths


def prompt_number(prompt_id: str) -> int:
    """A 32-bit number of a prompt's id, for its row's randomness: the same in every batch, file and process."""
    return zlib.crc32(prompt_id.encode())
