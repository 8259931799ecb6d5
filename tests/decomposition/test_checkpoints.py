"""Run folders of SPD, in every layout, written by the test as SPD writes them (`spd_runs.py`)."""

import pickle

import pytest
import torch
import yaml
from decomposition.spd_runs import (
    drawn,
    factors_of,
    layout_a,
    layout_b,
    layout_c,
    layout_d,
    mlp_on_inner_product,
    mlp_on_vector,
    mlp_parameters,
    module_info,
    shared_mlp,
    transformer,
    transformer_parameters,
    write_run,
)
from torch import nn

import pdprune
from pdprune.decomposition.importances import importance_mask, lower_leaky
from pdprune.errors import UserError
from pdprune.targets.known import LlamaLike, LlamaLikeConfig
from pdprune.targets.toys import TMS, ResidualMLP, ResidualMLPConfig, TMSConfig

TMS_CLASS = "spd.experiments.tms.models.TMSModel"
RESID_CLASS = "spd.experiments.resid_mlp.models.ResidualMLP"
LLAMA_CLASS = "spd.pretrain.models.llama_simple_mlp.LlamaSimpleMLP"
FEATURES = torch.rand(6, 5, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(4))


def randomised(network, scale=0.4):
    with torch.no_grad():
        for seed, parameter in enumerate(network.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=500 + seed, scale=scale))
    return network.eval().requires_grad_(False)


def tms(n_hidden_layers=0):
    return randomised(TMS(TMSConfig(5, 2, n_hidden_layers, tied_weights=False)))


def llama():
    return randomised(
        LlamaLike(LlamaLikeConfig(vocab_size=13, n_layer=2, n_head=2, n_key_value_heads=1, n_embd=8, n_intermediate=12))
    )


def assert_is(model, target, factors, inputs):
    """The model is the target, and its components and deltas are what was written and sum to the weights."""
    expected, found = target(inputs), model(inputs)
    ones = torch.ones(*inputs.shape[:2], model.n_nodes) if inputs.dtype == torch.long else torch.ones(model.n_nodes)
    for output in (found, model(inputs, ones)):
        output, wanted = (x[0] if isinstance(x, tuple) else x for x in (output, expected))
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    assert set(model.site_names) == set(factors)
    for path, (V, U) in factors.items():
        site = model.sites[path]
        assert torch.equal(site.V, V) and torch.equal(site.U, U)
        if path.endswith(".pre_identity"):
            W = torch.eye(len(V))
        else:
            module = target.get_submodule(path)
            stores_in_out = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            W = module.weight.t() if stores_in_out else module.weight
        torch.testing.assert_close((site.V @ site.U).t() + site.delta, W, atol=1e-5, rtol=0)


def values(model, inputs):
    return model.importances(model.site_inputs(inputs))


def assert_values(model, inputs, expected):
    found = values(model, inputs)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        torch.testing.assert_close(found[path], value, atol=1e-5, rtol=1e-4)
    mask = torch.cat([lower_leaky(expected[path]) for path in model.site_names], -1)
    torch.testing.assert_close(importance_mask(model, inputs), mask, atol=1e-5, rtol=1e-4)


# -- layout (a) ------------------------------------------------------------------------------------------------------


def test_layout_a_with_an_mlp_on_the_inner_product(tmp_path):
    target, sizes = tms(), {"linear1": 7, "linear2": 4}
    factors = factors_of(target, sizes)
    functions = {path: mlp_parameters([1, 6, 3, 1], C, seed) for seed, (path, C) in enumerate(sizes.items())}
    config = {"module_info": module_info(sizes), "ci_fn_type": "mlp", "pretrained_model_class": TMS_CLASS}
    run = write_run(tmp_path, layout_a(target, factors, functions), config | {"sigmoid_type": "leaky_hard"})

    model = pdprune.load_decomposition(run)

    assert_is(model, target, factors, FEATURES)
    read = model.site_inputs(FEATURES)
    assert_values(model, FEATURES, {p: mlp_on_inner_product(read[p], factors[p][0], functions[p]) for p in sizes})
    assert not any(parameter.requires_grad for parameter in model.importances.parameters())


