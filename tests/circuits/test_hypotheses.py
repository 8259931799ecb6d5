"""Circuit hypothesis tests on networks where the answers are known."""

from __future__ import annotations

import json

import pytest
import torch
from circuits.small_networks import Known, cancelling_pairs, linear_model

from pdprune.circuits.audit import audit
from pdprune.circuits.findings import Audit, HypothesisTests
from pdprune.circuits.hypotheses import HypothesisSettings, wilson
from pdprune.claims.planted.handmade import redundant_routes
from pdprune.errors import UserError

ALL = HypothesisSettings(circuits=20, removals=True)


def checked(known: Known, keep: set[int], settings: HypothesisSettings = ALL) -> tuple[Audit, HypothesisTests]:
    found = audit(known.model, keep, [known.batch], random_circuits=0, draws=2, hypotheses=settings)
    assert found.hypothesis_tests is not None
    return found, found.hypothesis_tests


def test_the_seeming_circuit_beats_random_ones_and_the_curve_shows_what_it_hides() -> None:
    found, tests = checked(cancelling_pairs(6, size=2.0), {0})
    assert tests.sufficiency is not None and tests.necessity is not None
    assert tests.sufficiency.loss == pytest.approx(found.complete_loss)
    assert tests.necessity.loss == pytest.approx(found.complement_loss)
    assert tests.sufficiency.share > 0.5 and tests.necessity.share > 0.5
    times, losses = zip(*((point.t, point.loss) for point in tests.ablation_curve), strict=True)
    assert times[0] == 0 and times[-1] == 1 and len(times) == 11
    assert losses[0] == pytest.approx(found.adversarial.loss)
    assert losses[-1] == pytest.approx(found.model_loss, abs=1e-6)
    assert list(losses) == sorted(losses, reverse=True)


def test_what_a_circuit_does_not_need_is_listed() -> None:
    model = linear_model(torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.5], [0, 0, 0, 0, 0]]))
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    _, tests = checked(Known(model, inputs, set(), set()), {0, 1, 2})
    assert tests.minimality is not None
    assert tests.minimality.unchanged == [2] and tests.minimality.tested == 3
    assert tests.minimality.largest.node == 0 and tests.minimality.smallest.node == 2
    assert tests.minimality.largest.change > 0.1 and tests.minimality.smallest.change == pytest.approx(0, abs=1e-6)


def test_a_removal_that_only_an_attack_sees_changes_something() -> None:
    """With one half of each pair kept there is no room; where the pairs are free their halves are found."""
    _, tests = checked(cancelling_pairs(3, size=2.0), set(range(7)))
    assert tests.minimality is not None and tests.minimality.unchanged == []
    assert tests.sufficiency is None and tests.necessity is None  # nothing to draw


def test_redundant_nodes_are_each_unneeded() -> None:
    puzzle = redundant_routes(3)
    _, tests = checked(Known(puzzle.model, puzzle.batch, set(), set()), {0, 1, 2})
    assert tests.minimality is not None and tests.minimality.unchanged == [0, 1, 2]
    _, tests = checked(Known(puzzle.model, puzzle.batch, set(), set()), {0})
    assert tests.minimality is not None and tests.minimality.unchanged == []


def test_they_are_saved_with_the_audit_and_left_out_where_not_asked_for(tmp_path) -> None:
    known = cancelling_pairs(2)
    found, tests = checked(known, {0})
    found.save(tmp_path)
    assert Audit.load(tmp_path).hypothesis_tests == tests
    plain = audit(known.model, {0}, [known.batch], random_circuits=0, draws=2)
    plain.save(tmp_path)
    assert "hypothesis_tests" not in json.loads((tmp_path / "audit.json").read_text())
    assert Audit.load(tmp_path) == plain


def test_without_removals_or_circuits_there_is_the_curve() -> None:
    _, tests = checked(cancelling_pairs(2), {0}, HypothesisSettings(circuits=0, points=3))
    assert tests.sufficiency is tests.necessity is tests.minimality is None
    assert [point.t for point in tests.ablation_curve] == [0, 0.5, 1]


def test_intervals_of_shares_have_a_width_at_the_ends() -> None:
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-3)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


@pytest.mark.parametrize("options", [{"circuits": -1}, {"points": 1}, {"removal_attacks": -2}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="hypotheses: "):
        HypothesisSettings(**options)
