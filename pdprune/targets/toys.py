"""Networks so small that what they compute is known, to be read top to bottom.

| network | what it learns | source |
|---|---|---|
| `TMS` | more features than it has hidden dimensions, each on rarely | Elhage et al. 2022, arXiv 2209.10652 |
| `ResidualMLP` | `x + act(x)` of more features than it has neurons | Braun et al. 2025 (APD), arXiv 2501.14926 |
| `InductionTransformer` | `s m ... s -> m`, by two layers of attention | Olsson et al. 2022, arXiv 2209.11895 |

The first two with the modules and parameter names of Bushnaq et al. 2025 (SPD, arXiv 2506.20790), so that its
checkpoints fit. What a network starts from is drawn from the global generator, as for any module of PyTorch.

Shape suffixes: B batch, T position, D model width, H head, K width of one head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdprune.errors import UserError, require_at_least

ActivationName = Literal["relu", "gelu"]


class Toy(nn.Module):
    """What a trainer needs to know of such a network."""

    config: Any
    """Its sizes, a dataclass."""

    def tied(self) -> dict[str, Tensor]:
        """By parameter, what it is a copy of while the network is trained. They are stored untied."""
        return {}

    def loss(self, output: Tensor, batch: dict[str, Any]) -> Float[Tensor, ""]:
        """How wrong the outputs on a batch are."""
        raise NotImplementedError


@dataclass(frozen=True)
class TMSConfig:
    """Sizes of a `TMS`. Raises `UserError` where they cannot make a network."""

    n_features: int = 5
    """Numbers that go in and shall come out."""
    n_hidden: int = 2
    """Dimensions that they are squeezed through."""
    n_hidden_layers: int = 0
    """Maps from the hidden space to itself in between: identities that are not trained."""
    tied_weights: bool = True
    """Whether `linear2.weight` is the transpose of `linear1.weight` while the network is trained."""
    init_bias_to_zero: bool = False
    """Start from no bias rather than a random one."""

    def __post_init__(self) -> None:
        require_at_least(1, "TMS: ", n_features=self.n_features, n_hidden=self.n_hidden)
        require_at_least(0, "TMS: ", n_hidden_layers=self.n_hidden_layers)


class TMS(Toy):
    """The toy model of superposition: `relu(linear2(linear1(x)))`.

    Sites: `linear1`, without a bias, `linear2`, and `hidden_layers.{i}` where there are any.
    """

    def __init__(self, config: TMSConfig = TMSConfig()) -> None:
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(config.n_features, config.n_hidden, bias=False)
        self.linear2 = nn.Linear(config.n_hidden, config.n_features)
        self.hidden_layers = nn.ModuleList(
            nn.Linear(config.n_hidden, config.n_hidden, bias=False) for _ in range(config.n_hidden_layers)
        )
        for layer in self.hidden_layers:
            nn.init.eye_(layer.requires_grad_(False).get_parameter("weight"))
        if config.init_bias_to_zero:
            nn.init.zeros_(self.linear2.bias)
        if config.tied_weights:
            with torch.no_grad():
                self.linear2.weight.copy_(self.linear1.weight.t())
            self.linear2.weight.requires_grad_(False)

    def forward(self, x: Float[Tensor, "*lead F"]) -> Float[Tensor, "*lead F"]:
        """The features, as far as they came through."""
        hidden = self.linear1(x)
        for layer in self.hidden_layers:
            hidden = layer(hidden)
        return F.relu(self.linear2(hidden))

    def tied(self) -> dict[str, Tensor]:
        """The second matrix is the first one's transpose."""
        return {"linear2.weight": self.linear1.weight.t()} if self.config.tied_weights else {}

    def loss(self, output: Float[Tensor, "*lead F"], batch: dict[str, Any]) -> Float[Tensor, ""]:
        """Mean squared distance from the features themselves."""
        return F.mse_loss(output, batch["inputs"])


