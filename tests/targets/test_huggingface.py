"""Models from a local folder: what they compute under masks and padding, and which folders are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from targets.tiny_models import FAMILIES, OUTPUT_PROJECTIONS, VOCAB, refuse_network, save_byte_level, save_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from pdprune.decomposition import DecomposedModel, decompose
from pdprune.decomposition.settings import Decomposition
from pdprune.errors import UserError
from pdprune.targets import load_target
from pdprune.targets.store import load_reader

IDS = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
LENGTHS = (6, 2, 4)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_model(root / family, family)
    return root


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_network(monkeypatch)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def padded(side: str, pad_id: int) -> dict[str, Tensor]:
    """The first tokens of each row of `IDS`, in one batch longer than any of them."""
    rows, masks = [], []
    for row, length in zip(IDS, LENGTHS, strict=True):
        padding, real = torch.full((7 - length,), pad_id), row[:length]
        rows.append(torch.cat([real, padding] if side == "right" else [padding, real]))
        masks.append(torch.cat([torch.ones(length), torch.zeros(7 - length)]).long())
        masks[-1] = masks[-1] if side == "right" else masks[-1].flip(0)
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


@every_family
def test_a_loaded_model_is_the_one_that_was_saved(folders: Path, family: str, tmp_path: Path) -> None:
    saved = save_model(tmp_path / family, family, seed=1)
    target = load_target(tmp_path / family)
    assert (target.name, target.max_length, target.tokenizer) == (family, 24, None)
    output = target.module(IDS)
    close(output.logits, saved(IDS).logits)
    assert output.past_key_values is None
    assert not any(module.training for module in target.module.modules())
    assert not any(parameter.requires_grad for parameter in target.module.parameters())


@every_family
def test_every_matrix_is_a_site_and_keeping_all_nodes_changes_nothing(folders: Path, family: str) -> None:
    target = load_target(folders / family).module
    model = decompose(target, "*", "svd")
    matrices = [name for name, p in target.named_parameters(remove_duplicate=False) if p.ndim == 2]
    assert [f"{name}.weight" for name in model.site_names] == matrices
    assert not model.delta_sites.any()
    expected = target(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS, torch.ones(model.n_nodes)).logits, expected)
    assert torch.equal(model(IDS, torch.ones(*IDS.shape, model.n_nodes)).logits, expected)


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_folded_and_per_token_routes_agree(folders: Path, family: str, attention: str) -> None:
    target = load_target(folders / family).module
    target.set_attn_implementation(attention)
    model = decompose(target, "*", "svd")
    mask = torch.rand(model.n_nodes, requires_grad=True)
    per_token = mask.expand(*IDS.shape, -1)
    folded, by_token = model(IDS, mask).logits, model(IDS, per_token).logits
    close(folded, by_token)
    direction = torch.randn_like(folded)
    close(*(torch.autograd.grad((logits * direction).sum(), mask)[0] for logits in (folded, by_token)))


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_is_answered_like_the_prompt_alone(folders: Path, family: str, side: str) -> None:
    model = decompose(load_target(folders / family).module, "*", "svd")
    mask = torch.rand(model.n_nodes)
    batch, other_padding = padded(side, 0), padded(side, 7)
    for shape in ((), (3, 7)):
        logits = model(batch, mask.expand(*shape, -1)).logits
        real = batch["attention_mask"].bool()
        close(logits[real], model(other_padding, mask.expand(*shape, -1)).logits[real])
        for i, length in enumerate(LENGTHS):
            alone = model(IDS[i : i + 1, :length], mask).logits[0]
            close(logits[i, :length] if side == "right" else logits[i, -length:], alone)
    assert torch.isfinite(logits).all()


def test_a_model_that_takes_no_positions_is_padded_on_the_right(tmp_path: Path) -> None:
    save_byte_level(tmp_path, padding_side="left")
    BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert load_reader(tmp_path).tokenizer.padding_side == "right"
    model = decompose(load_target(tmp_path).module, "*", "svd")
    mask, batch = torch.rand(model.n_nodes), padded("right", 0)
    for i, length in enumerate(LENGTHS):
        close(model(batch, mask).logits[i, :length], model(IDS[i : i + 1, :length], mask).logits[0])


def test_positions_that_are_given_are_left_alone(folders: Path) -> None:
    target = load_target(folders / "gpt2").module
    given = {"input_ids": IDS, "position_ids": (torch.arange(6) + 3).expand(3, 6)}
    close(target(**given).logits, AutoModelForCausalLM.from_pretrained(folders / "gpt2")(**given).logits)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_tied_embeddings_are_two_sites(folders: Path, family: str) -> None:
    target = load_target(folders / family).module
    embedding, unembedding = target.get_input_embeddings(), target.get_output_embeddings()
    assert embedding.weight is unembedding.weight
    name = next(name for name, module in target.named_modules() if module is embedding)
    model = decompose(target, [name, "lm_head"], "neuron")
    assert model.site_names == [name, "lm_head"]
    mask = torch.ones(model.n_nodes)
    mask[VOCAB:] = torch.rand(8)
    hidden = target.base_model(IDS).last_hidden_state
    close(model(IDS, mask).logits, hidden * mask[VOCAB:] @ unembedding.weight.t())


@every_family
def test_a_head_is_what_its_columns_of_the_output_projection_carry(folders: Path, family: str) -> None:
    target = load_target(folders / family).module
    model = decompose(target, OUTPUT_PROJECTIONS[family], "head")
    assert model.n_nodes == 2 * 4
    assert model.nodes[5].label == f"{model.site_names[1]}:head1"
    mask = torch.ones(8)
    mask[5] = 0
    width = model.sites[model.site_names[1]].n_components // 4
    columns = slice(width, 2 * width)

    def without_the_head(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = args
        x = x.clone()
        x[..., columns] = 0
        return (x,)

    ablated = model(IDS, mask).logits
    target.get_submodule(model.site_names[1]).register_forward_pre_hook(without_the_head)
    close(ablated, target(IDS).logits)


@pytest.mark.parametrize(
    ("family", "sites", "reads"),
    [
        ("gpt2", "*.c_attn", "the residual stream"),
        ("gpt_neox", "*.query_key_value", "the residual stream"),
        ("llama", "*.q_proj", "the residual stream"),
        ("llama", "*.k_proj", "the residual stream"),
        ("gpt2", "*.c_proj", "something else"),
        ("llama", "*.down_proj", "something else"),
        ("gpt2", "lm_head", "something else"),
        ("gpt2", "*.wte", "something else"),
    ],
)
def test_what_has_no_heads_is_refused_as_heads(folders: Path, family: str, sites: str, reads: str) -> None:
    with pytest.raises(UserError, match=f"reads {reads}.*output projections of attention only"):
        decompose(load_target(folders / family).module, sites, "head")


@pytest.mark.parametrize(("family", "site"), [("gpt2", "*.c_attn"), ("gpt_neox", "*.query_key_value")])
@pytest.mark.parametrize("basis", ["svd", "neuron"])
def test_fused_queries_keys_and_values_are_one_site(folders: Path, family: str, site: str, basis: Any) -> None:
    model = decompose(load_target(folders / family).module, site, basis)
    assert [s.n_components for s in model.sites.values()] == [8, 8]
    assert {s.d_out for s in model.sites.values()} == {24}


def test_shards_are_one_model(folders: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folders / "llama")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    close(load_target(tmp_path).module(IDS).logits, model(IDS).logits)


def test_the_reader_leaves_weights_alone(folders: Path, tmp_path: Path) -> None:
    shutil.copy(folders / "llama" / "config.json", tmp_path)
    assert load_reader(tmp_path)[1:] == (tmp_path.name, 24)
    with pytest.raises(UserError, match="no weights"):
        load_target(tmp_path)


def test_loading_leaves_global_state_alone(folders: Path) -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    random_state = torch.get_rng_state()
    load_target(folders / "gpt2")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "run")


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Trap(folder / "trapped"), folder / "pytorch_model.bin")


def save_bert(folder: Path) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=8)).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    T5ForConditionalGeneration(config).save_pretrained(folder)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (write("config.json", "{nope"), r"config\.json: damaged, or no JSON"),
        (write("config.json", "[]"), r"config\.json: a JSON list"),
        (write("config.json", "{}"), "model_type None"),
        (edit_config(model_type="nonesuch"), "'nonesuch'"),
        (edit_config(model_type=["llama"]), "model_type \\['llama'\\]"),
        (edit_config(architectures=["GPT2LMHeadModel"]), "holds a GPT2LMHeadModel.*here a LlamaForCausalLM"),
        (edit_config(model_type="nonesuch", auto_map={"AutoConfig": "x.C"}), "code in the folder is never run"),
        (edit_config(num_attention_heads=3), "not a causal language model that can be loaded"),
        (edit_config(hidden_size="eight"), "not a causal language model that can be loaded"),
        (edit_config(intermediate_size=14), "has in another shape model.layers.0.mlp.down_proj.weight and 5 more"),
        (edit_config(num_hidden_layers=1), "has too much of model.layers.1.input_layernorm.weight and 8 more"),
        (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized"),
        (edit_weights(lambda state: state.pop(UP)), f"lacks {UP}"),
        (truncate, "SafetensorError|incomplete|header|metadata"),
        (write("model.safetensors", "no weights at all"), "header"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
        (pickle_weights, r"pickled \(pytorch_model\.bin\).*save_pretrained"),
        (write("adapter_config.json", '{"base_model_name_or_path": "some/where"}'), "holds an adapter"),
        (lambda folder: LlamaForCausalLM.from_pretrained(folder).model.save_pretrained(folder), "holds a LlamaModel"),
        (save_bert, "holds a BertForMaskedLM; expected a causal language model"),
        (save_t5, "holds a T5ForConditionalGeneration; expected a causal language model"),
        (write("tokenizer.json", "{nope"), "not a causal language model that can be loaded"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(
    folders: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders / "llama", folder)
    damage(folder)
    with pytest.raises(UserError, match=named) as refusal:
        load_target(folder)
    assert str(refusal.value).startswith(f"target {folder}")
    assert "\n" not in str(refusal.value)
    assert not (folder / "trapped").exists()


def test_weights_that_are_no_numbers_are_refused_by_name(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path, dirs_exist_ok=True)
    edit_weights(lambda state: state[UP].fill_(torch.nan))(tmp_path)
    with pytest.raises(UserError, match=f"'{UP}' of the target holds NaN"):
        Decomposition(target=str(tmp_path), sites=["*.down_proj"]).load()


def test_without_transformers_the_extra_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'pdprune\[hf\]'"):
        load_target(folders / "llama")


def test_a_decomposition_of_a_folder_knows_its_name(folders: Path) -> None:
    model = Decomposition(target=str(folders / "llama"), sites=["*.down_proj"]).load()
    assert isinstance(model, DecomposedModel)
    assert (model.target_name, model.n_nodes) == ("llama", 24)
