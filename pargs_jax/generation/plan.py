"""The settings of decoding, and the requests and batches that prompts become."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.guides import Prompts
from pargs_jax.decoding.loop import row_keys
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.decoding.shape import Shape
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError, warn
from pargs_jax.generation.guidance import count_guides
from pargs_jax.generation.reward_models import RewardModel, left_pad, padded_width
from pargs_jax.models.causal import CausalModel
from pargs_jax.sharding import current_mesh, row_shards
from pargs_jax.text.tokenization import TextTokenizer, cut_left

MOST_BIASED = 300
"""The most tokens that a request may give a bias."""
NO_TOKEN = np.iinfo(np.int32).max
"""Beyond every vocabulary."""


@dataclasses.dataclass(frozen=True)
class OwnShape:
    """The shape of an answer's distribution (`decoding.shape.Shape`). `bias` are pairs of a token and what is added to
    its log-probability, at most `MOST_BIASED`. Raises InputError for numbers that cannot be used."""

    top_p: float = 1.0
    keeps_rest: bool = False
    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p:g}, must be above 0 and at most 1")
        if len(self.bias) > MOST_BIASED:
            raise InputError(f"logit_bias: got {len(self.bias)} tokens, must be at most {MOST_BIASED}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode: a method, and the settings that differ from its defaults.

    `n` is the number of answers to each prompt. `trace` says what is recorded for every token: its own numbers, or also
    all candidates with theirs. `top_p`, `look_ahead` and `gate_entropy` are explained in docs/methods.md. `preference`
    is the vector for the method that takes one, for prompts without their own. `search` holds the options of a search
    method that differ from its defaults. An answer ends where it contains one of the texts `stop`, which are not part
    of the response. `shape` reshapes the distribution before candidates are chosen; requests with and without one
    cannot run together. With `trace="candidates"`, `alternatives` of the likeliest tokens are recorded where they are
    not candidates. With `cut_prompts`, prompts that do not fit a model lose tokens on the left there. Raises InputError
    for a setting that does not apply to the method.
    """

    method: Method
    weights: tuple[float, ...] = ()
    k: int | None = None
    temperature: float | None = None
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0
    n: int = 1
    trace: Literal["tokens", "candidates"] | None = None
    top_p: float | None = None
    gate_entropy: float | None = None
    look_ahead: int | None = None
    preference: tuple[float, ...] = ()
    search: tuple[tuple[str, float | str | bool], ...] = ()
    stop: tuple[str, ...] = ()
    shape: OwnShape | None = None
    alternatives: int = 0
    cut_prompts: bool = False

    def __post_init__(self) -> None:
        for name, reason in self.method.unused.items():
            if getattr(self, "weights" if name == "weight" else name) not in (None, ()):
                flag = name.replace("_", "-")
                raise InputError(f"{flag}: is not an option of {self.method.source}, which {reason}; leave it out")
        if self.method.draws == "contrastive" and self.weights and not 0 <= self.weights[0] <= 1:
            raise InputError(f"weight: got {self.weights[0]:g}, must be from 0 to 1 for {self.method.source}")
        if self.preference:
            check_preference(self.preference, "preference")
        for name, _ in self.search:
            if name not in dict(self.method.search_options):
                flag = name.replace("_", "-")
                raise InputError(f"search.{flag}: is not an option of {self.method.source}; leave it out")
        if ("mean" in dict(self.search)) != ("deviation" in dict(self.search)):
            raise InputError("search.mean and search.deviation: got only one, give both or neither")
        if "" in self.stop:
            raise InputError("stop: got an empty text, which every answer contains; leave it out")
        if self.method.search is not None:
            self.method.make_search(dict(self.search))
            if self.stop:
                raise InputError(f"stop: is not supported by {self.method.source}, a search; leave it out")
            if self.trace is not None:
                raise InputError(
                    f"trace and explain: are not supported by {self.method.source}, a search; leave them out"
                )
        if self.n > 1 and not self.samples:
            raise InputError(
                f"n: got {self.n}, but {self.method.source} does not sample, so all answers would be the same"
            )

    @property
    def samples(self) -> bool:
        """Whether the method draws tokens at random."""
        return "temperature" not in self.method.unused

    @property
    def takes_bare_steps(self) -> bool:
        """Whether no candidates are recorded, and only candidates can be drawn (`Decoder.bare`)."""
        keeps_rest = self.method.keeps_rest if self.shape is None else self.shape.keeps_rest
        return not keeps_rest and not self.alternatives and self.trace != "candidates"

    @property
    def kl_is(self) -> Literal["exact", "bound", "estimate"]:
        """Whether an answer's `kl` is exact or, for a search, a bound or an estimate (docs/search.md)."""
        return "exact" if self.method.search is None else self.method.make_search(dict(self.search)).kl

    @property
    def measures_rewards(self) -> bool:
        """Whether the scale of rewards must be measured first: the method needs it, and it is not given."""
        return "deviation" in dict(self.method.search_options) and "deviation" not in dict(self.search)

    def with_reward_scale(self, mean: float, deviation: float) -> "Settings":
        """These settings with that scale."""
        return dataclasses.replace(self, search=(*self.search, ("mean", mean), ("deviation", deviation)))

    @property
    def method_name(self) -> str:
        """The method's name in `METHODS`; for other methods, its source."""
        return next((name for name, method in METHODS.items() if method == self.method), self.method.source)

    @property
    def candidates(self) -> int:
        """The most candidates of a step."""
        return self.k or self.method.k

    @property
    def sampling_temperature(self) -> float:
        return self.method.temperature if self.temperature is None else self.temperature

    @property
    def candidates_in_use(self) -> int | None:
        """The most candidates of a step; None for a method that does not count them."""
        return None if "k" in self.method.unused and self.method.candidates != "top_k" else self.candidates

    @property
    def tokens_ahead(self) -> int:
        """The number of tokens that an aligned model writes after each candidate; 0 for methods without one."""
        return self.method.look_ahead if self.look_ahead is None else self.look_ahead

    def guide_weights(self, reward_models: int, own: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """The weight of each guide that this many reward models make; empty for a method without guides. `own` are the
        prompt's own weights, if it has any.

        Raises InputError if the numbers of weights and guides differ, or if a guided method has no reward models.
        """
        guides = count_guides(self.method, reward_models)
        weights = own or self.weights or (self.method.weight,)
        if guides and len(weights) not in (1, guides):
            what = {"ratio": "pairs of models", "look_ahead": "look-ahead"}.get(
                self.method.reward_model, "reward models"
            )
            raise InputError(
                f"weight: got {len(weights)} weights for {guides} {what}, give one for all or one for each"
            )
        return weights * guides if len(weights) == 1 else weights[:guides]


def check_preference(vector: Sequence[float], name: str) -> None:
    """Raises InputError unless the numbers are shares that sum to one."""
    if min(vector) < 0 or abs(sum(vector) - 1) > 1e-3:
        raise InputError(
            f"{name}: got {', '.join(f'{x:g}' for x in vector)}, must be numbers of at least 0 that sum to 1"
        )


class Request(NamedTuple):
    """An answer that is wanted: number `sample` of the answers to a prompt. Requests with different settings can be
    decoded together if they have the same method."""

    prompt: Prompt
    sample: int
    settings: Settings
    lm_ids: list[int]
    own_ids: list[list[int]]
    """The same prompt in the tokens of each reward model."""

    @property
    def preference(self) -> tuple[float, ...]:
        """The preference vector, for a method that takes one. Raises InputError if there is none."""
        vector = self.prompt.preference or self.settings.preference
        if not vector:
            raise InputError(
                f"prompt {self.prompt.id!r}: {self.settings.method.source} needs a preference vector; set the option "
                "preference, or add a column 'preference'"
            )
        return vector


class Widths(NamedTuple):
    """The widths that prompts are padded to: in the tokens of the language model, and of each reward model."""

    lm: int
    own: tuple[int, ...]

    def widened(self, other: "Widths") -> "Widths":
        """The larger of each two."""
        return Widths(max(self.lm, other.lm), tuple(map(max, self.own, other.own)))


class Batch(NamedTuple):
    """Requests that are decoded together, one in each row. Further rows are filler."""

    requests: Sequence[Request]
    lm_prompts: Prompts
    own_prompts: list[Prompts]
    """The same prompts in the tokens of each reward model."""

    @classmethod
    def of(
        cls, requests: Sequence[Request], rows: int, reward_models: Sequence[RewardModel], least: Widths | None = None
    ) -> "Batch":
        """Pads the prompts of at most `rows` requests to a few widths, which are at least `least`."""
        lm_ids = [request.lm_ids for request in requests]
        least = least or Widths(0, (0,) * len(reward_models))
        return cls(
            requests,
            left_pad(lm_ids, rows, max(padded_width(max(map(len, lm_ids))), least.lm)),
            [
                model.pad_prompts([request.own_ids[j] for request in requests], rows, width)
                for j, (model, width) in enumerate(zip(reward_models, least.own, strict=True))
            ],
        )

    @property
    def rows(self) -> int:
        return len(self.lm_prompts.lengths)

    @property
    def prompts(self) -> list[Prompt]:
        return [request.prompt for request in self.requests]

    @property
    def widths(self) -> Widths:
        return Widths(self.lm_prompts.tokens.shape[1], tuple(own.tokens.shape[1] for own in self.own_prompts))

    @property
    def numbers(self) -> "Numbers":
        """What the rows' keys are made of."""
        filler = [(0, 0, 0)] * (self.rows - len(self.requests))
        each = [(request.settings.seed, prompt_number(request.prompt.id), request.sample) for request in self.requests]
        return Numbers(*np.array([*each, *filler], np.uint32).T)

    def settings(self, reward_models: int) -> RowSettings:
        """The settings of each row. Raises InputError if the numbers of weights and guides differ."""
        each = [request.settings for request in self.requests]
        weights = [
            own.guide_weights(reward_models, prompt.weights) for own, prompt in zip(each, self.prompts, strict=True)
        ]
        return RowSettings(
            self._of_rows(weights),
            self._of_rows([own.sampling_temperature for own in each]),
            self._of_rows([own.candidates for own in each], np.int32),
            self._of_rows([own.max_new_tokens for own in each], np.int32),
            self._of_rows([-np.inf if own.gate_entropy is None else own.gate_entropy for own in each]),
            self._shape(),
        )

    def _shape(self) -> Shape | None:
        """The shapes of the rows' distributions, if the requests have any."""
        each = [request.settings.shape for request in self.requests]
        if None in each:
            return None
        biases = [[*own.bias, *[(NO_TOKEN, 0.0)] * (MOST_BIASED - len(own.bias))] for own in each]
        return Shape(
            self._of_rows([own.top_p for own in each]),
            self._of_rows([own.keeps_rest for own in each], bool),
            self._of_rows([[token for token, _ in own] for own in biases], np.int32),
            self._of_rows([[bias for _, bias in own] for own in biases]),
            self._of_rows([own.presence for own in each]),
            self._of_rows([own.frequency for own in each]),
        )

    def preferences(self) -> Float[np.ndarray, "B M"]:
        """The preference vector of each row. Raises InputError if a prompt has none, or if their lengths differ."""
        vectors = [request.preference for request in self.requests]
        for prompt, vector in zip(self.prompts, vectors, strict=True):
            if len(vector) != len(vectors[0]):
                raise InputError(
                    f"prompt {prompt.id!r}: its preference has {len(vector)} numbers, not {len(vectors[0])}"
                )
        return self._of_rows(vectors)

    def _of_rows(self, values: Sequence[Any], dtype: Any = np.float32) -> Float[np.ndarray, "B ..."]:
        """One value for each row; filler rows have the first request's."""
        return np.array([*values, *[values[0]] * (self.rows - len(values))], dtype)


class Numbers(NamedTuple):
    """Seed, hash of the prompt's id, and sample of each row: its key is made of nothing else, so that an answer does
    not depend on its batch."""

    seeds: UInt32[Array, "B"]
    prompts: UInt32[Array, "B"]
    samples: UInt32[Array, "B"]

    def keys(self) -> PRNGKeyArray:
        """One key per row."""
        first = jax.vmap(lambda seed, prompt: row_keys(seed, prompt[None])[0])(self.seeds, self.prompts)
        # Far from the numbers of tokens, which are folded in later.
        others = jax.vmap(jax.random.fold_in)(first, jnp.uint32(2**32 - 1) - self.samples)
        return jnp.where(self.samples == 0, first, others)


def prompt_number(prompt_id: str) -> int:
    """A 32-bit hash of a prompt's id, for its row's randomness: the same in every batch, file and process."""
    return zlib.crc32(prompt_id.encode())


def plan_requests(
    lm: CausalModel,
    tokenizer: TextTokenizer,
    reward_models: Sequence[RewardModel],
    prompts: Sequence[Prompt],
    settings: Settings,
    answered: Bool[np.ndarray, "P n"] | None = None,
    encoded: Sequence[list[int]] | None = None,
) -> list[Request]:
    """The answers that are wanted, shortest prompts first: those of similar length are then decoded together, and few
    are padded far beyond their length.

    Args:
        lm, tokenizer: the language model and its tokenizer.
        reward_models: the reward models.
        prompts, settings: the prompts to answer, and how.
        answered: the samples of each prompt that exist already; they are left out.
        encoded: the prompts in the language model's tokens, where they are not to be encoded from their texts.

    Raises InputError if a prompt with its answer does not fit a model.
    """
    encoded = [tokenizer.encode_prompt(prompt.text) for prompt in prompts] if encoded is None else encoded
    encoded, own_encoded = _fitted(lm, tokenizer, reward_models, prompts, encoded, settings)
    _check_lengths(lm, reward_models, prompts, encoded, own_encoded, settings)
    return [
        Request(prompts[i], sample, settings, encoded[i], [own[i] for own in own_encoded])
        for i in sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        for sample in range(settings.n)
        if answered is None or not answered[i][sample]
    ]


def _fitted(
    lm: CausalModel,
    tokenizer: TextTokenizer,
    reward_models: Sequence[RewardModel],
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    settings: Settings,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The prompts' ids for the language model, and for each reward model; cut on the left where that was asked for. A
    reward model with the language model's tokens reads what is left there. Warns if prompts were cut."""
    lost = np.zeros(len(prompts), int)  # tokens of each prompt, in the model where it lost most

    def fitting(of: TextTokenizer, positions: int, all_ids: Sequence[list[int]]) -> Sequence[list[int]]:
        if not settings.cut_prompts or positions < 1:
            return all_ids
        cut = [cut_left(ids, positions, of.bos_id) for ids in all_ids]
        lost[:] = np.maximum(lost, [len(ids) - len(left) for ids, left in zip(all_ids, cut, strict=True)])
        return cut

    new_tokens = settings.max_new_tokens
    encoded = fitting(tokenizer, lm.config.max_positions - new_tokens, encoded)
    own_encoded = [
        fitting(
            model.tokenizer,
            model.model.config.max_positions - new_tokens - settings.tokens_ahead,
            list(map(model.encode_prompt, prompts, encoded)),
        )
        for model in reward_models
    ]
    if count := np.count_nonzero(lost):
        warn(f"{count} of {len(prompts)} prompts were cut on the left to fit, by at most {lost.max()} tokens")
    return encoded, own_encoded


def count_rows(batch_size: int, requests: int) -> int:
    """The rows that `requests` answers are decoded in: at most `batch_size`, rounded up to fill the mesh."""
    shards = row_shards(current_mesh())
    return -(-max(1, min(batch_size, requests)) // shards) * shards


def _check_lengths(
    lm: CausalModel,
    reward_models: Sequence[RewardModel],
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    own_encoded: Sequence[Sequence[list[int]]],
    settings: Settings,
) -> None:
    max_new_tokens = settings.max_new_tokens
    positions = lm.config.max_positions
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + max_new_tokens > positions:
            raise InputError(
                f"prompt {prompt.id!r} has {len(ids)} tokens; with {max_new_tokens} new tokens it exceeds "
                f"the language model's context of {positions} tokens; the option cut_prompts cuts it"
            )
        if ids and max(ids) >= lm.config.vocab_size:
            raise InputError(f"prompt {prompt.id!r} has tokens outside the language model's vocabulary")
    for model, own in zip(reward_models, own_encoded, strict=True):
        for prompt, ids in zip(prompts, own, strict=True):
            model.check_prompt(prompt, ids, max_new_tokens, settings.tokens_ahead)
