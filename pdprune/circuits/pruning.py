"""Learning which nodes to keep: gates descend, the adversary ascends (method.md, section 5)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import torch
from jaxtyping import Float
from lightning import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from pdprune.adversary.attack import Ascent, attack
from pdprune.adversary.game import Game, Scope
from pdprune.adversary.known_outputs import KnownOutputs
from pdprune.adversary.objective import MaskedLoss, Reference, ReferenceKind, masked_losses
from pdprune.adversary.opponent import Opponent, TrainingAdversary
from pdprune.batches import Batch, as_batch, as_batches
from pdprune.circuits.attack_journal import AttackJournal, Attacks
from pdprune.circuits.audit import Audit, require_ladder, require_strong
from pdprune.circuits.audit import audit as audit_circuit
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.exhaustive import can_be_exhaustive, select_exhaustively
from pdprune.circuits.gates import GateMap, HardConcrete, Heaviside, LeakyHardSigmoid, Sparsity
from pdprune.circuits.hypotheses import HypothesisSettings
from pdprune.circuits.journal import Journal, JournaledScorer, fingerprint_of
from pdprune.circuits.predictions import prediction_records
from pdprune.circuits.results import circuit_results, summary_of
from pdprune.circuits.schemes import Draws, SchemeName, Scorer, scorer
from pdprune.circuits.selection import (
    Report,
    Selected,
    Selection,
    select_for_loss,
    select_for_size,
    select_open_gates,
    silent,
)
from pdprune.circuits.warm_start import mean_importances
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.norms import NormScaling
from pdprune.decomposition.settings import Decomposition
from pdprune.errors import NonFiniteLossError, UserError, require_above, require_at_least
from pdprune.losses import LossFunction, loss_function, loss_name
from pdprune.precision import Compute, LossScale, computing_in, require_compute, require_float32_parameters
from pdprune.progress import telling
from pdprune.ranks import Ranks, leave_out_of_ddp, require_whole_model, save_checkpoint_alone
from pdprune.run_folder import RunFolder
from pdprune.seeding import generator
from pdprune.tracking import Results

log = logging.getLogger(__name__)

Search = Literal["gradient", "exact", "auto"]
GateMapName = Literal["leaky_hard", "hard_concrete", "heaviside"]
GATE_MAPS: dict[str, GateMap] = {
    "leaky_hard": LeakyHardSigmoid(),
    "hard_concrete": HardConcrete(),
    "heaviside": Heaviside(),
}


class CircuitData(Protocol):
    """What a pruner reads: three splits, as lists of batches (see `pdprune.tasks.TaskData`)."""

    def train_batches(self) -> Sequence[Any]: ...
    def select_batches(self) -> Sequence[Any]: ...


class AuditedData(CircuitData, Protocol):
    """What the command line's runs read besides."""

    name: str
    target: Any

    def held_out_batches(self) -> Sequence[Any]: ...
    def prompts(self, split: Any) -> Sequence[Any]: ...


@dataclass(frozen=True)
class AuditSettings:
    """The audit that a run ends with, and the longer one of the command `test`.

    Attributes:
        draws: random sources of the stochastic check.
        random_circuits: circuits of the same size, drawn at random, to compare with.
        ladder: budgets to attack with besides, in steps.
        second: whether an attack of another kind follows.
        test_ladder: the ladder of `test`, which always has the second attack.
        compute: what selection and audit compute matrix products in, whatever `trainer.precision` is: `float32`,
            `bfloat16` or `float16`.
        hypotheses: the circuit hypothesis tests; `test` removes every kept node in turn, whatever is said here.
    """

    draws: int = 32
    random_circuits: int = 2
    ladder: tuple[int, ...] = ()
    second: bool = False
    test_ladder: tuple[int, ...] = (20, 80, 320)
    compute: Compute = "float32"
    hypotheses: HypothesisSettings = field(default_factory=HypothesisSettings)

    def __post_init__(self) -> None:
        require_compute("audit: compute", self.compute)
        require_at_least(1, "audit: ", draws=self.draws)
        require_at_least(0, "audit: ", random_circuits=self.random_circuits)
        require_ladder(self.ladder, "audit: ladder")
        require_ladder(self.test_ladder, "audit: test_ladder")

    def longer(self) -> AuditSettings:
        """What the command `test` checks: the ladder of budgets, the second attack, every removal."""
        hypotheses = replace(self.hypotheses, removals=True)
        return replace(self, ladder=self.test_ladder, second=True, hypotheses=hypotheses)


