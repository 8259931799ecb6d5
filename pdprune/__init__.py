"""Circuits of a network that hold whatever happens to the rest of it."""

from pdprune.circuits.audit import Audit, audit
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.frontier import FrontierPruner
from pdprune.circuits.frontier_curve import Frontier
from pdprune.circuits.prune import prune
from pdprune.circuits.pruning import CircuitPruner
from pdprune.decomposition import DecomposedModel, Node, decompose
from pdprune.decomposition.checkpoints import load_decomposition
from pdprune.decomposition.learning import ComponentLearner
from pdprune.decomposition.settings import Decomposition
from pdprune.errors import NonFiniteLossError, UserError

__all__ = [
    "Audit",
    "Circuit",
    "CircuitPruner",
    "ComponentLearner",
    "DecomposedModel",
    "Decomposition",
    "Frontier",
    "FrontierPruner",
    "Node",
    "NonFiniteLossError",
    "UserError",
    "audit",
    "decompose",
    "load_decomposition",
    "prune",
]
