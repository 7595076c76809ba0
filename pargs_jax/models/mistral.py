"""Mistral (Jiang et al., 2023): Llama with a sliding window in every layer, or without one (since version 0.2)."""

import dataclasses
from typing import Any, ClassVar, Self

from pargs_jax.models import llama
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL_WITH_WINDOWS, NOT_SET, ConfigFields
from pargs_jax.models.family import Family
from pargs_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """The shape of a Mistral model."""

    model_type: ClassVar[str] = "mistral"
    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(*llama.SIZES, "sliding_window"),
        names=llama.NAMES,
        read=llama.ROTARY_FIELDS,
        must={**CAUSAL_WITH_WINDOWS, "layer_types": NOT_SET},
    )

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        windows = () if hf.sliding_window is None else (hf.sliding_window,) * hf.num_hidden_layers
        return super().from_hf(hf, windows=windows)

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), "sliding_window": self.windows[0] if self.windows else None}


FAMILY = Family(CausalModel, MistralConfig, "model.", llama.ROWS, class_prefix="Mistral", ignored=llama.FREQUENCIES)
