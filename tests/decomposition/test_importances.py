"""Causal-importance functions: their leaks, what they read, and how their values become masks of nodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel
from pdprune.decomposition.importances import (
    CausalImportances,
    ImportanceKind,
    ImportanceSettings,
    importance_mask,
    lower_leaky,
    node_importances,
    upper_leaky,
)
from pdprune.errors import UserError

KINDS: list[ImportanceKind] = ["component_mlp", "site_mlp", "shared_mlp", "transformer"]


class Reader(nn.Module):
    """An embedding and two maps, the second by way of a nested path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 3)})

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.inner["down"](torch.relu(self.inner["up"](self.embed(ids))))
        return y


def model_of(nodes: list[list[tuple[str, int]]] | None = None) -> DecomposedModel:
    shapes = {"embed": (7, 5, 4), "inner.up": (4, 3, 6), "inner.down": (6, 2, 3)}
    components = {name: (torch.randn(i, c), torch.randn(c, o)) for name, (i, c, o) in shapes.items()}
    return DecomposedModel.from_components(Reader(), components, nodes)


def settings_of(kind: ImportanceKind) -> ImportanceSettings:
    return ImportanceSettings(kind, hidden=[8], d_model=8, n_blocks=2, n_heads=2)


@pytest.mark.parametrize("kind", KINDS)
def test_each_component_gets_a_value_on_each_token(kind: ImportanceKind) -> None:
    model = model_of()
    importances = CausalImportances(model.sites, settings_of(kind), seed=1)
    values = importances(model.site_inputs(torch.arange(6).reshape(2, 3)))
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        "embed": (2, 3, 5),
        "inner.up": (2, 3, 3),
        "inner.down": (2, 3, 2),
    }
    assert not any(key.startswith("_sites") for key in importances.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_parameters_and_the_global_generator_stays(kind: ImportanceKind) -> None:
    model = model_of()
    before = torch.get_rng_state()
    a, b, c = (CausalImportances(model.sites, settings_of(kind), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_per_component_functions_are_what_a_loop_over_components_computes() -> None:
    model = model_of()
    inputs = model.site_inputs(torch.arange(6).reshape(2, 3))
    x = inputs["inner.up"]
    for kind in ("component_mlp", "site_mlp"):
        importances = CausalImportances(model.sites, settings_of(kind))
        state = importances.state_dict()
        W0, b0, W2, b2 = (state[f"functions.inner-up.layers.{key}"] for key in ("0.W", "0.b", "2.W", "2.b"))
        for c in range(3):
            read = (x @ model.sites["inner.up"].V[:, c])[..., None] if kind == "component_mlp" else x
            expected = nn.functional.gelu(read @ W0[c] + b0[c]) @ W2[c] + b2[c]
            assert torch.allclose(importances(inputs)["inner.up"][..., c], expected[..., 0], atol=1e-6)


def test_the_transformer_sees_other_positions_and_other_sites() -> None:
    model = model_of()
    importances = CausalImportances(model.sites, settings_of("transformer"))
    inputs = model.site_inputs(torch.arange(6).reshape(2, 3))
    moved = {**inputs, "inner.down": inputs["inner.down"].clone()}
    moved["inner.down"][0, 2] += torch.arange(6.0)
    change = (importances(moved)["embed"] - importances(inputs)["embed"]).abs().amax(-1)
    assert (change[0] > 0).all()
    assert (change[1] == 0).all()
    swapped = {name: x.flip(1) for name, x in inputs.items()}  # rotary positions tell order
    assert not torch.allclose(importances(swapped)["embed"].flip(1), importances(inputs)["embed"])


def test_the_transformer_does_without_positions() -> None:
    model = model_of()
    importances = CausalImportances(model.sites, settings_of("transformer"))
    assert importances(model.site_inputs(torch.arange(6)))["inner.up"].shape == (6, 3)


def test_leaky_sigmoids() -> None:
    x = torch.tensor([-2.0, -2.0, 0.25, 3.0], requires_grad=True)
    lower = lower_leaky(x)
    assert lower.tolist() == [0, 0, 0.25, 1]
    (gradient,) = torch.autograd.grad(lower, x, torch.tensor([1.0, -1.0, 1.0, 1.0]))
    assert gradient.tolist() == pytest.approx([0, -0.01, 1, 0])  # a descent step may raise what is below 0
    upper = upper_leaky(x)
    assert upper.tolist() == pytest.approx([0, 0, 0.25, 1.02])
    (gradient,) = torch.autograd.grad(upper.sum(), x)
    assert gradient.tolist() == pytest.approx([0, 0, 1, 0.01])


def test_a_node_matters_as_much_as_its_component_that_matters_most() -> None:
    groups = [
        [("inner.up", 1), ("embed", 4)],
        [("inner.down", 0)],
        *([("embed", c)] for c in range(4)),
        [("inner.up", 0), ("inner.up", 2), ("inner.down", 1)],
    ]
    model = model_of(groups)
    by_site = {name: torch.randn(2, 3, site.n_components) for name, site in model.sites.items()}
    mask = node_importances(by_site, model)
    for index, group in enumerate(groups):
        expected = torch.stack([by_site[name][..., c].clamp(0, 1) for name, c in group]).amax(0)
        assert torch.equal(mask[..., index], expected)


def test_importance_mask_is_a_mask_of_the_model() -> None:
    model = model_of()
    with pytest.raises(UserError, match="no causal importances"):
        importance_mask(model, torch.arange(6).reshape(2, 3))
    model.importances = CausalImportances(model.sites, settings_of("shared_mlp"))
    ids = torch.arange(6).reshape(2, 3)
    mask = importance_mask(model, ids)
    assert mask.shape == (2, 3, model.n_nodes)
    assert not mask.requires_grad
    assert model(ids, mask).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mlp"}, "kind is 'mlp'; expected one of component_mlp"),
        ({"hidden": [0]}, r"hidden\[0\] is 0; expected at least 1"),
        ({"kind": "transformer", "d_model": 12, "n_heads": 4}, "expected a multiple of 8"),
    ],
)
def test_settings_that_make_no_function_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImportanceSettings(**change)
