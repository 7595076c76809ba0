"""The fields of config.json: which ones are read, which ones do not affect a model's output, and which ones must have a
certain value here. All others are refused, because they may change what the model computes. Each family lists its own
beside its config (`HF_FIELDS`); the fields that all share are below."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pargs_jax.errors import InputError
from pargs_jax.models.layers import ACTIVATIONS


class Requirement(NamedTuple):
    """The condition that a field's value must meet: in words, and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


LARGEST_SIZE = 2**24
MOST_LAYERS = 1024
"""The largest sizes that are read: far beyond any model, and small enough for a typing error to be harmless."""

NOT_SET = Requirement("left out or null", lambda value: value is None)
EMPTY = Requirement("left out or empty", lambda value: not value)
FALSE = Requirement("false", lambda value: not value)
TOKEN_IDS = Requirement(
    "a token's number, a list of them, or null",
    lambda value: value is None or all(map(is_whole, value if isinstance(value, list) else [value])),
)

# The code that all causal families of transformers share reads these.
CAUSAL_WITH_WINDOWS: dict[str, Requirement] = {
    "is_causal": Requirement("true", bool),
    "attention_chunk_size": NOT_SET,
    "kv_sharing_modes": NOT_SET,
}
CAUSAL: dict[str, Requirement] = {
    **CAUSAL_WITH_WINDOWS,
    "sliding_window": NOT_SET,
    "layer_types": Requirement(
        "left out, null or 'full_attention' for every layer",
        lambda value: value is None or (isinstance(value, list) and value == ["full_attention"] * len(value)),
    ),
}

_EVERYWHERE: dict[str, Requirement] = {
    "quantization_config": Requirement(
        "left out, since quantised checkpoints cannot be read", lambda value: value is None
    ),
    "architectures": Requirement(
        "left out, null or a list of names",
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
    ),
    "num_labels": Requirement(
        "left out, null or a whole number from 0 to 65536",  # transformers makes a name for each
        lambda value: value is None or (is_whole(value) and 0 <= value <= 2**16),
    ),
    "bos_token_id": TOKEN_IDS,
    "eos_token_id": TOKEN_IDS,
    "pad_token_id": TOKEN_IDS,
    "per_layer_config": EMPTY,
    "pruned_heads": EMPTY,
    "is_encoder_decoder": FALSE,
    "transformers_weights": NOT_SET,
    "configuration_files": NOT_SET,
    "quantization": NOT_SET,  # of MLX
    "normalize_reward": FALSE,  # OpenRLHF then shifts and scales its rewards by `mean` and `std`
}

_READ = ("model_type", "id2label", "auto_map")

_HARMLESS = (
    # Where a file came from.
    "transformers_version", "name_or_path", "_name_or_path", "_commit_hash", "dtype", "torch_dtype",
    "use_bfloat16", "tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "label2id", "_num_labels",
    "problem_type", "is_llama_config", "model_name", "language", "license", "tags", "datasets",
    # Dropout, and other options of training.
    "attention_dropout", "hidden_dropout", "activation_dropout", "classifier_dropout", "dropout", "layerdrop",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "summary_dropout_prob", "loss_type", "neftune_noise_alpha", "gradient_checkpointing_kwargs", "packing_samples",
    "v_head_initializer_range", "v_head_init_strategy", "initializer_range", "mean", "std", "value_head_prefix",
    # How long a text a tokenizer or a trainer lets through.
    "model_max_length", "max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "padding_side",
    # Other special tokens.
    "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id", "bos_token",
    "eos_token", "pad_token", "unk_token",
    # How transformers computes and what it returns.
    "output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "use_cache", "torchscript",
    "chunk_size_feed_forward", "tie_last_hidden_states", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation_internal", "gradient_checkpointing", "_flash_attn_2_enabled", "use_flash_attention_2",
    "use_flash_attn", "reference_compile", "tf_legacy_loss", "xla_device", "output_past", "cache_implementation",
    "transformers.js_config",
    # Encoder-decoder fields, which older versions wrote for every model.
    "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder",
    # Generation: it has a file of its own and, here, options of its own.
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "suppress_tokens",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "begin_suppress_tokens",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "num_beam_groups", "diversity_penalty", "penalty_alpha", "max_time", "stop_strings", "use_mtp",
    "cache_config", "max_cache_len", "min_p", "min_new_tokens", "top_h", "renormalize_logits", "sequence_bias",
    "token_healing", "guidance_scale", "watermarking_config", "output_logits", "is_assistant", "low_memory",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_ensemble_weight",
    "speculation_type", "compile_config", "disable_compile", "continuous_batching_config", "dola_layers",
    "constraints", "force_words_ids", "forced_decoder_ids", "prefill_chunk_size", "_from_model_config",
)  # fmt: skip


