"""The package's own format: what is saved comes back, and nothing else is taken for it."""

import json

import pytest
import torch
from decomposition.small_nets import small_lm
from decomposition.spd_runs import drawn
from safetensors.torch import load_file, save_file

import pdprune
from pdprune.decomposition.identity import insert_identities
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings, importance_mask
from pdprune.decomposition.saved import JSON_FILE, TENSOR_FILE, read_decomposition, save_decomposition
from pdprune.errors import UserError
from pdprune.targets.store import save_target
from pdprune.targets.transformer import Transformer, TransformerConfig

SITES = ["blocks.0.mlp.down", "embed", "unembed"]
IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
SETTINGS = [
    ImportanceSettings("component_mlp", hidden=[5]),
    ImportanceSettings("site_mlp", hidden=[4]),
    ImportanceSettings("shared_mlp", hidden=[]),
    ImportanceSettings("transformer", hidden=[6], d_model=8, n_blocks=1, n_heads=2, sigmoid="normal", rope_base=50.0),
]


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Transformer(TransformerConfig(vocab_size=20, max_length=8, n_layers=1, n_heads=2, d_model=6, d_mlp=10))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5)
    return made.eval().requires_grad_(False)


def decomposed(target=None, settings=None, nodes=None, labels=None):
    target = target or network()
    rng = torch.Generator().manual_seed(1)
    components = {}
    for path, count in zip(SITES, (7, 4, 9), strict=True):
        module = target.get_submodule(path)
        d_in, d_out = (20, 6) if path == "embed" else module.weight.shape[::-1]
        components[path] = torch.randn(d_in, count, generator=rng), torch.randn(count, d_out, generator=rng)
    model = pdprune.DecomposedModel.from_components(target, components, nodes, labels)
    if settings is not None:
        model.importances = CausalImportances(model.sites, settings, seed=2)
    return model


def assert_same(loaded, model):
    assert loaded.site_names == model.site_names
    assert loaded.nodes == model.nodes
    assert loaded.decomposition_sha256 == model.decomposition_sha256
    assert loaded.target_sha256 == model.target_sha256
    mask = torch.rand(model.n_nodes, generator=torch.Generator().manual_seed(3))
    deltas = torch.zeros(model.n_sites)
    assert torch.equal(loaded(IDS, mask, deltas), model(IDS, mask, deltas))


@pytest.mark.parametrize("settings", [None, *SETTINGS])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, settings):
    model = decomposed(settings=settings)
    save_decomposition(tmp_path / "here", model, about={"loss": 0.5, "note": "a card"})

    loaded = pdprune.load_decomposition(tmp_path / "here", network())

    assert_same(loaded, model)
    assert (loaded.importances is None) is (settings is None)
    if settings is not None:
        assert loaded.importances.settings == settings
        assert torch.equal(importance_mask(loaded, IDS), importance_mask(model, IDS))
        assert not any(parameter.requires_grad for parameter in loaded.importances.parameters())
        assert pdprune.load_decomposition(tmp_path / "here", network(), importances=False).importances is None
    assert json.loads((tmp_path / "here" / JSON_FILE).read_text())["about"] == {"loss": 0.5, "note": "a card"}


