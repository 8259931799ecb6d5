"""What the toy networks read: batches drawn on the spot, each a pure function of its split and its number."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from lightning import LightningDataModule
from torch import Tensor

from pdprune.errors import UserError
from pdprune.loaders import FixedLoader, StepLoader
from pdprune.ranks import ALONE, Ranks
from pdprune.seeding import generator

Split = Literal["train", "select", "held_out"]
"""Lightning's train, validation and test loaders. The same data in each, drawn apart."""

SparsityName = Literal["at_least_zero_active", "exactly_one_active", "exactly_two_active"]

BOS = 0
"""Token id that every induction sequence begins with. All others are words."""


class DrawnData(LightningDataModule):
    """Batches that somebody draws.

    Args:
        batch_size: examples per training step, over all ranks together.
        audit_batch_size: examples per batch of the other two splits.
        audit_batches: batches of each of those; they never change with `seed`.
        steps_per_epoch: batches that make an "epoch", after which Lightning validates.
        seed: seed of the training batches.
    """

    def __init__(
        self, batch_size: int, audit_batch_size: int, audit_batches: int, steps_per_epoch: int, seed: int
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "audit_batch_size": audit_batch_size}
        for name, value in (sizes | {"audit_batches": audit_batches, "steps_per_epoch": steps_per_epoch}).items():
            if value < 1:
                raise UserError(f"{type(self).__name__}: {name} is {value}, expected at least 1")
        self.batch_size = batch_size
        self.audit_batch_size = audit_batch_size
        self.audit_batches = audit_batches
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed

    def draw(self, size: int, draws: torch.Generator) -> dict[str, Any]:
        """So many examples."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a model card says about the data."""
        raise NotImplementedError

    def batch(self, split: Split, step: int, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Batch `step` of a split, or one rank's share of it."""
        is_train = split == "train"
        draws = generator(self.seed if is_train else 0, type(self).__name__, split, step)
        whole = self.draw(self.batch_size if is_train else self.audit_batch_size, draws)
        share: dict[str, Any] = ranks.share(whole)
        return share

    def train_batches(self) -> list[dict[str, Any]]:
        """As many training batches as the other splits have."""
        return [self.batch("train", step) for step in range(self.audit_batches)]

    def select_batches(self) -> list[dict[str, Any]]:
        """The whole select split."""
        return [self.batch("select", step) for step in range(self.audit_batches)]

    def held_out_batches(self) -> list[dict[str, Any]]:
        """The whole held-out split."""
        return [self.batch("held_out", step) for step in range(self.audit_batches)]

    def train_dataloader(self) -> StepLoader:
        """Training batches 0, 1, ...; goes on from a checkpoint exactly."""
        ranks = Ranks.of(self.trainer)
        return StepLoader(lambda step: self.batch("train", step, ranks), self.steps_per_epoch)

    def val_dataloader(self) -> FixedLoader:
        """The select split, the same on every rank."""
        return FixedLoader(self.select_batches())

    def test_dataloader(self) -> FixedLoader:
        """The held-out split, the same on every rank."""
        return FixedLoader(self.held_out_batches())


class SparseFeatures(DrawnData):
    """Features that are mostly off: `{"inputs": Float[B, F]}`, for `TMS` and `ResidualMLP`.

    As in Bushnaq et al. 2025 (SPD, arXiv 2506.20790): a feature that is on has a value uniform on [low, high].

    Args:
        n_features: as many as the network reads.
        probability: each feature is on with it, by itself, if any number may be on.
        active: `at_least_zero_active`, `exactly_one_active` or `exactly_two_active`.
        low: least value of a feature that is on.
        high: greatest value.
        batch_size, audit_batch_size, audit_batches, steps_per_epoch, seed: as for `DrawnData`.
    """

    def __init__(
        self,
        n_features: int,
        probability: float = 0.05,
        active: SparsityName = "at_least_zero_active",
        low: float = 0.0,
        high: float = 1.0,
        batch_size: int = 4096,
        audit_batch_size: int = 1024,
        audit_batches: int = 4,
        steps_per_epoch: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, audit_batch_size, audit_batches, steps_per_epoch, seed)
        if active not in get_args(SparsityName):
            expected = ", ".join(get_args(SparsityName))
            raise UserError(f"sparse features: active is {active!r}, expected one of {expected}")
        n_active = {"exactly_one_active": 1, "exactly_two_active": 2}.get(active)
        if n_features < (n_active or 1):
            raise UserError(f"sparse features: n_features is {n_features}, expected at least {n_active or 1}")
        if not 0 < probability <= 1:
            raise UserError(f"sparse features: probability is {probability}, expected above 0 and at most 1")
        if not low < high:
            raise UserError(f"sparse features: values from low {low} to high {high}, expected low < high")
        self.n_features = n_features
        self.probability = probability
        self.active = active
        self.n_active = n_active
        self.low = low
        self.high = high

    def draw(self, size: int, draws: torch.Generator) -> dict[str, Float[Tensor, "B F"]]:
        """`{"inputs": ...}` of so many examples."""
        values = torch.empty(size, self.n_features).uniform_(self.low, self.high, generator=draws)
        order = torch.rand(size, self.n_features, generator=draws)
        is_on = order < self.probability if self.n_active is None else order.argsort(dim=1) < self.n_active
        return {"inputs": values.where(is_on, 0.0)}

    def describe(self) -> dict[str, Any]:
        """What a model card says about the data."""
        names = ("n_features", "probability", "active", "low", "high", "batch_size")
        return {name: getattr(self, name) for name in names}


class InductionSequences(DrawnData):
    """Sequences of random words `BOS ... s m ... s`, to be continued with `m`.

    `{"inputs": {"input_ids": Int[B, T]}, "labels": Int[B], "positions": Int[B]}`; only the last position is scored.
    Nothing but the place after the only other `s` tells the answer. Unlike in SPD's data, `s` is any word, another
    one in every sequence, so that no head can know beforehand what to look for.

    Args:
        vocab_size: as many token ids as the network reads: the words and `BOS`.
        length: tokens of a sequence.
        batch_size, audit_batch_size, audit_batches, steps_per_epoch, seed: as for `DrawnData`.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        batch_size: int = 128,
        audit_batch_size: int = 1024,
        audit_batches: int = 4,
        steps_per_epoch: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, audit_batch_size, audit_batches, steps_per_epoch, seed)
        if vocab_size < 4:
            raise UserError(
                f"induction sequences: vocab_size is {vocab_size}, expected at least 4: three words and BOS"
            )
        if length < 4:
            raise UserError(f"induction sequences: length is {length}, expected at least 4: BOS s m s")
        self.vocab_size = vocab_size
        self.length = length

    def draw(self, size: int, draws: torch.Generator) -> dict[str, Any]:
        """So many sequences, the pair anywhere between `BOS` and the last token."""
        s_B1 = torch.randint(1, self.vocab_size, (size, 1), generator=draws)
        others_BT = torch.randint(1, self.vocab_size - 1, (size, self.length), generator=draws)
        ids_BT = others_BT + (others_BT >= s_B1)  # any word but s
        place_B1 = torch.randint(1, self.length - 2, (size, 1), generator=draws)
        ids_BT[:, 0] = BOS
        ids_BT[:, -1:] = s_B1
        ids_BT.scatter_(1, place_B1, s_B1)
        return {
            "inputs": {"input_ids": ids_BT},
            "labels": ids_BT.gather(1, place_B1 + 1).squeeze(1),
            "positions": torch.full((size,), self.length - 1),
        }

    def describe(self) -> dict[str, Any]:
        """What a model card says about the data."""
        return {name: getattr(self, name) for name in ("vocab_size", "length", "batch_size")}


def single_features(n_features: int, value: float = 0.75) -> Float[Tensor, "F F"]:
    """One example a feature, in which it alone is on. 0.75 is the value that SPD looks at."""
    return value * torch.eye(n_features)
