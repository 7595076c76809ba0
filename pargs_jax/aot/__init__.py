"""What a compiled program costs, found on a machine that could not run it.

`count_operations` reads a function's jaxpr, `collective_bytes` the text of a compiled program, and `compile_report`
compiles for devices that need not be there and says whether the program fits their memory and what holds it back. Each
is about one program; meshes, models and configs are the caller's (`pargs_jax.compile_only`).
"""

import os


def expect_no_devices() -> None:
    """Lets libtpu compile on a machine without a TPU, also for several processes at once. To be called before JAX is
    imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Whatever they say: without them, libtpu complains that it cannot ask the machine.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
