"""The folded route, the per-token route and a slow loop over components are one function, gradients included."""

from __future__ import annotations

from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
import torch
from decomposition.small_nets import VOCAB, Case, random_decomposition, slow_forward, small_lm
from hypothesis import given, settings
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel, decompose, mean_reference, resample_reference
from pdprune.seeding import generator

B, T = 3, 4
REFERENCES = ("zero", "mean", "mean per position", "resample")
# Leading dimensions of a mask: shared, positions, examples, positions and examples.
LEADS = ((), (1, 1), (T,), (B, 1), (B, T))


def reference_named(name: str, model: DecomposedModel, ids: Tensor) -> Mapping[str, Tensor] | None:
    match name:
        case "zero":
            return None
        case "mean":
            return mean_reference(model, [ids, ids[:1]])
        case "mean per position":
            return mean_reference(model, [ids, ids[:1]], per_position=True)
        case _:
            return resample_reference(model, ids, ids.roll(1, 0))


def output_and_gradients(output: Tensor, wrt: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad((weights * output).sum(), wrt, materialize_grads=True)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 5),
    hidden=st.integers(1, 6),
    with_delta=st.booleans(),
    n_nodes=st.sampled_from([None, 1, 4, 9]),
    lead=st.sampled_from(LEADS),
    delta_lead=st.sampled_from(LEADS),
    reference=st.sampled_from(REFERENCES),
    masked=st.sampled_from(["nodes", "deltas", "both"]),
)
def test_every_route_is_the_formula(
    seed: int,
    width: int,
    hidden: int,
    with_delta: bool,
    n_nodes: int | None,
    lead: tuple[int, ...],
    delta_lead: tuple[int, ...],
    reference: str,
    masked: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = random_decomposition(small_lm(seed, width, hidden), generator, with_delta, n_nodes)
    ids = torch.randint(0, VOCAB, (B, T), generator=generator)
    mask = torch.rand(*lead, model.n_nodes, generator=generator, dtype=torch.double).requires_grad_()
    delta_mask = torch.rand(*delta_lead, model.n_sites, generator=generator, dtype=torch.double).requires_grad_()
    case = Case(
        mask if masked != "deltas" else None,
        delta_mask if masked != "nodes" else None,
        reference_named(reference, model, ids),
    )
    wrt = [given for given in (case.mask, case.delta_mask) if given is not None]

    expected = output_and_gradients(slow_forward(model, ids, case) + 0 * sum(w.sum() for w in wrt), wrt)
    output = model(ids, case.mask, case.delta_mask, case.reference)
    got = output_and_gradients(output + 0 * sum(w.sum() for w in wrt), wrt)
    for value, expectation in zip(got, expected, strict=True):
        torch.testing.assert_close(value, expectation, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("basis", ["svd", "neuron"])
def test_a_shared_mask_means_the_same_on_both_routes(basis: str, reference: str) -> None:
    model = decompose(small_lm(0), "*", basis)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (B, T), generator=generator)
    x_ref = reference_named(reference, model, ids)
    mask = torch.rand(model.n_nodes, generator=generator, dtype=torch.double).requires_grad_()
    folded = output_and_gradients(model(ids, mask, None, x_ref), [mask])
    per_token = output_and_gradients(model(ids, mask.expand(B, T, -1), None, x_ref), [mask])
    torch.testing.assert_close(folded, per_token, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("lead", LEADS)
def test_ones_leave_the_target_as_it_is_bit_for_bit(lead: tuple[int, ...], reference: str) -> None:
    target = small_lm(1).float()
    model = random_decomposition(target, torch.Generator().manual_seed(1), with_delta=True, n_nodes=5)
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    x_ref = reference_named(reference, model, ids)
    ones, delta_ones = torch.ones(*lead, model.n_nodes), torch.ones(*lead, model.n_sites)
    assert torch.equal(model(ids), target(ids))
    assert torch.equal(model(ids, ones, None, x_ref), target(ids))
    assert torch.equal(model(ids, ones, delta_ones, x_ref), target(ids))


def test_kept_nodes_are_beyond_the_sources() -> None:
    """With `m = g + (1 - g)s` and every gate 1, no `s` changes the output, and no gradient reaches it."""
    model = decompose(small_lm(2), "*", "svd")
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    gate = torch.ones(model.n_nodes, dtype=torch.double)
    for seed in range(5):
        source = torch.rand(model.n_nodes, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
        output = model(ids, gate + (1 - gate) * source)
        assert torch.equal(output, model.target(ids))
        (gradient,) = torch.autograd.grad(output.square().sum(), source)
        assert not gradient.any()


def test_all_ablated_with_deltas_reads_only_biases() -> None:
    model = decompose(nn.Linear(3, 2).double(), "", "neuron")
    output = model(torch.randn(4, 3).double(), torch.zeros(3))
    assert torch.equal(output, model.target.bias.expand(4, 2))


def test_mean_ablation_of_everything_is_a_constant_for_linear_nets() -> None:
    target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).double()
    model = decompose(target, "*", "svd")
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    output = model(x, torch.zeros(model.n_nodes), reference=mean_reference(model, [x]))
    torch.testing.assert_close(output, target(x).mean(0).expand(8, 2))


def test_masks_by_example_without_positions() -> None:
    model = decompose(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), "*", "neuron")
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(5, 3, generator=generator).double(), torch.rand(5, 7, generator=generator).double()
    one_by_one = torch.cat([model(x[i : i + 1], mask[i]) for i in range(5)])
    torch.testing.assert_close(model(x, mask), one_by_one)


def test_a_shorter_input_has_the_references_of_its_positions() -> None:
    model = decompose(small_lm(3), "*", "neuron")
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    x_ref = mean_reference(model, [ids], per_position=True)
    mask = torch.full((model.n_nodes,), 0.3).double()
    full = model(ids, mask, None, x_ref)
    torch.testing.assert_close(model(ids[:, :2], mask, None, x_ref), full[:, :2])
    torch.testing.assert_close(model(ids[:, :2], mask.expand(2, -1), None, x_ref), full[:, :2])


def test_bool_and_integer_masks() -> None:
    model = decompose(small_lm(4), "*", "neuron")
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    keep = torch.arange(model.n_nodes) % 2 == 0
    assert torch.equal(model(ids, keep), model(ids, keep.double()))
    assert torch.equal(model(ids, keep.int()), model(ids, keep.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_targets(dtype: torch.dtype) -> None:
    """Folding is done in float32: what is kept stays exact, and both routes agree as far as the type can tell."""
    target = nn.Sequential(nn.Embedding(VOCAB, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)).to(dtype)
    model = decompose(target, "*", "svd")
    assert model.sites["1"].U.dtype == torch.float32
    ids = torch.arange(12).reshape(3, 4) % VOCAB
    assert torch.equal(model(ids, torch.ones(model.n_nodes)), target(ids))
    mask = torch.rand(model.n_nodes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    folded, per_token = model(ids, mask), model(ids, mask.expand(3, 4, -1))
    assert folded.dtype == per_token.dtype == dtype
    torch.testing.assert_close(folded, per_token, rtol=0.05, atol=0.05)
    (gradient,) = torch.autograd.grad(folded.float().sum(), mask)
    assert gradient.dtype == torch.float32 and gradient.any()


def test_autocast_does_not_reach_the_fold() -> None:
    target = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = decompose(target, "*", "svd")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for lead in ((), (4,)):
            assert torch.equal(model(x, torch.ones(*lead, model.n_nodes)), target(x))


def test_tied_weights_are_two_matrices_of_which_one_is_masked() -> None:
    target = small_lm(5)
    target.unembed.weight = target.embed.weight
    model = decompose(target, "unembed", "neuron")
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    for lead in ((), (B, T)):
        assert not model(ids, torch.zeros(*lead, model.n_nodes)).any()
        embedding = decompose(target, "embed", "neuron")
        case = Case(torch.full((*lead, VOCAB), 0.5).double(), None, None)
        got = embedding(ids, case.mask)
        torch.testing.assert_close(got, slow_forward(embedding, ids, case))
    assert target.unembed.weight is target.embed.weight


def test_a_module_called_twice_is_masked_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.alias = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(torch.tanh(self.layer(x)))

    target = Twice().double()
    for by_path in ("layer", "alias"):
        W, b = target.layer.weight.detach().clone(), target.layer.bias.detach()
        model = DecomposedModel.from_components(target, {by_path: (None, W.t())})
        mask = torch.tensor([0.2, 1.0, 0.0]).double()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
        expected = torch.tanh(x @ (W * mask).t() + b) @ (W * mask).t() + b
        for m in (mask, mask.expand(4, 3)):
            torch.testing.assert_close(model(x, m), expected)
        assert torch.equal(target.layer.weight, W)
        assert decompose(target, ["alias", "layer"], "neuron").site_names == ["layer"]


def test_gradients_reach_padding_rows_on_both_routes() -> None:
    """An Embedding gives no gradient to its padding row, but the nodes that live there have one."""
    target = nn.Sequential(nn.Embedding(VOCAB, 3, padding_idx=0, scale_grad_by_freq=True), nn.Tanh()).double()
    nn.init.normal_(target[0].weight, generator=torch.Generator().manual_seed(0))
    model = decompose(target, "0", "neuron")
    ids = torch.tensor([[0, 0, 1], [2, 0, 1]])
    mask = torch.ones(VOCAB).double().requires_grad_()
    (folded,) = torch.autograd.grad(model(ids, mask).sum(), mask)
    (per_token,) = torch.autograd.grad(model(ids, mask.expand(2, 3, -1)).sum(), mask)
    torch.testing.assert_close(folded, per_token)
    assert folded[0] != 0
    assert target[0].padding_idx == 0 and target[0].scale_grad_by_freq is True


def test_layers_of_pytorch_itself() -> None:
    """TransformerEncoderLayer has a fast path that calls no modules; a shared mask counts there as well."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).double()
    model = decompose(layer, ["linear*", "self_attn.out_proj"], "neuron")
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.rand(model.n_nodes, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        fast = model(x, mask)
    torch.testing.assert_close(fast, model(x, mask.requires_grad_()).detach())
    by_token = decompose(layer, "linear*", "neuron")
    m = mask.detach()[8:]
    with torch.no_grad():
        torch.testing.assert_close(by_token(x, m), by_token(x, m.expand(2, 5, -1)))


@pytest.mark.parametrize("lead", [(), (B, T)])
def test_inputs_and_outputs_of_any_type(lead: tuple[int, ...]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = small_lm(6)

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0
        ) -> dict[str, object]:
            return {"logits": self.lm(input_ids=input_ids) * scale, "mask": attention_mask}

    model = decompose(Wrapped(), "*.down", "neuron")
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    mask = torch.zeros(*lead, model.n_nodes)
    plain = model(ids, mask)
    assert plain.keys() == {"logits", "mask"} and plain["mask"] is None
    assert torch.equal(model((ids, None, 2.0), mask)["logits"], 2 * plain["logits"])
    assert torch.equal(model({"scale": 2.0, "input_ids": ids}, mask)["logits"], 2 * plain["logits"])


def test_the_folded_forward_is_one_graph_to_the_compiler() -> None:
    model = decompose(small_lm(7), "*", "neuron")
    ids = torch.arange(B * T).reshape(B, T) % VOCAB
    mask = torch.full((model.n_nodes,), 0.5).double()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, mask), model(ids, mask))


def test_masks_can_be_kept_to_some_sites() -> None:
    """The others are as if their masks were one, which costs nothing."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = DecomposedModel.from_components(
        target, {"0": (torch.randn(4, 2), torch.randn(2, 6)), "2": (torch.randn(6, 3), torch.randn(3, 3))}
    )
    x, mask, delta_mask = torch.randn(5, 4), torch.rand(5, 5), torch.rand(5, 2)
    elsewhere, delta_elsewhere = mask.clone(), delta_mask.clone()
    elsewhere[:, :2], delta_elsewhere[:, 0] = 1, 1
    assert torch.allclose(model(x, mask, delta_mask, sites=["2"]), model(x, elsewhere, delta_elsewhere))
    assert torch.equal(model(x, mask, delta_mask, sites=[]), target(x))


def test_one_run_gives_the_output_and_what_the_sites_read() -> None:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = DecomposedModel.from_components(target, {"2": (torch.randn(6, 3), torch.randn(3, 3))})
    x, runs = torch.randn(5, 4), []
    target[0].register_forward_hook(lambda *_: runs.append(1))
    observed = model.observe(x)
    assert len(runs) == 1
    assert torch.equal(observed.output, target(x))
    assert torch.equal(observed.site_inputs["2"], torch.relu(target[0](x)))


@pytest.mark.parametrize("n_open", [0, 2, 9])
def test_leaving_out_what_is_kept_changes_nothing(n_open: int) -> None:
    model, inputs = decompose(small_lm(0), sites=["*"], basis="svd"), torch.arange(B * T).reshape(B, T) % VOCAB
    rng = generator(0)
    is_open = torch.zeros(model.n_nodes, dtype=torch.bool)
    is_open[torch.randperm(model.n_nodes, generator=rng)[:n_open]] = True
    mask = torch.where(is_open, torch.rand(model.n_nodes, generator=rng), 1.0).requires_grad_()
    narrowed = model.narrowed_to(is_open)
    assert sum(site.n_components for site in narrowed.sites) < model.n_nodes
    whole, part = model(inputs, mask), model(inputs, mask, narrowed=narrowed)
    assert torch.allclose(whole, part, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(output.square().sum(), mask)[0] for output in (whole, part)]
    assert torch.allclose(gradients[0][is_open], gradients[1][is_open], rtol=1e-5, atol=1e-6)
    assert bool((gradients[1][~is_open] == 0).all())
