"""Runs a call in a process of its own that may be killed, without starting Python anew."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable


def in_a_child(call: Callable[[], int], kill_after: float | None = None) -> int:
    """The exit status of `call` in a forked process, negative for a signal; killed after some seconds if asked to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since Python 3.12, about forking beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = call()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
