"""How good a decomposition is, as torchmetrics: against known answers, and by what it reconstructs under masks.

| metric | asks | source |
|---|---|---|
| `MeanMaxCosineSimilarity` | does a component point where each column of the weight points? | APD, arXiv 2501.14926 |
| `MeanL2Ratio` | and is it as long? | APD |
| `ComponentL0`, `ComponentsAlive` | how many components matter, at a token and at all? | SPD, arXiv 2506.20790 |
| `ImportancesAgainstIdentity` | is there one component for each feature, and no other? | SPD |
| `Reconstruction` | what is lost under complete, stochastic and adversarial masks? | method.md, sections 3 and 7 |

They take tensors, whatever the importances came from. Shape letters: C component, F feature, I/O in/out of a site, n
node; lead are the leading dimensions of a site's input.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from pdprune.adversary.attack import Ascent, attack, passes_of
from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss
from pdprune.assignment import best_assignment
from pdprune.batches import as_batch
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError
from pdprune.losses import LossFunction
from pdprune.progress import span
from pdprune.seeding import generator

MATTERS = 0.1
"""A component matters where its importance is above this: SPD's threshold for toy models."""


class _OverColumns(Metric):
    """A mean over the columns of all weights given."""

    full_state_update = False
    total: Tensor
    n_columns: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_columns", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Float[Tensor, " I"]) -> None:
        self.total += values.double().sum()
        self.n_columns += len(values)

    def compute(self) -> Float[Tensor, ""]:
        """The mean."""
        return (self.total / self.n_columns).float()


class MeanMaxCosineSimilarity(_OverColumns):
    """For each column of a weight, the cosine with the same column of the component where it is greatest; the mean.

    The columns of a first matrix are its features' vectors, as in `linear1` of a `TMS`. Where they are the rows, as in
    `linear2`, give all three transposed: `update(W.T, U.T, V.T)`.
    """

    higher_is_better = True

    def update(
        self, W: Float[Tensor, "O I"], V: Float[Tensor, "I C"], U: Float[Tensor, "C O"], alive: Tensor | None = None
    ) -> None:
        """Take in a site. `alive`, `Bool[C]`, leaves out components, which as published none is."""
        self._add(_match_columns(W, V, U, alive).cosine)


class MeanL2Ratio(_OverColumns):
    """For each column of a weight, how long the column of the component that matches it is, relative to it; the mean.

    The component is the one that `MeanMaxCosineSimilarity` picks. Below 1 tells of shrinkage.
    """

    def update(
        self, W: Float[Tensor, "O I"], V: Float[Tensor, "I C"], U: Float[Tensor, "C O"], alive: Tensor | None = None
    ) -> None:
        """Take in a site. `alive`, `Bool[C]`, leaves out components, which as published none is."""
        self._add(_match_columns(W, V, U, alive).length_ratio)


@dataclass(frozen=True)
class _Match:
    """Of each column with its component."""

    cosine: Float[Tensor, " I"]
    length_ratio: Float[Tensor, " I"]


def _match_columns(
    W: Float[Tensor, "O I"], V: Float[Tensor, "I C"], U: Float[Tensor, "C O"], alive: Bool[Tensor, " C"] | None
) -> _Match:
    """Column `i` of component `c` is `V[i, c] U[c]`: its cosine with `W[:, i]` is that of `U[c]`, or minus it."""
    if W.shape != (U.shape[1], V.shape[0]) or V.shape[1] != U.shape[0]:
        shapes = f"W {list(W.shape)}, V {list(V.shape)}, U {list(U.shape)}"
        raise UserError(f"metric: got {shapes}; expected W [O, I], V [I, C], U [C, O]")
    cosine_CI = (F.normalize(U, dim=1) @ F.normalize(W, dim=0)) * V.t().sign()
    length_CI = V.t().abs() * U.norm(dim=1, keepdim=True) / W.norm(dim=0).clamp(min=torch.finfo(W.dtype).tiny)
    if alive is not None:
        cosine_CI, length_CI = cosine_CI[alive], length_CI[alive]
    cosine, component = cosine_CI.max(dim=0)
    return _Match(cosine, length_CI.gather(0, component[None]).squeeze(0))


