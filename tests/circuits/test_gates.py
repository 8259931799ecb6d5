"""Gate maps and sparsity terms, by their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdprune.circuits.gates import GateMap, HardConcrete, Heaviside, LeakyHardSigmoid, Sparsity
from pdprune.seeding import generator

MAPS = [LeakyHardSigmoid(), HardConcrete(), Heaviside()]
by_name = pytest.mark.parametrize("gate_map", MAPS, ids=lambda gate_map: type(gate_map).__name__)


def gradient(gate_map: GateMap, theta: list[float], upstream: list[float], of: str = "gates") -> list[float]:
    leaf = torch.tensor(theta, requires_grad=True)
    getattr(gate_map, of)(leaf).backward(torch.tensor(upstream))
    assert leaf.grad is not None
    return leaf.grad.tolist()


@by_name
@given(theta=st.lists(st.floats(-20, 20), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_gates_lie_between_0_and_1_and_rise_with_theta(gate_map: GateMap, theta: list[float], seed: int) -> None:
    ordered = torch.tensor(theta).sort().values
    for gates in (gate_map.gates(ordered), gate_map.gates(ordered, generator(seed))):
        assert gates.min() >= 0 and gates.max() <= 1
    gates = gate_map.gates(ordered)
    assert torch.equal(gates, gates.sort().values)
    assert torch.equal(gates, gate_map.gates(ordered)), "without a generator nothing is drawn"


@by_name
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_gates_begin_open_and_in_bounds(gate_map: GateMap, shape: tuple[int, ...]) -> None:
    theta = gate_map.initial(shape, generator(0))
    low, high = gate_map.bounds()
    assert theta.shape == shape and low <= theta.min() and theta.max() <= high
    assert gate_map.gates(theta).min() > 0.9
    assert torch.equal(theta, gate_map.initial(shape, generator(0)))


@by_name
def test_both_ends_are_reached_within_the_bounds(gate_map: GateMap) -> None:
    low, high = gate_map.bounds()
    assert gate_map.gates(torch.tensor([low, high])).tolist() == [0, 1]


@by_name
def test_sparsity_can_bring_every_gate_down(gate_map: GateMap) -> None:
    """Its gradient dies nowhere from the upper bound down to where the gate has shut."""
    _, high = gate_map.bounds()
    theta = [high, high / 2, high / 100]
    assert min(gradient(gate_map, theta, [1, 1, 1], of="presence")) > 0


def test_leaky_hard_is_a_clamp_with_a_leak_for_gradients_that_raise() -> None:
    gate_map = LeakyHardSigmoid(leak=0.01)
    theta = [-0.3, -0.3, 0.4, 0.4, 1.2, 1.2]
    assert gate_map.gates(torch.tensor(theta)).tolist() == pytest.approx([0, 0, 0.4, 0.4, 1, 1])
    # Descent raises θ where the gradient is negative.
    upstream = [-2.0, 2.0, -2.0, 2.0, -2.0, 2.0]
    assert gradient(gate_map, theta, upstream) == pytest.approx([-0.02, 0, -2, 2, 0, 0])
    assert gradient(gate_map, theta, [1] * 6, of="presence") == pytest.approx([0, 0, 1, 1, 0.01, 0.01])


def test_hard_concrete_without_noise_is_a_stretched_sigmoid() -> None:
    theta = torch.linspace(-5, 5, 11)
    expected = (torch.sigmoid(theta) * 1.2 - 0.1).clamp(0, 1)
    assert torch.allclose(HardConcrete().gates(theta), expected)


def test_hard_concrete_expects_as_many_open_gates_as_it_draws() -> None:
    theta = torch.linspace(-4, 4, 9)
    drawn = HardConcrete().gates(theta.expand(40_000, -1), generator(0))
    assert torch.allclose((drawn > 0).float().mean(0), HardConcrete().presence(theta), atol=0.01)
    assert (drawn == 1).any() and (drawn == 0).any() and ((drawn > 0) & (drawn < 1)).any()


@given(seed=st.integers(0, 10**6))
def test_hard_concrete_draws_have_gradients_where_they_are_inside(seed: int) -> None:
    theta = torch.linspace(-2, 2, 20, requires_grad=True)
    drawn = HardConcrete().gates(theta, generator(seed))
    (slope,) = torch.autograd.grad(drawn.sum(), theta)
    inside = (drawn > 0) & (drawn < 1)
    assert bool((slope[inside] > 0).all()) and bool((slope[~inside] == 0).all())


def test_heaviside_steps_and_learns_like_a_sigmoid() -> None:
    theta = [-0.4, 0.0, 1e-6, 0.7]
    gate_map = Heaviside(temperature=0.5)
    assert gate_map.gates(torch.tensor(theta)).tolist() == [0, 0, 1, 1]
    leaf = torch.tensor(theta, requires_grad=True)
    torch.sigmoid(leaf / 0.5).backward(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    assert leaf.grad is not None
    assert gradient(gate_map, theta, [1, -2, 3, 4]) == pytest.approx(leaf.grad.tolist())


def test_heaviside_begins_where_gao_et_al_begin() -> None:
    theta = Heaviside().initial((10_000,), generator(0))
    assert float(theta.mean()) == pytest.approx(0.1, abs=1e-3) and float(theta.std()) == pytest.approx(0.01, rel=0.05)


# -- what keeping costs ----------------------------------------------------------------------------------------------

PRESENCE = torch.tensor([0.0, 0.25, 1.0, 1.0])


def lp_mean(p: float, offset: float = 1e-3) -> float:
    """The mean of `g^p` over `PRESENCE`, with the offset that keeps the gradient at 0 finite."""
    return sum((g + offset) ** p - offset**p for g in PRESENCE.tolist()) / 4


@pytest.mark.parametrize(
    ("kind", "progress", "expected"),
    [
        ("l0", 0.0, 2.25 / 4),
        ("l0", 1.0, 2.25 / 4),
        ("lp", 0.0, 2.25 / 4),  # p = 1
        ("lp", 0.35, lp_mean(0.75)),  # half-way
        ("lp", 0.7, lp_mean(0.5)),
        ("lp", 1.0, lp_mean(0.5)),  # and no further
        ("smooth_l0", 0.0, (2 * 1 / 2 + 0.0625 / 1.0625) / 4),
        ("smooth_l0", 1.0, (2 * 1 / 1.25 + 0.0625 / 0.3125) / 4),
    ],
)
def test_sparsity_terms_are_their_formulas_annealed(kind: str, progress: float, expected: float) -> None:
    term = Sparsity(kind, start=1.0, end=0.5, annealed_at=0.7)
    assert float(term(PRESENCE, progress)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["l0", "lp", "smooth_l0"])
@given(presence=st.lists(st.floats(0, 1), min_size=1, max_size=8), progress=st.floats(0, 1), more=st.floats(0, 1))
def test_sparsity_is_nothing_for_nothing_and_rises(
    kind: str, presence: list[float], progress: float, more: float
) -> None:
    term = Sparsity(kind)
    shut, gates = torch.zeros(4), torch.tensor(presence)
    assert float(term(shut, progress)) == pytest.approx(0, abs=1e-7)
    assert float(term(torch.maximum(gates, torch.tensor(more)), progress)) >= float(term(gates, progress)) - 1e-6


@pytest.mark.parametrize("kind", ["l0", "lp", "smooth_l0"])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_sparsity_has_a_finite_gradient_at_0(kind: str, progress: float) -> None:
    gates = torch.tensor([0.0, 1e-8, 0.5, 1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(Sparsity(kind)(gates, progress), gates)
    assert bool(torch.isfinite(slope).all()) and bool((slope >= 0).all())


def test_sparsity_does_not_depend_on_the_number_of_nodes() -> None:
    for kind in ("l0", "lp", "smooth_l0"):
        assert torch.allclose(Sparsity(kind)(PRESENCE, 0.4), Sparsity(kind)(PRESENCE.repeat(3, 5), 0.4))