def test_layout_a_with_an_mlp_on_the_vector_and_a_gelu_network(tmp_path):
    config = ResidualMLPConfig(n_layers=2, n_features=5, d_embed=6, d_mlp=4, act_fn_name="gelu", in_bias=True)
    target = randomised(ResidualMLP(config))
    sizes = {f"layers.{i}.{part}": 3 + i for i in range(2) for part in ("mlp_in", "mlp_out")}
    factors = factors_of(target, sizes)
    widths = {"mlp_in": 6, "mlp_out": 4}
    functions = {
        path: mlp_parameters([widths[path.split(".")[-1]], 5, 1], C, seed)
        for seed, (path, C) in enumerate(sizes.items())
    }
    patterns = [{"module_pattern": f"layers.{i}.mlp_*", "C": 3 + i} for i in range(2)]
    run = write_run(
        tmp_path,
        layout_a(target, factors, functions),
        {"module_info": patterns, "ci_fn_type": "vector_mlp", "pretrained_model_class": RESID_CLASS},
        resid_mlp_train_config={"resid_mlp_model_config": {"act_fn_name": "gelu", "n_layers": 2}},
    )

    model = pdprune.load_decomposition(run)

    assert_is(model, target, factors, FEATURES)
    read = model.site_inputs(FEATURES)
    assert_values(model, FEATURES, {path: mlp_on_vector(read[path], functions[path]) for path in sizes})


def test_layout_a_of_a_language_model_with_one_mlp_a_site(tmp_path):
    target = llama()
    sizes = {f"h.{i}.{part}": 5 for i in range(2) for part in ("mlp.c_fc", "mlp.down_proj", "attn.k_proj")}
    factors = factors_of(target, sizes)
    functions = {
        path: mlp_parameters([len(factors[path][0]), 6, C], None, seed) for seed, (path, C) in enumerate(sizes.items())
    }
    patterns = ["h.*.mlp.*", "h.*.attn.k_proj"]
    run = write_run(
        tmp_path,
        layout_a(target, factors, functions),
        {"C": 5, "target_module_patterns": patterns, "ci_fn_type": "shared_mlp", "pretrained_model_class": LLAMA_CLASS},
        model_config={"model_type": "LlamaSimpleMLP", "n_head": 2, "rms_norm_eps": "1e-6", "block_size": 16},
    )

    model = pdprune.load_decomposition(run)

    assert_is(model, target, factors, IDS)
    assert model.target.config.block_size == 16
    read = model.site_inputs(IDS)
    assert_values(model, IDS, {path: shared_mlp(read[path], functions[path]) for path in sizes})
    told = pdprune.load_decomposition(run, target_config={"rms_norm_eps": 0.5}).target.config
    assert (told.rms_norm_eps, told.n_head) == (0.5, 2)


def test_a_function_without_hidden_layers(tmp_path):
    target, sizes = tms(), {"linear1": 7}
    factors = factors_of(target, sizes)
    functions = {"linear1": mlp_parameters([5, 7], None, 0)}
    run = write_run(
        tmp_path,
        layout_a(target, factors, functions),
        {"module_info": module_info(sizes), "ci_fn_type": "shared_mlp", "pretrained_model_class": TMS_CLASS},
    )
    assert_values(pdprune.load_decomposition(run), FEATURES, {"linear1": shared_mlp(FEATURES, functions["linear1"])})


