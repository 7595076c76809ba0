"""The architectures that can be loaded, by the `model_type` of their config.json."""

from pargs_jax.models import (
    deberta,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    modernbert,
    opt,
    phi3,
    qwen2,
    qwen3,
)
from pargs_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    "deberta-v2": deberta.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "modernbert": modernbert.FAMILY,
    "opt": opt.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}