_HARMLESS_PREFIXES = ("pargs_", "unsloth_", "summary_")
"""Beginnings of names: ours, one trainer's, and the head of GPT-2 that reads several texts."""


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields of one family's config.json, besides those that all families share.

    Attributes:
        sizes: fields that are read and must be whole numbers of at least 1 where present.
        names: the fields that become one of our config's and back, by the name there: ours, then theirs.
        read: the other fields that are read.
        harmless: fields that do not affect the output, such as those for training.
        must: fields that affect the output, with the values that are supported.
    """

    sizes: tuple[str, ...]
    names: Mapping[str, str]
    read: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    must: Mapping[str, Requirement] = dataclasses.field(default_factory=dict)

    def check(self, fields: Mapping[str, Any]) -> None:
        """Checks the fields of a config.json. Unknown ones that are null say nothing.

        Raises InputError for an invalid size, for a field whose value is not supported, and for unknown fields.
        """
        for name in self.sizes:
            value, most = fields.get(name), MOST_LAYERS if name == self.names.get("layers") else LARGEST_SIZE
            if value is not None and not (is_whole(value) and value > 0):
                raise InputError(f"{name} is {value!r}, must be a whole number of at least 1")
            if value is not None and value > most:
                raise InputError(f"{name} is {value}, must be at most {most}")
        must = {**_EVERYWHERE, **self.must}
        for name, (words, holds) in must.items():
            if name in fields and not holds(fields[name]):
                raise InputError(f"{name} is {_short(fields[name])}, must be {words}")
        unknown = [
            f"{name} ({_short(value)})" for name, value in fields.items() if value is not None and not self.knows(name)
        ]
        if unknown:
            kind = fields.get("model_type") or fields.get("peft_type")
            raise InputError(
                f"has fields that are not known for {kind}, so what they change is not computed: {', '.join(unknown)}; "
                "delete them from the file if they change nothing"
            )

    def knows(self, name: str) -> bool:
        """Whether it is known what a field of this name changes, if anything."""
        known = {*_READ, *_HARMLESS, *_EVERYWHERE, *self.sizes, *self.names.values()}
        return name in known.union(self.read, self.harmless, self.must) or name.startswith(_HARMLESS_PREFIXES)

    def read_named(self, hf: Any) -> dict[str, Any]:
        """Our config's fields that have a name in a transformers config. Raises InputError for an activation that is
        not known."""
        return {
            ours: activation(hf, theirs) if ours.endswith("activation") else getattr(hf, theirs)
            for ours, theirs in self.names.items()
        }

    def write_named(self, config: Any) -> dict[str, Any]:
        """The reverse of `read_named`."""
        return {theirs: getattr(config, ours) for ours, theirs in self.names.items()}


class EvenHeads:
    """What holds of most configs: heads share the width evenly, each has its own keys and values, and the positions are
    those of the context."""

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def head_width(self) -> int:
        """The width of the hidden states that heads see."""
        return self.width

    @property
    def max_positions(self) -> int:
        return self.context_length


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(hf: Any, name: str, default: int) -> int:
    """Reads a field that transformers does not check. Raises InputError if it is not a whole number."""
    value = getattr(hf, name, default)
    if not is_whole(value):
        raise InputError(f"{name} is {value!r}, must be a whole number")
    return value


def activation(hf: Any, name: str, default: str = "") -> str:
    """Reads a field that names an activation. Raises InputError for an unknown one."""
    value = getattr(hf, name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise InputError(f"{name} {value!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return value


def check_divides(hf: Any, part: str, whole: str) -> None:
    """Raises InputError unless one field divides another; transformers leaves some at null."""
    if whole_number(hf, whole, 0) % whole_number(hf, part, 1):
        raise InputError(f"{part} {getattr(hf, part)} does not divide {whole} {getattr(hf, whole)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
