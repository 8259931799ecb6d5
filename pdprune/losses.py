"""How far a masked model is from its target, or from the labels: one number an example.

An example's loss is the mean over its scored positions; the loss of a batch is the mean over its examples
(method.md, section 3). Entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pdprune.batches import IGNORED_LABEL, UNUSED, Batch
from pdprune.errors import UserError

LossFunction = Callable[[Tensor, Tensor, Any], Tensor]
"""`(output, target_output, batch) -> [B]`, with `batch` as the data loader yielded it."""


class Scored(NamedTuple):
    """The scored positions of a batch, one row each, all examples in a row.

    M is their number over the batch; rows of one example need not be as many as those of another.
    """

    example: Int[Tensor, " M"]
    position: Int[Tensor, " M"] | None
    """None where the output has no positions."""
    share: Float[Tensor, " M"]
    """One over the number of rows of the same example, so that summing `share · loss` gives the example's mean."""
    everything: bool = False
    """Whether every position of every example is scored, in order: then no row need be copied."""

    def rows(self, output: Float[Tensor, "B *T V"]) -> Float[Tensor, "M V"]:
        """The output at the scored positions, in float32 or better."""
        if self.everything:
            picked = output.flatten(0, -2)
        else:
            picked = output[self.example] if self.position is None else output[self.example, self.position]
        return picked if picked.dtype == torch.float64 else picked.float()

    def mean_by_example(self, row_loss: Float[Tensor, " M"], size: int) -> Float[Tensor, " B"]:
        return torch.zeros(size, dtype=row_loss.dtype, device=row_loss.device).index_add(
            0, self.example, row_loss * self.share.to(row_loss.dtype)
        )


def loss_function(loss: str | LossFunction) -> Callable[[Tensor, Tensor, Batch], Float[Tensor, " B"]]:
    """The per-example loss of a name (`"kl"`, `"ce"`, `"mse"`) or of a user's function.

    Returns:
        a function of `(output, target_output, batch)` that gives `[B]`.

    Raises:
        UserError: for an unknown name.
    """
    if callable(loss):
        return _user_loss(loss)
    if loss not in NAMED:
        raise UserError(f"loss: got {loss!r}; expected one of {', '.join(NAMED)}, or a function")
    return NAMED[loss]


def loss_name(loss: str | LossFunction) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def kl(output: Tensor, target_output: Tensor, batch: Batch) -> Float[Tensor, " B"]:
    """KL(target ‖ masked model) over the last dimension, in nats (method.md, section 3)."""
    scored = scored_positions(output, batch)
    log_p = F.log_softmax(scored.rows(target_output), dim=-1)
    log_q = F.log_softmax(scored.rows(output), dim=-1)
    # Written out, which several masks at once can run as a batch, as they cannot `F.kl_div`.
    return scored.mean_by_example((log_p.exp() * (log_p - log_q)).sum(-1), batch.size)


def ce(output: Tensor, target_output: Tensor, batch: Batch) -> Float[Tensor, " B"]:
    """Cross-entropy to the labels, over `choices` where the batch has them, in nats."""
    scored, labels = _labelled(output, batch, "loss 'ce'")
    log_q = F.log_softmax(_among_choices(scored, output, batch), dim=-1)
    return scored.mean_by_example(-log_q.gather(-1, labels[:, None]).squeeze(-1), batch.size)


def mse(output: Tensor, target_output: Tensor, batch: Batch) -> Float[Tensor, " B"]:
    """Mean squared distance from the target's output, over the last dimension and the scored positions."""
    if batch.positions is None and (batch.attention_mask is None or output.ndim != 3):
        return (output.float() - target_output.float()).reshape(batch.size, -1).square().mean(-1)
    scored = scored_positions(output, batch)
    return scored.mean_by_example((scored.rows(output) - scored.rows(target_output)).square().mean(-1), batch.size)


NAMED: dict[str, Callable[[Tensor, Tensor, Batch], Tensor]] = {"kl": kl, "ce": ce, "mse": mse}


def task_loss_and_accuracy(output: Tensor, batch: Batch) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Cross-entropy over the answer and the wrong ones, and the share of positions answered rightly, per example."""
    scored, labels = _labelled(output, batch, "task scores")
    logits = _among_choices(scored, output, batch)
    right = logits.argmax(-1) == labels
    nats = F.cross_entropy(logits, labels, reduction="none")
    return scored.mean_by_example(nats, batch.size), scored.mean_by_example(right.float(), batch.size)


def answers(output: Tensor, batch: Batch) -> Int[Tensor, " M"]:
    """The class answered at every scored position: the likeliest of `choices`, or of the whole vocabulary."""
    scored = scored_positions(output, batch)
    return _among_choices(scored, output, batch).argmax(-1)


def scored_positions(output: Tensor, batch: Batch) -> Scored:
    """Which rows of the output count, by the batch's `positions`, and else by its attention mask."""
    return batch.once(("scored", output.shape[:-1], output.device), lambda: _scored_positions(output, batch))


