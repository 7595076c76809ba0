"""`--mesh`: which device a run uses."""

import jax

from pargs_jax.errors import InputError

PLATFORMS = {"auto": None, "cpu": "cpu", "gpu-1": "gpu"}


def use_mesh(name: str) -> jax.Device:
    """Makes one device the default of this process and returns it.

    `auto` takes what JAX prefers here. Raises InputError for an unknown name or a device that is not here.
    """
    if name not in PLATFORMS:
        raise InputError(f"--mesh {name}: not known; known are {', '.join(PLATFORMS)}")
    try:
        device = jax.local_devices(backend=PLATFORMS[name])[0]
    except RuntimeError as error:
        here = ", ".join(sorted({d.platform for d in jax.local_devices()}))
        raise InputError(f"--mesh {name}: no such device here, only: {here}") from error
    jax.config.update("jax_default_device", device)
    return device
