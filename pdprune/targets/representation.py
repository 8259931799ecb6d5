"""Whether a toy network represents every feature that it was trained on. Some seeds do not.

What a decomposition of such a network should find is known only where it does: a feature that was given up has no
mechanism, so nothing is to be found for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdprune.targets.toy_data import InductionSequences, single_features
from pdprune.targets.toys import TMS, InductionTransformer, ResidualMLP, Toy

NORM_SHARE = 0.75
"""A feature of a `TMS` is represented if its hidden vector is at least so long, relative to the longest one."""
LOSS_SHARE = 0.5
"""A feature of a `ResidualMLP` is represented if the MLPs leave at most this share of the loss without them."""
ACCURACY = 0.9
"""A word of an `InductionTransformer` is represented if it is answered in at least this share of sequences."""
SEQUENCES_PER_WORD = 64


@dataclass(frozen=True)
class Representation:
    """What was measured of each feature, and whether that is enough."""

    criterion: str
    """What it takes, in words."""
    measures: dict[str, Float[Tensor, " F"]]
    """By name, a number a feature."""
    is_represented: Bool[Tensor, " F"]

    @property
    def is_complete(self) -> bool:
        """Whether every feature is represented."""
        return bool(self.is_represented.all())

    @property
    def missing(self) -> list[int]:
        """The features that are not."""
        return (~self.is_represented).nonzero().squeeze(1).tolist()

    def summary(self) -> dict[str, Any]:
        """For `representation.json` and the model card."""
        return {
            "represents_every_feature": self.is_complete,
            "n_features": len(self.is_represented),
            "missing": self.missing,
            "criterion": self.criterion,
            "measures": {
                name: {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
                for name, values in self.measures.items()
            },
        }

    def line(self) -> str:
        """For the terminal."""
        n, n_there = len(self.is_represented), int(self.is_represented.sum())
        measured = ", ".join(f"{name} {v.min():.3g} to {v.max():.3g}" for name, v in self.measures.items())
        named = ", ".join(map(str, self.missing[:8])) + (", ..." if len(self.missing) > 8 else "")
        gap = "" if self.is_complete else f"; missing: {named}"
        return f"Represents {n_there} of {n} features ({measured}){gap}. Asked for: {self.criterion}."


def representation(network: Toy) -> Representation:
    """Measure whether a trained network represents every feature. Leaves it in the mode that it was in."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return _representation(network)
    finally:
        network.train(was_training)


@singledispatch
def _representation(network: Toy) -> Representation:
    raise NotImplementedError(f"no check for a {type(network).__name__}")


@_representation.register
def _of_tms(network: TMS) -> Representation:
    norms = network.linear1.weight.norm(dim=0)
    outputs = network(single_features(network.config.n_features))
    own = outputs.diagonal()
    return Representation(
        f"a hidden vector of at least {NORM_SHARE} times the greatest length, and, alone at 0.75, the largest output",
        {"length of the hidden vector": norms, "own output": own, "largest other output": _largest_other(outputs)},
        (norms >= NORM_SHARE * norms.max()) & (own > _largest_other(outputs)),
    )


@_representation.register
def _of_residual_mlp(network: ResidualMLP) -> Representation:
    n_features = network.config.n_features
    values = torch.linspace(-1, 1, 21)
    x_VFF = torch.stack([single_features(n_features, float(value)) for value in values])
    wanted = network.wanted(x_VFF)
    with_mlps = (network(x_VFF) - wanted).square().sum(-1).mean(0)
    without = (x_VFF @ network.W_E @ network.W_U - wanted).square().sum(-1).mean(0)
    own = network(single_features(n_features)).diagonal()
    return Representation(
        f"alone, at most {LOSS_SHARE} times the squared error without the MLPs",
        {"share of the error left": with_mlps / without, "own output at 0.75": own},
        with_mlps <= LOSS_SHARE * without,
    )


@_representation.register
def _of_induction(network: InductionTransformer) -> Representation:
    n_words = network.config.vocab_size - 1
    data = InductionSequences(
        network.config.vocab_size, network.config.max_length, audit_batch_size=SEQUENCES_PER_WORD * n_words
    )
    batch = data.batch("held_out", 0)
    ids_BT, words = batch["inputs"]["input_ids"], batch["labels"] - 1
    counts = torch.bincount(words, minlength=n_words)
    is_right = network(ids_BT)[:, -1].argmax(-1) == batch["labels"]
    accuracy = torch.bincount(words, is_right.double(), n_words) / counts
    place = (ids_BT[:, :-1] == ids_BT[:, -1:]).int().argmax(1)
    patterns = network.patterns(ids_BT)
    example = torch.arange(len(ids_BT))
    looks = {
        "attention that it pays to s, first layer": patterns[0][example, :, place + 1, place],
        "attention paid to it from the end, last layer": patterns[-1][example, :, -1, place + 1],
    }
    by_word = {name: torch.bincount(words, at_BH.amax(1).double(), n_words) / counts for name, at_BH in looks.items()}
    return Representation(
        f"answered rightly in at least {ACCURACY:.0%} of the sequences",
        {"accuracy": accuracy, **by_word},
        accuracy >= ACCURACY,
    )


def _largest_other(outputs: Float[Tensor, "F F"]) -> Float[Tensor, " F"]:
    """For each feature that is on alone, the largest output of any other."""
    is_own = torch.eye(len(outputs), dtype=torch.bool)
    return outputs.masked_fill(is_own, -torch.inf).max(dim=1).values
