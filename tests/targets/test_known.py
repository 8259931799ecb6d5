"""The networks that SPD runs decompose compute what their originals compute."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pdprune.errors import UserError
from pdprune.targets.known import GPT2Like, GPT2LikeConfig, LlamaLike, LlamaLikeConfig, known_network

IDS = torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(0))


def seeded(module, scale=0.3):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return module.eval()


def small_llama(**changes):
    sizes = dict(vocab_size=37, n_layer=2, n_head=4, n_key_value_heads=2, n_embd=16, n_intermediate=24)
    return seeded(LlamaLike(LlamaLikeConfig(**{**sizes, **changes})))


def small_gpt2():
    return seeded(
        GPT2Like(GPT2LikeConfig(vocab_size=37, block_size=16, n_layer=2, n_head=4, n_embd=16, n_intermediate=64))
    )


@pytest.mark.parametrize("n_key_value_heads", [4, 2])
def test_llama_with_gated_mlp_is_hugging_faces(n_key_value_heads):
    ours = small_llama(mlp="swiglu", n_key_value_heads=n_key_value_heads, rotary_base=5000.0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_key_value_heads,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=True,
        )
    ).eval()
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "rms_1": "input_layernorm", "attn": "self_attn"}
    names |= {"rms_2": "post_attention_layernorm", "h": "model.layers"}
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): value for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(state)

    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_adjacent_pairs_are_halves_in_another_order():
    """Coordinates (0, K/2), (1, K/2 + 1), ... side by side, in queries and keys alike, make the same scores."""
    halves, adjacent = small_llama(), small_llama(rotary_adjacent_pairs=True)
    width = 4
    order = torch.tensor([0, 2, 1, 3])
    for block in adjacent.h:
        for projection in (block.attn.q_proj, block.attn.k_proj):
            heads = projection.weight.data.unflatten(0, (-1, width))
            projection.weight.data = heads[:, order].flatten(0, 1).clone()

    torch.testing.assert_close(adjacent(IDS)[0], halves(IDS)[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(small_llama(rotary_adjacent_pairs=True)(IDS)[0], halves(IDS)[0], atol=1e-3)


def test_the_ungated_mlp_is_tanh_gelu_between_two_maps():
    mlp = small_llama().h[0].mlp
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    hidden = x @ mlp.c_fc.weight.t()
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))

    torch.testing.assert_close(mlp(x), gelu @ mlp.down_proj.weight.t(), atol=1e-6, rtol=1e-6)


def test_gpt2_is_hugging_faces():
    ours = small_gpt2()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=4)).eval()
    state = {"transformer.wte.weight": ours.wte.weight, "transformer.wpe.weight": ours.wpe.weight}
    state |= {f"transformer.ln_f.{leaf}": getattr(ours.ln_f, leaf) for leaf in ("weight", "bias")}
    state["lm_head.weight"] = ours.lm_head.weight
    for index, block in enumerate(ours.h):
        place = f"transformer.h.{index}"
        projections = [block.attn.q_proj, block.attn.k_proj, block.attn.v_proj]
        state[f"{place}.attn.c_attn.weight"] = torch.cat([p.weight for p in projections]).t()
        state[f"{place}.attn.c_attn.bias"] = torch.cat([p.bias for p in projections])
        for theirs_name, module in (
            ("attn.c_proj", block.attn.o_proj),
            ("mlp.c_fc", block.mlp.c_fc),
            ("mlp.c_proj", block.mlp.down_proj),
        ):
            state |= {f"{place}.{theirs_name}.weight": module.weight.t(), f"{place}.{theirs_name}.bias": module.bias}
        for name in ("ln_1", "ln_2"):
            norm = block.get_submodule(name)
            state |= {f"{place}.{name}.weight": norm.weight, f"{place}.{name}.bias": norm.bias}
    theirs.load_state_dict(state)

    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_output_is_logits_and_loss():
    targets = IDS.roll(-1, 1)
    for network in (small_gpt2(), small_llama()):
        assert network(IDS)[1] is None
        logits, loss = network(IDS, targets)
        by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
        torch.testing.assert_close(loss, by_hand)


def test_embeddings_are_tied():
    for network in (small_gpt2(), small_llama()):
        assert network.lm_head.weight is network.wte.weight
        assert {"lm_head.weight", "wte.weight"} <= network.state_dict().keys()


@pytest.mark.parametrize(
    "network, name",
    [
        (small_gpt2(), "GPT2Simple"),
        (small_llama(), "LlamaSimpleMLP"),
        (small_llama(mlp="swiglu"), "LlamaSimple"),
        (small_llama(attn_bias=True, mlp_bias=True, n_key_value_heads=4), "LlamaSimpleMlp"),
    ],
)
def test_sizes_follow_from_shapes(network, name):
    state = torch.get_rng_state()
    made = known_network(name, network.state_dict(), {"n_head": 4})
    made.load_state_dict(network.state_dict())

    assert torch.equal(made(IDS)[0], network(IDS)[0])
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_shapes_do_not_tell_comes_from_the_config():
    network = small_llama(rms_norm_eps=0.1, rotary_base=50.0, rotary_adjacent_pairs=True, block_size=11)
    told = {"n_head": 4, "rms_norm_eps": 0.1, "rotary_base": 50.0, "rotary_adjacent_pairs": True, "block_size": 11}
    made = known_network("LlamaSimpleMLP", network.state_dict(), told)
    made.load_state_dict(network.state_dict())

    assert torch.equal(made(IDS)[0], network(IDS)[0])
    with pytest.raises(UserError, match="12 tokens; expected at most 11"):
        made(torch.zeros(1, 12, dtype=torch.long))


@pytest.mark.parametrize(
    "name, change, config, message",
    [
        ("LlamaSimpleMLP", {}, {}, "n_head is None"),
        ("LlamaSimpleMLP", {}, {"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
        ("LlamaSimpleMLP", {}, {"n_head": 16}, "heads of width 1 cannot be rotated"),
        ("LlamaSimpleMLP", {}, {"n_head": 4, "rotary_base": "many"}, "does not fit a LlamaSimpleMLP"),
        ("LlamaSimpleMLP", {"wte.weight": None}, {"n_head": 4}, "parameter 'wte.weight' is missing"),
        ("LlamaSimpleMLP", {"wte.weight": torch.zeros(3)}, {"n_head": 4}, r"has shape \[3\]; expected a matrix"),
        ("LlamaSimpleMLP", {"h.0.attn.c_attn.weight": torch.zeros(3, 3)}, {"n_head": 4}, "q, k and v in one"),
        ("GPT2Simple", {}, {"n_head": 4}, "parameter 'wpe.weight' is missing"),
        ("GPTX", {}, {}, "no network that we know; expected one of TMS, ResidualMLP, GPT2Like, LlamaLike"),
    ],
)
def test_refused_in_one_line(name, change, config, message):
    state = {key: value for key, value in {**small_llama().state_dict(), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        known_network(name, state, config)
    assert "\n" not in str(caught.value)
