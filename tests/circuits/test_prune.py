"""`pdprune.prune`: what every combination of options gives, what it leaves alone, and what it refuses."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from circuits.networks import token_batch, token_model
from circuits.small_networks import random_network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdprune.adversary.attack import Ascent
from pdprune.adversary.opponent import TrainingAdversary
from pdprune.circuits.audit import audit
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.gates import Sparsity
from pdprune.circuits.prune import prune
from pdprune.circuits.pruning import Learning
from pdprune.circuits.schemes import Draws
from pdprune.claims.planted.handmade import by_neuron, cancelling_sets
from pdprune.decomposition import DecomposedModel, decompose
from pdprune.errors import NonFiniteLossError, UserError

LIGHT = Ascent(steps=3, step_size=0.5, restarts=1, draws=2, flips=8)
TOKENS = [token_batch(6, seed) for seed in range(3)]


def quick(model: DecomposedModel, batches: Any, **options: Any) -> Circuit:
    """A prune of a few steps: enough to run every part of it, not to find the best circuit."""
    return prune(model, batches, **({"steps": 8, "search": "gradient", "attack": LIGHT} | options))


def tokens(**options: Any) -> Circuit:
    goal = {} if options.keys() & {"target_loss", "target_nodes", "coefficient"} else {"target_nodes": 3}
    return quick(token_model(), TOKENS, **(goal | options))


# -- the three goals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["gradient", "exact"])
@pytest.mark.parametrize("scheme", ["complete", "stochastic", "adversarial"])
@pytest.mark.parametrize("size", [0, 2, 6])
def test_just_as_many_nodes_as_asked_for(search: Any, scheme: Any, size: int) -> None:
    circuit = tokens(target_nodes=size, search=search, scheme=scheme, draws=Draws("bernoulli", count=2))
    assert circuit.n_kept == size and circuit.reached is None
    assert circuit.target_nodes == size and circuit.scheme == scheme


@pytest.mark.parametrize("search", ["gradient", "exact"])
def test_a_dearer_node_is_kept_less_often(search: Any) -> None:
    puzzle = cancelling_sets(1, idle=3)
    sizes = [
        prune(puzzle.model, [puzzle.batch], coefficient=price, search=search, steps=80, attack=LIGHT).n_kept
        for price in (0.03, 1.0, 100.0)
    ]
    assert sizes == [3, 1, 0], "first all nodes with an effect, then the one that matters most, then none"


def test_a_target_between_is_reached_and_said_to_be() -> None:
    puzzle = cancelling_sets(2, idle=4)
    circuit = prune(puzzle.model, [puzzle.batch], target_loss=0.02, search="gradient", steps=100)
    assert circuit.reached is True and circuit.target_loss == 0.02
    assert set(circuit.kept) == puzzle.adversarial[0]


@pytest.mark.parametrize("search", ["gradient", "exact"])
def test_an_unreachable_target_returns_all_nodes_in_one_line(search: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = token_model(share=0.5)  # half of the weight is delta, which the adversary may ablate
    with caplog.at_level(logging.WARNING):
        circuit = quick(model, TOKENS, target_loss=1e-4, search=search)
    assert circuit.reached is False and circuit.n_kept == model.n_nodes
    (record,) = [record for record in caplog.records if record.name.startswith("pdprune")]
    assert "cannot be reached" in record.getMessage() and "\n" not in record.getMessage()


# -- every combination runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_map", ["leaky_hard", "hard_concrete", "heaviside"])
@pytest.mark.parametrize("kind", ["l0", "lp", "smooth_l0"])
def test_every_gate_map_and_sparsity_term_sorts_idle_nodes_out(gate_map: Any, kind: Any) -> None:
    puzzle = cancelling_sets(1, idle=5, examples=16)
    circuit = prune(
        puzzle.model, [puzzle.batch], target_nodes=3, search="gradient", steps=150,
        learning=Learning(gate_map=gate_map, sparsity=Sparsity(kind)), attack=LIGHT,
        adversary=TrainingAdversary(steps=2, step_size=1.0),
    )  # fmt: skip
    assert set(circuit.kept) == puzzle.adversarial[0]
    gates = circuit.gates
    assert gates.shape == (8,) and gates.min() >= 0 and gates.max() <= 1


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
@pytest.mark.parametrize("optimizer", ["sign", "adam"])
@pytest.mark.parametrize("particles", [1, 2])
def test_every_way_to_climb_runs(mode: Any, optimizer: Any, particles: int) -> None:
    adversary = TrainingAdversary(mode=mode, optimizer=optimizer, particles=particles, steps=2)
    assert tokens(adversary=adversary).n_kept == 3


@pytest.mark.parametrize("mode", ["fresh", "persistent", "free"])
def test_every_way_to_climb_finds_cancelling_nodes_out(mode: Any) -> None:
    puzzle = cancelling_sets(1, idle=5, examples=16)
    circuit = prune(
        puzzle.model, [puzzle.batch], target_nodes=3, search="gradient", steps=120, attack=LIGHT,
        adversary=TrainingAdversary(mode=mode, steps=2, particles=1 if mode == "fresh" else 2),
    )  # fmt: skip
    assert set(circuit.kept) == puzzle.adversarial[0]


@pytest.mark.parametrize("scope", ["batch", "universal", "position", "example", "example_position"])
@pytest.mark.parametrize("scheme", ["stochastic", "adversarial"])
def test_every_scope_runs(scope: Any, scheme: Any) -> None:
    circuit = tokens(scope=scope, scheme=scheme, draws=Draws(count=2))
    assert circuit.scope == scope and circuit.n_kept == 3


@pytest.mark.parametrize("reference", ["zero", "mean", "position_mean", "resample"])
@pytest.mark.parametrize("scheme", ["complete", "stochastic", "adversarial"])
def test_every_reference_runs(reference: Any, scheme: Any) -> None:
    circuit = tokens(reference=reference, scheme=scheme, draws=Draws(count=2), target_loss=0.05)
    assert circuit.reference == reference
    assert circuit.reached is True or circuit.n_kept == 6


@pytest.mark.parametrize("loss", ["kl", "ce", "mse", "own"])
def test_every_loss_runs(loss: Any) -> None:
    def own(output: Tensor, target_output: Tensor, batch: Any) -> Tensor:
        assert set(batch) == set(TOKENS[0])
        return (output - target_output).abs().mean((1, 2))

    circuit = tokens(loss=own if loss == "own" else loss)
    assert circuit.loss == loss


def test_sites_of_every_kind_and_nodes_across_them() -> None:
    model = token_model(("embed", "up", "down"), share=1.0)
    assert quick(model, TOKENS, target_nodes=5).n_kept == 5
    groups = [[("up", 0), ("down", 0), ("down", 3)], [("up", 1)], [("up", 2), ("up", 3)]]
    groups += [[("down", column)] for column in (1, 2, 4, 5)]
    target = model.target
    components = {
        site: (torch.eye(size), target.get_submodule(site).weight.detach().T) for site, size in (("up", 4), ("down", 6))
    }
    grouped = DecomposedModel.from_components(target, components, nodes=groups)
    for search in ("gradient", "exact"):
        circuit = quick(grouped, TOKENS, target_nodes=2, search=search)
        assert circuit.n_kept == 2 and circuit.n_nodes == 7


def test_a_budget_on_ablated_nodes_makes_circuits_smaller() -> None:
    puzzle = cancelling_sets(2, idle=2)
    sizes = [
        prune(
            puzzle.model, [puzzle.batch], target_loss=0.02, search="exact",
            adversary=TrainingAdversary(max_ablated=budget),
        ).n_kept
        for budget in (0, None)
    ]  # fmt: skip
    assert sizes == [0, 5]
    circuit = quick(
        puzzle.model, [puzzle.batch], target_loss=0.02, adversary=TrainingAdversary(max_ablated=0), steps=40
    )
    assert circuit.n_kept == 0


@pytest.mark.parametrize("scheme", ["complete", "stochastic", "adversarial"])
@pytest.mark.parametrize("goal", [{"target_nodes": 7}, {"target_loss": 0.05}, {"coefficient": 0.1}], ids=str)
def test_gates_by_position(scheme: Any, goal: dict[str, Any]) -> None:
    circuit = tokens(per_position=True, scheme=scheme, draws=Draws(count=2), **goal)
    assert circuit.keep.shape == circuit.gates.shape == (5, 6)
    if "target_nodes" in goal:
        assert int(circuit.keep.sum()) == 7


def test_positions_that_do_not_matter_are_not_kept() -> None:
    """Only position 2 is scored and a linear readout mixes nothing: nodes are needed there alone."""
    target = nn.Sequential(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        target[0].weight.copy_(torch.tensor([[3.0, 0, 0], [0, 0, 0]]))
    x = torch.where(torch.arange(16)[:, None, None] % 2 == 0, 1.0, -1.0).expand(-1, 4, 3)
    batch = {"inputs": x, "positions": torch.full((16,), 2)}
    circuit = prune(by_neuron(target, ["0"]), [batch], target_loss=0.02, per_position=True, search="gradient", steps=80)
    assert circuit.keep.nonzero().tolist() == [[2, 0]]


# -- the same again, and no traces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["gradient", "exact"])
@pytest.mark.parametrize("scheme", ["stochastic", "adversarial"])
def test_the_same_seed_gives_the_same_circuit(search: Any, scheme: Any) -> None:
    def run() -> Circuit:
        torch.manual_seed(random.randrange(10**6))  # whatever ran before
        return tokens(
            search=search, scheme=scheme, target_loss=0.05, seed=5, learning=Learning(gate_map="hard_concrete")
        )

    first, again = run(), run()
    assert torch.equal(first.keep, again.keep) and torch.equal(first.gates, again.gates)
    assert first.reached == again.reached and first.seed == 5


@pytest.mark.parametrize("search", ["gradient", "exact"])
@pytest.mark.parametrize("training", [True, False])
def test_target_and_random_state_are_left_as_they_were(search: Any, training: bool) -> None:
    model = token_model()
    target = model.target.train(training)
    target.up.eval()
    target.up.weight.requires_grad_(False)
    target.down.weight.grad = torch.ones_like(target.down.weight)
    state = {name: value.clone() for name, value in target.state_dict().items()}
    modes = [module.training for module in target.modules()]
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.is_grad_enabled())
    loader = DataLoader(
        TensorDataset(torch.cat([batch["inputs"]["input_ids"] for batch in TOKENS]), torch.zeros(18).long()),
        batch_size=6, shuffle=True,
    )  # fmt: skip
    quick(model, loader, target_nodes=2, search=search)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.is_grad_enabled())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert [module.training for module in target.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in target.state_dict().items())
    assert target.down.weight.requires_grad and not target.up.weight.requires_grad
    assert torch.equal(target.down.weight.grad, torch.ones(11, 6)) and target.embed.weight.grad is None
    assert not any(module._forward_hooks for module in target.modules())


def test_pruning_works_without_gradients_around_it() -> None:
    with torch.no_grad():
        assert tokens(target_nodes=2).n_kept == 2


def test_the_last_fifth_is_what_the_circuit_is_chosen_on() -> None:
    """Half of the data ask for node 0, the last batch for node 1 only."""
    target = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        target[0].weight.copy_(torch.tensor([[4.0, 4.0], [0, 0]]))
    first, last = torch.tensor([[1.0, 0.0]] * 8), torch.tensor([[0.0, 1.0]] * 8)
    model = by_neuron(target, ["0"])
    assert prune(model, [first] * 4 + [last], target_loss=0.02, scheme="complete").kept == [1]
    assert prune(model, [first] * 5, select=[last], target_loss=0.02, scheme="complete").kept == [1]
    assert prune(model, [first], target_loss=0.02, scheme="complete").kept == [0]
    assert prune(model, [first, last] * 2, select=[first, last], target_loss=0.02).kept == [0, 1]


def test_automatic_search_is_exact_for_small_graphs() -> None:
    """Gates are the learned ones only where any were learned."""
    small, large = random_network(1), cancelling_sets(6)
    assert small.model.n_nodes <= 12
    exact = prune(small.model, [small.inputs], target_nodes=3)
    assert torch.equal(exact.gates, exact.keep.float())
    learned = prune(large.model, [large.batch], target_nodes=3, steps=4, attack=LIGHT)
    assert learned.gates.unique().numel() > 2


# -- refusals --------------------------------------------------------------------------------------------------------


class Divides(nn.Module):
    """Finite until something is ablated."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.read.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] / self.read(x)


