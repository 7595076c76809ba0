"""Gemma 3 for text (Gemma Team, 2025): Gemma 2 with norms of each head's queries and keys instead of caps, and with
another rotation in layers with a sliding window, which are five of six."""

import dataclasses
from typing import Any, ClassVar, Self

from pargs_jax.errors import InputError
from pargs_jax.models import gemma2
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import NOT_SET, ConfigFields
from pargs_jax.models.family import Family
from pargs_jax.models.gemma2 import Gemma2Config
from pargs_jax.models.llama import rope_parameters
from pargs_jax.models.rotary import Rotary
from pargs_jax.models.windows import FULL, SLIDING


@dataclasses.dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """The shape of a Gemma 3 model, without its image encoder."""

    attention_cap: float | None = None
    logit_cap: float | None = None
    local_rotary: Rotary | None = Rotary()  # noqa: RUF009 (frozen)
    head_norms: ClassVar[bool] = True
    model_type: ClassVar[str] = "gemma3_text"
    HF_FIELDS: ClassVar[ConfigFields] = dataclasses.replace(
        Gemma2Config.HF_FIELDS,
        names=gemma2.NAMES,
        read=(*Gemma2Config.HF_FIELDS.read, "rope_local_base_freq", "sliding_window_pattern"),
        harmless=(*Gemma2Config.HF_FIELDS.harmless, "_sliding_window_pattern"),
        must={**Gemma2Config.HF_FIELDS.must, "attn_logit_softcapping": NOT_SET},
    )

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        parameters = rope_parameters(hf)
        if parameters.keys() != {FULL, SLIDING}:
            raise InputError(f"rope_parameters has {', '.join(parameters)}, must have {FULL} and {SLIDING}")
        rotary, local = (Rotary.from_hf(parameters[kind], hf.head_dim) for kind in (FULL, SLIDING))
        return super().from_hf(hf, rotary=rotary, local_rotary=local)

    def to_hf(self) -> dict[str, Any]:
        rotaries = {FULL: self.rotary.to_hf(), SLIDING: self.local_rotary.to_hf()}
        return {**super().to_hf(), "rope_parameters": rotaries}


FAMILY = Family(
    CausalModel,
    Gemma3Config,
    "model.",
    gemma2.ROWS,
    class_prefix="Gemma3",
    class_names={"reward": "Gemma3TextForSequenceClassification"},
)
