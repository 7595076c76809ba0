"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biases on queries, keys and values; some have sliding windows."""

import dataclasses
from typing import Any, ClassVar, Self

from pargs_jax.models import llama
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL_WITH_WINDOWS, FALSE, ConfigFields
from pargs_jax.models.family import Family
from pargs_jax.models.llama import LlamaConfig
from pargs_jax.models.windows import fields_of_windows, windows_of_layers


@dataclasses.dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """The shape of a Qwen 2 model."""

    attention_bias: bool = True
    out_bias: ClassVar[bool] = False
    model_type: ClassVar[str] = "qwen2"
    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(*llama.SIZES, "sliding_window"),
        names=llama.NAMES,
        read=(*llama.ROTARY_FIELDS, "use_sliding_window", "max_window_layers", "layer_types"),
        must={**CAUSAL_WITH_WINDOWS, "use_mrope": FALSE},
    )

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        return super().from_hf(hf, windows=windows_of_layers(hf))

    def to_hf(self) -> dict[str, Any]:
        windows = fields_of_windows(self.windows, self.layers)
        return {**super().to_hf(), "use_sliding_window": bool(self.windows), **windows}


FAMILY = Family(CausalModel, Qwen2Config, "model.", llama.ROWS, class_prefix="Qwen2", ignored=llama.FREQUENCIES)
