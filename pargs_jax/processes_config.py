"""The options of a run of several processes, `--processes.*`."""

import re
from dataclasses import dataclass

from pargs_jax.errors import InputError
from pargs_jax.options import option, shown

LARGEST_PORT = 2**16 - 1


@dataclass(frozen=True)
class ProcessesConfig:
    """The processes of a --distributed run."""

    coordinator: str | None = option(
        None,
        "address of the first process, the same for all",
        unset="found by JAX",
        metavar="HOST:PORT",
        may_change=True,
    )
    count: int | None = option(None, "number of processes", unset="found by JAX", at_least=1, may_change=True)
    index: int | None = option(
        None, "number of this process, from 0", unset="found by JAX", at_least=0, may_change=True
    )

    def validate(self, distributed: bool) -> None:
        """Raises InputError if they do not go together."""
        given = (self.coordinator is not None, self.count is not None, self.index is not None)
        if any(given) and not (all(given) and distributed):
            raise InputError(
                "--processes: give .coordinator, .count and .index together, with --distributed, or none of them"
            )
        address = re.fullmatch(r".+:([0-9]{1,5})", self.coordinator or "")
        if self.coordinator is not None and not (address and 0 < int(address[1]) <= LARGEST_PORT):
            raise InputError(
                f"--processes.coordinator: got {shown(self.coordinator)}, must be HOST:PORT, with a port from 1 to "
                f"{LARGEST_PORT}"
            )
        if self.count is not None and self.index is not None and self.index >= self.count:
            raise InputError(f"--processes.index: got {self.index}, must be below --processes.count ({self.count})")
