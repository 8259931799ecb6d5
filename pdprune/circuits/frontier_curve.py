"""What a frontier came to: the size of each of its circuits, and what an audit found for it. Save, load."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.errors import UserError
from pdprune.files import read_json, write_atomically
from pdprune.run_folder import FRONTIER_FILE, FRONTIER_TABLE, LEVELS_FOLDER

SCHEMA = "pdprune.frontier/1"


@dataclass(frozen=True)
class FrontierPoint:
    """One level: what was asked for, and what came out.

    Attributes:
        level: its name, and that of its folder in `levels/`.
        target_loss, target_nodes, coefficient: what was asked for: one of them.
        seed: of its gates and of its adversary.
        n_kept: nodes in the circuit; those kept at any position.
        reached: whether the loss on the select split is within `target_loss`; None without one.
        complete_loss, stochastic_loss, adversarial_loss: by the audit; the last is a lower bound on the worst case.
        faithful: whether `adversarial_loss` stays within `target_loss`; None without one.
    """

    level: str
    target_loss: float | None
    target_nodes: int | None
    coefficient: float | None
    seed: int
    n_kept: int
    reached: bool | None
    complete_loss: float
    stochastic_loss: float
    adversarial_loss: float
    faithful: bool | None


@dataclass(frozen=True)
class Frontier:
    """How the loss depends on the number of nodes that are kept.

    Attributes:
        task, target, loss, scheme: what was pruned, and how.
        n_nodes: of the graph.
        n_examples: that the audits were on, all on the same.
        model_loss: with nothing ablated.
        points: the levels, the smallest circuit first.
    """

    task: str | None
    target: str
    loss: str
    scheme: str
    n_nodes: int
    n_examples: int
    model_loss: float
    points: list[FrontierPoint]

    @classmethod
    def of(cls, levels: dict[str, tuple[Circuit, Audit]], coefficients: dict[str, float | None]) -> Frontier:
        """From the circuits and the audits of all levels, by name."""
        circuit, audit = next(iter(levels.values()))
        points = [_point(name, *found, coefficients[name]) for name, found in levels.items()]
        return cls(
            task=circuit.task,
            target=circuit.target.name,
            loss=audit.loss,
            scheme=circuit.scheme,
            n_nodes=circuit.n_nodes,
            n_examples=audit.n_examples,
            model_loss=audit.model_loss,
            points=sorted(points, key=lambda point: (point.n_kept, point.adversarial_loss, point.level)),
        )

    def save(self, folder: str | Path) -> None:
        """Write `frontier.csv`, a row a level, and then `frontier.json`, each at once.

        Raises:
            UserError: if the folder cannot be written.
        """
        rows = [dataclasses.asdict(point) for point in self.points]
        table = io.StringIO()
        writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(FrontierPoint)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(Path(folder) / FRONTIER_TABLE, table.getvalue().encode())
        content = {"schema": SCHEMA} | dataclasses.asdict(self)
        write_atomically(Path(folder) / FRONTIER_FILE, json.dumps(content, indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read a `frontier.json`, or the one of a run folder.

        Raises:
            UserError: if it is missing, damaged, or of another schema.
        """
        file = Path(path) / FRONTIER_FILE if Path(path).is_dir() else Path(path)
        content = read_json(file, SCHEMA)
        try:
            points = [FrontierPoint(**point) for point in content.pop("points")]
            return cls(**{name: value for name, value in content.items() if name != "schema"}, points=points)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: it lacks or garbles {error}; expected a frontier by pdprune") from error


def level_folder(folder: Path, level: str) -> Path:
    """Where the circuit of a level and its audit are."""
    return folder / LEVELS_FOLDER / level


def load_level(folder: Path) -> tuple[Circuit, Audit] | None:
    """A level's circuit with its audit, if both are there and whole."""
    try:
        return Circuit.load(folder), Audit.load(folder)
    except UserError:
        return None


def _point(level: str, circuit: Circuit, audit: Audit, coefficient: float | None) -> FrontierPoint:
    found: dict[str, Any] = {name: getattr(circuit, name) for name in ("target_loss", "target_nodes", "seed")}
    return FrontierPoint(
        level=level,
        **found,
        coefficient=coefficient,
        n_kept=circuit.n_kept,
        reached=circuit.reached,
        complete_loss=audit.complete_loss,
        stochastic_loss=audit.stochastic.mean,
        adversarial_loss=audit.adversarial.loss,
        faithful=audit.faithful,
    )
