"""The experiments, by name."""

from __future__ import annotations

from pdprune.claims import (
    bases,
    cancellation,
    frozen_norm,
    neurons,
    nonsense,
    overlap,
    scopes,
    sparse,
    subsets,
)
from pdprune.claims.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        cancellation.EXPERIMENT,
        nonsense.EXPERIMENT,
        subsets.EXPERIMENT,
        frozen_norm.EXPERIMENT,
        scopes.EXPERIMENT,
        neurons.EXPERIMENT,
        bases.EXPERIMENT,
        sparse.EXPERIMENT,
        overlap.EXPERIMENT,
    )
}
