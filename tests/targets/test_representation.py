"""The check of what a toy network represents, on networks built by hand of which it is known."""

import math

import pytest
import torch

from pdprune.targets import (
    TMS,
    InductionConfig,
    InductionTransformer,
    ResidualMLP,
    ResidualMLPConfig,
    TMSConfig,
)
from pdprune.targets.representation import representation


def pentagon() -> TMS:
    """Five features as the corners of a pentagon: what a TMS learns."""
    network = TMS(TMSConfig(5, 2))
    angles = torch.arange(5) * (2 * math.pi / 5)
    with torch.no_grad():
        network.linear1.weight.copy_(1.15 * torch.stack([angles.cos(), angles.sin()]))
        network.linear2.weight.copy_(network.linear1.weight.t())
        network.linear2.bias.fill_(-0.25)
    return network


def test_a_pentagon_represents_all_five() -> None:
    found = representation(pentagon())
    assert found.is_complete and found.missing == []
    assert found.measures["length of the hidden vector"].tolist() == pytest.approx([1.15] * 5)


@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_a_feature_with_too_short_a_vector_is_missing(factor: float) -> None:
    network = pentagon()
    with torch.no_grad():
        network.linear1.weight[:, 3] *= factor
        network.linear2.weight[3] *= factor
    found = representation(network)
    assert found.missing == [3]
    assert not found.summary()["represents_every_feature"] and found.summary()["missing"] == [3]
    assert "4 of 5" in found.line() and "missing: 3" in found.line()


def test_a_feature_in_the_shadow_of_another_is_missing() -> None:
    network = pentagon()
    with torch.no_grad():
        network.linear1.weight[:, 3] = 0.9 * network.linear1.weight[:, 2]
        network.linear2.weight.copy_(network.linear1.weight.t())
    assert representation(network).missing == [3]


def monosemantic(n_computed: int) -> ResidualMLP:
    """A neuron for each of the first features, none for the others."""
    network = ResidualMLP(ResidualMLPConfig(n_features=4, d_embed=4, d_mlp=n_computed))
    with torch.no_grad():
        network.W_E.copy_(torch.eye(4))
        network.W_U.copy_(torch.eye(4))
        network.layers[0].mlp_in.weight.copy_(torch.eye(4)[:n_computed])
        network.layers[0].mlp_out.weight.copy_(torch.eye(4)[:, :n_computed])
    return network


def test_a_residual_mlp_lacks_what_it_has_no_neuron_for() -> None:
    assert representation(monosemantic(4)).is_complete
    found = representation(monosemantic(3))
    assert found.missing == [3]
    assert found.measures["share of the error left"].tolist() == pytest.approx([0, 0, 0, 1])
    assert found.measures["own output at 0.75"].tolist() == pytest.approx([1.5, 1.5, 1.5, 0.75])


def test_an_untrained_transformer_represents_no_word_and_is_left_as_it_was() -> None:
    network = InductionTransformer(InductionConfig(vocab_size=8, max_length=6, d_model=8)).train()
    found = representation(network)
    assert network.training
    assert len(found.is_represented) == 7 and not found.is_complete
    assert all(0 <= accuracy <= 1 for accuracy in found.measures["accuracy"])