@dataclass(frozen=True)
class Goal:
    """What is asked of a circuit: just one of three.

    Attributes:
        target_loss: the smallest circuit whose loss under the scheme stays within this.
        target_nodes: the best circuit of this many nodes (of node positions under `per_position`).
        coefficient: the price of keeping every node, in the loss's unit: `loss + coefficient · mean(sparsity)`.
    """

    target_loss: float | None = None
    target_nodes: int | None = None
    coefficient: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in asdict(self).items() if value is not None]
        if len(given) != 1:
            raise UserError(
                f"prune: got {' and '.join(given) or 'none'} of target_loss, target_nodes, coefficient; "
                "expected just one: how good, how small, or at what price"
            )
        if self.target_loss is not None and not self.target_loss > 0:
            raise UserError(f"target_loss: got {self.target_loss}; expected more than 0")
        if self.coefficient is not None and self.coefficient < 0:
            raise UserError(f"coefficient: got {self.coefficient}; expected 0 or more")

    def check_fits(self, n_nodes: int) -> None:
        if self.target_nodes is not None and not 0 <= self.target_nodes <= n_nodes:
            raise UserError(f"target_nodes: got {self.target_nodes}; expected at most the {n_nodes} nodes there are")


@dataclass(frozen=True)
class Learning:
    """How gates are learned.

    Attributes:
        gate_map: `leaky_hard`, `hard_concrete` or `heaviside`.
        sparsity: the sparsity term.
        lr: of Adam on the gates' parameters.
        dual_rate: how fast the price of keeping follows the goal: its logarithm moves by at most this a step.
        dual_gain: how much its logarithm answers at once.
        aim: share of the target loss that learning holds the loss at; selection then has room.
    """

    gate_map: GateMapName = "leaky_hard"
    sparsity: Sparsity = field(default_factory=Sparsity)
    lr: float = 0.05
    dual_rate: float = 0.1
    dual_gain: float = 2.0
    aim: float = 0.9

    def __post_init__(self) -> None:
        require_above(0, "learning: ", lr=self.lr, aim=self.aim)
        require_at_least(0, "learning: ", dual_rate=self.dual_rate, dual_gain=self.dual_gain)
        if self.gate_map not in GATE_MAPS:
            raise UserError(f"gate_map: got {self.gate_map!r}; expected one of {', '.join(GATE_MAPS)}")


