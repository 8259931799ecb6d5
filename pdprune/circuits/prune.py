"""`pdprune.prune`: a circuit from Python, in one call."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from pdprune.adversary.attack import Ascent
from pdprune.adversary.game import Scope
from pdprune.adversary.objective import MaskedLoss, ReferenceKind
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.batches import Batch, as_batches
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.pruning import CircuitPruner, Learning, Search
from pdprune.circuits.schemes import Draws, SchemeName
from pdprune.circuits.selection import Selection
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.norms import NormScaling
from pdprune.errors import UserError, require_gradients
from pdprune.loaders import FixedLoader
from pdprune.losses import LossFunction


class InMemory(LightningDataModule):
    """Batches at hand, as the two splits that a pruner reads."""

    def __init__(self, train: Sequence[Batch], select: Sequence[Batch]) -> None:
        super().__init__()
        self._train, self._select = train, select

    def train_batches(self) -> list[Any]:
        return [batch.raw for batch in self._train]

    def select_batches(self) -> list[Any]:
        return [batch.raw for batch in self._select]

    def train_dataloader(self) -> Iterable[Any]:
        return FixedLoader(self.train_batches())


def prune(
    model: DecomposedModel,
    batches: Iterable[Any],
    *,
    loss: str | LossFunction = "kl",
    scheme: SchemeName = "adversarial",
    reference: ReferenceKind = "zero",
    scope: Scope = "batch",
    target_loss: float | None = None,
    target_nodes: int | None = None,
    coefficient: float | None = None,
    steps: int = 300,
    search: Search = "auto",
    select: Iterable[Any] | None = None,
    per_position: bool = False,
    warm_start: bool = False,
    learning: Learning = Learning(),
    adversary: TrainingAdversary = TrainingAdversary(),
    draws: Draws = Draws(),
    attack: Ascent = Ascent(),
    selection: Selection = Selection(),
    norm_scales: NormScaling = "live",
    seed: int = 0,
) -> Circuit:
    """Find the few nodes that a behaviour needs.

    Give just one of `target_loss`, `target_nodes` and `coefficient`.

    Args:
        model: the target as a sum of components.
        batches: what a DataLoader yields, re-iterable: tensors, `(inputs, labels)`, or dicts (see `pdprune.batches`).
        loss: `kl`, `ce`, `mse`, or `(output, target_output, batch) -> [B]`; in nats.
        scheme: `adversarial`, `stochastic` or `complete`.
        reference: what ablated parts are replaced by: `zero`, `mean`, `position_mean` or `resample`.
        scope: what one source is shared by; see `pdprune.adversary.game`.
        target_loss: find the smallest circuit whose loss under the scheme stays within this.
        target_nodes: find the best circuit of this many nodes.
        coefficient: or the circuit at this price of keeping everything, in the loss's unit.
        steps: keep steps.
        search: `gradient`, `exact` (all circuits; up to 16 nodes and deltas) or `auto` (exact up to 12 nodes).
        select: batches that the circuit is chosen on; by default the last fifth of `batches`, or all of them if there
            is one.
        per_position: a gate for every position: `keep` is then `[T, n]`.
        warm_start: gates start at the mean causal importances that `model` has on the tokens of `batches`.
        learning: gate map, sparsity term, and how fast.
        adversary: how the adversary climbs in training.
        draws: how stochastic sources are drawn.
        attack: the adversary's budget in selection.
        selection: how gates become a circuit.
        norm_scales: `live`, or `frozen` to the unablated run while the circuit is searched for (see `CircuitPruner`).
        seed: decides everything.

    Returns:
        the circuit. The model, its mode and the global random state are as they were.

    Raises:
        UserError: for arguments or batches that do not fit.
        NonFiniteLossError: if a loss becomes NaN or infinite.
    """
    require_gradients("prune")
    _require_one_of("scheme", scheme, get_args(SchemeName))
    _require_one_of("search", search, get_args(Search))
    _require_count("steps", steps)
    _require_count("target_nodes", target_nodes)
    with torch.random.fork_rng():  # every pass over a DataLoader draws from the global generator
        train_split, select_split = _split(as_batches(batches), None if select is None else as_batches(select))
    pruner = CircuitPruner(
        model,
        loss=loss,
        scheme=scheme,
        reference=reference,
        scope=scope,
        target_loss=target_loss,
        target_nodes=target_nodes,
        coefficient=coefficient,
        per_position=per_position,
        warm_start=warm_start,
        search=search,
        learning=learning,
        adversary=adversary,
        draws=draws,
        attack=attack,
        selection=selection,
        norm_scales=norm_scales,
        seed=seed,
    )
    data = InMemory(train_split, select_split)
    pruner.prepare(data)
    if not pruner.exhaustive([MaskedLoss(model, select_split[0], loss)]):
        device = model.delta_sites.device
        with _gradients_kept(model):
            learn_gates(pruner, data, steps)
        pruner.to(device)  # Lightning leaves it on the CPU
    pruner.select(data)
    return pruner.circuit()


def _require_one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UserError(f"{name}: got {value!r}; expected one of {', '.join(names)}")


def _require_count(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UserError(f"{name}: got {value!r}; expected a whole number, 0 or more")


def _split(batches: list[Batch], select: list[Batch] | None) -> tuple[list[Batch], list[Batch]]:
    if select is not None:
        return batches, select
    if len(batches) == 1:
        return batches, batches
    last = max(1, len(batches) // 5)
    return batches[:-last], batches[-last:]


@contextlib.contextmanager
def _gradients_kept(model: DecomposedModel) -> Iterator[None]:
    """Lightning clears the gradients of all parameters as it begins, the target's among them."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def learn_gates(pruner: CircuitPruner, data: LightningDataModule, steps: int) -> None:
    """So many keep steps where the model is, without Lightning's advice and files; the global random state is put
    back."""
    device = pruner.model.delta_sites.device
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            Trainer(
                max_steps=steps,
                max_epochs=-1,
                accelerator=device.type,
                strategy=SingleDeviceStrategy(device=device),
                devices=1,
                logger=False,
                log_every_n_steps=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                use_distributed_sampler=False,
            ).fit(pruner, datamodule=data)
        finally:
            logger.setLevel(level)
