"""A target is the same after a run as before it: mode, parameters, flags, hooks; and so is the global random state."""

from __future__ import annotations

import pytest
import torch
from decomposition.small_nets import VOCAB, SmallLM, matrix, small_lm
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel, decompose, mean_reference

IDS = torch.arange(12).reshape(3, 4) % VOCAB
LEADS = ((), (4,), (3, 4))


def state_of(target: nn.Module) -> dict[str, object]:
    return {
        "training": [module.training for module in target.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules()],
        "parameters": [(id(p), p.data_ptr(), p._version, p.requires_grad, p.grad) for p in target.parameters()],
        "keys": [sorted(module._parameters) for module in target.modules()],
    }


@pytest.fixture
def target() -> SmallLM:
    target = small_lm(0).train()
    target.mix.eval()
    target.up.weight.requires_grad_(False)
    return target


@pytest.mark.parametrize("lead", LEADS)
def test_after_a_run(target: SmallLM, lead: tuple[int, ...]) -> None:
    before, rng = state_of(target), torch.get_rng_state()
    model = decompose(target, "*", "svd")
    x_ref = mean_reference(model, [IDS], per_position=True)
    mask = torch.full((*lead, model.n_nodes), 0.5).double().requires_grad_()
    model(IDS, mask, None, x_ref).square().sum().backward()
    assert mask.grad is not None
    assert state_of(target) == before
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("lead", LEADS)
def test_after_a_run_that_fails(lead: tuple[int, ...]) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = small_lm(0)

        def forward(self, ids: Tensor) -> Tensor:
            self.lm(ids)
            raise RuntimeError("the target's own error")

    target = Failing().train()
    model = decompose(target, "*", "svd")
    before = state_of(target)
    x_ref = {name: torch.zeros(4, site.d_in).double() for name, site in model.sites.items()}
    for masked in (lambda: model(IDS, torch.zeros(*lead, model.n_nodes), None, x_ref), lambda: model.site_inputs(IDS)):
        with pytest.raises(RuntimeError, match="the target's own error"):
            masked()
        assert state_of(target) == before


def test_runs_in_eval_mode_whatever_mode_it_is_in(target: SmallLM) -> None:
    model = decompose(target, "*", "svd")
    assert torch.equal(model(IDS), small_lm(0)(IDS))
    assert torch.equal(model(IDS, torch.ones(model.n_nodes)), small_lm(0)(IDS))


def test_train_does_not_reach_the_target() -> None:
    target = small_lm(0)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = decompose(target, "*", "svd")

    holder = Holder().train()
    assert holder.model.training and not any(module.training for module in target.modules())
    holder.eval()
    assert not holder.model.training


def test_outputs_carry_no_gradient_to_parameters(target: SmallLM) -> None:
    model = decompose(target, "down", "svd")
    assert not model(IDS).requires_grad
    assert not model(IDS, torch.ones(model.n_nodes)).requires_grad


def test_moves_and_saves_with_its_parts() -> None:
    model = decompose(small_lm(0).float(), "*", "svd")
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert {"target.down.weight", "site_list.0.U", "site_list.0.node_index"} <= saved.keys()
    other = decompose(small_lm(1).float(), "*", "svd")
    mask = torch.full((model.n_nodes,), 0.5)
    assert not torch.equal(other(IDS, mask), model(IDS, mask))
    other.load_state_dict(saved)
    assert torch.equal(other(IDS, mask), model(IDS, mask))
    other.double()
    assert other(IDS, mask).dtype == torch.float64
    assert other.sites["up"].V.dtype == torch.float64
    torch.testing.assert_close(other(IDS, mask).float(), model(IDS, mask))


def test_fingerprints_tell_targets_and_decompositions_apart() -> None:
    def model(seed: int = 0, **changes: object) -> DecomposedModel:
        return decompose(small_lm(seed), ["*"], **{"basis": "svd", **changes})  # type: ignore[arg-type]

    assert model().target_sha256 == model(basis="neuron").target_sha256
    assert model().decomposition_sha256 == model().decomposition_sha256
    assert len({model().target_sha256, model(1).target_sha256}) == 2
    factors = {"down": (None, matrix(small_lm(0).down).t())}
    apart = DecomposedModel.from_components(small_lm(0), factors)
    together = DecomposedModel.from_components(small_lm(0), factors, [[("down", c) for c in range(3)]])
    assert apart.target_sha256 == together.target_sha256
    assert apart.decomposition_sha256 != together.decomposition_sha256
    # Singular vectors go by recipe: the sign they come out with, or their last bits, are no other decomposition.
    svd, turned = decompose(small_lm(0), "down", "svd"), decompose(small_lm(0), "down", "svd")
    turned.sites["down"].U.neg_()
    assert svd.decomposition_sha256 == turned.decomposition_sha256
    factors = {"down": (svd.sites["down"].V, svd.sites["down"].U)}
    given = DecomposedModel.from_components(small_lm(0), factors)
    assert given.decomposition_sha256 != svd.decomposition_sha256
    # Written down: equal in another process and on another day.
    linear = nn.Linear(2, 1)
    linear.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert decompose(linear, "", "neuron").target_sha256[:16] == "947f6ce375f4697a"