def test_nodes_labels_recipe_and_columns_come_back(tmp_path):
    sizes = {"blocks.0.mlp.down": 7, "embed": 4, "unembed": 9}
    everything = [(path, c) for path, count in sizes.items() for c in range(count)]
    groups = [everything[5:12], everything[:5], everything[12:]]
    for index, model in enumerate(
        (
            decomposed(nodes=groups),
            decomposed(nodes=groups, labels=["one", "two", "three"]),
            pdprune.decompose(network(), SITES, "svd"),
            pdprune.decompose(network(), ["*.mlp.down", "*.attn.out"], "neuron"),
            pdprune.decompose(network(), ["*.attn.out"], "head"),
        )
    ):
        save_decomposition(tmp_path / str(index), model)
        loaded = pdprune.load_decomposition(tmp_path / str(index), network())
        assert_same(loaded, model)
        assert loaded.recipe == model.recipe
        assert [site.reads_columns for site in loaded.sites.values()] == [
            site.reads_columns for site in model.sites.values()
        ]


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        save_decomposition(tmp_path / folder, decomposed(settings=SETTINGS[3]), about={"b": 1, "a": 2})
    for file in (JSON_FILE, TENSOR_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_half_precision_takes_half_the_space_and_sums_to_the_weights(tmp_path):
    model = decomposed(settings=SETTINGS[0])
    save_decomposition(tmp_path / "whole", model)
    save_decomposition(tmp_path / "half", model, dtype=torch.bfloat16)

    whole, half = ((tmp_path / folder / TENSOR_FILE).stat().st_size for folder in ("whole", "half"))
    loaded = pdprune.load_decomposition(tmp_path / "half", network())

    assert half < 0.7 * whole
    site, original = loaded.sites["unembed"], model.sites["unembed"]
    assert torch.equal(site.V, original.V.bfloat16().float())
    W = loaded.target.unembed.weight
    torch.testing.assert_close((site.V @ site.U).t() + site.delta, W, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded(IDS, torch.ones(loaded.n_nodes)), model(IDS), atol=1e-5, rtol=1e-5)
    assert next(loaded.importances.parameters()).dtype == torch.float32


def test_double_precision_stays(tmp_path):
    model = pdprune.decompose(small_lm(0), ["mix", "down"], "svd")
    save_decomposition(tmp_path, model)
    loaded = pdprune.load_decomposition(tmp_path, small_lm(0))
    assert loaded.sites["mix"].U.dtype == torch.float64
    assert loaded.decomposition_sha256 == model.decomposition_sha256


def test_the_target_is_found_where_the_file_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_target(network(), tmp_path / "targets" / "tiny")
    settings = pdprune.Decomposition("targets/tiny", SITES, "svd")
    save_decomposition(tmp_path / "run" / "decomposition", settings.load(), source="targets/tiny")

    for loaded in (
        pdprune.load_decomposition("run/decomposition"),
        pdprune.load_decomposition("run"),
        pdprune.load_decomposition("run", "targets/tiny"),
        pdprune.Decomposition(path="run").load(),
        pdprune.Decomposition("targets/tiny", path="run").load(),
    ):
        assert loaded.target_name == "tiny"
        assert_same(loaded, settings.load())
    (tmp_path / "targets" / "tiny" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"its target is not where it was .*give target="):
        pdprune.load_decomposition("run")


def test_inserted_identities_come_back(tmp_path):
    target = network()
    insert_identities(target, ["unembed.pre_identity"])
    V, U = drawn(6, 3, seed=4), drawn(3, 6, seed=5)
    model = pdprune.DecomposedModel.from_components(target, {"unembed.pre_identity": (V, U)})
    save_decomposition(tmp_path, model)
    assert_same(pdprune.load_decomposition(tmp_path, network()), model)


def test_another_target_is_refused(tmp_path):
    save_decomposition(tmp_path, decomposed())
    with pytest.raises(UserError, match="and this target is another one"):
        pdprune.load_decomposition(tmp_path, network(seed=1))


def test_settings_refuse_both_a_basis_and_a_path():
    for beside in ({"sites": ["*"]}, {"basis": "svd"}, {"n_heads": 2}):
        with pytest.raises(UserError, match="expected no sites, basis or n_heads beside it"):
            pdprune.Decomposition("dense-py", path="somewhere", **beside).load()
    with pytest.raises(UserError, match="neither target nor path"):
        pdprune.Decomposition(sites=["*"]).load()


@pytest.fixture
def saved(tmp_path):
    save_decomposition(tmp_path, decomposed(settings=SETTINGS[0]))
    return tmp_path


def assert_refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        read_decomposition(folder, network())
    assert "\n" not in str(caught.value)


def test_damaged_truncated_and_foreign_files_are_refused(saved):
    json_file, tensor_file = saved / JSON_FILE, saved / TENSOR_FILE
    text, data = json_file.read_bytes(), tensor_file.read_bytes()

    for damaged in (data[:-1], data[:40], b"", data[:-1] + bytes([data[-1] ^ 1])):
        tensor_file.write_bytes(damaged)
        assert_refused(saved, "does not belong to decomposition.json beside it, or is damaged")
    tensor_file.unlink()
    assert_refused(saved, "decomposition.safetensors: cannot be read")
    tensor_file.write_bytes(data)
    for damaged in (b"", text[:-10], b"\xff\xfe", b"[]", b'{"schema": "pdprune.circuit/1"}'):
        json_file.write_bytes(damaged)
        assert_refused(saved, "damaged or no JSON|its schema is")
    json_file.write_bytes(text.replace(b"pdprune.decomposition/1", b"pdprune.decomposition/2"))
    assert_refused(saved, "its schema is 'pdprune.decomposition/2'; expected 'pdprune.decomposition/1'")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content.pop("sites"), "lacks or garbles 'sites'"),
        (lambda content: content.update(sites=[{}]), "lacks or garbles 'name'"),
        (lambda content: content.update(sites=None), "lacks or garbles"),
        (lambda content: content["sites"].append({"name": "blocks.0.mlp.up"}), "lacks or garbles 'U.blocks.0.mlp.up'"),
        (lambda content: content.update(nodes=[[[9, 0]]]), "lacks or garbles"),
        (lambda content: content.update(nodes=[[[0, 0]]]), "is in no node"),
        (lambda content: content.update(labels=["one"]), "1 labels for 20 nodes"),
        (lambda content: content.pop("target"), "lacks or garbles 'target'"),
        (lambda content: content["importances"].pop("kind"), "importances: functions.*"),
        (lambda content: content["importances"].update(colour="red"), "lacks or garbles"),
        (lambda content: content["importances"].update(hidden=[6]), r"has shape \[7, 1, 5\]; expected \[7, 1, 6\]"),
    ],
)
def test_contents_that_do_not_fit_together_are_refused(saved, change, message):
    content = json.loads((saved / JSON_FILE).read_text())
    change(content)
    (saved / JSON_FILE).write_text(json.dumps(content))
    assert_refused(saved, message)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("U.embed", None, "lacks or garbles 'U.embed'"),
        ("U.embed", torch.zeros(4, 5), "U of site 'embed' has shape"),
        ("V.embed", None, "V of site 'embed'|U of site 'embed' has shape"),
        ("V.unembed", torch.full((6, 9), torch.nan), "V of site 'unembed' holds NaN"),
        ("importances.functions.embed.layers.0.W", None, "functions.embed.layers.0.W is missing"),
        ("importances.functions.other.layers.0.W", torch.zeros(2), "functions.other.layers.0.W is not known"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, name, tensor, message):
    import hashlib

    tensors = load_file(saved / TENSOR_FILE)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, saved / TENSOR_FILE)
    content = json.loads((saved / JSON_FILE).read_text())
    content["tensors_sha256"] = hashlib.sha256((saved / TENSOR_FILE).read_bytes()).hexdigest()
    (saved / JSON_FILE).write_text(json.dumps(content))
    assert_refused(saved, message)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_decomposition(tmp_path / "file" / "below", decomposed())
