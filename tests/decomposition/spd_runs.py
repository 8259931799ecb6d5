"""SPD run folders as SPD writes them, and what its causal importances are, by slow and obvious formulas.

Nothing here knows how the package reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

State = dict[str, Tensor]
Factors = Mapping[str, tuple[Tensor, Tensor]]


def drawn(*shape: int, seed: int, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors_of(target: nn.Module, n_components: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random `V: [d_in, C]`, `U: [C, d_out]` for sites of a target, of the size of its weights."""
    made = {}
    for seed, (path, count) in enumerate(n_components.items()):
        module = target.get_submodule(path.removesuffix(".pre_identity"))
        rows, columns = module.weight.shape
        stores_in_out = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        d_in, d_out = (rows, columns) if stores_in_out else (columns, rows)
        if path.endswith(".pre_identity"):
            d_out = d_in
        made[path] = (drawn(d_in, count, seed=2 * seed), drawn(count, d_out, seed=2 * seed + 1))
    return made


# -- causal-importance functions -------------------------------------------------------------------------------------


def mlp_parameters(widths: list[int], n_parallel: int | None, seed: int) -> State:
    """`layers.{0,2,...}.{W,b}` of an MLP, or of one for each component."""
    lead = () if n_parallel is None else (n_parallel,)
    state = {}
    for layer, (d_in, d_out) in enumerate(pairwise(widths)):
        state[f"layers.{2 * layer}.W"] = drawn(*lead, d_in, d_out, seed=100 * seed + layer)
        state[f"layers.{2 * layer}.b"] = drawn(*lead, d_out, seed=100 * seed + layer + 50)
    return state


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """An MLP of one row: matrices times vectors, GELUs in between."""
    layers = sorted({int(name.split(".")[1]) for name in state})
    for layer in layers:
        x = x @ state[f"layers.{layer}.W"] + state[f"layers.{layer}.b"]
        x = x if layer == layers[-1] else gelu(x)
    return x


