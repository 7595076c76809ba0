"""What a compiled program costs, found on a machine that could not run it.

`count_operations` reads a function's jaxpr, `collective_bytes` and `count_launches` the text of a compiled program, and
`compile_report` compiles for devices that need not be there and says whether the program fits their memory and what
holds it back. Each is about one program; meshes, models and configs are the caller's (`pargs_jax.commands`).
"""

import os


def expect_no_devices(mesh: str) -> None:
    """Lets JAX compile for what `mesh` names on a machine without it, also in several processes at once. To be called
    before JAX is imported. Raises InputError if a compiler for GPUs is needed and missing."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Whatever they say: without them, libtpu complains that it cannot ask the machine.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    if mesh.startswith("gpu"):
        from pargs_jax.aot.gpu import prepare_compiler

        prepare_compiler()
