"""The networks that SPD runs decompose: two families of language models, and how each network follows from its shapes.

`GPT2Like`: learned positions, LayerNorm, biases everywhere. `LlamaLike`: rotary positions, RMSNorm, grouped-query
attention, no biases. Both have a tanh-GELU MLP (`LlamaLike` also knows the gated one with SiLU), causal attention and
an unembedding tied to the embedding, and return `(logits, loss)`. Their parameters are named and computed with as in
simple_stories_train and the pretraining code of SPD (github.com/goodfire-ai/spd), whose checkpoints they load:

    wte, wpe, h.{i}.ln_1|ln_2,   h.{i}.attn.{q,k,v,o}_proj, h.{i}.mlp.{c_fc,down_proj}, ln_f, lm_head
    wte,      h.{i}.rms_1|rms_2, h.{i}.attn.{q,k,v,o}_proj, h.{i}.mlp.{c_fc,down_proj}, ln_f, lm_head

Shape suffixes: B batch, T position, D model width, H head, K width of one head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdprune.errors import UserError
from pdprune.targets.toys import TMS, ResidualMLP, ResidualMLPConfig, TMSConfig


@dataclass(frozen=True)
class GPT2LikeConfig:
    """Sizes of a `GPT2Like`."""

    vocab_size: int
    block_size: int
    """Number of positions: the longest input, in tokens."""
    n_layer: int
    n_head: int
    n_embd: int
    n_intermediate: int

    def __post_init__(self) -> None:
        _require_sizes(self)


@dataclass(frozen=True)
class LlamaLikeConfig:
    """Sizes of a `LlamaLike`, and what of its arithmetic can differ."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_key_value_heads: int
    """Divides `n_head`; each is read by `n_head / n_key_value_heads` heads."""
    n_embd: int
    n_intermediate: int
    block_size: int | None = None
    """The longest input, in tokens; None is any."""
    rms_norm_eps: float = 1e-6
    rotary_base: float = 10000.0
    rotary_adjacent_pairs: bool = False
    """Whether coordinates are rotated in pairs `(0, 1), (2, 3), ...`; if not, in pairs `(i, i + K/2)`."""
    attn_bias: bool = False
    mlp_bias: bool = False
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """`gelu`: `c_fc`, tanh-GELU, `down_proj`. `swiglu`: `gate_proj` through SiLU times `up_proj`, `down_proj`."""

    def __post_init__(self) -> None:
        _require_sizes(self)
        if self.n_head % self.n_key_value_heads:
            raise UserError(
                f"target: n_head {self.n_head} is not a multiple of n_key_value_heads {self.n_key_value_heads}"
            )
        if (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"target: heads of width {self.n_embd // self.n_head} cannot be rotated; expected an even width"
            )


Output = tuple[Float[Tensor, "B T V"], Float[Tensor, ""] | None]


