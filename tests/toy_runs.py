"""A small model and data set that go through the command line like the real ones, in a second."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from pdprune.errors import NonFiniteLossError, UserError
from pdprune.files import write_atomically
from pdprune.loaders import FixedLoader, StepLoader


class ToyPruner(LightningModule):
    """Fits `weight` to noisy batches by manual optimisation, with an adversary whose state is a buffer.

    Args:
        size: number of weights.
        lr: learning rate.
        pause: seconds that each step, and each of the four parts of `finish`, takes.
        die_at: step at which the process kills itself, as if from outside; -1 for never.
        terminate_at: step at which it is sent SIGTERM; -1 for never.
        die_in_finish: kill the process between the two files that `finish` writes.
        nan_at: step at which the loss is no number; -1 for never.
    """

    def __init__(
        self,
        size: int = 3,
        lr: float = 0.1,
        seed: int = 0,
        pause: float = 0.0,
        die_at: int = -1,
        terminate_at: int = -1,
        die_in_finish: bool = False,
        nan_at: int = -1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if size < 1:
            raise UserError(f"size: got {size}; expected at least 1")
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(size))
        self.register_buffer("source", torch.full((size,), 0.5))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        hp = self.hparams
        time.sleep(hp.pause)
        step = self.global_step
        loss = (self.weight + self.source - batch).square().mean()
        if step == hp.nan_at:
            raise NonFiniteLossError(f"training: the loss is nan at keep step {step}; expected a finite number")
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        noise = torch.rand(self.source.shape, generator=torch.Generator().manual_seed(hp.seed * 1000 + step))
        self.source += 0.1 * (noise - self.source)
        self.log_dict({"loss": loss.detach(), "step_seen": float(step)}, prog_bar=True)
        if step % 10 == 0:
            self.log("rare", float(step))
        if step == hp.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == hp.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("select_loss", (self.weight - batch).square().mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("held_out_loss", (self.weight - batch).square().mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[dict[str, Any]]:
        return [{"batch": batch_idx, "prompt": f"é{row}", "weight": float(self.weight[0])} for row in range(2)]

    def finish(self, datamodule: LightningDataModule, folder: Path) -> None:
        """Write what a circuit's fit writes, in the same order."""
        state = ",".join(str(value.item()) for value in (*self.weight, *self.source))
        for name in ("circuit.json", "audit.json"):
            time.sleep(self.hparams.pause)
            write_atomically(folder / name, state.encode())
            if self.hparams.die_in_finish:
                os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.weight], lr=self.hparams.lr)


class ToyData(LightningDataModule):
    """Batches that are a pure function of `(seed, step)`.

    Args:
        size: numbers in a batch.
        steps_per_pass: batches in an epoch.
    """

    def __init__(self, size: int = 3, seed: int = 0, steps_per_pass: int = 7, empty: bool = False) -> None:
        super().__init__()
        self.size, self.seed, self.steps_per_pass, self.empty = size, seed, steps_per_pass, empty

    def setup(self, stage: str) -> None:
        if self.empty:
            raise UserError("data: there are no prompts; expected at least one")

    def batch_at(self, step: int) -> Tensor:
        return torch.randn(self.size, generator=torch.Generator().manual_seed(self.seed * 100_000 + step))

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self.batch_at, self.steps_per_pass)

    def val_dataloader(self) -> FixedLoader:
        return FixedLoader([self.batch_at(50_000 + step) for step in range(2)])

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class Regression(LightningModule):
    """A model without `finish`, in automatic optimisation, as the shipped targets are trained."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layer(batch) - batch.sum()).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.layer(batch) - batch.sum()).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)
