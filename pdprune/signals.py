"""Signals to stop: noted when they come, heeded between two steps, by all ranks after the same one.

Lightning's own handlers act wherever the signal happens to come. In the middle of a step the state is half old and half
new, so that what SLURM's handler saves there cannot be gone on from exactly; and with several ranks the broadcast of
the handler for SIGTERM may meet quite another message of a rank that is elsewhere.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

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
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers, and Lightning has set none either
        self._noted.clear()
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._warning = environment.requeue_signal
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
