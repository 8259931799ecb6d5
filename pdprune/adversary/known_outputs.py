"""What the target answers to the training examples, worked out once and not again at every visit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import Batch
from pdprune.decomposition import DecomposedModel
from pdprune.fingerprints import bytes_of, leaves_of
from pdprune.losses import scored_positions

AT_LEAST, AT_MOST = 32 << 20, 1 << 30
"""Bytes of outputs that may be remembered: as many as one batch's whole output has, within these bounds."""


class Known(NamedTuple):
    """What is remembered of one example.

    Attributes:
        shape: of its output.
        scored: its output if a loss may look at all of that; or else at the scored positions, one row each.
    """

    shape: torch.Size
    scored: Float[Tensor, "*T V"]


class KnownOutputs:
    """The target's outputs for some examples, where they are scored; an example is known by what its inputs are.

    So a data module need not say which examples a batch is made of, and one that is not known is noticed. The outputs
    are those of the batches that they were measured in, whatever batch an example is met in: that makes no difference
    but for rounding, and a resumed run, which measures them anew, has the same bits.
    """

    def __init__(self, examples: Mapping[bytes, Known]) -> None:
        self.examples = examples

    @classmethod
    def measure(
        cls,
        model: DecomposedModel,
        batches: Sequence[Batch],
        limit: int | None = None,
        reached: Callable[[float], None] = lambda share: None,
    ) -> KnownOutputs | None:
        """Run the target on all batches.

        Args:
            model: whose target it is.
            batches: of all examples.
            limit: bytes that may be remembered; by default so many that the run's memory stays about what it was.
            reached: told what share of the examples is done.

        Returns:
            None as soon as there look to be more than `limit` bytes in the end.

        Raises:
            NonFiniteLossError: an output is NaN or infinite.
        """
        examples: dict[bytes, Known] = {}
        total, seen, held = sum(batch.size for batch in batches), 0, 0
        for batch in batches:
            run = MaskedLoss(model, batch)
            output = run.target_output
            found = _by_example(output, run.batch)
            limit = limit or min(AT_MOST, max(AT_LEAST, output.nbytes))
            seen, held = seen + batch.size, held + sum(known.scored.nbytes for known in found)
            if held * total > limit * seen:
                return None
            examples.update(zip(_keys(batch), found, strict=True))
            reached(seen / total)
        return cls(examples)

    def on(self, batch: Batch) -> Float[Tensor, "B *T V"] | None:
        """The target's output for a batch, 0 where it is not scored; None if one of its examples is not known."""
        found = [known for key in _keys(batch) if (known := self.examples.get(key)) is not None]
        if len(found) < batch.size:
            return None
        shape, rows = found[0]
        if _is_whole(shape, batch):
            return torch.stack([known.scored for known in found])
        output = rows.new_zeros(batch.size, *shape)
        scored = scored_positions(output, batch)
        output[scored.example, scored.position] = torch.cat([known.scored for known in found])
        return output


def _by_example(output: Tensor, batch: Batch) -> list[Known]:
    shape = output.shape[1:]
    if _is_whole(shape, batch):
        return [Known(shape, whole) for whole in output]
    scored = scored_positions(output, batch)
    counts = torch.bincount(scored.example, minlength=batch.size)
    return [Known(shape, rows) for rows in scored.rows(output).split(counts.tolist())]


def _is_whole(shape: torch.Size, batch: Batch) -> bool:
    """Whether a loss may look at all of outputs of this shape each."""
    return len(shape) != 2 or (batch.positions is None and batch.attention_mask is None)


def _keys(batch: Batch) -> Iterator[bytes]:
    """A key an example: all that decides what the target answers, and where it is scored."""
    rows, shared = [], hashlib.blake2b(digest_size=16)
    for value in leaves_of([batch.inputs, batch.positions]):
        if isinstance(value, Tensor) and value.ndim and len(value) == batch.size:
            shared.update(f"{value.dtype}{tuple(value.shape[1:])}".encode())
            rows.append(_rows_of_bytes(value))
        elif isinstance(value, Tensor):
            shared.update(_rows_of_bytes(value[None]).tobytes())
        else:
            shared.update(repr(value).encode())
    for example in range(batch.size):
        key = shared.copy()
        for row in rows:
            key.update(row[example].tobytes())
        yield key.digest()


def _rows_of_bytes(value: Tensor) -> Any:
    return bytes_of(value).reshape(len(value), -1).numpy()