@pytest.mark.parametrize(
    "name, sigmoid",
    [
        ("normal", torch.sigmoid),
        ("hard", lambda x: x.clamp(0, 1)),
        ("upper_leaky_hard", lambda x: x.clamp(0, 1)),
        (
            "swish_hard",
            lambda x: (
                0.5
                + ((x - 1) * torch.sigmoid(-10 * (x - 1)) - (x - 0.5) * torch.sigmoid(10 * (x - 0.5)))
                + (x * torch.sigmoid(10 * x) - (x - 0.5) * torch.sigmoid(-10 * (x - 0.5)))
            ).clamp(0, 1),
        ),
    ],
)
def test_sigmoids(tmp_path, name, sigmoid):
    target, sizes = tms(), {"linear1": 7}
    factors = factors_of(target, sizes)
    functions = {"linear1": mlp_parameters([5, 6, 7], None, 0)}
    config = {"module_info": module_info(sizes), "pretrained_model_class": TMS_CLASS, "sigmoid_type": name}
    model = pdprune.load_decomposition(write_run(tmp_path, layout_a(target, factors, functions), config))

    expected = sigmoid(shared_mlp(FEATURES, functions["linear1"]))
    torch.testing.assert_close(importance_mask(model, FEATURES), expected, atol=1e-5, rtol=1e-5)


# -- layout (b) ------------------------------------------------------------------------------------------------------


def test_layout_b_by_site_with_an_embedding(tmp_path):
    target, sizes = llama(), {"wte": 4, "h.1.attn.q_proj": 6}
    factors = factors_of(target, sizes)
    functions = {path: mlp_parameters([1, 5, 1], C, seed) for seed, (path, C) in enumerate(sizes.items())}
    run = write_run(
        tmp_path,
        layout_b(target, factors, functions),
        {
            "module_info": module_info(sizes),
            "ci_config": {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [5]},
            "pretrained_model_class": LLAMA_CLASS,
        },
    )

    model = pdprune.load_decomposition(run, target_config={"n_head": 2})

    assert_is(model, target, factors, IDS)
    read = model.site_inputs(IDS)
    assert_values(model, IDS, {p: mlp_on_inner_product(read[p], factors[p][0], functions[p]) for p in sizes})


def test_layout_b_with_one_transformer_for_all_sites(tmp_path):
    target = llama()
    sizes = {"wte": 4, "h.0.mlp.c_fc": 5, "h.0.attn.o_proj": 3, "h.1.mlp.down_proj": 2}
    factors = factors_of(target, sizes)
    d_in = {"wte": 4, "h.0.mlp.c_fc": 8, "h.0.attn.o_proj": 8, "h.1.mlp.down_proj": 12}
    shared = transformer_parameters(sum(d_in.values()), 8, n_blocks=2, hidden=10, d_out=sum(sizes.values()))
    run = write_run(
        tmp_path,
        layout_b(target, factors, {}, shared),
        {
            "module_info": module_info(sizes),
            "ci_config": {
                "mode": "global",
                "fn_type": "global_shared_transformer",
                "hidden_dims": None,
                "simple_transformer_ci_cfg": {
                    "d_model": 8,
                    "n_blocks": 2,
                    "mlp_hidden_dim": [10],
                    "attn_config": {"n_heads": 2, "max_len": 64, "rope_base": 100.0},
                },
            },
            "sigmoid_type": "leaky_hard",
            "pretrained_model_class": LLAMA_CLASS,
        },
        model_config={"n_head": 2},
    )

    model = pdprune.load_decomposition(run)

    assert_is(model, target, factors, IDS)
    read = model.site_inputs(IDS)
    read["wte"] = factors["wte"][0][read["wte"]]
    assert_values(model, IDS, transformer(read, sizes, shared, n_heads=2, base=100.0))


# -- layout (c) ------------------------------------------------------------------------------------------------------


def test_layout_c_components_inside_the_target(tmp_path):
    target, sizes = tms(n_hidden_layers=1), {"linear1": 7, "hidden_layers.0": 3, "linear2": 7}
    factors = factors_of(target, sizes)
    functions = {path: mlp_parameters([1, 4, 1], C, seed) for seed, (path, C) in enumerate(sizes.items())}
    config = {"module_info": module_info(sizes), "gate_type": "mlp", "pretrained_model_class": TMS_CLASS}
    run = write_run(tmp_path, layout_c(target, factors, functions), config)

    model = pdprune.load_decomposition(run)

    assert_is(model, target, factors, FEATURES)
    read = model.site_inputs(FEATURES)
    assert_values(model, FEATURES, {p: mlp_on_inner_product(read[p], factors[p][0], functions[p]) for p in sizes})


