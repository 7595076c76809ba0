"""How the processes of a run agree to stop."""

import signal

import jax

from pargs_jax.processes import largest
from pargs_jax.signals import ERRORS, StopRequest


def agreed(request: StopRequest, now: bool) -> type[KeyboardInterrupt] | None:
    """What to raise after this step, if anything: KeyboardInterrupt for Ctrl-C, Terminated for SIGTERM.

    If one of several processes was asked to stop, all stop after the same step: the next one at which all of them call
    this with `now`.
    """
    number = request.number or 0
    if jax.process_count() > 1:
        if not now:
            return None
        number = largest(number)
    return ERRORS[signal.Signals(number)] if number else None
