"""The checks of a learned decomposition, on data that it was not learned on.

`decomposition_audit.json` holds

    target, mode, loss, seed, steps       what was learned
    n_examples, batch_size                what it was checked on
    faithfulness                          mean square of what the components leave over, over all sites
    n_components, l0, alive               of all sites; and
    sites                                 of each, with `left_over`: the length of its delta relative to its weight
    reconstruction                        the loss under complete, stochastic and adversarial masks, by budget in steps;
                                          `ablated`: with nothing left of the sites, to compare with
    attack                                the budget of `adversarial`
    known_answers                         for the toy networks, how near it is to what is known to be right
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import singledispatch
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pdprune.adversary.attack import Ascent
from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import Batch, as_batch, to_device
from pdprune.decomposition.importances import importance_mask
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.trainable import faithfulness
from pdprune.errors import UserError
from pdprune.losses import LossFunction
from pdprune.metrics import (
    MATTERS,
    ComponentL0,
    ComponentsAlive,
    ImportancesAgainstIdentity,
    MeanL2Ratio,
    MeanMaxCosineSimilarity,
    Reconstruction,
)
from pdprune.precision import Compute, require_compute
from pdprune.progress import Tell, part
from pdprune.targets.toy_data import single_features
from pdprune.targets.toys import TMS, ResidualMLP

SCHEMA = "pdprune.decomposition-audit/1"
AUDIT_FILE = "decomposition_audit.json"

ONE_RANK = {"sync_on_compute": False}
"""For metrics: the first rank audits alone, and nobody would answer."""

Gates = Callable[[Batch, int], Float[Tensor, "*lead n"]]
"""What is kept of each node on a batch, the `int`-th of its split."""


@dataclass(frozen=True)
class DecompositionChecks:
    """How a decomposition is checked when it has been learned.

    Attributes:
        batches: held-out batches that are read.
        attack: the adversary's budget; one source must serve all of a batch.
        ladder: longer budgets, in steps, to see whether it had converged; none for none.
        draws: random sources a batch.
        compute: what matrix products are computed in, whatever `trainer.precision` is.
    """

    batches: int = 2
    attack: Ascent = field(default_factory=Ascent)
    ladder: list[int] = field(default_factory=lambda: [80, 320])
    draws: int = 8
    compute: Compute = "float32"

    def __post_init__(self) -> None:
        require_compute("audit: compute", self.compute)
        if self.batches < 1:
            raise UserError(f"audit: batches is {self.batches}; expected at least 1")
        if sorted({self.attack.steps, *self.ladder}) != [self.attack.steps, *self.ladder]:
            raise UserError(
                f"audit: ladder is {self.ladder}; expected numbers that rise from {self.attack.steps} steps"
            )


def audit_decomposition(
    model: DecomposedModel,
    gates: Gates,
    batches: Sequence[Any],
    loss: str | LossFunction,
    checks: DecompositionChecks,
    seed: int,
    tell: Tell = lambda doing: None,
) -> dict[str, Any]:
    """What the module's docstring lists, but for what was learned.

    Args:
        model: the decomposition, one node a component.
        gates: what matters.
        batches: as a data loader yields them; all outputs count.
        loss: `kl`, `mse` or a function.
        checks: how much is done.
        seed: of draws and attacks.
        tell: told what is being done.
    """
    sizes = {name: site.n_components for name, site in model.sites.items()}
    l0, alive = ComponentL0(sizes, **ONE_RANK), ComponentsAlive(sizes, **ONE_RANK)
    reconstruction = Reconstruction(loss, checks.attack, checks.ladder, checks.draws, seed, **ONE_RANK)
    ablated, n_examples = 0.0, 0
    for index, raw in enumerate(batches):
        tell(f"batch {index + 1} of {len(batches)}")
        batch = to_device(as_batch({"inputs": as_batch(raw).inputs}), model.delta_sites.device)
        kept = gates(batch, index).detach()
        by_site = {name: kept[..., site.node_index] for name, site in model.sites.items()}
        for metric in (l0, alive):
            metric.to(kept.device).update(by_site, batch.attention_mask)
        with part(index, len(batches)):
            reconstruction.to(kept.device).update(model, batch, kept)
        ablated += _ablated(model, batch, loss) * batch.size
        n_examples += batch.size
    by_site_l0 = {name: float(value) for name, value in l0.compute().items()}
    by_site_alive = {name: int(value) for name, value in alive.compute().items()}
    with torch.no_grad():
        left_over = {name: float(site.delta.norm() / _weight(site).norm()) for name, site in model.sites.items()}
        total = float(faithfulness(model))
    return {
        "n_examples": n_examples,
        "batch_size": as_batch(batches[0]).size,
        "faithfulness": total,
        "n_components": sum(sizes.values()),
        "matters_above": MATTERS,
        "l0": sum(by_site_l0.values()),
        "alive": sum(by_site_alive.values()),
        "sites": {
            name: {
                "n_components": sizes[name],
                "l0": by_site_l0[name],
                "alive": by_site_alive[name],
                "left_over": left_over[name],
            }
            for name in sizes
        },
        "reconstruction": {name: float(value) for name, value in reconstruction.compute().items()}
        | {"ablated": ablated / n_examples},
        "attack": asdict(checks.attack),
        "known_answers": known_answers(model.target, model),
    }


def held_out(data: Any, n_batches: int) -> list[Any]:
    """Batches that nothing was learned on: of a data module's held-out split, or else what it validates on.

    Raises:
        UserError: if it has neither.
    """
    try:
        batches = data.held_out_batches() if hasattr(data, "held_out_batches") else data.val_dataloader()
    except MisconfigurationException:  # how a data module says that it has no loader
        batches = []
    found = list(islice(iter(batches), n_batches))
    if not found:
        raise UserError("audit: the data have no held-out batches; expected held_out_batches() or val_dataloader()")
    return found


@singledispatch
def known_answers(target: nn.Module, model: DecomposedModel) -> dict[str, Any] | None:
    """How near a decomposition is to the known one, for targets that have one; None for others."""
    return None


@known_answers.register
def _(target: TMS, model: DecomposedModel) -> dict[str, Any]:
    """Each feature is a component of `linear1`, where it is a column, and one of `linear2`, where it is a row."""
    answers: dict[str, Any] = {}
    for name, is_row in (("linear1", False), ("linear2", True)):
        if name not in model.sites:
            continue
        site = model.sites[name]
        W, V, U = _weight(site).cpu(), site.V.detach().cpu(), site.U.detach().cpu()
        factors = (W.t(), U.t(), V.t()) if is_row else (W, V, U)
        answers[name] = _similarity(*factors)
        importances = _on_single_features(model, [name], target.config.n_features)
        if importances is not None:
            answers[name] |= {"of_alive": _similarity(*factors, alive=importances.amax(0) > MATTERS)}
            answers[name] |= _against_identity(importances)
    return answers


@known_answers.register
def _(target: ResidualMLP, model: DecomposedModel) -> dict[str, Any]:
    """Each feature has one component that reads it, in the `mlp_in` of one of the layers."""
    names = [name for name in model.site_names if name.endswith("mlp_in")]
    importances = _on_single_features(model, names, target.config.n_features)
    return {} if importances is None else {"mlp_in": _against_identity(importances)}


def _similarity(
    W: Float[Tensor, "O I"], V: Float[Tensor, "I C"], U: Float[Tensor, "C O"], alive: Bool[Tensor, " C"] | None = None
) -> dict[str, float | None]:
    """Direction and length of the best component for each column; null where none is alive."""
    if alive is not None and not bool(alive.any()):
        return {"mean_max_cosine_similarity": None, "mean_l2_ratio": None}
    similarity, ratio = MeanMaxCosineSimilarity(**ONE_RANK), MeanL2Ratio(**ONE_RANK)
    similarity.update(W, V, U, alive)
    ratio.update(W, V, U, alive)
    return {"mean_max_cosine_similarity": float(similarity.compute()), "mean_l2_ratio": float(ratio.compute())}


def _on_single_features(model: DecomposedModel, names: Sequence[str], n_features: int) -> Float[Tensor, "F C"] | None:
    """Importances at some sites, side by side, where one feature alone is on; None without importance functions."""
    if model.importances is None or not names:
        return None
    mask = importance_mask(model, single_features(n_features).to(model.delta_sites.device))
    return torch.cat([mask[:, model.sites[name].node_index] for name in names], dim=-1).cpu()


def _against_identity(importances: Float[Tensor, "F C"]) -> dict[str, float]:
    """How far they are from a component a feature; nothing where there are too few components for that."""
    n_features, n_components = importances.shape
    if n_components < n_features:
        return {}
    metric = ImportancesAgainstIdentity(**ONE_RANK)
    metric.update(importances)
    return {name: float(value) for name, value in metric.compute().items()}


@torch.no_grad()
def _ablated(model: DecomposedModel, batch: Batch, loss: str | LossFunction) -> float:
    nothing = torch.zeros(model.n_nodes + model.n_sites, device=model.delta_sites.device)
    return float(MaskedLoss(model, batch, loss).per_example(nothing[: model.n_nodes], nothing[model.n_nodes :]).mean())


def _weight(site: Any) -> Float[Tensor, "O I"]:
    """The matrix of a site, which its components and its delta sum to."""
    weight: Tensor = (site.V @ site.U).t() + site.delta
    return weight.detach()
