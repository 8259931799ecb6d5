"""How the toy networks are trained: AdamW on what each of them is to compute."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from pdprune.batches import as_batch
from pdprune.errors import UserError, require_above, require_at_least
from pdprune.files import write_atomically
from pdprune.ranks import Ranks, require_whole_model
from pdprune.targets.representation import representation
from pdprune.targets.store import save_target
from pdprune.targets.toys import Toy

log = logging.getLogger(__name__)

ScheduleName = Literal["constant", "cosine"]


class ToyTrainer(LightningModule):
    """Trains a toy network, and says in the end whether it represents every feature.

    Logs `train_loss` and `val_loss`.

    Args:
        network: what is trained.
        lr: learning rate, its peak.
        schedule: `constant`, or `cosine`: half a period, from the peak to zero.
        warmup: share of the steps over which the learning rate first rises linearly.
        weight_decay: AdamW's, on everything.
    """

    def __init__(
        self,
        network: Toy,
        lr: float = 5e-3,
        schedule: ScheduleName = "constant",
        warmup: float = 0.0,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        if schedule not in get_args(ScheduleName):
            raise UserError(f"toy training: schedule is {schedule!r}, expected 'constant' or 'cosine'")
        if not 0 <= warmup < 1:
            raise UserError(f"toy training: warmup is {warmup}, expected a share of the steps, 0 <= warmup < 1")
        require_above(0, "toy training: ", lr=lr)
        require_at_least(0, "toy training: ", weight_decay=weight_decay)
        self.hparams.update(
            network=type(network).__name__,
            sizes=asdict(network.config),
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
        )
        self.network = network
        self.lr = lr
        self.schedule: ScheduleName = schedule
        self.warmup = warmup
        self.weight_decay = weight_decay

    def setup(self, stage: str) -> None:
        """Lightning's hook: what is trained is written whole."""
        require_whole_model(self.trainer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Float[Tensor, ""]:
        """The loss of the whole batch, on all ranks."""
        loss = Ranks.of(self._trainer).mean(toy_loss(self.network, batch), as_batch(batch).size)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the loss on the select split."""
        self.log("val_loss", toy_loss(self.network, batch), prog_bar=True, batch_size=as_batch(batch).size)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, after which copies follow what they are copies of. Checkpoints thus hold both."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for name, value in self.network.tied().items():
                self.network.get_parameter(name).copy_(value)

    def finish(self, datamodule: LightningDataModule, folder: Path) -> None:
        """Writes `target/`, ready for `load_target`, and `representation.json`, which is also told in a line.

        The command line calls this at the end of a fit.
        """
        if self.trainer.is_global_zero:
            save_target(self.network, folder / "target")
            found = representation(self.network)
            write_atomically(folder / "representation.json", (json.dumps(found.summary(), indent=2) + "\n").encode())
            log.info(found.line())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on what is not fixed, its learning rate stepped with it."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        progress = step / max(1, self._total_steps() - 1)
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise UserError("toy training: the number of steps is open, expected trainer.max_steps or max_epochs")
        return int(total)


def toy_loss(network: Toy, batch: dict[str, Any]) -> Float[Tensor, ""]:
    """A network's loss on a batch, with gradients through both of a tied pair."""
    inputs = batch["inputs"]
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    return network.loss(torch.func.functional_call(network, network.tied(), args, kwargs), batch)