class CircuitPruner(LightningModule):
    """Finds the few nodes that a behaviour needs.

    Target and components are frozen. In manual optimisation each batch is one *keep step*: the adversary
    (`opponent.py`) climbs on its sources against detached gates, then the gates descend against its detached choice. So
    `trainer.global_step` counts keep steps. After training, `select` turns gates into a binary circuit.

    On several ranks a batch is shared out, and all hold the same gates, sources and price. The first one alone selects
    and audits; the others are done then.

    Args:
        decomposition: the target and its components; or the decomposed model itself, from Python.
        loss: `kl`, `ce`, `mse`, or a function (see `pdprune.losses`).
        scheme: `adversarial`, `stochastic` or `complete`.
        reference: what ablated parts are replaced by: `zero`, `mean`, `position_mean` or `resample`.
        scope: what one source is shared by: `batch`, `universal`, `position`, `example` or `example_position`.
        target_loss: find the smallest circuit whose loss under the scheme stays within this.
        target_nodes: find the best circuit of this many nodes.
        coefficient: or the circuit at this price of keeping everything.
        per_position: a gate for every position, for circuits of one prompt or of aligned prompts.
        warm_start: gates start at the decomposition's causal importances, averaged over the tokens of the train split,
            instead of wide open (method.md, section 5: VPD's recipe).
        search: how the circuit is searched for: `gradient` learns gates; `exact` scores all circuits of a small graph;
            `auto` does so up to 12 nodes.
        learning: gate map, sparsity term, and how fast.
        adversary: how the adversary climbs in training.
        draws: how stochastic sources are drawn.
        attack: the adversary's budget in selection, the same as the audit's.
        selection: how gates become a circuit.
        audit: the checks that a run ends with.
        norm_scales: while gates are learned and the circuit is chosen, the target's norms are `live`, or `frozen`: each
            multiplies by what it does on the unablated run on the same input. The audit, and whatever else scores a
            circuit, is live always.
        seed: decides everything.
    """

    strict_loading = False  # checkpoints hold the gates, not the model: see on_save_checkpoint
    theta: nn.Parameter
    opponent: Opponent
    log_price: Tensor
    openness: Float[Tensor, "*lead n"]

    def __init__(
        self,
        decomposition: Decomposition | DecomposedModel,
        loss: str | LossFunction = "kl",
        scheme: SchemeName = "adversarial",
        reference: ReferenceKind = "zero",
        scope: Scope = "batch",
        target_loss: float | None = None,
        target_nodes: int | None = None,
        coefficient: float | None = None,
        per_position: bool = False,
        warm_start: bool = False,
        search: Search = "gradient",
        learning: Learning = Learning(),
        adversary: TrainingAdversary = TrainingAdversary(),
        draws: Draws = Draws(),
        attack: Ascent = Ascent(),
        selection: Selection = Selection(),
        audit: AuditSettings = AuditSettings(),
        norm_scales: NormScaling = "live",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        loss_function(loss)
        _check_choice("scheme", scheme, SchemeName)
        _check_choice("search", search, Search)
        _check_choice("norm_scales", norm_scales, NormScaling)
        self.goal = Goal(target_loss, target_nodes, coefficient)
        self.decomposition = decomposition
        self.loss = loss
        self.scheme: SchemeName = scheme
        self.reference_kind: ReferenceKind = reference
        self.scope: Scope = scope
        self.per_position = per_position
        self.warm_start = warm_start
        self.search = search
        self.learning = learning
        self.adversary = adversary
        self.draws = draws
        self.attack = attack
        self.selection = selection
        self.audit = audit
        self.norm_scales: NormScaling = norm_scales
        self.seed = seed
        self.gate_map = GATE_MAPS[learning.gate_map]
        self.model = decomposition if isinstance(decomposition, DecomposedModel) else decomposition.load()
        self.selected: Selected | None = None
        self.journal: Journal | None = None
        self.attack_journal = AttackJournal()
        self.save_journal: Callable[[], None] | None = None
        self._found_elsewhere: Circuit | None = None
        self._scored_all = False
        self._reference: Reference | None = None
        self.known_outputs: KnownOutputs | None = None
        self._loss_scale = LossScale()
        if scheme == "adversarial" and adversary.mode != "fresh" and scope in ("example", "example_position"):
            raise UserError(
                f"adversary: mode {adversary.mode!r} carries sources from batch to batch; scope {scope!r} cannot"
            )

    # -- setting up ------------------------------------------------------------------------------------------------

    def prepare(self, data: CircuitData, reference: Reference | None = None) -> None:
        """Measure what training reads off the data: the reference, unless it is known, and the number of positions.

        Raises:
            UserError: if the data do not fit what was asked for.
        """
        batches = as_batches(data.train_batches())
        first = MaskedLoss(self.model, batches[0], self.loss)
        self._reference = reference or Reference.measure(self.reference_kind, self.model, batches, self.seed)
        shape = self._gate_shape(first)
        self.goal.check_fits(shape.numel())
        gates = torch.ones(shape, device=self.model.delta_sites.device)
        lead = Game([first], [gates], self.scope).lead if self.adversary.mode != "fresh" else ()
        theta = self._first_parameters(shape, batches)
        self.theta = nn.Parameter(theta.clone())
        self.opponent = Opponent(self.adversary, lead, self.model.n_nodes + self.model.n_sites, self.seed)
        self.register_buffer("openness", self.gate_map.gates(theta) if self.warm_start else torch.ones_like(theta))
        self.register_buffer("log_price", torch.zeros((), device=self.model.delta_sites.device))

    def _first_parameters(self, shape: torch.Size, batches: Sequence[Batch]) -> Float[Tensor, "*lead n"]:
        if self.warm_start:
            return self.gate_map.at(mean_importances(self.model, batches, self.per_position))
        return self.gate_map.initial(tuple(shape), generator(self.seed, "gates")).to(self.model.delta_sites.device)

    def _gate_shape(self, loss: MaskedLoss) -> torch.Size:
        if not self.per_position:
            return torch.Size([self.model.n_nodes])
        if len(loss.leading_shape) != 2:
            raise UserError(
                f"per_position: the sites' inputs have leading shape {list(loss.leading_shape)}; expected [B, T]"
            )
        return torch.Size([loss.leading_shape[1], self.model.n_nodes])

    def setup(self, stage: str) -> None:
        """Lightning's hook: the data are there now."""
        if self._trainer is not None:
            require_whole_model(self.trainer)
            require_float32_parameters(self.trainer)
            self._loss_scale = LossScale.of(self.trainer)
        leave_out_of_ddp(self, self.model)
        if self._reference is None:
            data = getattr(self.trainer, "datamodule", None)
            assert data is not None, "a CircuitPruner reads its splits from a LightningDataModule"
            self.prepare(data)

    def on_train_start(self) -> None:
        """Lightning's hook: it is known now how long the run is, and training's precision holds."""
        self.known_outputs = self.answers_worth_knowing()

    def on_train_end(self) -> None:
        """Lightning's hook: what follows asks for other examples."""
        self.known_outputs = None

    def answers_worth_knowing(self) -> KnownOutputs | None:
        """What the target answers to the training examples, where steps ask for it more often than that takes.

        Each rank works out all of it: on N ranks it pays from N passes over the data on.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self.loss not in ("kl", "mse"):
            return None
        if passes_over_data(self.trainer) <= Ranks.of(self.trainer).count:
            return None
        quiet = not cast(Any, self.trainer).log_every_n_steps  # from Python
        with telling("target", quiet) as tell, self.trainer.precision_plugin.forward_context():
            tell("its answers to the training examples")
            return KnownOutputs.measure(self.model, as_batches(data.train_batches()), reached=tell.reach)

    @property
    def reference(self) -> Reference:
        """What ablated parts are replaced by, as `prepare` measured it."""
        assert self._reference is not None, "prepare first"
        return self._reference

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the gates' parameters; nothing else learns."""
        return torch.optim.Adam([self.theta], lr=self.learning.lr, betas=(0.9, 0.98))

    # -- one keep step ---------------------------------------------------------------------------------------------

    def training_step(self, raw: Any, index: int) -> None:
        """The adversary ascends, the gates descend, and the price of a node follows the objective."""
        step = self.global_step
        loss = self.shared_loss(as_batch(raw), step)
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        data_loss = self.play(loss, step, self.manual_backward)
        optimizer.step()
        self.after_step()
        self._log_step(loss, data_loss, step)

    def play(self, loss: MaskedLoss, step: int, backward: Callable[[Tensor], None]) -> Float[Tensor, ""]:
        """What happens between two steps of the optimiser: the adversary's ascent, and the gradients of the gates.

        Args:
            loss: of the training batch.
            step: the keep step.
            backward: leaves the gradients of the objective on the gates' parameters, and on sources that want one.

        Returns:
            the loss that the gates met.
        """
        gates = self.noisy_gates(step)
        entries = self.sources(self.game(loss, gates.detach()), step)
        game = Game([loss], [gates], self.scope)
        data_loss = game.mean_loss(entries)
        backward(self.objective(data_loss, float(data_loss.detach()), step))
        if entries.grad is not None:
            self.opponent.learn(game, step, game.gradient(entries.grad))
        return data_loss.detach()

    def noisy_gates(self, step: int) -> Float[Tensor, "*lead n"]:
        """The gates as a keep step meets them: random ones where the gate map samples."""
        return self.gate_map.gates(self.theta, generator(self.seed, "gate-noise", step))

    def game(self, loss: MaskedLoss, gates: Float[Tensor, "*lead n"]) -> Game:
        """What the adversary plays against gates on a training batch."""
        return Game([loss], [gates], self.scope, self.adversary.max_ablated)

    def objective(self, data_loss: Float[Tensor, ""], met: float, step: int) -> Float[Tensor, ""]:
        """What the gates descend on: the loss, of which `met` is the value, and the price of what is kept."""
        price = self.learning.sparsity(self.gate_map.presence(self.theta), self.progress)
        total = data_loss * self._loss_weight() + self._price(met) * price
        self._stop_if_not_finite(total, step)
        return total

    def after_step(self) -> None:
        """What follows a step of the optimiser."""
        self._loss_scale.after_step()
        self._remember_gates()
        self.selected, self.journal, self.attack_journal = None, None, AttackJournal()

    def shared_loss(self, batch: Batch, step: int) -> MaskedLoss:
        """The loss of a training batch, of which `batch` is this rank's share."""
        assert self._reference is not None
        ranks = Ranks.of(self.trainer)
        reference = self._reference.on(self.model, batch, step, ranks)
        return MaskedLoss(
            self.model,
            batch,
            self.loss,
            reference,
            ranks=ranks,
            scale=self._loss_scale,
            norm_scales=self.norm_scales,
            target_output=None if self.known_outputs is None else self.known_outputs.on(batch),
        )

    def sources(self, game: Game, step: int) -> Float[Tensor, "*lead E"]:
        """What is done to the not-kept nodes at this keep step: by the adversary's choice, by chance, or ablation."""
        match self.scheme:
            case "complete":
                return torch.zeros(game.free.shape, device=game.free.device)
            case "stochastic":
                return self.draws.entries(game, generator(self.seed, "draw", step))
            case "adversarial":
                return self.opponent.met_by_gates(game, step)

    @property
    def progress(self) -> float:
        """The share of training that is done."""
        return self.global_step / max(1, int(self.trainer.max_steps))

    def _loss_weight(self) -> float:
        return 1.0 if self.goal.target_loss is None else 1 / self.goal.target_loss

    def _price(self, data_loss: float) -> float:
        """Dual ascent: nodes get dearer while the loss has room, or while too many are kept.

        The logarithm of the price integrates how far the goal is missed, and answers at once in proportion to it, which
        keeps price and gates from chasing one another in circles.
        """
        if self.goal.coefficient is not None:
            return self.goal.coefficient
        if self.goal.target_loss is not None:
            slack = 1 - data_loss / (self.learning.aim * self.goal.target_loss)
        else:
            assert self.goal.target_nodes is not None
            slack = float(self.gates().sum()) / max(1, self.goal.target_nodes) - 1
        slack = max(-1.0, min(1.0, slack))
        self.log_price += self.learning.dual_rate * slack
        return math.exp(float(self.log_price) + self.learning.dual_gain * slack)

    def _remember_gates(self) -> None:
        """Hold θ in its bounds, and average the gates over the last steps: how open each has been is its rank."""
        with torch.no_grad():
            self.theta.clamp_(*self.gate_map.bounds())
            self.openness.lerp_(self.gate_map.gates(self.theta), 1 - RANKING_MEMORY)

    def gates(self) -> Float[Tensor, "*lead n"]:
        """The gates as they are now, without noise."""
        with torch.no_grad():
            return self.gate_map.gates(self.theta)

    def _stop_if_not_finite(self, total: Tensor, step: int) -> None:
        if bool(torch.isfinite(total)):
            return
        raise NonFiniteLossError(f"training: the loss is {float(total)} at keep step {step}; expected a finite number")

    def _log_step(self, loss: MaskedLoss, data_loss: Tensor, step: int) -> None:
        if not cast(Any, self.trainer).log_every_n_steps:  # from Python: nobody reads along
            return
        values = self.values_at(loss, data_loss, step)
        unseen = {name: values.pop(name) for name in ("gate_sum", "price")}
        self.log_dict(values, prog_bar=True, batch_size=loss.size)
        self.log_dict(unseen, batch_size=loss.size)

    def values_at(self, loss: MaskedLoss, data_loss: Tensor, step: int) -> dict[str, Tensor | float]:
        """What is logged of a keep step."""
        gates = self.gates()
        values = {"loss": data_loss, "kept": (gates > 0.5).sum().float()}
        values |= {"gate_sum": gates.sum(), "price": self.log_price.exp()}
        return values | (self._scheme_losses(loss, (gates > 0.5).float(), step) if step % DISPLAY_EVERY == 0 else {})

    def _scheme_losses(self, loss: MaskedLoss, keep: Float[Tensor, "*lead n"], step: int) -> dict[str, float]:
        """What the open gates alone cost on one batch, under the two schemes that need no attack."""
        game = Game([loss], [keep], self.scope)
        with torch.no_grad():
            drawn = self.draws.entries(game, generator(self.seed, "display", step))
            complete, stochastic = game.mean_loss(torch.zeros_like(drawn)), game.mean_loss(drawn)
        return {"complete": float(complete), "stochastic": float(stochastic)}

    # -- from gates to a circuit -----------------------------------------------------------------------------------

    def select(self, data: CircuitData, report: Report = silent) -> Selected:
        """The circuit, chosen on the select split (see `selection.py`); deterministic, whatever ran before."""
        return self.select_on(self.select_losses(data), report)

    def select_losses(self, data: CircuitData) -> list[MaskedLoss]:
        """The losses that the circuit is chosen on."""
        batches = as_batches(data.select_batches())
        return masked_losses(self.model, batches, self.loss, self.reference, self.norm_scales)

    def select_on(self, losses: Sequence[MaskedLoss], report: Report = silent) -> Selected:
        """The circuit, chosen on losses that are at hand."""
        self._scored_all = self.exhaustive(losses)
        if self._scored_all:
            self.selected = select_exhaustively(
                losses,
                scheme=self.scheme,
                scope=self.scope,
                draws=self.draws,
                max_ablated=self.adversary.max_ablated,
                **asdict(self.goal),
            )
        else:
            self.selected = self._select_by_ranking(losses, report)
        return self.selected

    def exhaustive(self, losses: Sequence[MaskedLoss]) -> bool:
        """Whether all circuits are scored, and no gates are needed."""
        if self.search == "exact" and self.per_position:
            raise UserError("search 'exact': circuits per position have too many gates; use 'gradient'")
        automatic = self.search == "auto" and not self.per_position
        return self.search == "exact" or (automatic and can_be_exhaustive(losses, self.scheme, self.scope, self.draws))

    def _select_by_ranking(self, losses: Sequence[MaskedLoss], report: Report) -> Selected:
        ranking = self.openness
        scores = self._journaled(self.scorer(losses), ranking, losses)
        if self.goal.target_loss is not None:
            return select_for_loss(
                ranking,
                scores,
                self.goal.target_loss,
                scheme=self.scheme,
                selection=self.selection,
                report=report,
            )
        if self.goal.target_nodes is not None:
            return select_for_size(ranking, scores, self.goal.target_nodes, selection=self.selection, report=report)
        return select_open_gates(self.gates(), scores)

    def _journaled(self, scores: Scorer, ranking: Tensor, losses: Sequence[MaskedLoss]) -> Scorer:
        """The scorer with what an earlier, stopped selection of the same circuit was told."""
        save = self._saves_journals()
        if save is None:
            return scores
        settings = [getattr(self, name) for name in ANSWERS_FOLLOW_FROM]
        about = fingerprint_of(ranking, losses, self.loss, settings, self.adversary.max_ablated, self.audit.compute)
        if self.journal is None or self.journal.about != about:
            self.journal = Journal(about)
        return JournaledScorer(scores, self.journal, save)

    def _saves_journals(self) -> Callable[[], None] | None:
        """What puts a selection's answers and an audit's attacks where they outlive the process.

        None where there is no such place, as from Python, and with a loss of the user's own, which cannot be told from
        another.
        """
        return self.save_journal if isinstance(self.loss, str) else None

    def scorer(self, losses: Sequence[MaskedLoss]) -> Scorer:
        """The scheme that the gates learn under, as a judge of binary circuits."""
        return scorer(
            self.scheme,
            losses,
            scope=self.scope,
            draws=self.draws,
            ascent=self.attack,
            max_ablated=self.adversary.max_ablated,
            seed=self.seed,
        )

    def take(self, circuit: Circuit) -> None:
        """Go on with a circuit that was found elsewhere, in place of one that is selected here.

        Raises:
            UserError: it is a circuit of another model.
        """
        circuit.check_fits(self.model)
        self._found_elsewhere = circuit
        self.selected = Selected(circuit.keep, math.nan, None)

    def circuit(self, **how: Any) -> Circuit:
        """The selected circuit, with what it takes to make it again; `how` adds attributes of `Circuit`."""
        assert self.selected is not None, "select first"
        how |= {
            "loss": loss_name(self.loss),
            "reference": self.reference_kind,
            "scope": self.scope,
            "target_loss": self.goal.target_loss,
            "target_nodes": self.goal.target_nodes,
            "reached": self.selected.reached,
            "seed": self.seed,
        }
        if self._found_elsewhere is not None:
            return replace(self._found_elsewhere, **how)
        gates = None if self._scored_all else self.gates()
        return Circuit.of(self.model, self.selected.keep, gates, scheme=self.scheme, **how)

    # -- what the command line asks for ----------------------------------------------------------------------------

    def require_finishable(self) -> None:
        """Refuse, before anything is learned, what `finish` would refuse.

        Raises:
            UserError: an attack that is too weak for an audit.
        """
        require_strong(self.attack)

    def finish(self, datamodule: AuditedData, folder: Path) -> None:
        """Write the circuit and its audit into the run folder; the last thing that `fit` does.

        The circuit goes into the checkpoint as well, so that a run killed in its audit need not choose again, and the
        other commands read it from there. Only the first rank does this, without a word to the others.
        """
        if not self.trainer.is_global_zero:
            return
        self.to(self.trainer.strategy.root_device)  # which Lightning has just moved it away from
        with computing_in(self.audit.compute, self.device):
            self.save_journal = partial(save_checkpoint_alone, self.trainer, RunFolder(folder).last)
            if self.selected is None:
                self._select_aloud(datamodule)
                self.save_journal()
            self.write_audited(datamodule, folder, self.audit)

    def _select_aloud(self, data: CircuitData) -> None:
        self.select_on_aloud(self.select_losses(data))

    def select_on_aloud(self, losses: Sequence[MaskedLoss]) -> None:
        """Choose the circuit, and tell how that goes."""
        with telling("selection") as tell:
            self.select_on(losses, lambda doing, scored, kept: tell(f"{doing}, {scored} circuits scored, {kept} kept"))

    def write_audited(self, data: AuditedData, folder: Path, settings: AuditSettings) -> Audit:
        """Audit on the held-out split and write both files, `audit.json` last: where it is, all is."""
        circuit = self.circuit(task=data.name, config=self.resolved_config())
        with telling("audit") as tell:
            found = audit_circuit(
                self.model,
                circuit,
                data.held_out_batches(),
                loss=self.loss,
                reference=cast(Reference, self._reference),
                scope=self.scope,
                target_loss=self.goal.target_loss,
                steps=self.attack.steps,
                step_size=self.attack.step_size,
                restarts=self.attack.restarts,
                ladder=settings.ladder,
                second_attack=settings.second,
                draws=settings.draws,
                random_circuits=settings.random_circuits,
                hypotheses=settings.hypotheses,
                max_ablated=self.adversary.max_ablated,
                held_out=True,
                seed=self.seed,
                attacks=self._attacks(),
                progress=tell,
            )
        circuit = replace(circuit, worst_source=found.worst_source, worst_source_delta=found.worst_source_delta)
        circuit.save(folder)
        found.save(folder)
        if self.attack_journal.found and self.save_journal is not None:
            self.attack_journal = AttackJournal()
            self.save_journal()  # without what the audit needs no more
        return found

    def _attacks(self) -> Attacks:
        """Those of an audit, known again if an earlier, stopped one made them."""
        save = self._saves_journals()
        return Attacks() if save is None else Attacks(self.attack_journal, save)

    def resolved_config(self) -> dict[str, Any] | None:
        """What the run folder says that this run is; None where there is none."""
        return RunFolder(self.trainer.default_root_dir).config

    def _keep(self) -> Float[Tensor, "*lead n"]:
        """The circuit, or before there is one the gates that are open."""
        return self.selected.keep.to(self.theta.device).float() if self.selected else (self.gates() > 0.5).float()

    def validation_step(self, raw: Any, index: int) -> None:
        """The circuit's loss on a batch of the select split, under each scheme."""
        batch = as_batch(raw)
        values = self.validated(batch, index)
        self.log_dict({f"select/{name}": value for name, value in values.items()}, batch_size=batch.size)

    def validated(self, batch: Batch, index: int) -> dict[str, float]:
        """What `validation_step` logs."""
        keep = self._keep()
        with computing_in(self.audit.compute, self.device):
            loss = MaskedLoss(self.model, batch, self.loss, self.reference.on(self.model, batch, index))
            worst = attack(Game([loss], [keep], self.scope), self.attack, generator(self.seed, "validate", index))
            return self._scheme_losses(loss, keep, index) | {"adversarial": worst.loss, "kept": float(keep.sum())}

    def test_step(self, raw: Any, index: int) -> None:
        """Nothing by itself: the audit, at the end, needs the whole split."""

    def on_test_epoch_end(self) -> None:
        """The audit with its ladder of budgets and its second attack, on the first rank; the others wait."""
        if not self.trainer.is_global_zero:
            return
        data = cast(Any, self.trainer).datamodule
        with computing_in(self.audit.compute, self.device):
            if self.selected is None:
                self._select_aloud(data)
            folder = Path(self.trainer.default_root_dir)
            found = self.write_audited(data, folder, self.audit.longer())
        summary = {f"test/{name}": float(value) for name, value in summary_of(found).items() if value is not None}
        self.log_dict(summary, rank_zero_only=True)

    def results(self, folder: Path) -> Results:
        """What experiment trackers show of a run folder that holds the circuit and its audit."""
        return circuit_results(folder)

    def predict_step(self, raw: Any, index: int) -> list[dict[str, Any]]:
        """What the target and the circuit alone answer, prompt by prompt; the first rank answers them all."""
        if not self.trainer.is_global_zero:
            return []
        data = cast(Any, self.trainer).datamodule
        assert self._reference is not None
        batch = as_batch(raw)
        prompts = data.prompts("held_out")[index * data.audit_batch_size :][: batch.size]
        deltas = torch.zeros(self.model.n_sites, device=self.theta.device)
        with computing_in(self.audit.compute, self.device):
            if self.selected is None:
                self._select_aloud(data)
            loss = MaskedLoss(self.model, batch, self.loss, self._reference.on(self.model, batch, index))
            with torch.no_grad():
                circuit_output = loss.output(self._keep(), deltas)
        return prediction_records(prompts, batch, loss.target_output, circuit_output, data.target.tokenizer)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the model out, which the config makes again, and say which one it was."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("model.")}
        checkpoint["pdprune"] = self.identity()
        if self.selected is not None:
            checkpoint["selected"] = asdict(self.selected)
        elif self.journal is not None:
            checkpoint["selection"] = asdict(self.journal)
        if self.attack_journal.found:
            checkpoint["audit"] = vars(self.attack_journal)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse gates of another model.

        Raises:
            UserError: if target, components or the gates' shape are not those of this run.
        """
        require_identity(checkpoint, self.identity())
        if "selected" in checkpoint:
            self.selected = Selected(**checkpoint["selected"])
        if "selection" in checkpoint:
            self.journal = Journal(**checkpoint["selection"])
        if "audit" in checkpoint:
            self.attack_journal = AttackJournal(**checkpoint["audit"])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must be of."""
        return {
            "target": self.model.target_sha256,
            "decomposition": self.model.decomposition_sha256,
            "gates": list(self.theta.shape),
            "gate_map": self.learning.gate_map,
        }


def passes_over_data(trainer: Trainer) -> float:
    """How often a run meets each training example; 0 where the loader does not say how many batches a pass has."""
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs not in (None, -1):
        steps = min(steps, trainer.max_epochs * trainer.num_training_batches)
    try:
        return steps / max(1, len(cast(Any, trainer.train_dataloader)))  # an epoch may be a part of a pass
    except TypeError:
        return 0.0


def require_identity(checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of something else.

    Raises:
        UserError: what it was made for is not `own`.
    """
    found = checkpoint.get("pdprune")
    if not isinstance(found, Mapping):
        raise UserError("checkpoint: it holds no gates; expected the checkpoint of a CircuitPruner")
    for name in (*own, *(found.keys() - own.keys())):
        if found.get(name) != own.get(name):
            raise UserError(
                f"checkpoint: its {name} is {found.get(name)}, this run's is {own.get(name)}; "
                "expected a checkpoint of the same target, decomposition and kind of gates"
            )


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name}: got {value!r}; expected one of {', '.join(get_args(choices))}")


RANKING_MEMORY = 0.97
"""What a node is ranked by is its gate averaged over about the last `1 / (1 − this)` keep steps."""

ANSWERS_FOLLOW_FROM = "scheme", "scope", "norm_scales", "reference_kind", "draws", "attack", "selection", "goal", "seed"
"""Settings that decide, with the data, what a selection asks and is told."""

DISPLAY_EVERY = 10
"""Keep steps between two looks at the loss under each scheme."""
