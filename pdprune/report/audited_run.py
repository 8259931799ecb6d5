"""What a report is made from: a circuit with its audit, and the model and the data to ask more of it."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pdprune.adversary.objective import MaskedLoss, Reference
from pdprune.batches import Batch, as_batches, to_device
from pdprune.circuit_config import CircuitConfig
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.circuits.pruning import CircuitPruner
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError
from pdprune.loggers import read_metrics
from pdprune.losses import NAMED, LossFunction
from pdprune.run_folder import CONFIG_FILE, METRICS_FILE
from pdprune.targets.reader import Tokenizer
from pdprune.tasks.prompts import Example


@dataclass(frozen=True)
class AuditedRun:
    """A run whose circuit is chosen and audited.

    Attributes:
        folder: where its files lie.
        model: the decomposed target.
        circuit, audit: the results.
        batches: the held-out split.
        prompts: its examples as people wrote them, in order; empty where the data are no prompts.
        tokenizer: None for a target that reads no text.
        loss: what was audited.
        reference: what ablated parts are replaced by, measured.
        max_ablated: how many nodes the adversary may ablate.
    """

    folder: Path
    model: DecomposedModel
    circuit: Circuit
    audit: Audit
    batches: list[Batch]
    prompts: Sequence[Example]
    tokenizer: Tokenizer | None
    loss: str | LossFunction
    reference: Reference
    max_ablated: int | None

    @classmethod
    def of(cls, pruner: CircuitPruner, data: Any, folder: Path) -> AuditedRun:
        """The run that a pruner has just written into its folder.

        Raises:
            UserError: the folder lacks a result.
        """
        return cls._with_data(
            data,
            folder=folder,
            model=pruner.model,
            circuit=Circuit.load(folder),
            audit=Audit.load(folder),
            loss=pruner.loss,
            reference=pruner.reference,
            max_ablated=pruner.adversary.max_ablated,
        )

    @classmethod
    def load(cls, folder: Path) -> AuditedRun:
        """A run from its folder: the target, the prompts and the reference are made again from its config.

        Raises:
            UserError: the folder lacks a result, or target or data are not what they were.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; expected that of a finished fit of a circuit")
        circuit, audit = Circuit.load(folder), Audit.load(folder)
        config = CircuitConfig.read(folder / CONFIG_FILE)
        model, data = config.decomposition.load(), config.make_data()
        circuit.check_fits(model)
        seed = config.model.get("seed", 0)
        reference = Reference.measure(audit.reference, model, as_batches(data.train_batches()), seed)  # type: ignore[arg-type]
        return cls._with_data(
            data,
            folder=folder,
            model=model,
            circuit=circuit,
            audit=audit,
            loss=_loss(config.model.get("loss", "kl")),
            reference=reference,
            max_ablated=(config.model.get("adversary") or {}).get("max_ablated"),
        )

    @classmethod
    def _with_data(cls, data: Any, **rest: Any) -> AuditedRun:
        """Data modules of prompts have more to tell than those of numbers."""
        prompts = data.prompts("held_out") if hasattr(data, "prompts") else []
        tokenizer = getattr(getattr(data, "target", None), "tokenizer", None)
        return cls(batches=as_batches(data.held_out_batches()), prompts=prompts, tokenizer=tokenizer, **rest)

    @property
    def n_examples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def masked_loss(self, batch: Batch, index: int = 0) -> MaskedLoss:
        """The loss of some examples under masks."""
        here = to_device(batch, self.model.delta_sites.device)
        return MaskedLoss(self.model, here, self.loss, self.reference.on(self.model, here, index))

    @property
    def means(self) -> Mapping[str, Tensor] | None:
        """The reference inputs that do not depend on the batch, where the model is; None if there are none."""
        found: Mapping[str, Tensor] | None = to_device(self.reference.means, self.model.delta_sites.device)
        return found

    def metrics(self) -> dict[str, list[float | None]]:
        """The columns of `metrics.csv`; empty without one."""
        return read_metrics(self.folder / METRICS_FILE)

    def config_text(self) -> str:
        """The resolved configuration; empty without one."""
        path = self.folder / CONFIG_FILE
        return path.read_text() if path.is_file() else ""


def _loss(named: Any) -> str | LossFunction:
    """A loss as configs name it: one of ours, or the import path of a function."""
    if named in NAMED:
        return str(named)
    function = pydoc.locate(str(named))
    if not callable(function):
        raise UserError(f"loss: got {named!r}; expected one of {', '.join(NAMED)}, or the import path of a function")
    return function
