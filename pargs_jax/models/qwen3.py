"""Qwen 3 (Yang et al., 2025): Qwen 2 with norms of each head's queries and keys, and usually without biases."""

import dataclasses
from typing import ClassVar

from pargs_jax.models import llama
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import ConfigFields
from pargs_jax.models.family import Family
from pargs_jax.models.qwen2 import Qwen2Config


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """The shape of a Qwen 3 model."""

    attention_bias: bool = False
    head_norms: ClassVar[bool] = True
    model_type: ClassVar[str] = "qwen3"
    HF_FIELDS: ClassVar[ConfigFields] = dataclasses.replace(
        Qwen2Config.HF_FIELDS, names={**llama.NAMES, "attention_bias": "attention_bias"}
    )

    @property
    def out_bias(self) -> bool:
        return self.attention_bias


FAMILY = Family(CausalModel, Qwen3Config, "model.", llama.ROWS, class_prefix="Qwen3")
