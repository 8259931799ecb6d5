"""The network that ships: its shapes, its sites, what it may look at, and what it does with padding."""

import pytest
import torch
from torch import nn

from pdprune.errors import UserError
from pdprune.targets import Transformer, TransformerConfig

TINY = TransformerConfig(vocab_size=11, max_length=7, n_layers=2, n_heads=2, d_model=8, d_mlp=12)


@pytest.fixture
def network() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TINY).eval()


def test_gives_logits_at_every_position(network: Transformer) -> None:
    assert network(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 11)


def test_every_matrix_is_a_site_under_its_documented_path(network: Transformer) -> None:
    blocks = [
        f"blocks.{i}.{site}"
        for i in range(2)
        for site in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down")
    ]
    sites = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert sites == ["embed", "pos", *blocks, "unembed"]
    in_sites = {f"{site}.{kind}" for site in sites for kind in ("weight", "bias")}
    assert all(parameter.ndim == 1 for name, parameter in network.named_parameters() if name not in in_sites)


def test_sees_no_token_to_the_right(network: Transformer) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = ids.clone()
    changed[0, 4:] = 9
    before, after = network(ids), network(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_padding_on_the_right_changes_nothing_before_it(network: Transformer) -> None:
    ids = torch.tensor([[1, 2, 3]])
    padded = torch.tensor([[1, 2, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(network(padded, attention_mask=mask)[:, :3], network(ids))


def test_tells_positions_apart(network: Transformer) -> None:
    logits = network(torch.full((1, 4), 3))
    assert not torch.allclose(logits[0, 0], logits[0, 3])


@pytest.mark.parametrize(("field", "value"), [("n_layers", 0), ("d_model", 9), ("vocab_size", -1)])
def test_impossible_sizes_are_refused(field: str, value: int) -> None:
    with pytest.raises(UserError, match=field):
        TransformerConfig(**{**vars(TINY), field: value})