class ComponentL0(Metric):
    """By site, how many components matter at a token, on average.

    Args:
        n_components: by site.
        threshold: above it an importance counts.
    """

    full_state_update = False
    n_tokens: Tensor

    def __init__(self, n_components: Mapping[str, int], threshold: float = MATTERS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sites = list(n_components)
        self.threshold = threshold
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")
        for index, size in enumerate(n_components.values()):  # by number: a state's name may hold no dots
            self.add_state(f"counts_{index}", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, importances: Mapping[str, Float[Tensor, "*lead C"]], counted: Bool[Tensor, "*lead"] | None = None
    ) -> None:
        """Take in importances by site; `counted` leaves out tokens, such as padding."""
        if importances.keys() != set(self.sites):
            name = min(importances.keys() ^ set(self.sites))
            raise UserError(f"metric: importances and sites differ at {name!r}; expected one entry a site")
        for index, name in enumerate(self.sites):
            by_token = importances[name].flatten(0, -2) if counted is None else importances[name][counted]
            counts = getattr(self, f"counts_{index}")
            counts += (by_token > self.threshold).sum(0)
            if index == 0:
                self.n_tokens += len(by_token)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The number by site."""
        return {name: counts.sum() / self.n_tokens for name, counts in self._counts().items()}

    def _counts(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"counts_{index}") for index, name in enumerate(self.sites)}


class ComponentsAlive(ComponentL0):
    """By site, how many components matter at any token at all. Arguments as for `ComponentL0`."""

    def compute(self) -> dict[str, Tensor]:
        """The number by site."""
        return {name: (counts > 0).sum() for name, counts in self._counts().items()}


class ImportancesAgainstIdentity(Metric):
    """How far importances on inputs that hold one feature each are from the identity, components permuted to fit best.

    `compute` gives
    - `errors`: entries that are off by more than the tolerance, of a feature's own component below, of all others
      above: SPD's "identity CI error";
    - `distance`: the mean over features of the sum of what entries are off by;
    - `components_per_feature`: how many components matter to a feature, on average;
    - `one_to_one`: the share of features to which one component matters, which matters to no other feature.

    Features whose mechanisms are spread over several sites are given the sites' components side by side.

    Args:
        tolerance: what an importance may be off by, and above which a component matters.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, tolerance: float = MATTERS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, importances: Float[Tensor, "F C"]) -> None:
        """Take in the importances on `pdprune.targets.toy_data.single_features`, one row a feature."""
        self.rows.append(importances.detach())

    def compute(self) -> dict[str, Tensor]:
        """The numbers above."""
        rows_FC = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)
        n_features, n_components = rows_FC.shape
        if n_components < n_features:
            raise UserError(f"metric: {n_components} components for {n_features} features; expected as many or more")
        own = torch.from_numpy(best_assignment(rows_FC.double().cpu().numpy())).to(rows_FC.device)
        wanted_FC = torch.zeros_like(rows_FC).scatter(1, own[:, None], 1.0)
        off_FC = (rows_FC - wanted_FC).abs()
        matters_FC = rows_FC > self.tolerance
        is_alone_F = (matters_FC.sum(1) == 1) & ((matters_FC * (matters_FC.sum(0) == 1)).sum(1) == 1)
        return {
            "errors": (off_FC > self.tolerance).sum(),
            "distance": off_FC.sum(1).mean(),
            "components_per_feature": matters_FC.sum(1).float().mean(),
            "one_to_one": is_alone_F.float().mean(),
        }


class Reconstruction(Metric):
    """The loss against the target when everything that does not matter is masked, under the three schemes.

    With importances as gates `g`, masks are `g + (1 − g)·s`. `compute` gives the mean over examples of
    - `complete`: `s = 0`, deltas ablated too;
    - `stochastic`: `s` uniform on [0,1], drawn for each example and position by itself, as SPD trains;
    - `adversarial`: one `s` for all of a batch, chosen to hurt; never below `complete`;
    - `adversarial_{steps}`: the same with a longer attack, which starts from what the shorter one found.

    Args:
        loss: `"mse"`, `"kl"`, or a function, as for `pdprune.audit`.
        ascent: the budget of `adversarial`: 20 sign steps of 0.1 from each of 4 starts, unless given.
        ladder: numbers of steps of the longer attacks, rising.
        draws: random sources a batch.
        seed: of draws and attacks.
    """

    full_state_update = False
    higher_is_better = False
    n_examples: Tensor
    n_batches: Tensor

    def __init__(
        self,
        loss: str | LossFunction = "mse",
        ascent: Ascent = Ascent(),
        ladder: Sequence[int] = (80, 320),
        draws: int = 8,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        budgets = [ascent.steps, *ladder]
        if sorted(set(budgets)) != budgets:
            raise UserError(f"metric: attacks of {budgets} steps; expected a ladder that rises from ascent.steps")
        if draws < 1:
            raise UserError(f"metric: draws is {draws}; expected at least 1")
        self.loss = loss
        self.ascents = {"adversarial": ascent} | {
            f"adversarial_{steps}": replace(ascent, steps=steps) for steps in ladder
        }
        self.draws = draws
        self.seed = seed
        self.schemes = ["complete", "stochastic", *self.ascents]
        for name in self.schemes:
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_examples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_batches", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, model: DecomposedModel, batch: Any, importances: Float[Tensor, "*lead n"]) -> None:
        """Take in a batch, as a DataLoader yields it, with the importance of every node on it."""
        loss = MaskedLoss(model, as_batch(batch), self.loss)
        gates = importances.detach().clamp(0, 1)
        index = int(self.n_batches)
        found = {
            "complete": self._complete(loss, gates),
            "stochastic": self._stochastic(loss, gates, index),
            **self._adversarial(loss, gates, index),
        }
        for name, value in found.items():
            total = getattr(self, name)
            total += value * loss.size
        self.n_examples += loss.size
        self.n_batches += 1

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The losses by scheme."""
        return {name: (getattr(self, name) / self.n_examples).float() for name in self.schemes}

    @torch.no_grad()
    def _complete(self, loss: MaskedLoss, gates: Float[Tensor, "*lead n"]) -> float:
        deltas = gates.new_zeros(loss.model.n_sites)
        return float(loss.per_example(gates, deltas).mean())

    @torch.no_grad()
    def _stochastic(self, loss: MaskedLoss, gates: Float[Tensor, "*lead n"], index: int) -> float:
        game = Game([loss], [gates], "example_position")
        rng = generator(self.seed, "reconstruction-draws", index)
        return sum(float(game.loss(game.draw(rng, coins=False)).mean()) for _ in range(self.draws)) / self.draws

    def _adversarial(self, loss: MaskedLoss, gates: Float[Tensor, "*lead n"], index: int) -> dict[str, float]:
        game = Game([loss], [gates], "batch")
        found: dict[str, float] = {}
        pool: list[Tensor] = []
        costs = list(itertools.accumulate(map(passes_of, self.ascents.values()), initial=0))
        for (name, ascent), (before, after) in zip(self.ascents.items(), itertools.pairwise(costs), strict=True):
            rng = generator(self.seed, "reconstruction-attack", ascent.steps, index)
            with span(before / costs[-1], after / costs[-1]):
                worst = attack(game, ascent, rng, pool=pool)
            found[name] = worst.loss
            pool = [worst.entries]
        return found
