"""Means over tokens that are no padding, and inputs of partners."""

from __future__ import annotations

import pytest
import torch
from decomposition.small_nets import SITES, VOCAB, small_lm
from torch import nn

from pdprune.decomposition import DecomposedModel, decompose, mean_reference, resample_reference
from pdprune.errors import UserError

LENGTHS = ((4, 2), (3, 3, 1))


@pytest.fixture
def model() -> DecomposedModel:
    return decompose(small_lm(0), "*", "svd")


def padded_batches() -> list[dict[str, dict[str, torch.Tensor]]]:
    """Two batches of unlike size and width, padded on the right with ids that must not count."""
    batches = []
    for lengths in LENGTHS:
        width = max(lengths)
        ids = torch.randint(0, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(width))
        kept = torch.arange(width) < torch.tensor(lengths)[:, None]
        batches.append({"inputs": {"input_ids": ids, "attention_mask": kept.long()}})
    return batches


def tokens_read(model: DecomposedModel, site: str) -> list[tuple[int, torch.Tensor]]:
    """Position and vector of every token that a site reads, one sequence at a time without its padding."""
    tokens = []
    for batch in padded_batches():
        for ids, kept in zip(batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"], strict=True):
            x = model.site_inputs(ids[: int(kept.sum())].unsqueeze(0))[site][0]
            vectors = nn.functional.one_hot(x, VOCAB).double() if site == "embed" else x
            tokens += list(enumerate(vectors))
    return tokens


@pytest.mark.parametrize("site", SITES)
def test_means_leave_padding_out(model: DecomposedModel, site: str) -> None:
    tokens = tokens_read(model, site)
    mean = mean_reference(model, padded_batches())[site]
    torch.testing.assert_close(mean, torch.stack([x for _, x in tokens]).mean(0))
    by_position = mean_reference(model, padded_batches(), per_position=True)[site]
    for t in range(4):
        torch.testing.assert_close(by_position[t], torch.stack([x for p, x in tokens if p == t]).mean(0))


def test_a_position_that_is_only_padding_gets_the_overall_mean(model: DecomposedModel) -> None:
    batch = padded_batches()[0]
    batch["inputs"]["attention_mask"][:, 3] = 0
    by_position, overall = mean_reference(model, [batch], per_position=True), mean_reference(model, [batch])
    for site in SITES:
        torch.testing.assert_close(by_position[site][3], overall[site])


def test_means_without_positions() -> None:
    model = decompose(nn.Linear(3, 2), "", "neuron")
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3)
    torch.testing.assert_close(mean_reference(model, [x, (y, None)])[""], torch.cat([x, y]).mean(0))
    with pytest.raises(UserError, match="site '' reads leading dimensions \\[4\\]"):
        mean_reference(model, [x], per_position=True)


def test_a_module_called_twice_counts_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    target = Twice()
    model = decompose(target, "*", "neuron")
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_reference(model, [x])["layer"], torch.cat([x, target.layer(x)]).mean(0).detach())
    with pytest.raises(UserError, match="'layer' is called 2 times"):
        model.site_inputs(x)


def test_position_ids_alike_for_all_examples() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(VOCAB, 2), nn.Embedding(4, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]).unsqueeze(0))

    model = decompose(Positions(), "*", "neuron")
    frequencies = mean_reference(model, padded_batches()[:1])["place"]
    torch.testing.assert_close(frequencies, torch.tensor([2.0, 2.0, 1.0, 1.0]) / 6)


def test_resampled_inputs_are_what_the_partner_reads(model: DecomposedModel) -> None:
    ids = torch.arange(12).reshape(3, 4) % VOCAB
    x_ref = resample_reference(model, ids, ids.roll(1, 0))
    expected = model.site_inputs(ids.roll(1, 0))
    assert all(torch.equal(x_ref[site], expected[site]) for site in SITES)
    ablated = model(ids, torch.zeros(model.n_nodes), None, x_ref)
    torch.testing.assert_close(ablated, model.target(ids.roll(1, 0)))
    with pytest.raises(UserError, match="shapes"):
        resample_reference(model, ids, ids[:, :2])


def test_nothing_to_average(model: DecomposedModel) -> None:
    with pytest.raises(UserError, match="no batches"):
        mean_reference(model, [])
    batch = padded_batches()[0]
    batch["inputs"]["attention_mask"].zero_()
    with pytest.raises(UserError, match="nothing but padding"):
        mean_reference(model, [batch])
