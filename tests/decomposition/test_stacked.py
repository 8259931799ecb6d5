"""Sites of one shape folded by one product are what they are one by one, in fewer operators."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import hypothesis.strategies as st
import pytest
import torch
from decomposition.small_nets import Conv1D
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdprune.decomposition import DecomposedModel, mean_reference, stacked
from pdprune.seeding import generator

VOCAB, WIDTH, HIDDEN = 5, 4, 3


class Alike(nn.Module):
    """Two embeddings, and two blocks of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.again = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (False, True))
        self.up = nn.ModuleList(Conv1D(HIDDEN, WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.again(ids.flip(-1))
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            x = x + mix(x).cumsum(1)
            x = x + down(torch.tanh(up(x)))
        return x


SITES = ["embed", "again", *(f"{name}.{index}" for index in range(2) for name in ("mix", "up", "down"))]


def model_of(basis: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> DecomposedModel:
    """With neurons, or with random components that leave something over."""
    torch.manual_seed(seed)
    target = Alike().to(dtype)
    components: dict[str, tuple[Tensor | None, Tensor]] = {}
    for name in SITES:
        module = target.get_submodule(name)
        weight = module.get_parameter("weight").detach()
        W_IO = weight.t() if isinstance(module, nn.Linear) else weight
        V = None if basis == "neuron" else torch.randn(len(W_IO), 2, dtype=dtype)
        components[name] = V, W_IO.clone() if V is None else torch.randn(2, WIDTH, dtype=dtype)[:, : W_IO.shape[1]]
    return DecomposedModel.from_components(target, components)


def ids_of(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, 4), generator=generator(seed, "ids"))


def output_and_gradients(
    model: DecomposedModel, together: bool, reference: Mapping[str, Tensor] | None, sites: list[str] | None = None
) -> list[Tensor]:
    model.folds_together = together
    rng = generator(0, "masks")
    mask, delta_mask = (torch.rand(size, generator=rng).double() for size in (model.n_nodes, model.n_sites))
    leaves = [mask.requires_grad_(), delta_mask.requires_grad_()]
    output = model(ids_of(), mask, delta_mask, reference, sites)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad((weights * output).sum(), leaves, materialize_grads=True)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    basis=st.sampled_from(["neuron", "components"]),
    kind=st.sampled_from(["zero", "mean", "position", "token"]),
    sites=st.sampled_from([None, SITES[:3], [*SITES[:2], "up.1"]]),
)
def test_one_product_for_several_sites_changes_nothing(
    seed: int, basis: str, kind: str, sites: list[str] | None
) -> None:
    model = model_of(basis, seed)
    reference: Mapping[str, Tensor] | None = None
    if kind in ("mean", "position"):
        reference = mean_reference(model, [ids_of(1)], per_position=kind == "position")
    elif kind == "token":
        reference = model.site_inputs(ids_of(1))
    each, together = (output_and_gradients(model, how, reference, sites) for how in (False, True))
    for one, other in zip(each, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Counted(TorchDispatchMode):
    """How often products of matrices are asked for."""

    products = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def products(model: DecomposedModel, together: bool) -> int:
    model.folds_together = together
    with Counted() as counted, torch.no_grad():
        model(ids_of(), torch.full((model.n_nodes,), 0.5, dtype=torch.double))
    return counted.products


def test_there_are_fewer_products() -> None:
    model = model_of("components")
    # Eight sites of four shapes; the target's own six products stay.
    assert products(model, together=False) - products(model, together=True) == 4


def test_on_a_cpu_sites_are_folded_one_by_one_unless_told() -> None:
    model = model_of("components")
    model(ids_of(), torch.full((model.n_nodes,), 0.5, dtype=torch.double))
    assert model._stacks is None


def changed_in_place(model: DecomposedModel) -> None:
    model.sites["mix.1"].U.mul_(-3)


def replaced(model: DecomposedModel) -> None:
    model.sites["mix.1"].U = -3 * model.sites["mix.1"].U


def loaded(model: DecomposedModel) -> None:
    state = model.state_dict()
    model.load_state_dict({name: -3 * tensor for name, tensor in state.items()}, assign=True, strict=False)


@pytest.mark.parametrize("change", [changed_in_place, replaced, loaded, DecomposedModel.double])
def test_what_is_stacked_follows_the_sites(change: Callable[[DecomposedModel], object]) -> None:
    model = model_of("components", dtype=torch.float32)
    before, *_ = output_and_gradients(model, True, None)
    change(model)
    together, each = (output_and_gradients(model, one_product, None) for one_product in (True, False))
    for one, other in zip(each, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert before.dtype != together[0].dtype or not torch.allclose(before, together[0])


def test_copies_make_their_own_stacks() -> None:
    model = model_of("components")
    expected = output_and_gradients(model, True, None)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._stacks is None
        torch.testing.assert_close(output_and_gradients(copied, True, None), expected)


def test_gradients_follow_a_pass_in_inference_mode() -> None:
    model = model_of("components")
    model.folds_together = True
    with torch.inference_mode():
        model(ids_of(), torch.full((model.n_nodes,), 0.5, dtype=torch.double))
    output_and_gradients(model, True, None)


def test_large_sites_are_not_stored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "MOST_ENTRIES", WIDTH * WIDTH - 1)
    model = model_of("neuron")
    alike = stacked.Stacks(list(model.sites.values())).all
    assert [[site.name for site in one.sites] for one in alike] == [["up.0", "up.1"], ["down.0", "down.1"]]


def test_sites_that_were_narrowed_are_folded_by_themselves() -> None:
    model = model_of("components")
    is_open = torch.zeros(model.n_nodes, dtype=torch.bool)
    is_open[::2] = True
    mask = torch.where(is_open, 0.5, 1.0).double()
    narrowed = model.narrowed_to(is_open)
    assert any(left is not None for left in narrowed.components)
    expected = model(ids_of(), mask)
    model.folds_together = True
    torch.testing.assert_close(model(ids_of(), mask, narrowed=narrowed), expected, rtol=1e-10, atol=1e-10)
    assert all(left is None for left in model.narrowed_to(is_open).components)
    by_token = model.narrowed_to(is_open, model.site_inputs(ids_of(1)))
    assert any(left is not None for left in by_token.components), "one product cannot serve these"
