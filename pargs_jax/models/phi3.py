"""Phi-3 and Phi-4 (Abdin et al., 2024): Mistral with joined tensors, LongRoPE and heads that may rotate in part."""

import dataclasses
from typing import Any, ClassVar

from pargs_jax.models import llama
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import FALSE, ConfigFields, Requirement
from pargs_jax.models.family import Family
from pargs_jax.models.mistral import MistralConfig
from pargs_jax.models.tables import linear


@dataclasses.dataclass(frozen=True)
class Phi3Config(MistralConfig):
    """The shape of a Phi-3 model."""

    may_rotate_partly: ClassVar[bool] = True
    model_type: ClassVar[str] = "phi3"
    HF_FIELDS: ClassVar[ConfigFields] = dataclasses.replace(
        MistralConfig.HF_FIELDS,
        must={
            **MistralConfig.HF_FIELDS.must,
            **{name: FALSE for name in ("attention_bias", "mlp_bias", "lm_head_bias")},
            **{name: Requirement("1", lambda value: value == 1) for name in ("full_attn_mod", "interpolate_factor")},
        },
    )

    def to_hf(self) -> dict[str, Any]:
        # transformers prefers this number to the one in rope_parameters, and has a default for it.
        first_length = dict(self.rotary.numbers).get("original_max_position_embeddings", self.context_length)
        return {**super().to_hf(), "original_max_position_embeddings": first_length}


FAMILY = Family(
    CausalModel,
    Phi3Config,
    "model.",
    (
        *llama.SHARED_ROWS,
        llama.NORM2_ROW,
        *linear("layers.{}.self_attn.qkv_proj", "layers.{}.query", ("width", "heads")),
        *linear("layers.{}.self_attn.qkv_proj", "layers.{}.key", ("width", "heads")),
        *linear("layers.{}.self_attn.qkv_proj", "layers.{}.value", ("width", "heads")),
        *linear("layers.{}.mlp.gate_up_proj", "layers.{}.gate", ("width", "feedforward")),
        *linear("layers.{}.mlp.gate_up_proj", "layers.{}.up", ("width", "feedforward")),
    ),
    class_prefix="Phi3",
    ignored=llama.FREQUENCIES,
)
