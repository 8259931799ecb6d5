"""Decompositions from disk, whoever made them."""

from pdprune.decomposition.checkpoints.loading import load_decomposition

__all__ = ["load_decomposition"]