@pytest.mark.parametrize("search", ["gradient", "exact"])
@pytest.mark.parametrize("scheme", ["complete", "adversarial"])
def test_a_loss_that_is_not_finite_ends_the_search(search: Any, scheme: Any) -> None:
    model = by_neuron(Divides(), ["read"])
    with pytest.raises(NonFiniteLossError) as error:
        quick(model, [torch.ones(4, 3)], loss="mse", target_nodes=0, search=search, scheme=scheme)
    assert "NaN or infinite" in str(error.value) and "\n" not in str(error.value)


def test_inputs_and_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteLossError, match="output on a batch is NaN"):
        quick(cancelling_sets(1).model, [torch.full((4, 3), torch.nan)], target_nodes=1)
    target = nn.Sequential(nn.Linear(3, 2))
    weight = target[0].weight.detach().clone()
    with torch.no_grad():
        target[0].weight[1, 1] = torch.nan
    with pytest.raises(UserError, match=r"parameter '0\.weight' of the target holds NaN"):
        DecomposedModel.from_components(target, {"0": (torch.eye(3), weight.T)})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "got none of target_loss, target_nodes, coefficient"),
    ({"target_loss": 0.1, "target_nodes": 2}, "got target_loss and target_nodes"),
    ({"target_loss": 0.1, "coefficient": 2.0}, "expected just one"),
    ({"target_nodes": 7}, "target_nodes: got 7; expected at most the 6 nodes"),
    ({"target_nodes": -1}, "target_nodes: got -1"),
    ({"target_nodes": 2.5}, "target_nodes: got 2.5; expected a whole number"),
    ({"target_nodes": 31, "per_position": True}, "expected at most the 30"),
    ({"target_loss": 0.0}, "target_loss: got 0.0; expected more than 0"),
    ({"target_loss": float("nan")}, "target_loss: got nan"),
    ({"coefficient": -1.0}, "coefficient: got -1.0"),
    ({"target_nodes": 2, "steps": -1}, "steps: got -1"),
    ({"target_nodes": 2, "scheme": "total"}, "expected one of complete, stochastic, adversarial"),
    ({"target_nodes": 2, "search": "clever"}, "expected one of gradient, exact, auto"),
    ({"target_nodes": 2, "scope": "all"}, "expected one of batch, universal"),
    ({"target_nodes": 2, "reference": "median"}, "expected one of zero, mean"),
    ({"target_nodes": 2, "loss": "huber"}, "expected one of kl, ce, mse"),
    ({"target_nodes": 2, "search": "exact", "per_position": True}, "use 'gradient'"),
    ({"target_nodes": 2, "search": "exact", "scope": "position"}, "use 'gradient'"),
    (
        {"target_nodes": 2, "scope": "example", "adversary": TrainingAdversary(mode="persistent")},
        "carries sources from batch to batch",
    ),
    ({"target_nodes": 2, "select": []}, "got none"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_wrong_arguments_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        quick(token_model(), TOKENS, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (lambda: (batch for batch in TOKENS), "generator"),
        (lambda: TOKENS[0], "write [batch]"),
        (list, "got none"),
        (lambda: [{"input_ids": TOKENS[0]["inputs"]["input_ids"]}], "key 'inputs'"),
    ],
    ids=["generator", "one batch", "none", "wrong key"],
)
def test_wrong_batches_are_refused_in_one_line(batches: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        quick(token_model(), batches(), target_nodes=2)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_exact_search_of_many_nodes_is_refused() -> None:
    puzzle = cancelling_sets(9)
    with pytest.raises(UserError, match="19 nodes and deltas; expected at most 16: use 'gradient'"):
        prune(puzzle.model, [puzzle.batch], target_nodes=2, search="exact")


def test_networks_without_positions_have_no_gates_or_sources_by_position() -> None:
    puzzle = cancelling_sets(1)
    for options in ({"per_position": True}, {"scope": "position"}, {"reference": "position_mean"}):
        with pytest.raises(UserError, match="position"):
            quick(puzzle.model, [puzzle.batch], target_nodes=2, **options)


def test_resampling_needs_another_example() -> None:
    with pytest.raises(UserError, match="has no other; give 'counterfactual'"):
        quick(token_model(), [token_batch(1)], target_nodes=2, reference="resample")


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    model = decompose(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), ["2"], "neuron")
    with torch.inference_mode():
        for call in (prune, audit):
            with pytest.raises(UserError, match="inference_mode"):
                call(model, *([] if call is prune else [{0}]), batches, loss="mse")
    with torch.no_grad():
        assert prune(model, batches, loss="mse", target_nodes=1, steps=2).n_kept == 1
        assert audit(model, {0}, batches, loss="mse").n_kept == 1
