"""Runs calls in processes of their own that may be killed, without starting Python anew."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable

PATIENCE = 20.0
"""Seconds that ranks get to end after one of them has failed, for which they may be waiting."""


def in_a_child(call: Callable[[], int], kill_after: float | None = None) -> int:
    """The exit status of `call` in a forked process, negative for a signal; killed after some seconds if asked to."""
    child = _fork(call, {})
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_ranks(count: int, call: Callable[[], int]) -> list[int]:
    """The exit statuses of `call` in so many forked processes, by rank, that think torchrun has started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(call, _as_by_torchrun(rank, count, port)) for rank in range(count)]
    statuses: dict[int, int] = {}
    deadline = None
    while len(statuses) < count:
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if deadline is None and any(statuses.values()):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children]


def _fork(call: Callable[[], int], environment: dict[str, str]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since Python 3.12, about forking beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ.update(environment)
            status = call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _as_by_torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    of_this_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    of_all = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"}
    return of_this_rank | of_all | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
