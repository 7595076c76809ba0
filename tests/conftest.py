"""Four virtual devices for every test; what sets no mesh runs on the first of them."""

import jax

from pargs_jax.mesh import be_patient

be_patient()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
