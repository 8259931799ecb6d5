"""A circuit: which nodes are kept, with what it takes to reproduce and to audit it. Save, load, compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.decomposition import DecomposedModel, Node
from pdprune.errors import UserError
from pdprune.files import read_bytes, read_json, write_atomically

SCHEMA = "pdprune.circuit/1"
JSON_FILE = "circuit.json"
TENSOR_FILE = "circuit.safetensors"
PLAIN = ("task", "loss", "scheme", "reference", "scope", "target_loss", "target_nodes", "reached", "seed")
"""The attributes that JSON holds as they are."""


def installed_versions() -> dict[str, str]:
    """Of the packages that decide a result."""
    try:
        ours = version("pdprune")
    except PackageNotFoundError:  # run from a source tree that is not installed
        ours = "unknown"
    return {"pdprune": ours, "torch": torch.__version__}


class Fingerprint(NamedTuple):
    """What a circuit was made for: a name for people, and the SHA-256 of all names and tensors."""

    name: str
    sha256: str


def jaccard(one: AbstractSet[int], other: AbstractSet[int]) -> float:
    """Nodes in both over nodes in either; 1 for two empty circuits."""
    return len(one & other) / len(one | other) if one | other else 1.0


class Overlap(NamedTuple):
    """What two circuits of one model have in common, by node (kept at any position)."""

    jaccard: float
    """Nodes in both over nodes in either; 1 for two empty circuits."""
    both: list[int]
    only_first: list[int]
    only_second: list[int]


@dataclass(frozen=True, eq=False)
class Circuit:
    """The nodes that a behaviour needs, as far as the search could tell.

    Attributes:
        keep: `[n]`, or `[T, n]` for gates per position; True is kept.
        gates: the learned gates that `keep` came from, of the same shape.
        nodes: the kept nodes by index: their components and labels.
        target: which network.
        decomposition: which components and nodes.
        loss: the name of the loss.
        scheme: what it was pruned with: `complete`, `stochastic`, `adversarial`; or `imported`, if it was found
            elsewhere.
        reference: what ablated components were replaced by.
        scope: what one source of the adversary was shared by.
        target_loss, target_nodes: what was asked for; None where it was not.
        reached: whether the circuit's loss on the select split is within `target_loss`; None without one.
        seed: decides every draw that led here.
        task: the name of the task; None from Python.
        config: the resolved configuration of the run; None from Python.
        worst_source: the worst source that the audit found, kept nodes 1, in the scope's shape `[*lead, n]`.
        worst_source_delta: its entries for the sites' deltas, `[*lead, n_sites]`.
        versions: of pdprune and torch.
    """

    keep: Bool[Tensor, "*lead n"]
    gates: Float[Tensor, "*lead n"]
    nodes: Mapping[int, Node]
    target: Fingerprint
    decomposition: Fingerprint
    loss: str = "kl"
    scheme: str = "adversarial"
    reference: str = "zero"
    scope: str = "batch"
    target_loss: float | None = None
    target_nodes: int | None = None
    reached: bool | None = None
    seed: int = 0
    task: str | None = None
    config: Mapping[str, Any] | None = None
    worst_source: Float[Tensor, "*source_lead n"] | None = None
    worst_source_delta: Float[Tensor, "*source_lead s"] | None = None
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    @classmethod
    def of(
        cls,
        model: DecomposedModel,
        keep: Bool[Tensor, "*lead n"],
        gates: Float[Tensor, "*lead n"] | None = None,
        *,
        decomposition_name: str | None = None,
        **how: Any,
    ) -> Circuit:
        """The circuit of a model that keeps these nodes.

        Args:
            model: what it is a circuit of; gives the nodes and the two fingerprints.
            keep: `[n]` or `[T, n]`.
            gates: what `keep` came from; by default `keep` itself.
            decomposition_name: a name for people; by default the numbers of nodes and sites.
            **how: the remaining attributes.
        """
        keep = keep.detach().bool().cpu()
        gates = keep.float() if gates is None else gates.detach().float().cpu()
        nodes = {node: model.nodes[node] for node in _kept(keep)}
        target = Fingerprint(model.target_name, model.target_sha256)
        name = decomposition_name or f"{model.n_nodes} nodes in {model.n_sites} sites"
        return cls(keep, gates, nodes, target, Fingerprint(name, model.decomposition_sha256), **how)

    @property
    def n_nodes(self) -> int:
        return self.keep.shape[-1]

    @property
    def kept(self) -> list[int]:
        """The kept nodes in ascending order; with gates per position, those kept at any."""
        return _kept(self.keep)

    @property
    def n_kept(self) -> int:
        return len(self.kept)

    def compare(self, other: Circuit) -> Overlap:
        """What this circuit and another one of the same model have in common.

        Raises:
            UserError: if they are circuits of different decompositions.
        """
        if self.decomposition.sha256 != other.decomposition.sha256:
            raise UserError(
                f"circuits: one is of {self.decomposition.name}, the other of {other.decomposition.name}; "
                "expected two circuits of one decomposition"
            )
        first, second = set(self.kept), set(other.kept)
        return Overlap(jaccard(first, second), sorted(first & second), sorted(first - second), sorted(second - first))

    def check_fits(self, model: DecomposedModel) -> None:
        """Refuse a model that this is no circuit of.

        Raises:
            UserError: if the target or the decomposition is another one.
        """
        for what, made_for, sha256 in (
            ("target", self.target, model.target_sha256),
            ("decomposition", self.decomposition, model.decomposition_sha256),
        ):
            if made_for.sha256 != sha256:
                raise UserError(
                    f"circuit: it was made for the {what} {made_for.name} ({made_for.sha256[:12]}), and this "
                    f"{what} is another one ({sha256[:12]}); expected the model that it was pruned from"
                )

    def save(self, folder: str | Path) -> None:
        """Write `circuit.json` and `circuit.safetensors`, each at once.

        The tensors come first and the JSON, which holds their SHA-256, last. So a reader who comes in
        between, or after a crash in between, is told that the two do not belong together; nobody gets a mix.

        Raises:
            UserError: if the folder cannot be written.
        """
        tensors = safetensors.torch.save(self._tensors())
        write_atomically(Path(folder) / TENSOR_FILE, tensors)
        text = json.dumps(self._as_json(hashlib.sha256(tensors).hexdigest()), indent=1, allow_nan=False)
        write_atomically(Path(folder) / JSON_FILE, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit from its folder, or from the path of its `circuit.json`.

        Raises:
            UserError: if a file is missing, damaged, of another schema, or does not belong to the other.
        """
        file = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
        content = read_json(file, SCHEMA)
        tensor_file = file.with_name(TENSOR_FILE)
        data = read_bytes(tensor_file)
        if hashlib.sha256(data).hexdigest() != content.get("tensors_sha256"):
            raise UserError(
                f"{tensor_file}: it does not belong to {file.name} beside it, or is damaged; "
                "expected the two files of one save: save the circuit again"
            )
        try:
            tensors = safetensors.torch.load(data)
            circuit = cls._from_json(content, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: it lacks or garbles {error}; expected a circuit that pdprune saved") from error
        circuit._check_shapes(content, file)
        return circuit

    def _tensors(self) -> dict[str, Tensor]:
        given = {
            "keep": self.keep.bool(),
            "gates": self.gates.float(),
            "worst_source": self.worst_source,
            "worst_source_delta": self.worst_source_delta,
        }
        return {name: value.cpu().contiguous() for name, value in given.items() if value is not None}

    def _as_json(self, tensors_sha256: str) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "n_nodes": self.n_nodes,
            "n_kept": self.n_kept,
            "target": self.target._asdict(),
            "decomposition": self.decomposition._asdict(),
            **{name: getattr(self, name) for name in PLAIN},
            "versions": dict(self.versions),
            "tensors_sha256": tensors_sha256,
            "kept": [self._kept_as_json(node) for node in self.kept],
            "config": self.config,
        }

    def _kept_as_json(self, node: int) -> dict[str, Any]:
        described = {
            "node": node,
            "label": self.nodes[node].label,
            "components": [[site, index] for site, index in self.nodes[node].components],
            "gate": float(self.gates[..., node].max()),
        }
        if self.keep.ndim == 2:
            described["positions"] = self.keep[:, node].nonzero().squeeze(-1).tolist()
        return described

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Circuit:
        return cls(
            tensors["keep"].bool(),
            tensors["gates"],
            {
                kept["node"]: Node(tuple((site, index) for site, index in kept["components"]), kept["label"])
                for kept in content["kept"]
            },
            Fingerprint(**content["target"]),
            Fingerprint(**content["decomposition"]),
            **{name: content[name] for name in PLAIN},
            config=content["config"],
            worst_source=tensors.get("worst_source"),
            worst_source_delta=tensors.get("worst_source_delta"),
            versions=content["versions"],
        )

    def _check_shapes(self, content: Mapping[str, Any], file: Path) -> None:
        """Refuse files whose parts contradict one another."""
        source, delta = self.worst_source, self.worst_source_delta
        leads = [None if tensor is None else tensor.shape[:-1] for tensor in (source, delta)]
        consistent = {
            "keep and gates": self.keep.shape == self.gates.shape and self.keep.ndim in (1, 2),
            "n_nodes": content["n_nodes"] == self.n_nodes,
            "kept": sorted(self.nodes) == self.kept and content["n_kept"] == self.n_kept,
            "worst_source": source is None or source.shape[-1] == self.n_nodes,
            "worst_source_delta": delta is None or leads[0] == leads[1],
        }
        for what, fits in consistent.items():
            if not fits:
                raise UserError(f"{file}: {what} does not fit the rest of the circuit; expected files of one save")


def _kept(keep: Bool[Tensor, "*lead n"]) -> list[int]:
    indices: Sequence[int] = keep.reshape(-1, keep.shape[-1]).any(0).nonzero().squeeze(-1).tolist()
    return list(indices)
