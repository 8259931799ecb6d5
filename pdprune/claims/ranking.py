"""Rankings of nodes by gates alone, before a circuit is chosen: what schemes and gate maps are compared by."""

from __future__ import annotations

import logging
import warnings

import torch
from jaxtyping import Float
from lightning import LightningDataModule, Trainer
from torch import Tensor

from pdprune.circuits.pruning import CircuitPruner


def learned_ranking(pruner: CircuitPruner, data: LightningDataModule, steps: int) -> Float[Tensor, "*lead n"]:
    """Learn gates for so many keep steps; how open each has been of late is its node's rank."""
    advice = logging.getLogger("lightning.pytorch")
    level = advice.level
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        advice.setLevel(logging.ERROR)
        try:
            _trainer(steps).fit(pruner, datamodule=data)
        finally:
            advice.setLevel(level)
    return pruner.openness


def _trainer(steps: int) -> Trainer:
    """One that learns on the CPU and leaves no trace."""
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
