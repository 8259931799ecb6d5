"""The toy networks: what they compute, as written down for a few numbers, and the sizes that are refused."""

import pytest
import torch
from torch import nn

from pdprune.decomposition import DecomposedModel, decompose
from pdprune.errors import UserError
from pdprune.targets import (
    TMS,
    InductionConfig,
    InductionTransformer,
    ResidualMLP,
    ResidualMLPConfig,
    TMSConfig,
    load_target,
    save_target,
)

TINY_INDUCTION = InductionConfig(vocab_size=9, max_length=7, n_layers=2, n_heads=2, d_model=8)
TOYS = [
    TMS(TMSConfig(5, 2, n_hidden_layers=1)),
    ResidualMLP(ResidualMLPConfig(n_layers=2, n_features=6, d_embed=8, d_mlp=4, in_bias=True, out_bias=True)),
    InductionTransformer(TINY_INDUCTION),
]


def inputs_of(network: nn.Module) -> torch.Tensor:
    if isinstance(network, InductionTransformer):
        return torch.randint(network.config.vocab_size, (3, 7))
    return torch.rand(3, network.config.n_features)


def test_tms_is_two_matrices_and_a_relu() -> None:
    network = TMS(TMSConfig(5, 2))
    x = torch.rand(4, 5)
    W = network.linear1.weight
    assert torch.equal(network.linear2.weight, W.t())
    torch.testing.assert_close(network(x), (x @ W.t() @ W + network.linear2.bias).relu())


def test_hidden_layers_of_a_tms_change_nothing() -> None:
    torch.manual_seed(0)
    plain = TMS(TMSConfig(5, 2))
    deeper = TMS(TMSConfig(5, 2, n_hidden_layers=3))
    deeper.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(4, 5)
    torch.testing.assert_close(deeper(x), plain(x))
    assert not any(layer.weight.requires_grad for layer in deeper.hidden_layers)


def test_a_residual_mlp_adds_its_layers_to_the_stream() -> None:
    network = ResidualMLP(ResidualMLPConfig(n_layers=2, n_features=6, d_embed=8, d_mlp=4))
    x = 2 * torch.rand(3, 6) - 1
    stream = x @ network.W_E
    for layer in network.layers:
        stream = stream + (stream @ layer.mlp_in.weight.t()).relu() @ layer.mlp_out.weight.t()
    torch.testing.assert_close(network(x), stream @ network.W_U)
    torch.testing.assert_close(network.wanted(x), x + x.relu())


def test_the_embedding_is_of_unit_length_fixed_and_read_out_by_its_transpose() -> None:
    network = ResidualMLP(ResidualMLPConfig(n_features=6, d_embed=8))
    torch.testing.assert_close(network.W_E.norm(dim=1), torch.ones(6))
    assert torch.equal(network.W_U, network.W_E.t())
    assert not network.W_E.requires_grad and not network.W_U.requires_grad


def test_a_narrow_stream_holds_the_cosines_of_a_wide_one() -> None:
    torch.manual_seed(3)
    wide = ResidualMLP(ResidualMLPConfig(n_features=20, d_embed=500)).W_E
    torch.manual_seed(3)
    narrow = ResidualMLP(ResidualMLPConfig(n_features=20, d_embed=24, d_random=500)).W_E
    assert narrow.shape == (20, 24)
    torch.testing.assert_close(narrow @ narrow.t(), wide @ wide.t(), atol=1e-5, rtol=0)


def test_the_induction_transformer_sees_no_token_to_the_right() -> None:
    network = InductionTransformer(TINY_INDUCTION)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = ids.clone()
    changed[0, 4:] = 8
    before, after = network(ids), network(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_heads_look_but_never_move_positions() -> None:
    """With attention spread evenly, the order of the tokens before the last is lost."""
    network = InductionTransformer(TINY_INDUCTION)
    for block in network.blocks:
        nn.init.zeros_(block.attn.q.weight)
    ids = torch.tensor([[1, 2, 3, 4], [3, 1, 2, 4]])
    one_layer = network.blocks[0](network.embed(ids), network.positions[:4])
    torch.testing.assert_close(one_layer[0, -1], one_layer[1, -1])
    pattern = network.patterns(ids)[0]
    torch.testing.assert_close(pattern, torch.ones(4, 4).tril().div(torch.arange(1, 5)[:, None]).expand_as(pattern))


@pytest.mark.parametrize("network", TOYS, ids=lambda network: type(network).__name__)
def test_a_saved_toy_comes_back(network: nn.Module, tmp_path) -> None:
    save_target(network, tmp_path / "toy")
    random_state = torch.random.get_rng_state()
    target = load_target(tmp_path / "toy")
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert (type(target.module), target.module.config) == (type(network), network.config)
    assert (target.name, target.tokenizer) == ("toy", None)
    assert target.max_length == (7 if isinstance(network, InductionTransformer) else None)
    inputs = inputs_of(network)
    torch.testing.assert_close(target.module(inputs), network(inputs))


@pytest.mark.parametrize("network", TOYS, ids=lambda network: type(network).__name__)
def test_every_matrix_is_a_site(network: nn.Module) -> None:
    model = decompose(network, ["*"], "svd")
    fixed = {"W_E", "W_U"}
    matrices = {name.removesuffix(".weight") for name, value in network.named_parameters() if value.ndim == 2} - fixed
    assert set(model.site_names) == matrices
    assert isinstance(model, DecomposedModel)
    inputs = inputs_of(network)
    torch.testing.assert_close(model(inputs, torch.ones(model.n_nodes)), network(inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TMSConfig(n_hidden=0), "n_hidden"),
        (lambda: TMSConfig(n_hidden_layers=-1), "n_hidden_layers"),
        (lambda: ResidualMLPConfig(d_mlp=0), "d_mlp"),
        (lambda: ResidualMLPConfig(act_fn_name="tanh"), "act_fn_name"),
        (lambda: ResidualMLPConfig(n_features=100, d_embed=50, d_random=1000), "d_random"),
        (lambda: InductionConfig(d_model=9, n_heads=3), "d_model"),
        (lambda: InductionConfig(vocab_size=0), "vocab_size"),
    ],
)
def test_impossible_sizes_are_refused(make, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()
