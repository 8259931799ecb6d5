"""Several prunings at once, from one loop over the same batches: the size of a circuit against its worst case."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss, Reference
from pdprune.adversary.opponent import as_one
from pdprune.adversary.several import SeveralCircuits
from pdprune.batches import as_batch
from pdprune.circuits.attack_journal import AttackJournal
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.circuits.frontier_curve import Frontier, level_folder, load_level
from pdprune.circuits.journal import Journal
from pdprune.circuits.pruning import (
    AuditedData,
    AuditSettings,
    CircuitData,
    CircuitPruner,
    Selected,
    require_identity,
)
from pdprune.circuits.results import frontier_results
from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.settings import Decomposition
from pdprune.errors import UserError
from pdprune.precision import computing_in
from pdprune.progress import part, telling
from pdprune.ranks import leave_out_of_ddp, reduced_at_the_end, save_checkpoint_alone
from pdprune.run_folder import RunFolder
from pdprune.tracking import Results


@dataclass(frozen=True)
class Levels:
    """What is asked of the circuits of a frontier: several of one kind of goal, each with every seed.

    Attributes:
        target_loss: find the smallest circuit within each of these.
        target_nodes: or the best circuit of each of these numbers of nodes.
        coefficient: or the circuit at each of these prices of keeping everything.
        seeds: of gates and adversary; by default the run's. The batches are the same for all.
    """

    target_loss: tuple[float, ...] = ()
    target_nodes: tuple[int, ...] = ()
    coefficient: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("target_loss", "target_nodes", "coefficient") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                f"levels: got {' and '.join(given) or 'none'} of target_loss, target_nodes, coefficient; "
                "expected a list of just one of them"
            )
        for field in fields(self):
            values = getattr(self, field.name)
            if len(set(values)) < len(values):
                raise UserError(f"levels: {field.name} is {list(values)}; expected each value once")

    def each(self, seed: int) -> Iterator[Level]:
        """The levels one by one, in a run of this seed."""
        for goal in ("target_loss", "target_nodes", "coefficient"):
            for own, value in itertools.product(self.seeds or (seed,), getattr(self, goal)):
                name = f"{goal}-{value}" + (f"-seed-{own}" if len(self.seeds) > 1 else "")
                yield Level(name, own, **{goal: value})


@dataclass(frozen=True)
class Level:
    """One of them, with its name."""

    name: str
    seed: int
    target_loss: float | None = None
    target_nodes: int | None = None
    coefficient: float | None = None


class FrontierPruner(LightningModule):
    """Finds circuits of several sizes in one run.

    A level is a `CircuitPruner` of its own: gates, adversary and price. They learn side by side on the same batches, on
    which the target runs once. On a CPU a level takes its steps one after another, and ends, bit for bit, as a single
    run with its goal and seed; on a GPU the levels' masks run as one batch where the scope is `batch` (or `universal`).

    Then each level's circuit is selected and audited as a single one is, all with the same budget and on the same data.

    Args:
        decomposition: the target and its components; or the decomposed model itself, from Python.
        levels: what is asked of each circuit.
        seed: decides everything.
        audit: the checks that the run ends with, for each level.
        settings: all others of a `CircuitPruner`, the same for all levels.
    """

    strict_loading = False  # checkpoints hold the gates, not the model

    def __init__(
        self,
        decomposition: Decomposition | DecomposedModel,
        levels: Levels,
        seed: int = 0,
        audit: AuditSettings = AuditSettings(),
        **settings: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.audit = audit
        self.asked = list(levels.each(seed))
        # What needs no network is looked at before one is loaded.
        model = decomposition if isinstance(decomposition, DecomposedModel) else decomposition.load()
        self.pruners = nn.ModuleList(
            CircuitPruner(
                model,
                target_loss=level.target_loss,
                target_nodes=level.target_nodes,
                coefficient=level.coefficient,
                seed=level.seed,
                audit=audit,
                **settings,
            )
            for level in self.asked
        )
        self.model_of_all = (model,)  # a module's attribute would be a part of it once more

    @property
    def model(self) -> DecomposedModel:
        """The target and its components."""
        return self.model_of_all[0]

    @property
    def levels(self) -> dict[str, CircuitPruner]:
        """What prunes each level, by name."""
        pruners = (cast(CircuitPruner, pruner) for pruner in self.pruners)
        return {level.name: pruner for level, pruner in zip(self.asked, pruners, strict=True)}

    # -- setting up ------------------------------------------------------------------------------------------------

    def prepare(self, data: CircuitData) -> None:
        """Measure what training reads off the data, for all levels; what only seeds decide, once a seed.

        Raises:
            UserError: if the data do not fit what was asked for.
        """
        references: dict[int | None, Reference] = {}
        for pruner in self.levels.values():
            draws = pruner.seed if pruner.reference_kind == "resample" else None
            pruner.prepare(data, references.get(draws))
            references[draws] = pruner.reference

    def setup(self, stage: str) -> None:
        """Lightning's hook: the data are there now."""
        if not self.is_prepared:
            data = getattr(self.trainer, "datamodule", None)
            assert data is not None, "a FrontierPruner reads its splits from a LightningDataModule"
            self.prepare(data)
        for pruner in self.levels.values():
            pruner.trainer = self.trainer
            pruner.setup(stage)
        leave_out_of_ddp(self, self.model)

    def on_train_start(self) -> None:
        """What the target answers is the same for all levels."""
        known = next(iter(self.levels.values())).answers_worth_knowing()
        for pruner in self.levels.values():
            pruner.known_outputs = known

    def on_train_end(self) -> None:
        """What follows asks for other examples."""
        for pruner in self.levels.values():
            pruner.known_outputs = None

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` was called."""
        return all(hasattr(pruner, "theta") for pruner in self.levels.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam on the parameters of all levels' gates, which it treats one by one as single runs would."""
        singles = [pruner.configure_optimizers() for pruner in self.levels.values()]
        thetas = [parameter for single in singles for parameter in single.param_groups[0]["params"]]
        return torch.optim.Adam(thetas, **{name: singles[0].defaults[name] for name in ("lr", "betas")})

    # -- one keep step ---------------------------------------------------------------------------------------------

    def training_step(self, raw: Any, index: int) -> None:
        """A keep step of every level on the same batch; one step of the optimiser."""
        step = self.global_step
        batch = as_batch(raw)
        shared: dict[int, MaskedLoss] = {}
        for pruner in self.levels.values():
            if id(pruner.reference) not in shared:
                shared[id(pruner.reference)] = pruner.shared_loss(batch, step)
        losses = [shared[id(pruner.reference)] for pruner in self.levels.values()]

        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        with reduced_at_the_end(self.trainer, [pruner.theta for pruner in self.levels.values()]):
            met = self._play(losses, step)
        optimizer.step()
        for pruner in self.levels.values():
            pruner.after_step()
        self._log_step(losses, met, step)

    def _play(self, losses: Sequence[MaskedLoss], step: int) -> list[Tensor]:
        """What `CircuitPruner.play` does, for all levels: the loss that the gates of each have met."""
        met: list[Tensor] = []
        playing = zip(self.levels.values(), losses, strict=True)
        for loss, group in itertools.groupby(playing, key=lambda pair: pair[1]):
            pruners = [pruner for pruner, _ in group]
            at_once = self._at_once(pruners[0], loss)
            for first in range(0, len(pruners), at_once):
                together = pruners[first : first + at_once]
                if len(together) > 1:
                    met += play_together(together, loss, step, self.manual_backward)
                else:
                    met.append(together[0].play(loss, step, self.manual_backward))
        return met

    def _at_once(self, pruner: CircuitPruner, loss: MaskedLoss) -> int:
        """How many levels to run as one batch; on a CPU one after another is as fast, and keeps the bits."""
        if loss.model.delta_sites.device.type == "cpu":
            return 1
        return pruner.game(loss, pruner.gates()).at_once()

    def _log_step(self, losses: Sequence[MaskedLoss], met: Sequence[Tensor], step: int) -> None:
        if not cast(Any, self.trainer).log_every_n_steps:
            return
        found = [
            pruner.values_at(loss, data_loss, step)
            for pruner, loss, data_loss in zip(self.levels.values(), losses, met, strict=True)
        ]
        size = losses[0].size
        named = zip(self.levels, found, strict=True)
        self.log_dict(
            {f"{name}/{level}": value for level, values in named for name, value in values.items()}, batch_size=size
        )
        kept = [float(values["kept"]) for values in found]
        shown = {"loss": float(sum(met)) / len(met), "least_kept": min(kept), "most_kept": max(kept)}
        self.log_dict(shown, prog_bar=True, batch_size=size)

    # -- what the command line asks for ----------------------------------------------------------------------------

    def select(self, data: CircuitData) -> None:
        """Choose the circuit of every level that has none yet, on the select split."""
        self._select(data, after_each=lambda: None)

    def _select(self, data: CircuitData, after_each: Any) -> None:
        losses: dict[int, list[MaskedLoss]] = {}
        with telling("frontier") as tell:
            for index, (name, pruner) in enumerate(self.levels.items()):
                if pruner.selected is not None:
                    continue
                tell(f"{name}, {index + 1} of {len(self.asked)}")
                if id(pruner.reference) not in losses:
                    losses[id(pruner.reference)] = pruner.select_losses(data)
                with part(index, len(self.asked)):
                    pruner.select_on_aloud(losses[id(pruner.reference)])
                after_each()

    def require_finishable(self) -> None:
        """As of a single run; the attack is the same for all levels."""
        next(iter(self.levels.values())).require_finishable()

    def finish(self, datamodule: AuditedData, folder: Path) -> None:
        """Write the circuits, their audits and the frontier into the run folder; the last thing that `fit` does.

        Each circuit goes into the checkpoint as it is chosen, and an audit that is in the folder is not done again, so
        that a run that is killed here goes on where it was. Only the first rank does this.
        """
        if not self.trainer.is_global_zero:
            return
        self.to(self.trainer.strategy.root_device)  # which Lightning has just moved it away from
        with computing_in(self.audit.compute, self.device):
            save = partial(save_checkpoint_alone, self.trainer, RunFolder(folder).last)
            for pruner in self.levels.values():
                pruner.save_journal = save
            self._select(datamodule, save)
            self._write_audited(datamodule, folder, self.audit, again=False)

    def _write_audited(self, data: AuditedData, folder: Path, settings: AuditSettings, *, again: bool) -> Frontier:
        found: dict[str, tuple[Circuit, Audit]] = {}
        with telling("frontier") as tell:
            for index, (name, pruner) in enumerate(self.levels.items()):
                tell(f"{name}, {index + 1} of {len(self.asked)}")
                own = level_folder(folder, name)
                written = None if again else load_level(own)
                if written is None or not self._is_of_this_run(written[0], pruner):
                    with part(index, len(self.asked)):
                        pruner.write_audited(data, own, settings)
                    written = load_level(own)
                assert written is not None
                found[name] = written
        frontier = Frontier.of(found, {level.name: level.coefficient for level in self.asked})
        frontier.save(folder)
        return frontier

    @staticmethod
    def _is_of_this_run(circuit: Circuit, pruner: CircuitPruner) -> bool:
        """Whether a circuit that is in the folder is the one that was chosen, under the same settings."""
        assert pruner.selected is not None
        same = circuit.keep.shape == pruner.selected.keep.shape and torch.equal(
            circuit.keep, pruner.selected.keep.bool().cpu()
        )
        return same and circuit.config == pruner.resolved_config() and circuit.worst_source is not None

    def validation_step(self, raw: Any, index: int) -> None:
        """The loss of every level's circuit on a batch of the select split, under each scheme."""
        batch = as_batch(raw)
        for level, pruner in self.levels.items():
            values = {f"select/{name}/{level}": value for name, value in pruner.validated(batch, index).items()}
            self.log_dict(values, batch_size=batch.size)

    def test_step(self, raw: Any, index: int) -> None:
        """Nothing by itself: the audits, at the end, need the whole split."""

    def on_test_epoch_end(self) -> None:
        """The audits once more, with a ladder of budgets and a second attack, on the first rank; the others wait."""
        if not self.trainer.is_global_zero:
            return
        data = cast(Any, self.trainer).datamodule
        with computing_in(self.audit.compute, self.device):
            self.select(data)
            folder = Path(self.trainer.default_root_dir)
            frontier = self._write_audited(data, folder, self.audit.longer(), again=True)
        for point in frontier.points:
            summary = {f"test/{name}/{point.level}": float(getattr(point, name)) for name in AUDITED}
            self.log_dict(summary, rank_zero_only=True)

    def on_predict_start(self) -> None:
        """Refuse: answers are one circuit's.

        Raises:
            UserError: always.
        """
        raise UserError("predict: the config's model is a FrontierPruner; expected that of a single circuit")

    def predict_step(self, raw: Any, index: int) -> None:
        """Never reached; Lightning asks for it before it starts."""

    def results(self, folder: Path) -> Results:
        """What experiment trackers show of a run folder that holds the frontier."""
        return frontier_results(Frontier.load(folder))

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the model out, which the config makes again, and say which one it was."""
        state = checkpoint["state_dict"]
        model = ("model", "decomposition")
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key.split(".")[2] not in model}
        checkpoint["pdprune"] = self._identity()
        selected = [pruner.selected for pruner in self.levels.values()]
        checkpoint["selected_levels"] = [None if one is None else asdict(one) for one in selected]
        going_on = {
            name: asdict(pruner.journal)
            for name, pruner in self.levels.items()
            if pruner.selected is None and pruner.journal is not None
        }
        if going_on:
            checkpoint["selection_of_levels"] = going_on
        attacked = {
            name: vars(pruner.attack_journal) for name, pruner in self.levels.items() if pruner.attack_journal.found
        }
        if attacked:
            checkpoint["audit_of_levels"] = attacked

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse gates of another model, or of other levels.

        Raises:
            UserError: if target, components, the gates' shape or the levels are not those of this run.
        """
        require_identity(checkpoint, self._identity())
        for pruner, selected in zip(self.levels.values(), checkpoint["selected_levels"], strict=True):
            pruner.selected = None if selected is None else Selected(**selected)
        for name, journal in checkpoint.get("selection_of_levels", {}).items():
            self.levels[name].journal = Journal(**journal)
        for name, journal in checkpoint.get("audit_of_levels", {}).items():
            self.levels[name].attack_journal = AttackJournal(**journal)

    def _identity(self) -> dict[str, Any]:
        first = next(iter(self.levels.values()))
        return {"levels": list(self.levels)} | first.identity()


AUDITED = ("n_kept", "complete_loss", "stochastic_loss", "adversarial_loss")


def play_together(
    pruners: Sequence[CircuitPruner], loss: MaskedLoss, step: int, backward: Any
) -> list[Float[Tensor, ""]]:
    """`CircuitPruner.play` of several prunings on one batch, their masks run as one batch.

    Args:
        pruners: alike but for goals and seeds, of the scope `batch`.
        loss, step, backward: as there.

    Returns:
        the losses that their gates met.
    """
    first = pruners[0]
    alike = len({pruner.seed for pruner in pruners}) == 1
    gates = [pruner.noisy_gates(step) for pruner in pruners]
    detached = [pruner.game(loss, own.detach()) for pruner, own in zip(pruners, gates, strict=True)]
    playing = SeveralCircuits([Game([loss], [own], first.scope) for own in gates], alike=alike)
    with as_one([pruner.opponent for pruner in pruners]) as opponent:
        if first.scheme == "adversarial":
            entries = opponent.met_by_gates(SeveralCircuits(detached, alike=alike), step)
        else:
            entries = torch.stack([pruner.sources(game, step) for pruner, game in zip(pruners, detached, strict=True)])
        losses = playing.loss(entries)
        values = losses.detach().tolist()
        objectives = [
            pruner.objective(own, met, step) for pruner, own, met in zip(pruners, losses, values, strict=True)
        ]
        backward(torch.stack(objectives).sum())
        if entries.grad is not None:
            opponent.learn(playing, step, playing.gradient(entries.grad))
    return [*losses.detach()]
