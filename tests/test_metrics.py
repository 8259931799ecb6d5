"""Metrics of decompositions: known answers, and slow obvious ways to the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdprune.adversary.attack import Ascent
from pdprune.decomposition import DecomposedModel, decompose
from pdprune.errors import UserError
from pdprune.metrics import (
    ComponentL0,
    ComponentsAlive,
    ImportancesAgainstIdentity,
    MeanL2Ratio,
    MeanMaxCosineSimilarity,
    Reconstruction,
)
from pdprune.targets import TMS, InductionConfig, InductionSequences, InductionTransformer, TMSConfig

QUICK = Ascent(steps=5, restarts=1, draws=2, flips=8)


def columns_apart(W: torch.Tensor, n_dead: int = 3, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The decomposition that is looked for, a component a column, with dead components behind."""
    V = torch.cat([torch.eye(W.shape[1]), torch.zeros(W.shape[1], n_dead)], dim=1)
    U = torch.cat([scale * W.t(), torch.rand(n_dead, W.shape[0])])
    return V, U


@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_a_component_for_each_column_is_perfect_but_for_its_length(scale: float) -> None:
    W = torch.randn(3, 6)
    V, U = columns_apart(W, scale=scale)
    similarity, ratio = MeanMaxCosineSimilarity(), MeanL2Ratio()
    similarity.update(W, V, U)
    ratio.update(W, V, U)
    assert similarity.compute().item() == pytest.approx(1)
    assert ratio.compute().item() == pytest.approx(scale)


def test_similarity_and_ratio_are_those_of_the_components_written_out() -> None:
    W, V, U = torch.randn(3, 5), torch.randn(5, 7), torch.randn(7, 3)
    P = torch.einsum("ic,co->coi", V, U)
    cosines, ratios = [], []
    for i in range(5):
        by_component = torch.stack([F.cosine_similarity(P[c, :, i], W[:, i], dim=0) for c in range(7)])
        best = int(by_component.argmax())
        cosines.append(by_component[best])
        ratios.append(P[best, :, i].norm() / W[:, i].norm())
    similarity, ratio = MeanMaxCosineSimilarity(), MeanL2Ratio()
    for metric in (similarity, ratio):
        metric.update(W, V, U)
        metric.update(W, V, U)  # a second site like the first changes no mean
    assert similarity.compute().item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert ratio.compute().item() == pytest.approx(torch.stack(ratios).mean().item(), abs=1e-6)


def test_a_sign_in_both_factors_does_not_matter_and_dead_components_can_be_left_out() -> None:
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    V = torch.tensor([[-1.0, 0.0, 1e-6], [0.0, 1.0, 0.0]])
    U = torch.tensor([[-1.0, 0.01], [0.0, 1.0], [1.0, 0.0]])  # the last one points exactly, and is nothing
    with_dead, without = MeanL2Ratio(), MeanL2Ratio()
    with_dead.update(W, V, U)
    without.update(W, V, U, alive=torch.tensor([True, True, False]))
    assert with_dead.compute().item() == pytest.approx(0.5, abs=1e-4)
    assert without.compute().item() == pytest.approx(1, abs=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"W \[5, 3\]"):
        MeanMaxCosineSimilarity().update(torch.zeros(5, 3), torch.zeros(5, 7), torch.zeros(7, 3))


def test_components_are_counted_by_site_token_and_threshold() -> None:
    sizes = {"a.b": 3, "c": 2}
    l0, alive = ComponentL0(sizes), ComponentsAlive(sizes)
    first = {"a.b": torch.tensor([[1.0, 0.05, 0.0], [1.0, 0.0, 0.2]]), "c": torch.zeros(2, 2)}
    second = {"a.b": torch.tensor([[0.0, 0.0, 1.0]]), "c": torch.tensor([[0.0, 1.0]])}
    for metric in (l0, alive):
        metric.update(first)
        metric.update(second)
    assert {name: value.item() for name, value in l0.compute().items()} == pytest.approx({"a.b": 4 / 3, "c": 1 / 3})
    assert {name: value.item() for name, value in alive.compute().items()} == {"a.b": 2, "c": 1}


