"""The architectures that can be loaded, by the `model_type` of their config.json."""

from pargs_jax.models import deberta, gpt2, llama, opt
from pargs_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    "deberta-v2": deberta.FAMILY,
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "opt": opt.FAMILY,
}
