"""Audits of networks whose right answers are known by construction, from 3 to 400 nodes."""

from __future__ import annotations

import pytest
import torch
from circuits.small_networks import (
    Known,
    bypassed_attention,
    cancelling_pairs,
    correlated_shortcut,
    linear_model,
    norm_gain,
    random_network,
    small_contributions,
)

from pdprune.circuits.audit import Audit, audit


def audited(known: Known, keep: set[int], **options: object) -> Audit:
    return audit(known.model, keep, [known.batch], **{"random_circuits": 0, "draws": 8} | options)


@pytest.mark.parametrize("search", ["gradient", "exact"])
@pytest.mark.parametrize(
    "known",
    [cancelling_pairs(1), cancelling_pairs(6), correlated_shortcut(), bypassed_attention(1), bypassed_attention(6)],
    ids=["pair", "6 pairs", "shortcut", "attention", "attention of 12"],
)
def test_seeming_circuits_pass_complete_ablation_and_fail_the_attack(known: Known, search: str) -> None:
    seeming = audited(known, known.small, search=search, target_loss=0.01)
    assert seeming.complete_loss < 1e-6
    assert seeming.adversarial.loss > 0.03
    assert seeming.faithful is False
    honest = audited(known, known.honest, search=search, target_loss=0.01)
    assert honest.adversarial.loss < 1e-6
    assert honest.faithful is True


@pytest.mark.parametrize("n_pairs", [1, 20, 199])
def test_the_attack_finds_just_one_half_of_every_cancelling_pair(n_pairs: int) -> None:
    known = cancelling_pairs(n_pairs, size=2.0)
    found = audited(known, known.small)
    losses = []
    for half in (1, 2):  # one of the two directions hurts more
        keep = set(range(half, known.model.n_nodes, 2)) | {0}
        losses.append(audited(known, keep).complete_loss)
    assert found.complete_loss < 1e-6
    assert found.adversarial.loss == pytest.approx(max(losses), rel=0.02)
    assert found.adversarial.n_ablated == pytest.approx(n_pairs, abs=max(1, n_pairs // 20))


def test_leaving_out_one_half_of_a_pair_shows_under_complete_ablation() -> None:
    known = cancelling_pairs(1)
    assert audited(known, {0, 1}).complete_loss > 0.03
    assert audited(known, {0, 1}).adversarial.loss == pytest.approx(audited(known, {0, 1}).complete_loss)


@pytest.mark.parametrize("n_idle", [60, 399])
def test_only_a_choice_for_each_example_lines_up_small_contributions(n_idle: int) -> None:
    known = small_contributions(n_idle, size=3 / n_idle)
    shared = audited(known, known.honest, scope="batch")
    separate = audited(known, known.honest, scope="example")
    assert shared.adversarial.loss < 0.02
    assert separate.adversarial.loss > 5 * shared.adversarial.loss
    assert separate.adversarial.loss > 0.1


def test_small_contributions_of_few_examples_do_not_hurt_others() -> None:
    known = small_contributions(200, n_examples=16, size=0.05)
    halves = [known.batch[:8], known.batch[8:]]
    found = audit(known.model, known.honest, halves, random_circuits=0)
    assert found.adversarial.held_out_loss < 0.7 * found.adversarial.loss


@pytest.mark.parametrize("search", ["gradient", "exact"])
def test_norm_gain_beats_the_model_and_is_no_circuit(search: str) -> None:
    known = norm_gain(8)
    seeming = audited(known, known.small, search=search, loss="ce")
    assert seeming.beats_model is True
    assert seeming.task.complete.ce < 0.5 * seeming.task.model.ce
    assert seeming.task.complete.accuracy == seeming.task.model.accuracy == 1
    assert seeming.kl.complete > 0.1  # cross-entropy alone would call it perfect
    assert audited(known, known.small, search=search).adversarial.loss > 0.1
    assert audited(known, known.honest, search=search).adversarial.loss < 1e-6


def test_norm_gain_of_many_nodes() -> None:
    known = norm_gain(300)
    assert audited(known, known.small).adversarial.loss > 0.1


def test_a_random_network_has_a_seeming_circuit_for_a_nonsense_task() -> None:
    """Of all circuits, pick the one that answers random labels best when the rest is ablated: it beats the model."""
    network = random_network(4)
    n = network.model.n_nodes
    labels = torch.arange(len(network.inputs)) % 2
    masks = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).float()
    outputs = network.outputs(masks, torch.zeros(len(masks)))
    ce = -outputs.log_softmax(-1)[:, torch.arange(len(labels)), labels].mean(-1)
    keep = masks[ce.argmin()].bool()
    found = audit(network.model, keep, [(network.inputs, labels)], loss="ce", random_circuits=0)
    assert found.beats_model is True
    assert found.complete_loss == pytest.approx(float(ce.min()), rel=1e-4)
    assert found.adversarial.loss > 1.5 * found.complete_loss
    assert found.kl.adversarial > 0.1


def test_half_of_a_random_network_of_400_nodes_is_no_circuit() -> None:
    rng = torch.Generator().manual_seed(0)
    model = linear_model(torch.randn(8, 400, generator=rng) / 10)
    inputs = torch.randn(64, 400, generator=rng)
    found = audit(model, range(0, 400, 2), [inputs], random_circuits=1, draws=8)
    assert found.adversarial.loss > 1.2 * max(found.complete_loss, found.stochastic.max)
    assert found.random_circuits.adversarial_loss == pytest.approx(found.adversarial.loss, rel=0.5)