def per_component(rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """`rows[c]` through the MLP of component `c`, one after another."""
    count = state["layers.0.W"].shape[0]
    return torch.stack([mlp(rows[c], {name: value[c] for name, value in state.items()})[0] for c in range(count)])


def token_by_token(x: Tensor, function: Any) -> Tensor:
    lead = x.shape[:-1]
    return torch.stack([function(row) for row in x.reshape(-1, x.shape[-1])]).reshape(*lead, -1)


def mlp_on_inner_product(x: Tensor, V: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """SPD's `mlp`."""
    acts = V[x] if not x.is_floating_point() else x @ V
    return token_by_token(acts, lambda row: per_component(row[:, None], state))


def mlp_on_vector(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """SPD's `vector_mlp`."""
    count = state["layers.0.W"].shape[0]
    return token_by_token(x, lambda row: per_component(row.expand(count, -1), state))


def shared_mlp(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return token_by_token(x, lambda row: mlp(row, state))


def transformer_parameters(d_in: int, d_model: int, n_blocks: int, hidden: int, d_out: int) -> State:
    state = {
        "_input_projector.W": drawn(d_in, d_model, seed=1000),
        "_input_projector.b": drawn(d_model, seed=1001),
        "_output_head.W": drawn(d_model, d_out, seed=1002),
        "_output_head.b": drawn(d_out, seed=1003),
    }
    for block in range(n_blocks):
        for index, name in enumerate("qkv"):
            state[f"_blocks.{block}.attn.{name}_proj.weight"] = drawn(d_model, d_model, seed=1100 + 10 * block + index)
        state[f"_blocks.{block}.attn.out_proj.weight"] = drawn(d_model, d_model, seed=1105 + 10 * block)
        parameters = mlp_parameters([d_model, hidden, d_model], None, seed=20 + block)
        state |= {f"_blocks.{block}.mlp.{name.removeprefix('layers.')}": value for name, value in parameters.items()}
    return state


def rms_normalised(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def transformer(read: Mapping[str, Tensor], sizes: Mapping[str, int], state: State, n_heads: int, base: float) -> State:
    """SPD's `global_shared_transformer`: attention in both directions, by loops over heads and pairs of positions.

    `read` holds `[B, T, I]` by site, activations of the components at an embedding.
    """
    names = sorted(read)
    x = torch.cat([rms_normalised(read[name]) for name in names], -1)
    x = x @ state["_input_projector.W"] + state["_input_projector.b"]
    width = x.shape[-1] // n_heads
    for block in range(len({name.split(".")[1] for name in state if name.startswith("_blocks.")})):
        own = {k.removeprefix(f"_blocks.{block}."): v for k, v in state.items() if k.startswith(f"_blocks.{block}.")}
        y = rms_normalised(x)
        q, k, v = (y @ own[f"attn.{name}_proj.weight"].t() for name in "qkv")
        mixed = torch.zeros_like(x)
        for head in range(n_heads):
            at = slice(head * width, (head + 1) * width)
            for example in range(x.shape[0]):
                turned_q, turned_k = (turned(z[example, :, at], base) for z in (q, k))
                pattern = (turned_q @ turned_k.t() / math.sqrt(width)).softmax(-1)
                mixed[example, :, at] = pattern @ v[example, :, at]
        x = x + mixed @ own["attn.out_proj.weight"].t()
        y = rms_normalised(x)
        y = gelu(y @ own["mlp.0.W"] + own["mlp.0.b"]) @ own["mlp.2.W"] + own["mlp.2.b"]
        x = x + y
    values = x @ state["_output_head.W"] + state["_output_head.b"]
    return dict(zip(names, values.split([sizes[name] for name in names], -1), strict=True))


def turned(x: Tensor, base: float) -> Tensor:
    """Row `t`, its pairs `(i, i + K/2)` seen as complex numbers, times `exp(i t base^(-2i/K))`."""
    half = x.shape[-1] // 2
    complex_rows = torch.complex(x[:, :half], x[:, half:])
    angles = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    spun = complex_rows * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([spun.real, spun.imag], -1)


# -- the files -------------------------------------------------------------------------------------------------------


def layout_a(target: nn.Module, factors: Factors, functions: Mapping[str, State]) -> State:
    """Late 2025."""
    state = {f"target_model.{name}": value for name, value in target.state_dict().items()}
    for path, (V, U) in factors.items():
        state[f"_components.{path.replace('.', '-')}.V"] = V
        state[f"_components.{path.replace('.', '-')}.U"] = U
        bias = _bias_of(target, path)
        if bias is not None:
            state[f"_components.{path.replace('.', '-')}.bias"] = bias
    for path, parameters in functions.items():
        state |= {f"_ci_fns.{path.replace('.', '-')}.{name}": value for name, value in parameters.items()}
    return state


def layout_b(target: nn.Module, factors: Factors, functions: Mapping[str, State], shared: State | None = None) -> State:
    """2026: a wrapper around the functions, or one for all sites."""
    state = layout_a(target, factors, {})
    for path, parameters in functions.items():
        state |= {f"ci_fn._ci_fns.{path.replace('.', '-')}.{name}": value for name, value in parameters.items()}
    for name, value in (shared or {}).items():
        state[f"ci_fn._global_ci_fn.{name}"] = value
        if name.endswith("attn.q_proj.weight"):
            place = name.removesuffix("q_proj.weight")
            state[f"ci_fn._global_ci_fn.{place}rope.inv_freq"] = torch.ones(2)
    return state


def layout_c(target: nn.Module, factors: Factors, functions: Mapping[str, State]) -> State:
    """Mid-2025: components inside the patched target."""
    state: State = {}
    patched = {path.removesuffix(".pre_identity") for path in factors}
    for name, value in target.state_dict().items():
        path, _, leaf = name.rpartition(".")
        middle = f"{path}.original" if path in patched else path
        state[f"patched_model.{middle}.{leaf}" if middle else f"patched_model.{leaf}"] = value
    for path, (V, U) in factors.items():
        base = path.removesuffix(".pre_identity")
        what = "components" if base == path else "identity_components"
        state |= {f"patched_model.{base}.{what}.V": V, f"patched_model.{base}.{what}.U": U}
    for path, parameters in functions.items():
        base = path.removesuffix(".pre_identity")
        key = base.replace(".", "-") if base == path else "identity_" + base.replace(".", "-")
        state |= {f"_gates.{key}.{name}": value for name, value in parameters.items()}
    return state


def layout_d(target: nn.Module, factors: Factors, gates: Mapping[str, State]) -> State:
    """The first release: A and B."""
    state = {f"model.{name}": value for name, value in target.state_dict().items()}
    for path, (A, B) in factors.items():
        key = path.replace(".", "-")
        state |= {f"components.{key}.A": A, f"components.{key}.B": B}
        bias = _bias_of(target, path)
        if bias is not None:
            state[f"components.{key}.bias"] = bias
    for path, parameters in gates.items():
        state |= {f"gates.{path.replace('.', '-')}.{name}": value for name, value in parameters.items()}
    return state


def write_run(folder: Path, state: State, config: Mapping[str, Any], step: int = 100, **beside: Any) -> Path:
    """A run folder; `beside` are further YAML files, without their suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.detach().clone() for name, value in state.items()}, folder / f"model_{step}.pth")
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"seed": 0, "steps": step, **config}))
    for name, content in beside.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def module_info(n_components: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"module_pattern": path, "C": count} for path, count in n_components.items()]


def _bias_of(target: nn.Module, path: str) -> Tensor | None:
    if path.endswith(".pre_identity"):
        return None
    return getattr(target.get_submodule(path), "bias", None)
