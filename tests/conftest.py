"""Four virtual devices for every test; what sets no mesh runs on the first of them."""

import os

import jax

from pargs_jax.mesh import prepare_virtual_devices

# Most of a test's time is compilation, and most of that is LLVM's. The commands that tests start inherit this.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
prepare_virtual_devices(4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