def test_padding_is_left_out_of_the_count() -> None:
    l0 = ComponentL0({"a": 2}, threshold=0.0)
    l0.update({"a": torch.ones(2, 3, 2)}, counted=torch.tensor([[True, True, False], [True, False, False]]))
    assert (l0.compute()["a"].item(), l0.n_tokens.item()) == (2, 3)
    with pytest.raises(UserError, match="differ at 'a'"):
        l0.update({"b": torch.ones(1, 2)})


def numbers(importances: torch.Tensor) -> dict[str, float]:
    metric = ImportancesAgainstIdentity()
    half = len(importances) // 2
    for rows in (importances[:half], importances[half:]):
        metric.update(rows)
    return {name: float(value) for name, value in metric.compute().items()}


def test_a_permuted_identity_is_the_identity() -> None:
    importances = torch.cat([torch.eye(6), torch.zeros(6, 3)], dim=1)[:, torch.randperm(9)]
    assert numbers(importances) == {"errors": 0, "distance": 0, "components_per_feature": 1, "one_to_one": 1}


def test_what_is_not_the_identity_is_counted() -> None:
    importances = torch.cat([torch.eye(4), torch.zeros(4, 1)], dim=1)
    importances[0, 4] = 0.5  # a second component for the first feature
    importances[1, 1] = 0.8  # its own, but weak
    importances[2, 3] = 0.05  # within the tolerance
    found = numbers(importances)
    assert found["errors"] == 2
    assert found["distance"] == pytest.approx((0.5 + 0.2 + 0.05) / 4)
    assert found["components_per_feature"] == 5 / 4
    assert found["one_to_one"] == 3 / 4


def test_one_component_for_two_features_is_one_to_one_for_neither() -> None:
    importances = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = numbers(importances)
    assert found["one_to_one"] == pytest.approx(1 / 3) and found["errors"] == 2


def test_too_few_components_are_refused() -> None:
    metric = ImportancesAgainstIdentity()
    metric.update(torch.ones(3, 2))
    with pytest.raises(UserError, match="2 components for 3 features"):
        metric.compute()


def svd_of(network: nn.Module) -> DecomposedModel:
    return decompose(network.requires_grad_(False), ["*"], "svd")


def test_nothing_is_lost_where_everything_matters() -> None:
    model = svd_of(TMS(TMSConfig(5, 2)))
    metric = Reconstruction(ascent=QUICK, ladder=())
    metric.update(model, torch.rand(4, 5), torch.ones(4, model.n_nodes))
    assert all(value.item() == pytest.approx(0, abs=1e-9) for value in metric.compute().values())


def test_complete_is_the_forward_pass_under_the_importances_alone() -> None:
    torch.manual_seed(0)
    model = svd_of(TMS(TMSConfig(5, 2)))
    metric = Reconstruction(ascent=QUICK, ladder=())
    losses = []
    for size in (3, 7):
        x, importances = torch.rand(size, 5), torch.rand(size, model.n_nodes)
        metric.update(model, x, importances)
        losses += (model(x, importances) - model(x)).square().mean(1).tolist()
    assert metric.compute()["complete"].item() == pytest.approx(sum(losses) / 10, rel=1e-4)


def test_the_attack_is_worse_than_complete_and_rises_with_its_budget() -> None:
    torch.manual_seed(0)
    network = InductionTransformer(InductionConfig(vocab_size=8, max_length=6, d_model=8))
    model = svd_of(network)
    batch = InductionSequences(8, 6, audit_batch_size=4).batch("held_out", 0)
    importances = (torch.rand(4, 6, model.n_nodes) * 1.5).clamp(max=1)
    found = []
    for _ in range(2):
        metric = Reconstruction("kl", ascent=QUICK, ladder=(8, 12), draws=2)
        metric.update(model, batch, importances)
        found.append({name: value.item() for name, value in metric.compute().items()})
    assert found[0] == found[1]
    assert list(found[0]) == ["complete", "stochastic", "adversarial", "adversarial_8", "adversarial_12"]
    assert found[0]["complete"] <= found[0]["adversarial"] <= found[0]["adversarial_8"] <= found[0]["adversarial_12"]
    assert 0 < found[0]["stochastic"] < found[0]["adversarial_12"]


def test_a_ladder_that_falls_is_refused() -> None:
    with pytest.raises(UserError, match="ladder"):
        Reconstruction(ladder=(10,))
