"""Signals to stop: in training noted when they come, heeded between two steps, by all ranks after the same one.

Lightning's own handlers act wherever the signal happens to come. In the middle of a step the state is half old and half
new, so that what SLURM's handler saves there cannot be gone on from exactly; and with several ranks the broadcast of
the handler for SIGTERM may meet quite another message of a rank that is elsewhere.

Outside of training there is nothing to save: what selects or audits saves by itself, and a report is made anew, to the
same end. SIGTERM ends it as it ends any process, and so does SLURM's warning, once the job is queued again.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pdprune.ranks import Ranks

log = logging.getLogger(__name__)


class StopSignals:
    """SIGTERM, and under SLURM the signal that warns of a job's end.

    Attributes:
        stop: whether the ranks have agreed to stop.
        requeue: whether the job is to be queued again then.
    """

    def __init__(self) -> None:
        self.stop = False
        self.requeue = False
        self._warning: int | None = None
        self._noted: set[int] = set()

    def listen(self, trainer: Any) -> None:
        """Put noting in the place of Lightning's handlers, which it takes away itself when the fit is over."""
        if not _may_set_handlers():
            return  # Lightning has set none either
        self._noted.clear()
        self._warning = _warning_of(trainer)
        for number in (signal.SIGTERM, self._warning):
            if number is not None:
                signal.signal(number, lambda received, frame: self._noted.add(received))

    def agree(self, trainer: Any) -> None:
        """Stop if any rank has got a signal. Called on all ranks."""
        noted = [signal.SIGTERM in self._noted, self._warning in self._noted]
        ranks = Ranks.of(trainer)
        if ranks.count > 1:
            noted = ranks.any(torch.tensor(noted, device=trainer.strategy.root_device)).tolist()
        self.stop, self.requeue = any(noted), noted[1]


@contextmanager
def ending_when_warned(trainer: Any) -> Iterator[None]:
    """End at SLURM's warning, and have the job queued again; while a fit trains, `StopSignals` listens instead.

    Lightning leaves that signal alone where somebody handles it, and would else save a checkpoint of its own.
    """
    warning = _warning_of(trainer)
    if warning is None or not _may_set_handlers():
        yield
        return

    def end(received: int, frame: Any) -> None:
        signal.signal(received, signal.SIG_IGN)
        if trainer.is_global_zero:
            requeue_job()
        raise SIGTERMException

    before = signal.signal(warning, end)
    try:
        yield
    finally:
        signal.signal(warning, before)


def _warning_of(trainer: Any) -> int | None:
    """The signal that warns of a job's end, where that job is to be queued again."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def _may_set_handlers() -> bool:
    """Only the main thread may."""
    return threading.current_thread() is threading.main_thread()


def requeue_job() -> None:
    """Have SLURM queue this job again; its script then goes on with `--ckpt_path last`."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        log.warning("SLURM job %s could not be queued again: %s", job, problem)
