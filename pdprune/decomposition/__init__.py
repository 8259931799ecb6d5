"""A target network as a sum of components, run under masks of them."""

from pdprune.decomposition.bases import Basis, decompose, matching_sites
from pdprune.decomposition.clusters import co_important, read_clusters, regroup, write_clusters
from pdprune.decomposition.model import DecomposedModel, Node
from pdprune.decomposition.references import mean_reference, resample_reference
from pdprune.decomposition.sites import Site

__all__ = [
    "Basis",
    "DecomposedModel",
    "Node",
    "Site",
    "co_important",
    "decompose",
    "matching_sites",
    "mean_reference",
    "read_clusters",
    "regroup",
    "resample_reference",
    "write_clusters",
]