class GPT2Like(nn.Module):
    """Token ids in, `(logits, loss)` out; the loss is None without targets."""

    def __init__(self, config: GPT2LikeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.block_size, width)
        self.h = nn.ModuleList(
            Block(
                {"ln_1": nn.LayerNorm(width), "ln_2": nn.LayerNorm(width)},
                Attention(width, config.n_head, config.n_head, bias=True, rotary=None),
                GELUMLP(width, config.n_intermediate, bias=True),
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = _tied_to(self.wte)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
    ) -> Output:
        """Logits of the next token at every position. Padding goes on the right, where no real token looks.

        Raises:
            UserError: an input longer than there are positions.
        """
        _require_length(input_ids, self.config.block_size)
        # Repeated for each example, so that this site's input has the leading dimensions [B, T] of all the others.
        positions_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x_BTD = self.wte(input_ids) + self.wpe(positions_BT)
        for block in self.h:
            x_BTD = block(x_BTD)
        return _with_loss(self.lm_head(self.ln_f(x_BTD)), targets)


class LlamaLike(nn.Module):
    """Token ids in, `(logits, loss)` out; the loss is None without targets."""

    def __init__(self, config: LlamaLikeConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.n_embd, config.rms_norm_eps
        rotary = Rotary(width // config.n_head, config.rotary_base, config.rotary_adjacent_pairs)
        mlp = {"gelu": GELUMLP, "swiglu": SwiGLUMLP}[config.mlp]
        self.wte = nn.Embedding(config.vocab_size, width)
        self.h = nn.ModuleList(
            Block(
                {"rms_1": nn.RMSNorm(width, eps), "rms_2": nn.RMSNorm(width, eps)},
                Attention(width, config.n_head, config.n_key_value_heads, config.attn_bias, rotary),
                mlp(width, config.n_intermediate, config.mlp_bias),
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.RMSNorm(width, eps)
        self.lm_head = _tied_to(self.wte)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
    ) -> Output:
        """Logits of the next token at every position. Padding goes on the right, where no real token looks.

        Raises:
            UserError: an input longer than `block_size`.
        """
        _require_length(input_ids, self.config.block_size)
        x_BTD = self.wte(input_ids)
        for block in self.h:
            x_BTD = block(x_BTD)
        return _with_loss(self.lm_head(self.ln_f(x_BTD)), targets)


class Block(nn.Module):
    """Attention, then MLP; each reads the residual stream through its norm, of which the first is attention's."""

    def __init__(self, norms: Mapping[str, nn.Module], attn: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_names = list(norms)
        for name, norm in norms.items():
            self.add_module(name, norm)
        self.attn = attn
        self.mlp = mlp

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The residual stream after this block."""
        before_attn, before_mlp = (self.get_submodule(name) for name in self.norm_names)
        x_BTD = x_BTD + self.attn(before_attn(x_BTD))
        return x_BTD + self.mlp(before_mlp(x_BTD))


class Rotary(NamedTuple):
    """Rotary positions over the whole width of a head (Su et al. 2021, arXiv 2104.09864)."""

    width: int
    base: float
    adjacent_pairs: bool

    def __call__(self, x_BHTK: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H T K"]:
        """Every pair of coordinates turned by its frequency times the position."""
        half = torch.arange(self.width // 2, dtype=torch.float32, device=x_BHTK.device)
        period = self.base ** (half / (self.width / 2))
        period = period.repeat_interleave(2) if self.adjacent_pairs else period.repeat(2)
        angle_TK = torch.arange(x_BHTK.shape[2], dtype=torch.float32, device=x_BHTK.device)[:, None] / period
        return x_BHTK * angle_TK.cos().to(x_BHTK.dtype) + self._quarter_turn(x_BHTK) * angle_TK.sin().to(x_BHTK.dtype)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        if self.adjacent_pairs:
            return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)


class Attention(nn.Module):
    """Causal self-attention in which several heads may read the same keys and values."""

    def __init__(self, width: int, n_heads: int, n_key_value_heads: int, bias: bool, rotary: Rotary | None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_key_value_heads = n_key_value_heads
        self.rotary = rotary
        key_value_width = n_key_value_heads * (width // n_heads)
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, key_value_width, bias)
        self.v_proj = nn.Linear(width, key_value_width, bias)
        self.o_proj = nn.Linear(width, width, bias)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the heads together add to the residual stream."""
        q_BHTK = self.q_proj(x_BTD).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k_BHTK = self.k_proj(x_BTD).unflatten(-1, (self.n_key_value_heads, -1)).transpose(1, 2)
        v_BHTK = self.v_proj(x_BTD).unflatten(-1, (self.n_key_value_heads, -1)).transpose(1, 2)
        if self.rotary is not None:
            q_BHTK, k_BHTK = self.rotary(q_BHTK), self.rotary(k_BHTK)
        shared_by = self.n_heads // self.n_key_value_heads
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK.repeat_interleave(shared_by, 1), v_BHTK.repeat_interleave(shared_by, 1), is_causal=True
        )
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))


class GELUMLP(nn.Module):
    """Two linear maps with GPT-2's GELU between, the one by tanh."""

    def __init__(self, width: int, n_intermediate: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, n_intermediate, bias)
        self.down_proj = nn.Linear(n_intermediate, width, bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the neurons together add to the residual stream."""
        return self.down_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SwiGLUMLP(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, width: int, n_intermediate: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, n_intermediate, bias)
        self.up_proj = nn.Linear(width, n_intermediate, bias)
        self.down_proj = nn.Linear(n_intermediate, width, bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the neurons together add to the residual stream."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def known_network(name: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """A network whose parameters have the names and shapes of `state`, with random weights, in eval mode.

    Args:
        name: one of `KNOWN`.
        state: the parameters.
        config: what shapes do not tell. Of a residual MLP `act_fn_name` (by default `relu`); of the language models
            `n_head`; of `LlamaLike`, where they are not the usual ones, also `block_size`, `rms_norm_eps`,
            `rotary_base` and `rotary_adjacent_pairs`.

    Raises:
        UserError: an unknown name, a parameter that is missing or no matrix, a size that cannot be.
    """
    if name not in KNOWN:
        raise UserError(f"target: {name!r} is no network that we know; expected one of {', '.join(KNOWN)}")
    try:
        with torch.random.fork_rng(devices=[]):  # what a module draws when it is made is about to be replaced
            return KNOWN[name](state, config).eval().requires_grad_(False)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"target: its config does not fit a {name} ({error}); expected numbers and flags") from error


def _tms(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> TMS:
    n_hidden, n_features = _shape(state, "linear1.weight")
    n_hidden_layers = _n_layers(state, "hidden_layers")
    return TMS(TMSConfig(n_features, n_hidden, n_hidden_layers, tied_weights=False))


def _residual_mlp(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ResidualMLP:
    n_features, d_embed = _shape(state, "W_E")
    return ResidualMLP(
        ResidualMLPConfig(
            n_layers=_n_layers(state, "layers"),
            n_features=n_features,
            d_embed=d_embed,
            d_mlp=_shape(state, "layers.0.mlp_in.weight")[0],
            act_fn_name=config.get("act_fn_name", "relu"),
            in_bias="layers.0.mlp_in.bias" in state,
            out_bias="layers.0.mlp_out.bias" in state,
        )
    )


def _gpt2_like(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> GPT2Like:
    vocab_size, n_embd = _shape(state, "wte.weight")
    return GPT2Like(
        GPT2LikeConfig(
            vocab_size=vocab_size,
            block_size=_shape(state, "wpe.weight")[0],
            n_layer=_n_layers(state, "h"),
            n_head=_configured(config, "n_head"),
            n_embd=n_embd,
            n_intermediate=_shape(state, "h.0.mlp.c_fc.weight")[0],
        )
    )


def _llama_like(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LlamaLike:
    if "h.0.attn.c_attn.weight" in state:
        raise UserError("target: h.0.attn.c_attn holds q, k and v in one; expected q_proj, k_proj and v_proj")
    vocab_size, n_embd = _shape(state, "wte.weight")
    n_head = _configured(config, "n_head")
    gated = "h.0.mlp.gate_proj.weight" in state
    return LlamaLike(
        LlamaLikeConfig(
            vocab_size=vocab_size,
            n_layer=_n_layers(state, "h"),
            n_head=n_head,
            n_key_value_heads=max(1, _shape(state, "h.0.attn.k_proj.weight")[0] * n_head // n_embd),
            n_embd=n_embd,
            n_intermediate=_shape(state, "h.0.mlp.gate_proj.weight" if gated else "h.0.mlp.c_fc.weight")[0],
            attn_bias="h.0.attn.q_proj.bias" in state,
            mlp_bias="h.0.mlp.down_proj.bias" in state,
            mlp="swiglu" if gated else "gelu",
            **{key: kind(config[key]) for key, kind in TOLD_OF_LLAMA.items() if config.get(key) is not None},
        )
    )


TOLD_OF_LLAMA: dict[str, Callable[[Any], Any]] = {
    "block_size": int,
    "rms_norm_eps": float,  # YAML takes 1e-6, without a point, for a string
    "rotary_base": float,
    "rotary_adjacent_pairs": bool,
}

KNOWN: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module]] = {
    "TMS": _tms,
    "ResidualMLP": _residual_mlp,
    "GPT2Like": _gpt2_like,
    "LlamaLike": _llama_like,
    "TMSModel": _tms,
    "GPT2Simple": _gpt2_like,
    "LlamaSimpleMLP": _llama_like,
    "LlamaSimpleMlp": _llama_like,
    "LlamaSimple": _llama_like,
}
"""How a network follows from its parameters, by the name of its class: ours, and those of SPD's configs."""


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in state:
        raise UserError(f"target: parameter {name!r} is missing; expected it, to take sizes from")
    if state[name].ndim != 2:
        raise UserError(f"target: parameter {name!r} has shape {list(state[name].shape)}; expected a matrix")
    rows, columns = state[name].shape
    return rows, columns


def _n_layers(state: Mapping[str, Tensor], stack: str) -> int:
    """The number of different `i` in the names `<stack>.<i>....`."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})


def _configured(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"target: {key} is {value!r}, and shapes do not tell it; expected a number in model_config.yaml beside the "
            f"checkpoint, or target_config={{{key!r}: ...}}"
        )
    return value


def _require_sizes(config: GPT2LikeConfig | LlamaLikeConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"target: {name} is {value}; expected at least 1")
    if config.n_embd % config.n_head:
        raise UserError(f"target: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")


def _require_length(input_ids: Tensor, longest: int | None) -> None:
    if longest is not None and input_ids.shape[1] > longest:
        raise UserError(f"target: the input has {input_ids.shape[1]} tokens; expected at most {longest}")


def _tied_to(embedding: nn.Embedding) -> nn.Linear:
    unembedding = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    unembedding.weight = embedding.weight
    return unembedding


def _with_loss(logits_BTV: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"] | None) -> Output:
    if targets is None:
        return logits_BTV, None
    return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten().long(), ignore_index=-1)
