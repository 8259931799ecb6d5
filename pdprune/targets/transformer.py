"""A small decoder-only transformer, to be read top to bottom: the architecture of the targets that ship.

Pre-norm residual blocks, learned positions, causal attention, GELU MLP, untied unembedding. Every weight matrix is an
`nn.Linear` or an `nn.Embedding`, so every matrix is a site that can be decomposed:

    embed, pos, blocks.{i}.attn.{q,k,v,out}, blocks.{i}.mlp.{up,down}, unembed

Shape suffixes: B batch, T position, D model width, H head, K width of one head, F width of the MLP, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdprune.errors import UserError

INIT_STD = 0.02
"""Standard deviation of the initial weights, as in GPT-2."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Transformer`. The fields are those of the shipped `config.yaml` files.

    Raises `UserError` where the sizes cannot make a network.
    """

    vocab_size: int = 128
    """Number of token ids."""
    max_length: int = 128
    """Number of positions: the longest input, in tokens."""
    n_layers: int = 2
    """Number of blocks."""
    n_heads: int = 4
    """Attention heads of a block; divides `d_model`."""
    d_model: int = 96
    """Width of the residual stream."""
    d_mlp: int = 384
    """Number of MLP neurons of a block."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"transformer: {name} is {value}, expected at least 1")
        if self.d_model % self.n_heads:
            raise UserError(f"transformer: d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")


class Transformer(nn.Module):
    """Token ids in, next-token logits out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.pos = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(_initialise)

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position.

        `attention_mask` is accepted for the calling convention of Hugging Face models and not needed: padding goes
        on the right, where causal attention never looks from a real token.
        """
        positions_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Repeated for each example, so that this site's input has the leading dimensions [B, T] of all the others.
        positions_BT = positions_T.expand_as(input_ids)
        x_BTD = self.embed(input_ids) + self.pos(positions_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.unembed(self.norm(x_BTD))


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised residual stream and adds to it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.d_model)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The residual stream after this block."""
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Attention(nn.Module):
    """Causal multi-head self-attention. Head `h` is rows `h*K:(h+1)*K` of q, k, v and those columns of out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.q = nn.Linear(config.d_model, config.d_model)
        self.k = nn.Linear(config.d_model, config.d_model)
        self.v = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the heads together add to the residual stream."""
        q_BHTK, k_BHTK, v_BHTK = (
            site(x_BTD).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for site in (self.q, self.k, self.v)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with a GELU between. Neuron `f` is row `f` of up and column `f` of down."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_mlp)
        self.down = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What the neurons together add to the residual stream."""
        return self.down(F.gelu(self.up(x_BTD)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
