"""Several processes that end where one would: this is the only place where a rank knows of the others.

Three rules make it so:

- A rank takes every N-th example of a whole batch, from its own on. What is drawn by example is drawn for the whole
  batch, on every rank alike, and each takes its share of the draws.
- Whatever is decided on (a loss, a gradient on shared sources, a count) is reduced over the whole batch first. The
  result has the same bits on every rank, so that all decide alike and hold the same sources and gates.
- Gradients follow the convention of DDP: those of the ranks are such that their mean is that of the whole batch.

Lightning makes the processes and the group that they talk in. Files are written by the first rank alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, distributed, nn

from pdprune.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The processes that share a batch, as one of them sees them.

    Attributes:
        own: this one's number.
        count: how many there are.
    """

    own: int = 0
    count: int = 1

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """The ranks of a trainer; just this process if it has none, or is the only one."""
        return cls(trainer.global_rank, trainer.world_size) if trainer and trainer.world_size > 1 else ALONE

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.own == 0

    def share(self, whole: Any, dim: int = 0) -> Any:
        """This rank's examples of a whole batch: tensors, maybe in dicts and tuples, with the examples along `dim`.

        Raises:
            UserError: if there are fewer examples than ranks.
        """
        if self.count == 1:
            return whole
        match whole:
            case Tensor():
                if whole.shape[dim] < self.count:
                    raise UserError(
                        f"batch: {whole.shape[dim]} examples over {self.count} processes; expected at least one each"
                    )
                return whole[(slice(None),) * dim + (slice(self.own, None, self.count),)]
            case Mapping():
                return {key: self.share(value, dim) for key, value in whole.items()}
            case tuple() | list():
                return type(whole)(self.share(value, dim) for value in whole)
            case _:
                return whole

    def gather(self, part: Any) -> Any:
        """The whole batch, of which every rank has its share; the inverse of `share`. No gradients."""
        if self.count == 1:
            return part
        match part:
            case Tensor():
                return self._gathered(part.detach())
            case Mapping():
                return {key: self.gather(value) for key, value in part.items()}
            case tuple() | list():
                return type(part)(self.gather(value) for value in part)
            case _:
                return part

    def _gathered(self, part: Tensor) -> Tensor:
        size = int(self.sum(torch.tensor(len(part), device=part.device)))
        padded = part.new_zeros(math.ceil(size / self.count), *part.shape[1:])
        padded[: len(part)] = part
        by_rank = [torch.empty_like(padded) for _ in range(self.count)]
        distributed.all_gather(by_rank, padded)
        return torch.stack(by_rank, dim=1).flatten(0, 1)[:size]  # example i of rank r was number i·N + r of the whole

    def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over ranks. No gradients."""
        return self._reduced(value, distributed.ReduceOp.SUM)

    def largest(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The maximum over ranks, entry by entry. No gradients."""
        return self._reduced(value, distributed.ReduceOp.MAX)

    def any(self, flags: Tensor) -> Tensor:
        """Whether each flag is up on some rank."""
        return flags if self.count == 1 else self.largest(flags.int()).bool()

    def mean(self, value: Float[Tensor, "*shape"], weight: float | Tensor = 1.0) -> Float[Tensor, "*shape"]:
        """The weighted mean over ranks: of means over shares, weighted by how many they are over, that over the whole.

        Its gradient follows DDP's convention.
        """
        return value if self.count == 1 else _Mean.apply(value, weight, self)

    def of_first(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What the first rank holds. No gradients."""
        return value if self.count == 1 else self.sum(value if self.is_first else torch.zeros_like(value))

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        if self.count == 1:
            return value
        reduced = value.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(reduced, op=how)  # Lightning's `strategy.reduce` waits at a barrier before
        return reduced


ALONE = Ranks()
"""One process, which has all of every batch."""


class _Mean(torch.autograd.Function):
    """Of N ranks with weights `w`, each of which sums to `Σw`: the gradient to a rank's own value is `N·w/Σw`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float | Tensor, ranks: Ranks) -> Tensor:
        own = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
        sums = ranks.sum(torch.cat([(own * value).flatten(), own.reshape(1)]))
        total = sums[-1].clamp(min=torch.finfo(value.dtype).tiny)  # with nothing anywhere the mean is 0, not NaN
        ctx.factor = ranks.count * own / total
        return (sums[:-1] / total).reshape(value.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad * ctx.factor, None, None


def is_first_process() -> bool:
    """Whether this is the first rank as far as the environment tells, also before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def save_checkpoint_alone(trainer: Trainer, path: Path) -> None:
    """What `Trainer.save_checkpoint` does, by one rank that waits for no other."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    trainer.strategy.save_checkpoint(checkpoint, path)


def leave_out_of_ddp(module: nn.Module, part: nn.Module, learned: Iterable[Tensor] = ()) -> None:
    """Have DDP neither wait for gradients of what is frozen nor copy it from the first rank at every step.

    Args:
        module: what will be wrapped.
        part: of it, what is the same on every rank already, all its parameters and buffers,
        learned: but for these.
    """
    frozen = {id(tensor) for tensor in (*part.parameters(), *part.buffers())} - {id(tensor) for tensor in learned}
    everything = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    names = [name for name, tensor in itertools.chain(*everything) if id(tensor) in frozen]
    module._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]  # where DDP looks for them


@contextlib.contextmanager
def reduced_at_the_end(trainer: Any, learned: Sequence[Tensor]) -> Iterator[None]:
    """Several backward passes, after which gradients are averaged over ranks once.

    DDP reduces in every pass, and expects that each reaches all parameters.

    Args:
        trainer: whose model the passes go through, in a training step.
        learned: parameters that have a gradient when the passes are done.
    """
    ranks = Ranks.of(trainer)
    if ranks.count == 1:
        yield
        return
    with trainer.model.no_sync():
        yield
    gradients = [cast(Tensor, tensor.grad) for tensor in learned]
    together = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.count
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def require_as_many_as_launched(trainer: Any) -> None:
    """Refuse another number of processes than torchrun or SLURM have started: they would run beside one another.

    Raises:
        UserError: `devices` times `num_nodes` is not it.
    """
    environment = trainer._accelerator_connector.cluster_environment
    try:
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except ValueError as error:
        raise UserError(f"trainer.devices: {error}") from error


def require_whole_model(trainer: Any) -> None:
    """Refuse strategies that split a model over ranks.

    Raises:
        UserError: masks are folded into whole matrices, which no rank would have.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            f"trainer.strategy: got {type(trainer.strategy).__name__}, which splits parameters over processes; "
            "expected auto or ddp, since masks are folded into whole matrices (see docs/scale.md)"
        )
