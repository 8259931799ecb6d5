"""Learning a decomposition: components, and how much each matters on an input (method.md, section 7).

The target is frozen. `V`, `U` and the causal-importance functions descend on

    faithfulness      the components sum to the weights
    minimality        few components matter on any input
    reconstruction    whatever does not matter may be ablated, in any combination and partly, and the outputs stay:
                      with sources drawn (SPD, arXiv 2506.20790) or chosen by the adversary (VPD)

One key, `mode`, says who chooses the sources of the reconstruction at all sites; nothing else differs. The adversary is
the one that circuits are pruned against. The third mode, `attribution`, is the baseline without importances (APD).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from pdprune.adversary.game import Game, Scope
from pdprune.adversary.objective import MaskedLoss
from pdprune.adversary.opponent import Opponent, TrainingAdversary
from pdprune.batches import Batch, as_batch
from pdprune.decomposition.attribution import TopK
from pdprune.decomposition.audit import AUDIT_FILE, SCHEMA, DecompositionChecks, audit_decomposition, held_out
from pdprune.decomposition.bases import matching_sites
from pdprune.decomposition.importances import (
    CausalImportances,
    ImportanceSettings,
    importance_mask,
    node_importances,
    upper_leaky,
)
from pdprune.decomposition.minimality import Minimality
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.reconstruction import at_all_sites, in_subsets, site_by_site
from pdprune.decomposition.saved import read_decomposition, save_decomposition
from pdprune.decomposition.trainable import faithfulness, settled, trainable
from pdprune.errors import NonFiniteLossError, UserError, require_above, require_at_least
from pdprune.files import read_json, write_atomically
from pdprune.losses import LossFunction, loss_function, loss_name
from pdprune.metrics import MATTERS
from pdprune.precision import LossScale, computing_in, require_float32_parameters
from pdprune.progress import telling
from pdprune.ranks import ALONE, Ranks, leave_out_of_ddp, require_whole_model
from pdprune.seeding import generator
from pdprune.targets import load_target
from pdprune.tracking import Results

DECOMPOSITION_FOLDER = "decomposition"
"""In a run folder."""

Mode = Literal["stochastic", "adversarial", "attribution"]


@dataclass(frozen=True)
class Weights:
    """How much each loss counts; minimality has a coefficient of its own. Mode `attribution` has only the first two.

    Attributes:
        faithfulness: of `Σ‖Δ‖² / n_params`.
        all_sites: of the reconstruction with all sites masked; in mode `adversarial` by the adversary's sources.
        site_by_site: of that with one site masked at a time, by drawn sources. Costs a pass a site.
        subsets: of that with a random subset of sites masked at every token, by drawn sources.
    """

    faithfulness: float = 1.0
    all_sites: float = 1.0
    site_by_site: float = 1.0
    subsets: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise UserError(f"weights: {name} is {value}; expected 0 or more")


@dataclass(frozen=True)
class WarmUp:
    """Steps on faithfulness alone, by AdamW, before training begins; no data are read.

    Attributes:
        steps: how many; 0 for none.
        lr: learning rate.
        weight_decay: AdamW's.
    """

    steps: int = 200
    lr: float = 1e-2
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        require_at_least(0, "warm-up: ", steps=self.steps, weight_decay=self.weight_decay)
        require_above(0, "warm-up: ", lr=self.lr)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of Adam: a linear rise, then a cosine.

    Attributes:
        lr: at its peak.
        warm_up: share of the steps in which it rises.
        final: share of `lr` at the last step; 1 for a rate that stays.
    """

    lr: float = 1e-3
    warm_up: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0 or not 0 <= self.warm_up < 1 or not 0 <= self.final <= 1:
            raise UserError(
                f"schedule: lr {self.lr}, warm_up {self.warm_up}, final {self.final}; "
                "expected lr above 0, warm_up from 0 to below 1, final from 0 to 1"
            )

    def at(self, step: int, total: int) -> float:
        """The learning rate of step `step` of `total`."""
        progress = step / max(1, total)
        if progress < self.warm_up:
            return self.lr * (step + 1) / (self.warm_up * total + 1)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warm_up) / (1 - self.warm_up)))
        return self.lr * (self.final + (1 - self.final) * cosine)