# -- layout (d) ------------------------------------------------------------------------------------------------------


def test_layout_d_with_a_gate_mlp(tmp_path):
    target, sizes = tms(n_hidden_layers=1), {"linear1": 7, "hidden_layers.0": 7, "linear2": 7}
    factors = factors_of(target, sizes)
    gates = {
        path: {
            "mlp_in": drawn(7, 5, seed=10 * seed),
            "in_bias": drawn(7, 5, seed=10 * seed + 1),
            "mlp_out": drawn(7, 5, seed=10 * seed + 2),
            "out_bias": drawn(7, seed=10 * seed + 3),
        }
        for seed, path in enumerate(sizes)
    }
    config = {"C": 7, "target_module_patterns": ["linear*", "hidden_layers.0"], "n_ci_mlp_neurons": 5}
    run = write_run(tmp_path, layout_d(target, factors, gates), config | {"pretrained_model_class": TMS_CLASS})

    model = pdprune.load_decomposition(run)

    assert_is(model, target, factors, FEATURES)
    read = model.site_inputs(FEATURES)
    expected = {}
    for path, gate in gates.items():
        acts = (read[path] @ factors[path][0])[..., None]
        hidden = nn.functional.gelu(acts * gate["mlp_in"] + gate["in_bias"])
        expected[path] = (hidden * gate["mlp_out"]).sum(-1) + gate["out_bias"]
    assert_values(model, FEATURES, expected)


def test_layout_d_with_a_linear_gate(tmp_path):
    target, sizes = tms(), {"linear1": 7, "linear2": 7}
    factors = factors_of(target, sizes)
    gates = {p: {"weight": drawn(7, seed=i), "bias": drawn(7, seed=i + 9)} for i, p in enumerate(sizes)}
    config = {"C": 7, "target_module_patterns": ["linear1", "linear2"], "pretrained_model_class": TMS_CLASS}

    model = pdprune.load_decomposition(write_run(tmp_path, layout_d(target, factors, gates), config))

    read = model.site_inputs(FEATURES)
    expected = {p: read[p] @ factors[p][0] * gates[p]["weight"] + gates[p]["bias"] for p in sizes}
    assert_values(model, FEATURES, expected)


# -- identities, Conv1D, targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [layout_a, layout_b, layout_c])
def test_inserted_identities_are_sites(tmp_path, layout):
    target, sizes = tms(n_hidden_layers=1), {"linear1": 7, "linear1.pre_identity": 4, "hidden_layers.0.pre_identity": 4}
    factors = factors_of(target, sizes)
    functions = {path: mlp_parameters([len(factors[path][0]), 4, 1], C, i) for i, (path, C) in enumerate(sizes.items())}
    config = {
        "module_info": [{"module_pattern": "linear1", "C": 7}],
        "identity_module_info": [{"module_pattern": "linear1", "C": 4}, {"module_pattern": "hidden_layers.0", "C": 4}],
        "ci_fn_type": "vector_mlp",
        "pretrained_model_class": TMS_CLASS,
    }
    run = write_run(tmp_path, layout(target, factors, functions), config)

    for given in (None, tms(n_hidden_layers=1)):
        model = pdprune.load_decomposition(run, given)
        assert_is(model, target, factors, FEATURES)
        read = model.site_inputs(FEATURES)
        assert torch.equal(read["linear1.pre_identity"], FEATURES)
        assert_values(model, FEATURES, {path: mlp_on_vector(read[path], functions[path]) for path in sizes})

    # The identity's only component kept, and no delta: the network reads its input through one direction.
    mask, V, U = torch.ones(model.n_nodes), *factors["linear1.pre_identity"]
    at = model.site_names.index("linear1.pre_identity")
    first = sum(sizes[name] for name in model.site_names[:at])
    mask[first : first + 4] = torch.tensor([1.0, 0, 0, 0])
    deltas = torch.ones(3).index_fill(0, torch.tensor([at]), 0)
    expected = target(torch.outer(FEATURES @ V[:, 0], U[0]))
    torch.testing.assert_close(model(FEATURES, mask, deltas), expected, atol=1e-5, rtol=1e-5)


