"""The loss of a batch as a function of masks, and what ablated parts are replaced by."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.together import for_each, how_many_at_once
from pdprune.batches import Batch, as_batch, first_tensor, output_of, to_device
from pdprune.decomposition import DecomposedModel, mean_reference, resample_reference
from pdprune.decomposition.model import Narrowed, Observed
from pdprune.decomposition.norms import NormScaling
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.losses import LossFunction, ce, loss_function
from pdprune.precision import UNSCALED, LossScale
from pdprune.ranks import ALONE, Ranks
from pdprune.seeding import generator

ReferenceKind = Literal["zero", "mean", "position_mean", "resample"]
ReferenceInputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """What an ablated component is replaced by (method.md, section 2).

    Attributes:
        kind: `zero`; `mean` over a reference set; `position_mean`, that mean at each position by itself;
            `resample`, the values on the batch's `counterfactual`, or else on another example of the batch.
        means: for the two means, each site's mean input.
        seed: decides which other example resampling reads.
    """

    kind: ReferenceKind
    means: ReferenceInputs | None = None
    seed: int = 0

    @classmethod
    def measure(cls, kind: ReferenceKind, model: DecomposedModel, batches: Sequence[Batch], seed: int = 0) -> Reference:
        """Make a reference, measuring means on `batches` where they are asked for.

        Raises:
            UserError: for an unknown kind.
        """
        match kind:
            case "zero" | "resample":
                return cls(kind, seed=seed)
            case "mean" | "position_mean":
                inputs = [batch.raw for batch in batches]
                return cls(kind, mean_reference(model, inputs, per_position=kind == "position_mean"), seed)
            case _:
                raise UserError(f"reference: got {kind!r}; expected one of {', '.join(get_args(ReferenceKind))}")

    def on(self, model: DecomposedModel, batch: Batch, index: int = 0, ranks: Ranks = ALONE) -> ReferenceInputs | None:
        """The reference input of every site for one batch, the `index`-th of its split; None is zero.

        Of a batch that `ranks` share, this rank's part is given; another example may be any of the whole.
        """
        if self.kind != "resample":
            return None if self.means is None else to_device(self.means, model.delta_sites.device)
        if batch.counterfactual is not None:
            return resample_reference(model, batch.inputs, batch.counterfactual)
        return resample_reference(model, batch.inputs, _other_examples(batch, self.seed, index, ranks).inputs)


class MaskedLoss:
    """The loss of one batch under masks, against the unablated target on that batch.

    The target runs once, when its outputs are first asked for, unless it was already observed on these inputs; each
    call runs the masked model.

    Args:
        model: the target and its components.
        batch: the examples; where several ranks share a batch, this one's.
        loss: `kl`, `ce`, `mse` or a function.
        reference: what ablated parts are replaced by, by site; None is zero.
        observed: the target's run on the batch, if there was one.
        ranks: who shares the batch.
        scale: for gradients in float16.
        norm_scales: whether the masked model's norms are `live`, or `frozen` to the unablated run on the batch.
        target_output: what the unablated target answers wherever the loss looks, if that is known.
    """

    def __init__(
        self,
        model: DecomposedModel,
        batch: Batch,
        loss: str | LossFunction = "kl",
        reference: ReferenceInputs | None = None,
        observed: Observed | None = None,
        ranks: Ranks = ALONE,
        scale: LossScale = UNSCALED,
        norm_scales: NormScaling = "live",
        target_output: Tensor | None = None,
    ) -> None:
        self.model = model
        self.batch: Batch = to_device(batch, model.delta_sites.device)
        self.reference = reference
        self.ranks = ranks
        self.scale = scale
        self._loss: Callable[[Tensor, Tensor, Batch], Tensor] = loss_function(loss)
        self._observed = observed
        self.norm_scales = norm_scales
        if target_output is not None:
            self.target_output = target_output

    @cached_property
    def target_output(self) -> Tensor:
        """What the unablated target answers."""
        with torch.no_grad():
            output = self.model(self.batch.inputs) if self._observed is None else self._observed.output
            found = output_of(output).detach()
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteLossError("target: its output on a batch is NaN or infinite; expected finite numbers")
        return found

    @cached_property
    def _frozen_scales(self) -> dict[str, Tensor] | None:
        """What norms multiply by on the unablated run; None where they are live."""
        return self.model.norm_scales(self.batch.inputs) if self.norm_scales == "frozen" else None

    @property
    def size(self) -> int:
        return self.batch.size

    @cached_property
    def whole_size(self) -> int:
        """The number of examples on all ranks together."""
        if self.ranks.count == 1:
            return self.size
        return int(self.ranks.sum(torch.tensor(self.size, device=self.model.delta_sites.device)))

    @cached_property
    def leading_shape(self) -> tuple[int, ...]:
        """The dimensions before the last of what the sites read: `(B, T)`, or `(B,)` in networks without positions."""
        read = (self._observed or self.model.observe(self.batch.inputs)).site_inputs.values()
        return max((x.shape[:-1] if x.is_floating_point() else x.shape for x in read), key=len)

    def output(
        self,
        mask: Float[Tensor, "*lead n"] | None,
        delta_mask: Float[Tensor, "*lead s"] | None = None,
        sites: Collection[str] | None = None,
        narrowed: Narrowed | None = None,
    ) -> Tensor:
        masks = mask, delta_mask, self.reference, sites, narrowed
        return output_of(self.model(self.batch.inputs, *masks, norm_scales=self._frozen_scales))

    def per_example(
        self,
        mask: Float[Tensor, "*lead n"] | None,
        delta_mask: Float[Tensor, "*lead s"] | None = None,
        sites: Collection[str] | None = None,
        narrowed: Narrowed | None = None,
    ) -> Float[Tensor, " B"]:
        """Each example's loss under a mask: `[n]`, or any shape that broadcasts (method.md, section 4).

        With `sites` only those are masked; `narrowed` as in `DecomposedModel.forward`.
        """
        return self._of(self.output(mask, delta_mask, sites, narrowed))

    def per_example_of_each(
        self,
        masks: Float[Tensor, "R n"],
        delta_masks: Float[Tensor, "R s"],
        narrowed: Narrowed | None = None,
        *,
        at_once: int,
    ) -> Float[Tensor, "R B"]:
        """Each example's loss under each of several shared masks, so many of them run together."""
        if at_once > 1:
            _ = self.unablated(), self._frozen_scales  # the target's own runs are no part of the batched one

        def one(mask: Tensor, delta_mask: Tensor) -> Tensor:
            return self.per_example(mask, delta_mask, narrowed=narrowed)

        return for_each(one, (masks, delta_masks), at_once, self.model)

    def at_once(self, *, exhaustive: bool = False) -> int:
        """How many shared masks of this batch should run together (`together.py`)."""
        tokens = math.prod(self.target_output.shape[:-1])
        return how_many_at_once(self.model, tokens, exhaustive=exhaustive)

    def unablated(self) -> Float[Tensor, " B"]:
        """Each example's loss with nothing ablated: under a mask of ones the outputs are the target's, bit by bit."""
        return self._of(self.target_output)

    def _of(self, output: Tensor) -> Float[Tensor, " B"]:
        # Cross-entropy looks at labels alone: the target need not run for it.
        beside = output if self._loss is ce else self.target_output
        return self._loss(output, beside, self.batch)

    def mean(self, per_example: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """The mean over the examples of the whole batch, on all ranks."""
        return self.ranks.mean(per_example.mean(), self.size)


def masked_losses(
    model: DecomposedModel,
    batches: Sequence[Batch],
    loss: str | LossFunction,
    reference: Reference,
    norm_scales: NormScaling = "live",
) -> list[MaskedLoss]:
    """The losses of a split, one a batch."""
    device = model.delta_sites.device
    return [
        MaskedLoss(model, batch, loss, reference.on(model, to_device(batch, device), index), norm_scales=norm_scales)
        for index, batch in enumerate(batches)
    ]


def by_size(losses: Sequence[MaskedLoss], values: Sequence[Any]) -> float:
    """The mean of one value a batch, weighted by the number of examples."""
    total = sum(loss.size for loss in losses)
    return float(sum(loss.size * float(value) for loss, value in zip(losses, values, strict=True)) / total)


def _other_examples(batch: Batch, seed: int, index: int, ranks: Ranks) -> Batch:
    """The batch in an order in which no example meets itself; of one that ranks share, this rank's part."""
    whole = batch if ranks.count == 1 else as_batch(ranks.gather(batch.raw))
    if whole.size < 2:
        raise UserError("reference 'resample': a batch of one example has no other; give 'counterfactual' inputs")
    order = torch.randperm(whole.size, generator=generator(seed, "resample", index))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return whole.select(ranks.share(other).to(first_tensor(batch.inputs).device))