class Seen(NamedTuple):
    """A batch, and what matters on it."""

    loss: MaskedLoss
    gates: Float[Tensor, "*lead n"]
    """What is kept of each node, with a gradient to the importance functions."""
    values: dict[str, Float[Tensor, "*lead C"]]
    """Importances before the hard sigmoid, by site; empty in mode `attribution`."""


class ComponentLearner(LightningModule):
    """Learns the components of a target, and how much each matters on an input.

    In manual optimisation each batch is one step of Adam, so `trainer.global_step` counts batches. Logs each loss, `l0`
    (components with an importance above 0 on a token, on average) and `alive` (nodes above 0.1 on some token of the
    batch). What comes out is written to `decomposition/` in the run folder, and checked in `decomposition_audit.json`.

    On several ranks a batch is shared out, and all hold the same components, importance functions and sources. The
    first one alone writes and checks what was learned; the others are done then.

    Args:
        target: a shipped target or the folder of one; or a module, from Python.
        sites: number of components by pattern of module path, `{"*.mlp.down": 96}`; the last that matches counts.
        loss: how far outputs are from the target's: `kl`, `mse`, or a function (see `pdprune.losses`). Of a batch only
            the inputs are read: all outputs count, whatever positions a task scores.
        mode: `stochastic`, `adversarial` or `attribution`.
        importances: which functions say how much a component matters.
        weights: of the losses.
        minimality: the pressure under which few components matter.
        adversary: how it climbs, in mode `adversarial`.
        scope: what one of its sources is shared by.
        top_k: what is kept, in mode `attribution`.
        warm_up: steps on faithfulness alone, before.
        schedule: the learning rate.
        gradient_clip: largest norm of a step's gradient; none for any.
        save_as: the type of what is stored. What is stored is what is checked.
        audit: the checks that a run ends with.
        seed: decides everything.
    """

    strict_loading = False  # checkpoints leave the target out: see on_save_checkpoint
    opponent: Opponent

    def __init__(
        self,
        target: str | nn.Module,
        sites: dict[str, int],
        loss: str | LossFunction = "kl",
        mode: Mode = "stochastic",
        importances: ImportanceSettings = ImportanceSettings(),
        weights: Weights = Weights(),
        minimality: Minimality = Minimality(),
        adversary: TrainingAdversary = TrainingAdversary(mode="persistent", steps=2, step_size=0.1),
        scope: Scope = "batch",
        top_k: TopK = TopK(),
        warm_up: WarmUp = WarmUp(),
        schedule: Schedule = Schedule(),
        gradient_clip: float | None = None,
        save_as: Literal["float32", "bfloat16"] = "float32",
        audit: DecompositionChecks = DecompositionChecks(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if mode not in get_args(Mode):
            raise UserError(f"mode: got {mode!r}; expected one of {', '.join(get_args(Mode))}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise UserError(f"gradient_clip: got {gradient_clip}; expected more than 0, or none")
        if mode == "adversarial" and not weights.all_sites:
            raise UserError("weights: all_sites is 0; expected more in mode adversarial, which chooses its sources")
        if save_as not in ("float32", "bfloat16"):
            raise UserError(f"save_as: got {save_as!r}; expected float32 or bfloat16")
        loss_function(loss)
        self.loss = loss
        self.mode: Mode = mode
        self.weights = weights
        self.minimality = minimality
        self.adversary = adversary
        self.scope: Scope = scope
        self.top_k = top_k
        self.warm_up = warm_up
        self.schedule = schedule
        self.gradient_clip = gradient_clip
        self.save_as = save_as
        self.audit = audit
        self.seed = seed
        self._steps_in_checkpoint = 0
        self._loss_scale = LossScale()
        self.source = target if isinstance(target, str) else None
        loaded = None if isinstance(target, nn.Module) else load_target(target)
        module = target if isinstance(target, nn.Module) else cast(Any, loaded).module
        self.model = trainable(module, numbers_of_components(module, sites), seed)
        if loaded is not None:
            self.model.target_name = loaded.name
        if mode != "attribution":
            self.model.importances = CausalImportances(self.model.sites, importances, seed)

    # -- setting up ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Lightning's hook: the data are there now, and with them the shape of what the adversary carries along."""
        if self._trainer is not None:
            require_whole_model(self.trainer)
            require_float32_parameters(self.trainer)
            self._loss_scale = LossScale.of(self.trainer)
        leave_out_of_ddp(self, self.model, self.learned())
        if hasattr(self, "opponent"):
            return
        lead: tuple[int, ...] = ()
        if self.mode == "adversarial" and self.adversary.mode != "fresh" and self.scope not in ("batch", "universal"):
            data = cast(Any, self.trainer).datamodule
            assert data is not None, "sources that are carried along, one a position, need a LightningDataModule"
            if self.scope != "position" and self.trainer.world_size > 1:
                raise UserError(
                    f"adversary: mode {self.adversary.mode!r} carries sources along, and under scope {self.scope!r} "
                    "every rank has others; expected mode 'fresh', another scope, or one process"
                )
            seen = self.look(next(iter(data.train_dataloader())), 0)
            lead = Game([seen.loss], [seen.gates], self.scope).lead
        self.opponent = Opponent(self.adversary, lead, self.model.n_nodes + self.model.n_sites, self.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the components and the importance functions."""
        return torch.optim.Adam(self.learned(), lr=self.schedule.lr)

    def learned(self) -> list[nn.Parameter]:
        """What training changes: components, then importance functions."""
        functions = [] if self.model.importances is None else self.model.importances.parameters()
        return [*self.model.site_list.parameters(), *functions]

    def on_train_start(self) -> None:
        """The warm-up, unless it lies behind."""
        if self.global_step == 0 and self.warm_up.steps:
            warm_up(self.model, self.warm_up, Ranks.of(self.trainer))

    # -- one step --------------------------------------------------------------------------------------------------

    def training_step(self, raw: Any, index: int) -> None:
        """The adversary ascends, where there is one; components and importances descend."""
        step = self.global_step
        ranks = Ranks.of(self.trainer)
        seen = self.look(raw, step, ranks)
        losses: dict[str, Tensor] = {}
        entries = self._reconstructions(seen, step, losses)
        with computing_in("float32", self.device):
            losses["faithfulness"] = faithfulness(self.model)
            if seen.values:
                importances = [upper_leaky(value) for value in seen.values.values()]
                losses["minimality"] = self.minimality(importances, self.progress, counts_of(seen.loss), ranks)
        total = torch.stack([self._weight(name) * loss for name, loss in losses.items()]).sum()
        if not bool(torch.isfinite(total)):
            raise NonFiniteLossError(f"training: the loss is {float(total)} at step {step}; expected a finite number")
        self._descend(total, step, seen, entries)
        self._log_step(total, losses, seen, step)

    def look(self, raw: Any, step: int, ranks: Ranks = ALONE) -> Seen:
        """Run the target once on a batch, and say what matters there.

        Args:
            raw: a batch as a data loader yields it; all its outputs count.
            step: decides the draws, in mode `attribution`.
            ranks: who shares the batch.
        """
        batch = as_batch({"inputs": as_batch(raw).inputs})
        observed = self.model.observe(batch.inputs)
        loss = MaskedLoss(self.model, batch, self.loss, observed=observed, ranks=ranks, scale=self._loss_scale)
        if self.model.importances is None:
            return Seen(loss, self.top_k.gates(loss, generator(self.seed, "directions", step)), {})
        values = self.model.importances(observed.site_inputs)
        return Seen(loss, node_importances(values, self.model), values)

    def _reconstructions(self, seen: Seen, step: int, losses: dict[str, Tensor]) -> Tensor | None:
        """Add the losses under masks that are asked for; returns the adversary's sources, where there are any."""
        loss, gates, _ = seen
        entries = None
        if self.mode == "attribution":
            no_deltas = torch.zeros_like(gates[..., : self.model.n_sites])
            losses["all_sites"] = loss.mean(loss.per_example(gates, no_deltas))
            return None
        if self.weights.all_sites and self.mode == "adversarial":
            chosen = self.opponent.choose(Game([loss], [gates.detach()], self.scope, self.adversary.max_ablated), step)
            entries = chosen.detach().requires_grad_(self.adversary.mode == "free")
            losses["all_sites"] = Game([loss], [gates], self.scope).mean_loss(entries)
        elif self.weights.all_sites:
            losses["all_sites"] = at_all_sites(loss, gates, generator(self.seed, "all-sites", step))
        if self.weights.site_by_site:
            losses["site_by_site"] = site_by_site(loss, gates, generator(self.seed, "site-by-site", step))
        if self.weights.subsets:
            losses["subsets"] = in_subsets(loss, gates, generator(self.seed, "subsets", step))
        return entries

    def _weight(self, name: str) -> float:
        return self.minimality.coefficient if name == "minimality" else cast(float, getattr(self.weights, name))

    def _descend(self, total: Tensor, step: int, seen: Seen, entries: Tensor | None) -> None:
        """One backward pass and a step of Adam; where the sources got a gradient too, they climb along it."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.at(step, self.total_steps)
        optimizer.zero_grad()
        self.manual_backward(total)
        if entries is not None and entries.grad is not None:
            game = Game([seen.loss], [seen.gates], self.scope)
            self.opponent.learn(game, step, game.gradient(entries.grad))
        optimizer.step()
        self._loss_scale.after_step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lightning's hook: clip, now that the gradients are unscaled."""
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.learned(), self.gradient_clip)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training.

        Raises:
            UserError: if its end is open.
        """
        trainer = cast(Any, self.trainer)
        total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise UserError("learning: the number of steps is open; expected trainer.max_steps or trainer.max_epochs")
        return int(total)

    @property
    def progress(self) -> float:
        """The share of training that is done."""
        return self.global_step / max(1, self.total_steps)

    def _log_step(self, total: Tensor, losses: Mapping[str, Tensor], seen: Seen, step: int) -> None:
        every = cast(Any, self.trainer).log_every_n_steps
        if not every or (step + 1) % every:
            return
        size = seen.loss.size
        values = {"loss": total.detach(), **l0_and_alive(seen.gates, seen.loss.ranks)}
        self.log_dict(values, prog_bar=True, batch_size=size)
        self.log_dict({name: loss.detach() for name, loss in losses.items()}, batch_size=size)

    # -- what the command line asks for ----------------------------------------------------------------------------

    def validation_step(self, raw: Any, index: int) -> None:
        """On held-out data: the loss with all that does not matter ablated, and by chance; how much matters."""
        with torch.no_grad(), computing_in(self.audit.compute, self.device):
            seen = self.look(raw, index)
            nothing_left = torch.zeros(self.model.n_sites, device=seen.gates.device)
            complete = seen.loss.per_example(seen.gates, nothing_left).mean()
            stochastic = at_all_sites(seen.loss, seen.gates, generator(self.seed, "validate", index))
        values = {"complete": complete, "stochastic": stochastic, **l0_and_alive(seen.gates)}
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=seen.loss.size)

    def finish(self, datamodule: LightningDataModule, folder: Path) -> None:
        """Write the decomposition and then its audit into the run folder; the last thing that `fit` does.

        Only the first rank does this, without a word to the others.
        """
        if self.trainer.is_global_zero:
            self.to(self.trainer.strategy.root_device)  # which Lightning has just moved it away from
            self._write_audited(datamodule, folder)

    def _write_audited(self, data: LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write both, the audit last: where it is, all is."""
        steps = self.global_step or self._steps_in_checkpoint
        about = {"mode": self.mode, "loss": loss_name(self.loss), "steps": steps, "seed": self.seed}
        save_decomposition(
            folder / DECOMPOSITION_FOLDER,
            settled(self.model),
            self.model.importances,
            about,
            source=self.source,
            dtype=getattr(torch, self.save_as),
        )
        saved = read_decomposition(folder / DECOMPOSITION_FOLDER, self.model.target)
        saved.to(self.model.delta_sites.device)
        with telling("audit") as tell, computing_in(self.audit.compute, self.device):
            found = audit_decomposition(
                saved,
                lambda batch, index: self.gates(saved, batch, index),
                held_out(data, self.audit.batches),
                self.loss,
                self.audit,
                self.seed,
                tell,
            )
        content = {"schema": SCHEMA, "target": self.model.target_name, **about, **found}
        write_atomically(folder / AUDIT_FILE, json.dumps(content, indent=1).encode())
        return found

    def test_step(self, raw: Any, index: int) -> None:
        """Nothing by itself: the audit, at the end, reads the batches."""

    def on_test_epoch_end(self) -> None:
        """The audit again, of the components in the checkpoint, with the checks that are configured now."""
        trainer = cast(Any, self.trainer)
        if trainer.is_global_zero:
            found = self._write_audited(trainer.datamodule, Path(trainer.default_root_dir))
            summary = {f"test/{name}": value for name, value in _summary(found).items()}
            self.log_dict(summary, rank_zero_only=True)

    def results(self, folder: Path) -> Results:
        """What experiment trackers show of a run folder that holds the audit."""
        return Results(_summary(read_json(folder / AUDIT_FILE, SCHEMA)))

    def gates(self, model: DecomposedModel, batch: Batch, index: int) -> Float[Tensor, "*lead n"]:
        """What matters on a batch, for a decomposition like the one that is learned here."""
        if model.importances is not None:
            return importance_mask(model, batch.inputs)
        return self.top_k.gates(MaskedLoss(model, batch, self.loss), generator(self.seed, "directions", index))

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the target out, which the config names, and say which one it was."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("model.target.")}
        checkpoint["pdprune"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the components of another target, or others than these.

        Raises:
            UserError: if target, components, importance functions or what the adversary carries are not this run's.
        """
        found, own = checkpoint.get("pdprune"), self._identity()
        if not isinstance(found, Mapping) or "components" not in found:
            raise UserError("checkpoint: it holds no components; expected the checkpoint of a ComponentLearner")
        for name, expected in own.items():
            if found.get(name) != expected:
                raise UserError(
                    f"checkpoint: its {name} is {found.get(name)}, this run's is {expected}; "
                    "expected a checkpoint of the same target and settings"
                )
        self._steps_in_checkpoint = checkpoint["global_step"]

    def _identity(self) -> dict[str, Any]:
        functions = self.model.importances
        return {
            "target": self.model.target_sha256,
            "components": {name: site.n_components for name, site in self.model.sites.items()},
            "importances": None if functions is None else asdict(functions.settings),
            "sources": list(self.opponent.sources.shape),
        }


def _summary(audit: Mapping[str, Any]) -> dict[str, float]:
    """An audit in a few values."""
    losses = {name: audit["reconstruction"][name] for name in ("complete", "stochastic", "adversarial")}
    return losses | {"gap": losses["adversarial"] - losses["complete"], "l0": audit["l0"], "alive": audit["alive"]}


def numbers_of_components(target: nn.Module, sites: Mapping[str, int]) -> dict[str, int]:
    """How many components each site gets, in the target's order; of several patterns that match the last one counts.

    Raises:
        UserError: no pattern, or one that matches no site.
    """
    counts = {name: count for pattern, count in sites.items() for name in matching_sites(target, [pattern])}
    return {name: counts[name] for name in matching_sites(target, list(sites))}


def warm_up(model: DecomposedModel, settings: WarmUp, ranks: Ranks = ALONE) -> None:
    """Bring the components near to the weights, on faithfulness alone. Ranks end with what the first one found."""
    optimizer = torch.optim.AdamW(model.site_list.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    with telling("faithfulness warm-up", quiet=not ranks.is_first) as tell, torch.enable_grad():
        for step in range(settings.steps):
            optimizer.zero_grad()
            loss = faithfulness(model)
            loss.backward()
            optimizer.step()
            tell(f"step {step + 1} of {settings.steps}, {float(loss.detach()):.3g}", (step + 1) / settings.steps)
    optimizer.zero_grad()
    for parameter in model.site_list.parameters():
        parameter.data = ranks.of_first(parameter.data)


def counts_of(loss: MaskedLoss) -> Float[Tensor, "B T"] | None:
    """1 for tokens, 0 for padding; None where there is none."""
    mask = loss.batch.attention_mask
    return None if mask is None or tuple(mask.shape) != loss.leading_shape else mask.float()


def l0_and_alive(gates: Float[Tensor, "*lead n"], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """How many nodes matter on a token, on average, and how many on some token of the batch that ranks share."""
    rows = gates.detach().flatten(0, -2)
    l0 = ranks.mean((rows > 0).sum(-1).float().mean(), len(rows))
    return {"l0": l0, "alive": (ranks.largest(rows.amax(0)) > MATTERS).sum().float()}
