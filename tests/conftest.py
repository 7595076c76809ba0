"""Four virtual devices for every test; what sets no mesh runs on the first of them."""

import jax

from pargs_jax.mesh import prepare_virtual_devices

prepare_virtual_devices(4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
