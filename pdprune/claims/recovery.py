"""How a found circuit, or a ranking of nodes, is held against the true circuit."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


class Recovery(NamedTuple):
    """Of the nodes found, the share that is true; of the true nodes, the share found; their harmonic mean."""

    precision: float
    recall: float
    f1: float


def recovery(found: Collection[int], truth: Collection[int]) -> Recovery:
    """Precision, recall and F1. An empty circuit has precision 0, unless the truth is empty too."""
    hits = len(set(found) & set(truth))
    precision = hits / len(found) if found else float(not truth)
    recall = hits / len(truth) if truth else 1.0
    total = precision + recall
    return Recovery(precision, recall, 2 * precision * recall / total if total else 0.0)


def auroc(scores: Float[Tensor, " n"], truth: Collection[int]) -> float | None:
    """The chance that a true node ranks above another one; ties count half. None where all or none are true."""
    if not 0 < len(set(truth)) < len(scores):
        return None
    is_true = torch.zeros(len(scores), dtype=torch.long)
    is_true[list(truth)] = 1
    places = scores.unique(return_inverse=True)[1] / len(scores)  # the same order, in [0, 1], where it is not squashed
    return float(binary_auroc(places, is_true))


def top(scores: Float[Tensor, " n"], size: int) -> set[int]:
    """The highest `size` nodes."""
    return set(scores.argsort(descending=True, stable=True)[:size].tolist())
