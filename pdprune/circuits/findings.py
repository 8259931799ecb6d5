"""What an audit found: the records that `audit.json` holds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pdprune.errors import UserError
from pdprune.files import read_json, write_atomically

SCHEMA = "pdprune.audit/1"
JSON_FILE = "audit.json"
NOT_IN_JSON = ("worst_source", "worst_source_delta")
ONLY_IF_THERE = ("kl", "hypothesis_tests")


@dataclass(frozen=True)
class Stochastic:
    """The loss under uniform random sources: over draws, of the mean over data."""

    mean: float
    p95: float
    max: float
    draws: int


@dataclass(frozen=True)
class Rung:
    """The highest loss found with up to this many steps a restart."""

    steps: int
    loss: float


@dataclass(frozen=True)
class Adversarial:
    """The worst case that was found.

    Attributes:
        loss: the highest found by any start or stage, so never below complete, model or stochastic loss; averaged
            over batches by size.
        discrete_loss: the same where every node is ablated wholly or not at all.
        held_out_loss: each batch's worst source on the other batches; None if there is none or it does not transfer.
        per_example_p95: of the examples' own losses under the worst source.
        flipped: the share of examples whose answer is not the target's; None where outputs are no classes.
        steps, step_size, restarts: the budget; 0 steps and restarts under `search="exact"`.
        n_ablated: not-kept nodes with `s < 0.5`, on average over batches (and positions, examples).
        ladder: the loss by budget, where one was asked for.
        converged: False if a longer or a different attack still climbs; None if none was tried.
    """

    loss: float
    discrete_loss: float
    held_out_loss: float | None
    per_example_p95: float
    flipped: float | None
    steps: int
    step_size: float
    restarts: int
    n_ablated: float
    ladder: list[Rung]
    converged: bool | None


@dataclass(frozen=True)
class RandomCircuits:
    """Circuits of the same number of nodes in each site, drawn at random: means over `n` of them.

    `adversarial_loss` is by one restart of 20 steps, a weaker attack than the audited circuit's own.
    """

    n: int
    size: int
    complete_loss: float
    adversarial_loss: float


@dataclass(frozen=True)
class Comparison:
    """How the circuit stands among `n` random ones of as many nodes in each site.

    Attributes:
        loss: the circuit's own.
        n, median: of the random ones: how many, and the median of their losses.
        share: of the random ones that the circuit beats: its percentile.
        low, high: the 95 % interval of that share (Wilson's).
    """

    loss: float
    n: int
    median: float
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Removal:
    """By how much the worst case rises without one node of the circuit."""

    node: int
    change: float


@dataclass(frozen=True)
class Minimality:
    """What the removal of single nodes does to the worst case: lower bounds, as the worst case itself.

    Attributes:
        tested, attacked: kept nodes that were removed in turn; of these, how many removals were attacked and not only
            tried under the sources known to be bad.
        largest, smallest: the removals that raise the worst case most and least.
        unchanged: nodes whose removal raises it by no more than 2 %, as far as was tried: the circuit may not need
            them, each by itself.
    """

    tested: int
    attacked: int
    largest: Removal
    smallest: Removal
    unchanged: list[int]


@dataclass(frozen=True)
class CurvePoint:
    """The loss under the source `t·1 + (1 − t)·s`: the worst found at t = 0, no ablation at t = 1."""

    t: float
    loss: float


@dataclass(frozen=True)
class HypothesisTests:
    """What the circuit claims, tested (see `pdprune.circuits.hypotheses`).

    Attributes:
        sufficiency: the circuit among random ones, the rest ablated; it beats those that lose more. None where there
            is nothing to draw.
        necessity: its complement among theirs; it beats those whose ablation costs less. None likewise.
        minimality: None where it was not asked for, or the circuit is empty.
        ablation_curve: from the worst source to no ablation.
    """

    sufficiency: Comparison | None
    necessity: Comparison | None
    minimality: Minimality | None
    ablation_curve: list[CurvePoint]


@dataclass(frozen=True)
class Score:
    """How well the task is done: cross-entropy in nats over the answers to choose from, and share answered rightly."""

    ce: float
    accuracy: float


@dataclass(frozen=True)
class TaskScores:
    """The task under each check: by the model, and by the circuit."""

    model: Score
    complete: Score
    stochastic: Score
    adversarial: Score


@dataclass(frozen=True)
class KL:
    """What the circuit does to the target's outputs, when the audit's loss is another one."""

    complete: float
    stochastic: float
    adversarial: float


@dataclass(frozen=True)
class Audit:
    """What the checks of a circuit found; the attributes are the keys of `audit.json`.

    Attributes:
        n_nodes, n_kept: of the graph, and of the circuit.
        loss: the name of the loss; all losses are in its unit.
        scheme: what the circuit was pruned with, if known.
        reference, scope: what ablated nodes are replaced by, and what one source is shared by.
        n_examples, batch_size: of the data; examples under one source (of the largest batch).
        held_out: whether nothing was chosen on the data; None if that is not known.
        model_loss: with nothing ablated.
        complete_loss: with everything ablated that is not kept.
        complement_loss: with the circuit ablated and the rest kept.
        random_circuits: None where the circuit leaves nothing to draw.
        task, beats_model: None without labels.
        faithful: whether `adversarial.loss` stays within `target_loss`; None without one.
        kl: only in JSON when the loss is another one on outputs that are classes.
        hypothesis_tests: only in JSON where they were asked for.
        worst_source: the worst source found, `[*lead, n]`, kept nodes 1; of several batches' the one that hurts the
            data most. Not in JSON.
        worst_source_delta: its entries for the deltas, `[*lead, n_sites]`. Not in JSON.
    """

    n_nodes: int
    n_kept: int
    loss: str
    scheme: str | None
    reference: str
    scope: str
    n_examples: int
    batch_size: int
    held_out: bool | None
    seed: int
    model_loss: float
    complete_loss: float
    stochastic: Stochastic
    adversarial: Adversarial
    complement_loss: float
    random_circuits: RandomCircuits | None
    task: TaskScores | None
    beats_model: bool | None
    target_loss: float | None
    faithful: bool | None
    kl: KL | None = None
    hypothesis_tests: HypothesisTests | None = None
    schema: str = SCHEMA
    worst_source: Float[Tensor, "*lead n"] | None = field(default=None, repr=False, compare=False)
    worst_source_delta: Float[Tensor, "*lead s"] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of `audit.json`."""
        tensors_left_out = dataclasses.replace(self, worst_source=None, worst_source_delta=None)
        content = dataclasses.asdict(tensors_left_out)
        absent = [name for name in ONLY_IF_THERE if content[name] is None]
        dropped = (*NOT_IN_JSON, *absent)
        return {"schema": SCHEMA} | {name: value for name, value in content.items() if name not in dropped}

    def save(self, path: str | Path) -> None:
        """Write `audit.json`, at once; a folder gets one of that name.

        Raises:
            UserError: if it cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_atomically(_file(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read an `audit.json`, or the one of a folder.

        Raises:
            UserError: if it is missing, damaged, or of another schema.
        """
        content = read_json(_file(path), SCHEMA)
        try:
            return _from_json(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{_file(path)}: it lacks or garbles {error}; expected an audit by pdprune") from error


def _from_json(content: dict[str, Any]) -> Audit:
    adversarial, random, task, kl = (content.get(key) for key in ("adversarial", "random_circuits", "task", "kl"))
    tests = content.get("hypothesis_tests")
    assert isinstance(adversarial, dict)
    records = {
        "stochastic": Stochastic(**content["stochastic"]),
        "adversarial": Adversarial(**adversarial | {"ladder": [Rung(**rung) for rung in adversarial["ladder"]]}),
        "random_circuits": None if random is None else RandomCircuits(**random),
        "task": None if task is None else TaskScores(**{check: Score(**score) for check, score in task.items()}),
        "kl": None if kl is None else KL(**kl),
        "hypothesis_tests": None if tests is None else _tests_from_json(tests),
    }
    return Audit(**content | records)


def _tests_from_json(content: dict[str, Any]) -> HypothesisTests:
    minimality, compared = content["minimality"], (content["sufficiency"], content["necessity"])
    sufficiency, necessity = (None if one is None else Comparison(**one) for one in compared)
    if minimality is not None:
        removals = {end: Removal(**minimality[end]) for end in ("largest", "smallest")}
        minimality = Minimality(**minimality | removals)
    curve = [CurvePoint(**point) for point in content["ablation_curve"]]
    return HypothesisTests(sufficiency, necessity, minimality, curve)


def _file(path: str | Path) -> Path:
    return Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
