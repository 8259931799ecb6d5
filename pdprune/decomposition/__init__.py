"""A target network as a sum of components, run under masks of them."""

from pdprune.decomposition.bases import Basis, decompose, matching_sites
from pdprune.decomposition.model import DecomposedModel, Node
from pdprune.decomposition.references import mean_reference, resample_reference
from pdprune.decomposition.sites import Site

__all__ = [
    "Basis",
    "DecomposedModel",
    "Node",
    "Site",
    "decompose",
    "matching_sites",
    "mean_reference",
    "resample_reference",
]
