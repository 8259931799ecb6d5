"""Gates that start at causal importances, and causal importances as keep masks, of decompositions from disk."""

import pytest
import torch
import yaml
from decomposition.spd_runs import drawn, factors_of, layout_a, mlp_parameters, module_info, write_run

import pdprune
from pdprune.batches import as_batches
from pdprune.circuits.pruning import CircuitPruner, Learning
from pdprune.circuits.warm_start import mean_importances
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings, importance_mask
from pdprune.errors import UserError
from pdprune.targets.known import LlamaLike, LlamaLikeConfig
from pdprune.targets.toys import TMS, TMSConfig

IDS = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
TOKENS = [
    {"inputs": {"input_ids": IDS[:2], "attention_mask": MASK[:2]}, "positions": torch.tensor([5, 3])},
    {"inputs": {"input_ids": IDS[2:], "attention_mask": MASK[2:]}, "positions": torch.tensor([5, 0])},
]


def llama_run(folder):
    """An SPD run of a small language model, random but for its names."""
    target = LlamaLike(
        LlamaLikeConfig(vocab_size=13, n_layer=1, n_head=2, n_key_value_heads=1, n_embd=8, n_intermediate=12)
    )
    with torch.no_grad():
        for seed, parameter in enumerate(target.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=600 + seed))
    sizes = {"h.0.mlp.c_fc": 6, "h.0.mlp.down_proj": 5, "h.0.attn.v_proj": 4}
    factors = factors_of(target, sizes)
    functions = {path: mlp_parameters([len(factors[path][0]), C], None, i) for i, (path, C) in enumerate(sizes.items())}
    return write_run(
        folder,
        layout_a(target, factors, functions),
        {"module_info": module_info(sizes), "pretrained_model_class": "spd.LlamaSimpleMLP"},
        model_config={"n_head": 2},
    )


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return pdprune.load_decomposition(llama_run(tmp_path_factory.mktemp("run")))


def test_the_mean_is_over_all_tokens_that_are_no_padding(language_model):
    rows = [importance_mask(language_model, IDS)[b, t] for b in range(4) for t in range(6) if MASK[b, t]]
    found = mean_importances(language_model, as_batches(TOKENS), per_position=False)
    torch.testing.assert_close(found, torch.stack(rows).mean(0))


