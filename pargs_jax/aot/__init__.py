"""The cost of a compiled program, found on a machine that cannot run it.

`count_operations` reads a function's jaxpr; `collective_bytes` and `count_launches` read the text of a compiled
program. `compile_report` compiles for devices that need not be there, and reports whether the program fits their memory
and what limits its speed. Each deals with one program; meshes, models and configs are the caller's
(`pargs_jax.commands`).
"""

import os


def expect_no_devices(mesh: str) -> None:
    """Lets JAX compile for `mesh` on a machine without its devices, also in several processes at once. Call this before
    JAX is imported. Raises InputError if a compiler for GPUs is needed and missing."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # The values do not matter: without these variables, libtpu complains that it cannot query the machine.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    if mesh.startswith("gpu"):
        from pargs_jax.aot.gpu import prepare_compiler

        prepare_compiler()
