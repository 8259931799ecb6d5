"""Toy data: who may be on, within which values, and the same whoever asks."""

import pytest
import torch

from pdprune.batches import as_batch
from pdprune.errors import UserError
from pdprune.ranks import Ranks
from pdprune.targets import InductionSequences, SparseFeatures
from pdprune.targets.toy_data import BOS, single_features


def test_features_are_on_as_often_and_as_strongly_as_asked() -> None:
    x = SparseFeatures(20, 0.05, low=-1.0, high=0.5, batch_size=20_000).batch("train", 0)["inputs"]
    assert x.shape == (20_000, 20)
    is_on = x != 0
    assert is_on.float().mean().item() == pytest.approx(0.05, abs=0.002)
    on = x[is_on]
    assert -1 <= on.min() < -0.99 and 0.49 < on.max() <= 0.5
    assert on.mean().item() == pytest.approx(-0.25, abs=0.02)


@pytest.mark.parametrize(("active", "n_active"), [("exactly_one_active", 1), ("exactly_two_active", 2)])
def test_exactly_so_many_features_are_on(active: str, n_active: int) -> None:
    x = SparseFeatures(6, active=active, low=0.1, batch_size=6000).batch("train", 0)["inputs"]
    assert torch.equal((x != 0).sum(1), torch.full((6000,), n_active))
    assert (x != 0).float().mean(0).allclose(torch.tensor(n_active / 6), atol=0.02)


def test_induction_sequences_hold_the_pair_once_and_end_on_its_first() -> None:
    batch = as_batch(InductionSequences(12, 9, batch_size=2000).batch("train", 0))
    ids, last = batch.inputs["input_ids"], batch.inputs["input_ids"][:, -1]
    assert torch.equal(ids[:, 0], torch.full((2000,), BOS)) and (ids[:, 1:] != BOS).all() and ids.max() == 11
    is_s = ids[:, :-1] == last[:, None]
    assert torch.equal(is_s.sum(1), torch.ones(2000, dtype=torch.long))
    place = is_s.int().argmax(1)
    assert torch.equal(ids[torch.arange(2000), place + 1], batch.labels)
    assert sorted(place.unique().tolist()) == list(range(1, 7))  # anywhere between BOS and the last token but one
    assert torch.equal(batch.positions, torch.full((2000, 1), 8))
    assert len(last.unique()) == len(batch.labels.unique()) == 11


@pytest.mark.parametrize(
    "make", [lambda seed: SparseFeatures(5, seed=seed), lambda seed: InductionSequences(9, 8, seed=seed)]
)
def test_batches_are_functions_of_seed_split_and_number(make) -> None:
    def first(data, split: str, step: int) -> torch.Tensor:
        inputs = data.batch(split, step)["inputs"]
        return inputs["input_ids"] if isinstance(inputs, dict) else inputs

    random_state = torch.random.get_rng_state()
    data = make(0)
    first(data, "train", 3)
    assert torch.equal(first(data, "train", 0), first(make(0), "train", 0))
    assert not torch.equal(first(data, "train", 0), first(data, "train", 1))
    assert not torch.equal(first(data, "train", 0), first(make(1), "train", 0))
    assert torch.equal(first(data, "held_out", 0), first(make(1), "held_out", 0))
    assert not torch.equal(first(data, "held_out", 0), first(data, "select", 0))
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_ranks_share_a_batch_out() -> None:
    data = InductionSequences(9, 8, batch_size=6)
    whole = data.batch("train", 0)
    for rank in range(2):
        share = data.batch("train", 0, Ranks(rank, 2))
        assert torch.equal(share["inputs"]["input_ids"], whole["inputs"]["input_ids"][rank::2])
        assert torch.equal(share["labels"], whole["labels"][rank::2])


def test_loaders_hold_the_splits() -> None:
    data = SparseFeatures(5, audit_batches=3, audit_batch_size=4, steps_per_epoch=2)
    assert len(list(data.train_dataloader())) == 2
    for loader, batches in (
        (data.val_dataloader(), data.select_batches()),
        (data.test_dataloader(), data.held_out_batches()),
    ):
        got = list(loader)
        assert len(got) == 3
        assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(got, batches, strict=True))


def test_single_features_are_on_alone() -> None:
    assert torch.equal(single_features(3, 0.5), torch.diag(torch.tensor([0.5, 0.5, 0.5])))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SparseFeatures(0), "n_features"),
        (lambda: SparseFeatures(1, active="exactly_two_active"), "n_features"),
        (lambda: SparseFeatures(5, 0.0), "probability"),
        (lambda: SparseFeatures(5, low=1.0, high=0.0), "low"),
        (lambda: SparseFeatures(5, active="some"), "active"),
        (lambda: SparseFeatures(5, batch_size=0), "batch_size"),
        (lambda: InductionSequences(3, 8), "vocab_size"),
        (lambda: InductionSequences(9, 3), "length"),
    ],
)
def test_data_that_cannot_be_is_refused(make, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()
