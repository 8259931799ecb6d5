"""Loaders whose batches are a pure function of their number, so that an interrupted run goes on exactly."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class StepLoader:
    """Yields `batch_at(0)`, `batch_at(1)`, ... in passes of `steps_per_pass` batches.

    It goes on where it stopped: the next pass, or a run resumed from a checkpoint, starts at the next batch number.
    Lightning saves and restores the number through `state_dict` and `load_state_dict`; the length lets it do
    without prefetching, which would skip a batch on resuming. Holding no sampler, it is left alone by Lightning's
    `use_distributed_sampler`: which share of a batch a rank takes is the business of `batch_at` (see `ranks.py`).
    """

    def __init__(self, batch_at: Callable[[int], Any], steps_per_pass: int) -> None:
        self.batch_at = batch_at
        self.steps_per_pass = steps_per_pass
        self.step = 0

    def __len__(self) -> int:
        return self.steps_per_pass

    def __iter__(self) -> Iterator[Any]:
        while True:
            batch = self.batch_at(self.step)
            self.step += 1  # before the yield: a checkpoint taken while the batch is used goes on with the next one
            yield batch
            if self.step % self.steps_per_pass == 0:
                return

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where the saved loader was."""
        self.step = state["step"]


class FixedLoader:
    """A list of batches as a loader. Lightning takes a bare list for several loaders, and a `DataLoader` it would
    split between ranks; every rank scores all of these."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)