def _scored_positions(output: Tensor, batch: Batch) -> Scored:
    positions = batch.positions
    if output.ndim > 3 or output.ndim < 2:
        raise UserError(
            f"target: its output has shape {list(output.shape)}; expected [B, V] or [B, T, V] (or loss 'mse')"
        )
    if output.ndim == 2:
        example = torch.arange(output.shape[0], device=output.device)
        return Scored(example, None, torch.ones(len(example), device=output.device), everything=True)
    everything = positions is None and batch.attention_mask is None
    if positions is None:
        chosen = batch.attention_mask
        if chosen is None:
            chosen = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        example, position = chosen.nonzero(as_tuple=True)
    elif positions.dtype == torch.bool:
        example, position = positions.nonzero(as_tuple=True)
    else:
        _require_positions(positions, output.shape[1])
        used = positions != UNUSED
        example, position = used.nonzero(as_tuple=True)[0], positions[used]
    return Scored(example, position, _share(example, output.shape[0]), everything)


def _require_positions(positions: Int[Tensor, "B P"], length: int) -> None:
    if not positions.numel():
        return
    low, high = int(positions.min()), int(positions.max())
    if low < UNUSED or high >= length:
        raise UserError(f"batch: positions run from {low} to {high}; expected 0 to {length - 1}, or -1 for none")


def _share(example: Int[Tensor, " M"], size: int) -> Float[Tensor, " M"]:
    return torch.bincount(example, minlength=size).clamp(min=1).reciprocal()[example]


def _labelled(output: Tensor, batch: Batch, what: str) -> tuple[Scored, Int[Tensor, " M"]]:
    """The scored positions that have a label, with it."""
    return batch.once(("labelled", output.shape, output.device), lambda: _find_labelled(output, batch, what))


def _find_labelled(output: Tensor, batch: Batch, what: str) -> tuple[Scored, Int[Tensor, " M"]]:
    if batch.labels is None:
        raise UserError(f"batch: {what} needs labels, and the batch has none; add the key 'labels'")
    scored, labels = scored_positions(output, batch), batch.labels
    if labels.ndim == 1:
        rows = labels[scored.example]
    elif batch.positions is not None and batch.positions.dtype != torch.bool and labels.shape == batch.positions.shape:
        rows = labels[batch.positions != UNUSED]
    elif scored.position is not None and labels.shape == output.shape[:2]:
        rows = labels[scored.example, scored.position]
    else:
        raise UserError(
            f"batch: labels have shape {list(labels.shape)}; expected [B], the shape of positions, or [B, T] "
            f"of an output of shape {list(output.shape)}"
        )
    if batch.choices is not None:
        rows = _index_among_choices(rows, batch.choices[scored.example])
    elif bool(((rows != IGNORED_LABEL) & ((rows < 0) | (rows >= output.shape[-1]))).any()):
        raise UserError(
            f"batch: a label is none of the output's classes; expected 0 to {output.shape[-1] - 1}, or -100"
        )
    kept = rows != IGNORED_LABEL
    example = scored.example[kept]
    position = None if scored.position is None else scored.position[kept]
    everything = scored.everything and bool(kept.all())
    return Scored(example, position, _share(example, batch.size), everything), rows[kept].long()


def _among_choices(scored: Scored, output: Tensor, batch: Batch) -> Float[Tensor, "M K"]:
    rows = scored.rows(output)
    if batch.choices is None:
        return rows
    choices = batch.choices[scored.example]
    return rows.gather(-1, choices.clamp(min=0)).masked_fill(choices == UNUSED, -torch.inf)


def _index_among_choices(labels: Int[Tensor, " M"], choices: Int[Tensor, "M K"]) -> Int[Tensor, " M"]:
    found: Bool[Tensor, "M K"] = choices == rearrange(labels, "m -> m 1")
    if not bool((found.any(-1) | (labels == IGNORED_LABEL)).all()):
        raise UserError("batch: a label is not among its example's choices; expected the answer to be one of them")
    return torch.where(labels == IGNORED_LABEL, IGNORED_LABEL, found.int().argmax(-1))


def _user_loss(loss: LossFunction) -> Callable[[Tensor, Tensor, Batch], Tensor]:
    def per_example(output: Tensor, target_output: Tensor, batch: Batch) -> Tensor:
        value = loss(output, target_output, batch.raw)
        if not isinstance(value, Tensor) or value.shape != (batch.size,):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"loss {loss_name(loss)}: returned {got}; expected one loss an example, shape [{batch.size}]"
            )
        return value

    return per_example