def hugging_face_gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    network.save_pretrained(folder)
    return randomised(network)


def test_conv1d_of_a_hugging_face_model_by_its_folder(tmp_path):
    target = hugging_face_gpt2(tmp_path / "gpt2")  # the folder holds other weights than the run was made with
    sizes = {"transformer.h.0.attn.c_attn": 5, "transformer.h.0.mlp.c_proj": 6, "transformer.wte": 3}
    factors = factors_of(target, sizes)
    assert factors["transformer.h.0.attn.c_attn"][0].shape == (8, 5)
    functions = {path: mlp_parameters([1, 5, 1], C, seed) for seed, (path, C) in enumerate(sizes.items())}
    state = layout_a(target, factors, functions)
    state["target_model.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).bool()  # older versions stored this mask
    config = {"module_info": module_info(sizes), "pretrained_model_class": "transformers.GPT2LMHeadModel"}
    run = write_run(tmp_path / "run", state, config | {"pretrained_model_name": "someone/gpt2"})

    for given in (hugging_face_gpt2(tmp_path / "again"), tmp_path / "gpt2", str(tmp_path / "gpt2")):
        model = pdprune.load_decomposition(run, given)
        torch.testing.assert_close(model(IDS).logits, target(IDS).logits, atol=1e-5, rtol=1e-5)
        for path, (V, U) in factors.items():
            site = model.sites[path]
            W = target.get_submodule(path).weight.t()
            torch.testing.assert_close((V @ U).t() + site.delta, W, atol=1e-5, rtol=0)
        read = model.site_inputs(IDS)
        assert_values(model, IDS, {p: mlp_on_inner_product(read[p], factors[p][0], functions[p]) for p in sizes})
    with pytest.raises(UserError, match="a GPT2LMHeadModel, none that we know"):
        pdprune.load_decomposition(run)


def simple_run(folder, step=100, scale=1.0, **changes):
    """A run of TMS in layout (a); `changes` replace keys of its state, None removes one."""
    target, sizes = tms(), {"linear1": 7, "linear2": 4}
    factors = {path: (scale * V, U) for path, (V, U) in factors_of(target, sizes).items()}
    functions = {path: mlp_parameters([1, 6, 1], C, seed) for seed, (path, C) in enumerate(sizes.items())}
    state = {**layout_a(target, factors, functions), **changes}
    state = {key: value for key, value in state.items() if value is not None}
    config = {"module_info": module_info(sizes), "ci_fn_type": "mlp", "pretrained_model_class": TMS_CLASS}
    return write_run(folder, state, config, step)


def test_the_newest_checkpoint_is_read_unless_one_is_named(tmp_path):
    for step, scale in ((900, 1.0), (10000, 2.0), (2000, 3.0)):
        simple_run(tmp_path, step, scale)
    (tmp_path / "model_final.pth").touch()

    newest = pdprune.load_decomposition(tmp_path).sites["linear1"].V
    named = pdprune.load_decomposition(tmp_path / "model_900.pth").sites["linear1"].V
    assert torch.equal(newest, 2 * named)


def test_weights_are_loaded_into_the_module_given(tmp_path):
    given = TMS(TMSConfig(5, 2))
    given.train()
    model = pdprune.load_decomposition(simple_run(tmp_path), given)
    assert model.target is given and given.training
    assert torch.equal(given.linear1.weight, tms().linear1.weight)


def test_importances_can_be_left_out(tmp_path):
    run = simple_run(tmp_path)
    keys = [key for key in torch.load(run / "model_100.pth", weights_only=True) if key.startswith("_ci_fns")]

    assert pdprune.load_decomposition(run).importances is not None
    simple_run(tmp_path, **{keys[0]: None})
    assert pdprune.load_decomposition(run, importances=False).importances is None
    simple_run(tmp_path, **dict.fromkeys(keys))
    assert pdprune.load_decomposition(run).importances is None


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    run = simple_run(tmp_path)
    state = torch.get_rng_state()
    pdprune.load_decomposition(run)
    assert torch.equal(torch.get_rng_state(), state)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_model.linear1.weight": None}, "parameter 'linear1.weight'.* is missing"),
        ({"target_model.linear2.bias": None}, "parameter 'linear2.bias' of the target is missing"),
        ({"target_model.linear2.weight": torch.zeros(2, 5)}, r"has shape \[2, 5\]; expected \[5, 2\]"),
        ({"target_model.linear2.bias": torch.full((5,), torch.nan)}, "'linear2.bias' of the target holds NaN"),
        ({"target_model.linear3.weight": torch.zeros(2)}, "it has a parameter 'linear3.weight'"),
        ({"_components.linear1.V": None}, "V of site 'linear1' is missing"),
        ({"_components.linear1.U": None}, "U of site 'linear1' is missing"),
        ({"_components.linear1.V": torch.zeros(7, 5)}, r"V \[7, 5\] and U \[7, 2\]; expected V \[5, C\]"),
        ({"_components.linear1.V": torch.zeros(5)}, r"V \[5\] and U"),
        ({"_components.linear1.U": torch.zeros(7)}, r"U \[7\]; expected"),
        ({"_components.linear1.U": torch.full((7, 2), torch.inf)}, "U of site 'linear1' holds NaN or infinite"),
        ({"_components.linear2.V": None, "_components.linear2.U": None}, "linear2"),
        (
            {"_components.linear1.V": torch.zeros(5, 3), "_components.linear1.U": torch.zeros(3, 2)},
            "site 'linear1' has 3 components; expected 7",
        ),
        ({"_components.linear3.V": torch.zeros(5, 3)}, "components of 'linear3'; expected a module of that path"),
        ({"_ci_fns.linear1.layers.0.W": None}, "functions.linear1.layers.0.W is missing"),
        ({"_ci_fns.linear2.layers.2.b": None}, "functions.linear2.layers.2.b is missing"),
        ({"_ci_fns.linear2.layers.2.b": torch.zeros(4)}, r"layers.2.b has shape \[4\]; expected \[4, 1\]"),
        ({"_ci_fns.linear2.layers.2.b": torch.full((4, 1), torch.nan)}, "layers.2.b holds NaN"),
        ({"_ci_fns.linear2.graph.weight": torch.zeros(4)}, "'graph.weight' is of no causal-importance function"),
        ({"_ci_fns.linear3.layers.0.W": torch.zeros(4, 1, 6)}, "functions.linear3.layers.0.W is not known"),
        ({"optimizer.step": torch.zeros(1)}, "'optimizer.step' is a key of no layout"),
    ],
)
def test_what_is_missing_or_of_a_wrong_shape_is_named(tmp_path, changes, message):
    given = TMS(TMSConfig(5, 2))
    before = {name: value.clone() for name, value in given.state_dict().items()}
    run = simple_run(tmp_path, **changes)
    for target in (None, given):
        with pytest.raises(UserError, match=message) as caught:
            pdprune.load_decomposition(run, target)
        assert "\n" not in str(caught.value)
    if not any(key.startswith("_ci_fns") for key in changes):
        assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"module_info": module_info({"linear1": 7})}, "components of site 'linear2'; expected a pattern"),
        ({"module_info": module_info({"linear*": 7})}, "site 'linear2' has 4 components; expected 7"),
        ({"module_info": module_info({"linear1": 7, "linear2": 4, "lin": 4})}, "pattern 'lin' matches no module"),
        ({"module_info": None}, "expected a pattern for it in its config"),
        ({"module_info": "linear1"}, "its sites cannot be read"),
        ({"module_info": [{"module_pattern": "linear1"}]}, "its sites cannot be read"),
        ({"pretrained_model_class": "transformers.LlamaForCausalLM"}, "a LlamaForCausalLM, none that we know"),
        ({"pretrained_model_class": None}, "a network that its config does not name, none that we know"),
        ({"pretrained_model_class": RESID_CLASS}, "parameter 'W_E' is missing"),
        ({"sigmoid_type": "soft"}, "sigmoid_type 'soft' is none of"),
        ({"ci_fn_type": "vector_mlp"}, r"layers.0.W has shape \[7, 1, 6\]; expected \[7, 5, 6\]"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, change, message):
    run = simple_run(tmp_path)
    config = {**yaml.safe_load((run / "final_config.yaml").read_text()), **change}
    (run / "final_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=message) as caught:
        pdprune.load_decomposition(run)
    assert "\n" not in str(caught.value)


def test_a_transformer_needs_its_number_of_heads(tmp_path):
    target, sizes = tms(), {"linear1": 7}
    shared = transformer_parameters(5, 8, n_blocks=1, hidden=10, d_out=7)
    config = {"module_info": module_info(sizes), "pretrained_model_class": TMS_CLASS}
    run = write_run(tmp_path, layout_b(target, factors_of(target, sizes), {}, shared), config)
    with pytest.raises(UserError, match="n_heads is None"):
        pdprune.load_decomposition(run)
    shared["_reader.0.weight"] = torch.zeros(3)
    write_run(tmp_path, layout_b(target, factors_of(target, sizes), {}, shared), config)
    with pytest.raises(UserError, match="_reader"):
        pdprune.load_decomposition(run)


class Untrusted:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_files_that_are_no_state_dict_are_refused_and_nothing_in_them_runs(tmp_path):
    run = simple_run(tmp_path)
    file = run / "model_100.pth"
    whole = file.read_bytes()

    def assert_refused(message):
        with pytest.raises(UserError, match=message) as caught:
            pdprune.load_decomposition(run)
        assert "\n" not in str(caught.value)

    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-100], whole[100:]):
        file.write_bytes(damaged)
        assert_refused("not a readable checkpoint")
    torch.save({"target_model.linear1.weight": Untrusted(tmp_path / "trace")}, file)
    assert_refused("not a readable checkpoint")
    file.write_bytes(pickle.dumps({"a": Untrusted(tmp_path / "trace")}))
    assert_refused("not a readable checkpoint")
    assert not (tmp_path / "trace").exists()
    torch.save({"model": {"linear1": torch.zeros(2)}}, file)
    assert_refused("'model' is a dict; expected a bare state dict")
    torch.save([torch.zeros(2)], file)
    assert_refused("it holds a list; expected a state dict")
    torch.save({"target_model.linear1.weight": torch.zeros(2)}, file)
    assert_refused("it holds no components")


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        pdprune.load_decomposition(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither decomposition.json"):
        pdprune.load_decomposition(tmp_path)
    run = simple_run(tmp_path / "run")
    config = (run / "final_config.yaml").read_text()
    (run / "final_config.yaml").unlink()
    with pytest.raises(UserError, match=r"final_config.yaml: cannot be read"):
        pdprune.load_decomposition(run)
    for content, message in ((config + "]", "is damaged or no YAML"), ("- a list", "it holds a list")):
        (run / "final_config.yaml").write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            pdprune.load_decomposition(run)
        assert "\n" not in str(caught.value)
    (run / "model_100.pth").unlink()
    with pytest.raises(UserError, match=r"it has no model_<step>.pth"):
        pdprune.load_decomposition(run)
