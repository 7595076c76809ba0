"""What config.json may say: which fields are read, which make no difference to what a model computes, and which would
but have to keep one value here. A family says this beside its config (`HF_FIELDS`); what all share is below."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pargs_jax.errors import InputError
from pargs_jax.models.layers import ACTIVATIONS


class Must(NamedTuple):
    """What the value of a field has to be: in words, and as a test of it."""

    words: str
    holds: Callable[[Any], bool]


NOT_SET = Must("left out or null", lambda value: value is None)
EMPTY = Must("left out or empty", lambda value: not value)
FALSE = Must("false", lambda value: not value)

# Code that all causal families of transformers share reads these.
CAUSAL: dict[str, Must] = {
    "is_causal": Must("true", bool),
    "sliding_window": NOT_SET,
    "attention_chunk_size": NOT_SET,
    "layer_types": Must(
        "left out, null or 'full_attention' for every layer",
        lambda value: value is None or value == ["full_attention"] * len(value),
    ),
    "kv_sharing_modes": NOT_SET,
}

_EVERYWHERE: dict[str, Must] = {
    "quantization_config": Must("left out, since quantised checkpoints cannot be read", lambda value: value is None),
    "per_layer_config": EMPTY,
    "pruned_heads": EMPTY,
    "is_encoder_decoder": FALSE,
    "transformers_weights": NOT_SET,
    "configuration_files": NOT_SET,
}

_READ = ("model_type", "num_labels", "id2label", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map")

_HARMLESS = (
    # What a file is and where it came from.
    "transformers_version", "architectures", "name_or_path", "_name_or_path", "_commit_hash", "dtype", "torch_dtype",
    "use_bfloat16", "tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "label2id", "_num_labels",
    "problem_type",
    # Other special tokens.
    "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    # How transformers computes, and what it returns.
    "output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "use_cache", "torchscript",
    "chunk_size_feed_forward", "tie_last_hidden_states", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation_internal", "gradient_checkpointing",
    # Fields of encoder-decoders, which older versions wrote for every model.
    "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder",
    # Generation, which has its own file and, here, its own options.
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "suppress_tokens",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "begin_suppress_tokens",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "num_beam_groups", "diversity_penalty", "penalty_alpha",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields of one family's config.json, beside those that all families share.

    Attributes:
        sizes: read, and a whole number of at least 1 where given.
        read: the others that are read.
        harmless: those of training, and others that change nothing.
        must: those that change what is computed, with the values that are followed here.
    """

    sizes: tuple[str, ...]
    read: tuple[str, ...]
    harmless: tuple[str, ...] = ()
    must: Mapping[str, Must] = dataclasses.field(default_factory=dict)

    def check(self, fields: Mapping[str, Any]) -> list[str]:
        """The names in a config.json that nobody knows; ours, which begin with `pargs_`, are known.

        Raises InputError for a size that is none, or a field that would change the computation.
        """
        for name in self.sizes:
            value = fields.get(name)
            if value is not None and not (is_whole(value) and value > 0):
                raise InputError(f"{name} is {value!r}, must be a whole number of at least 1")
        must = {**_EVERYWHERE, **self.must}
        for name, (words, holds) in must.items():
            if name in fields and not holds(fields[name]):
                raise InputError(f"{name} is {_short(fields[name])}, must be {words}")
        known = {*_READ, *_HARMLESS, *self.sizes, *self.read, *self.harmless, *must}
        return [name for name in fields if name not in known and not name.startswith("pargs_")]


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(hf: Any, name: str, default: int) -> int:
    """A field that transformers itself does not check. Raises InputError if it is not a whole number."""
    value = getattr(hf, name, default)
    if not is_whole(value):
        raise InputError(f"{name} is {value!r}, must be a whole number")
    return value


def activation(hf: Any, name: str, default: str = "") -> str:
    """A field that names an activation. Raises InputError for one that is not known."""
    value = getattr(hf, name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise InputError(f"{name} {value!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return value


def check_divides(hf: Any, part: str, whole: str) -> None:
    """Raises InputError unless one field divides another."""
    if getattr(hf, whole) % getattr(hf, part):
        raise InputError(f"{part} {getattr(hf, part)} does not divide {whole} {getattr(hf, whole)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