def test_per_position_it_is_over_examples(language_model):
    values = importance_mask(language_model, IDS)
    found = mean_importances(language_model, as_batches(TOKENS), per_position=True)
    expected = [torch.stack([values[b, t] for b in range(4) if MASK[b, t]]).mean(0) for t in range(6)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_per_position_wants_as_many_positions_in_all_batches(language_model):
    with pytest.raises(UserError, match="6 and 5 positions; expected as many in all"):
        mean_importances(language_model, as_batches([IDS, IDS[:, :5]]), per_position=True)


class Splits:
    def __init__(self, batches):
        self.batches = batches

    def train_batches(self):
        return self.batches

    select_batches = train_batches


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("gate_map", ["leaky_hard", "hard_concrete", "heaviside"])
def test_gates_start_at_the_mean_importances(language_model, gate_map, per_position):
    pruner = CircuitPruner(
        language_model, target_loss=0.1, warm_start=True, per_position=per_position, learning=Learning(gate_map)
    )
    pruner.prepare(Splits(TOKENS))
    expected = mean_importances(language_model, as_batches(TOKENS), per_position)
    assert 0 < float((expected == 0).float().mean()) < 1  # some nodes matter nowhere
    if gate_map == "heaviside":
        expected = (expected > 0).float()
    torch.testing.assert_close(pruner.gates(), expected)
    torch.testing.assert_close(pruner.openness, expected)
    assert not any(name.startswith("model.importances") for name, p in pruner.named_parameters() if p.requires_grad)


def test_without_importances_there_is_nothing_to_start_from(language_model):
    bare = pdprune.decompose(language_model.target, ["h.0.mlp.*"], "svd")
    with pytest.raises(UserError, match="it has no causal importances"):
        pdprune.prune(bare, [IDS], target_loss=0.1, warm_start=True, search="gradient", steps=1)


def one_component_a_feature():
    """TMS whose `linear1` is split by feature, with importances that are the features themselves, half of which are 0.

    What the circuit has to keep is known: the components of the features that are ever on.
    """
    torch.manual_seed(0)
    target = TMS(TMSConfig(n_features=8, n_hidden=8, tied_weights=True)).eval()
    model = pdprune.DecomposedModel.from_components(target, {"linear1": (torch.eye(8), target.linear1.weight.t())})
    model.importances = CausalImportances(model.sites, ImportanceSettings(hidden=[]))
    with torch.no_grad():
        model.importances.functions["linear1"].layers[0].W.copy_(torch.eye(8))
    features = torch.rand(3, 16, 8)
    features[..., 4:] = 0
    return model, list(features)


def test_a_warm_start_finds_what_is_on():
    model, batches = one_component_a_feature()
    ask = dict(loss="mse", scheme="complete", target_loss=1e-4, search="gradient", steps=10, seed=1)
    warm = pdprune.prune(model, batches, warm_start=True, **ask)
    again = pdprune.prune(model, batches, warm_start=True, **ask)

    assert warm.reached
    assert set(warm.kept) <= set(range(4))
    assert warm.kept == again.kept and torch.equal(warm.gates, again.gates)


def test_a_loaded_decomposition_prunes_from_a_warm_start(language_model):
    circuit = pdprune.prune(
        language_model, TOKENS, scheme="complete", target_loss=0.5, warm_start=True, search="gradient", steps=3
    )
    assert circuit.n_nodes == 15 and circuit.reached


def test_importances_are_audited_as_keep_masks_under_one_shared_source(language_model):
    keep = importance_mask(language_model, IDS[:2])
    assert keep.shape == (2, 6, 15)
    assert bool(((keep > 0) & (keep < 1)).any()), "some are kept in part"

    found = pdprune.audit(language_model, keep, TOKENS[:1], random_circuits=0, draws=2)

    assert found.scope == "batch" and found.worst_source.shape == (15,)
    assert found.adversarial.loss >= max(found.complete_loss, found.model_loss, found.stochastic.max)
    (batch,) = as_batches(TOKENS[:1])
    ablated = language_model(batch.inputs, keep, torch.zeros(3))[0]
    by_hand = pdprune.losses.kl(ablated, language_model(batch.inputs)[0], batch).mean()
    assert found.complete_loss == pytest.approx(float(by_hand), rel=1e-4)


def test_examples_may_be_kept_in_part_too():
    model, (features, *_) = one_component_a_feature()
    found = pdprune.audit(model, importance_mask(model, features), [features], loss="mse", random_circuits=0, draws=2)
    assert found.n_nodes == 8 and found.n_kept == 4


@pytest.mark.parametrize("value", [-0.1, 1.1, torch.nan])
def test_keeps_outside_of_the_unit_interval_are_refused(language_model, value):
    with pytest.raises(UserError, match=r"outside of \[0, 1\]"):
        pdprune.audit(language_model, torch.full((4, 6, 15), value), TOKENS)


def test_the_settings_of_a_run_can_name_an_spd_run(tmp_path):
    run = llama_run(tmp_path / "run")
    pruner = CircuitPruner(pdprune.Decomposition(path=str(run)), target_loss=0.1)
    assert pruner.model.n_nodes == 15
    config = yaml.safe_load((run / "final_config.yaml").read_text())
    (run / "final_config.yaml").write_text(yaml.safe_dump({**config, "pretrained_model_class": "other.Network"}))
    with pytest.raises(UserError, match="a Network, none that we know"):
        CircuitPruner(pdprune.Decomposition(path=str(run)), target_loss=0.1)
