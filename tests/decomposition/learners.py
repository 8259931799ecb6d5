"""Small runs of a `ComponentLearner`: a target with sites of every kind, data that follow from the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from decomposition.small_nets import VOCAB, small_lm
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

from pdprune.decomposition.importances import ImportanceSettings
from pdprune.decomposition.learning import ComponentLearner, WarmUp
from pdprune.loaders import StepLoader
from pdprune.seeding import generator


class Data(LightningDataModule):
    """Batches that follow from the step; the loader counts steps, as that of the tasks does."""

    def __init__(self, batch_at: Any) -> None:
        super().__init__()
        self.loader = StepLoader(batch_at, 1000)

    def train_dataloader(self) -> StepLoader:
        return self.loader

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


def tokens() -> Data:
    return Data(lambda step: {"inputs": torch.randint(0, VOCAB, (3, 4), generator=generator(0, "tokens", step))})


def trainer(folder: Path, steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=folder, max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
    )  # fmt: skip


def target() -> nn.Module:
    return small_lm(0).float().requires_grad_(False)


def learner(**options: Any) -> ComponentLearner:
    importances = ImportanceSettings(hidden=[4], d_model=8, n_blocks=1, n_heads=2)
    defaults = {"sites": {"*": 3, "down": 5}, "importances": importances, "warm_up": WarmUp(3)}
    return ComponentLearner(target(), **(defaults | options))


def features(seed: int, size: int) -> Data:
    def batch_at(step: int) -> Tensor:
        rng = generator(seed, "features", step)
        return torch.rand(size, 5, generator=rng) * (torch.rand(size, 5, generator=rng) < 0.15)

    return Data(batch_at)