@dataclass(frozen=True)
class ResidualMLPConfig:
    """Sizes of a `ResidualMLP`. Raises `UserError` where they cannot make a network."""

    n_layers: int = 1
    """Number of MLPs, each adding to the residual stream."""
    n_features: int = 100
    """Numbers that go in; each has a function of its own to come out as."""
    d_embed: int = 100
    """Width of the residual stream."""
    d_mlp: int = 50
    """Neurons of each MLP."""
    act_fn_name: ActivationName = "relu"
    """`relu` or `gelu`: of the neurons, and in what is to be computed."""
    in_bias: bool = False
    """Whether `mlp_in` has a bias."""
    out_bias: bool = False
    """Whether `mlp_out` has one."""
    d_random: int | None = None
    """Dimensions in which the features' directions are drawn; `d_embed` if not given. Random unit vectors have cosines
    of about `d_random ** -0.5` with one another, by which features leak into one another. A stream of 1000 dimensions
    that holds 100 of them can do no more than one of 100 dimensions that holds vectors with the same cosines."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("n_layers", "n_features", "d_embed", "d_mlp")}
        require_at_least(1, "residual MLP: ", **sizes)
        if self.act_fn_name not in get_args(ActivationName):
            raise UserError(f"residual MLP: act_fn_name is {self.act_fn_name!r}, expected 'relu' or 'gelu'")
        if self.d_random is not None and not self.n_features <= self.d_embed <= self.d_random:
            raise UserError(
                f"residual MLP: {self.n_features} features drawn in d_random {self.d_random} for d_embed "
                f"{self.d_embed}, expected n_features <= d_embed <= d_random, or no d_random"
            )


class ResidualMLP(Toy):
    """MLPs on a residual stream: `W_U(x_0 + mlp_0(x_0) + ...)` of `x_0 = x W_E`.

    Sites: `layers.{i}.mlp_in`, `layers.{i}.mlp_out`. The embedding is fixed at random, and `W_U` is its transpose.
    """

    def __init__(self, config: ResidualMLPConfig = ResidualMLPConfig()) -> None:
        super().__init__()
        self.config = config
        self.W_E: Float[Tensor, "F D"] = nn.Parameter(_embedding(config), requires_grad=False)
        self.W_U: Float[Tensor, "D F"] = nn.Parameter(self.W_E.t().clone(), requires_grad=False)
        self.layers = nn.ModuleList(ResidualMLPLayer(config) for _ in range(config.n_layers))

    def forward(self, x: Float[Tensor, "*lead F"]) -> Float[Tensor, "*lead F"]:
        """What the network makes of the features."""
        residual = x @ self.W_E
        for layer in self.layers:
            residual = residual + layer(residual)
        return residual @ self.W_U

    def wanted(self, x: Float[Tensor, "*lead F"]) -> Float[Tensor, "*lead F"]:
        """What it is trained to make of them."""
        return x + activation(self.config.act_fn_name, x)

    def loss(self, output: Float[Tensor, "*lead F"], batch: dict[str, Any]) -> Float[Tensor, ""]:
        """Mean squared distance from `x + act(x)`."""
        return F.mse_loss(output, self.wanted(batch["inputs"]))


class ResidualMLPLayer(nn.Module):
    """Two linear maps with an activation between. Neuron `f` is row `f` of `mlp_in` and column `f` of `mlp_out`."""

    def __init__(self, config: ResidualMLPConfig) -> None:
        super().__init__()
        self.act_fn_name = config.act_fn_name
        self.mlp_in = nn.Linear(config.d_embed, config.d_mlp, bias=config.in_bias)
        self.mlp_out = nn.Linear(config.d_mlp, config.d_embed, bias=config.out_bias)

    def forward(self, residual: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        """What the neurons together add to the residual stream."""
        return self.mlp_out(activation(self.act_fn_name, self.mlp_in(residual)))


@dataclass(frozen=True)
class InductionConfig:
    """Sizes of an `InductionTransformer`. Raises `UserError` where they cannot make a network."""

    vocab_size: int = 33
    """Number of token ids."""
    max_length: int = 32
    """Number of positions: the longest input, in tokens."""
    n_layers: int = 2
    """Number of layers of attention."""
    n_heads: int = 1
    """Heads of a layer; divides `d_model`."""
    d_model: int = 32
    """Width of the residual stream, even."""

    def __post_init__(self) -> None:
        require_at_least(1, "induction transformer: ", **vars(self))
        if self.d_model % self.n_heads or self.d_model % 2:
            raise UserError(
                f"induction transformer: d_model is {self.d_model}, expected an even multiple of n_heads {self.n_heads}"
            )


class InductionTransformer(Toy):
    """Attention and nothing else: no MLP, no norm, no bias. Token ids in, next-token logits out.

    Positions are added to what queries and keys read and never to the residual stream, so that a head can look for
    places but only ever moves tokens (Press et al. 2021, arXiv 2012.15832).
    Sites: `embed`, `blocks.{i}.attn.{q,k,v,out}`, `unembed`.
    """

    positions: Float[Tensor, "T D"]

    def __init__(self, config: InductionConfig = InductionConfig()) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(InductionBlock(config) for _ in range(config.n_layers))
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("positions", _sinusoids(config.max_length, config.d_model), persistent=False)

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position. `attention_mask` is not needed: padding goes on the right."""
        positions_TD = self.positions[: input_ids.shape[1]]
        x_BTD = self.embed(input_ids)
        for block in self.blocks:
            x_BTD = block(x_BTD, positions_TD)
        return self.unembed(x_BTD)

    def patterns(self, input_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B H T T"]]:
        """Where the heads of each layer look, as `PositionlessAttention.pattern` gives it."""
        positions_TD = self.positions[: input_ids.shape[1]]
        x_BTD = self.embed(input_ids)
        patterns = []
        for block in self.blocks:
            assert isinstance(block, InductionBlock)
            patterns.append(block.attn.pattern(x_BTD, positions_TD))
            x_BTD = block(x_BTD, positions_TD)
        return patterns

    def loss(self, output: Float[Tensor, "B T V"], batch: dict[str, Any]) -> Float[Tensor, ""]:
        """Cross-entropy of the token that the sequence is to end with, in nats."""
        last_BV = output[torch.arange(len(output)), batch["positions"]]
        return F.cross_entropy(last_BV, batch["labels"])


class InductionBlock(nn.Module):
    """Attention, which reads the residual stream and adds to it."""

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.attn = PositionlessAttention(config)

    def forward(self, x_BTD: Float[Tensor, "B T D"], positions_TD: Float[Tensor, "T D"]) -> Float[Tensor, "B T D"]:
        """The residual stream after this block."""
        return x_BTD + self.attn(x_BTD, positions_TD)


class PositionlessAttention(nn.Module):
    """Causal attention whose values hold no positions. Head `h` is rows `h*K:(h+1)*K` of q, k, v, columns of out."""

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BTD: Float[Tensor, "B T D"], positions_TD: Float[Tensor, "T D"]) -> Float[Tensor, "B T D"]:
        """What the heads together add to the residual stream."""
        v_BHTK = self._by_head(self.v(x_BTD))
        return self.out((self.pattern(x_BTD, positions_TD) @ v_BHTK).transpose(1, 2).flatten(2))

    def pattern(self, x_BTD: Float[Tensor, "B T D"], positions_TD: Float[Tensor, "T D"]) -> Float[Tensor, "B H T T"]:
        """Where each head looks: row by row, the share of attention that a position pays to those before it."""
        placed_BTD = x_BTD + positions_TD
        q_BHTK, k_BHTK = self._by_head(self.q(placed_BTD)), self._by_head(self.k(placed_BTD))
        scores_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
        future_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=x_BTD.device).triu(1)
        return scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1)

    def _by_head(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T K"]:
        return x_BTD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def activation(name: ActivationName, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ReLU or GELU, by name."""
    return F.relu(x) if name == "relu" else F.gelu(x)


def _embedding(config: ResidualMLPConfig) -> Float[Tensor, "F D"]:
    """Random unit vectors, one a row; where they were drawn in more dimensions, in a random basis of their span."""
    drawn = F.normalize(torch.randn(config.n_features, config.d_random or config.d_embed), dim=-1)
    if config.d_random is None:
        return drawn
    coordinates = torch.linalg.qr(drawn.t()).R.t()
    return coordinates @ nn.init.orthogonal_(torch.empty(config.n_features, config.d_embed))


def _sinusoids(length: int, width: int) -> Float[Tensor, "T D"]:
    """Sines and cosines of geometrically spaced wavelengths (Vaswani et al. 2017, arXiv 1706.03762)."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
