"""Norm scales of the unablated run: with them a masked network's norms are linear, as many methods assume.

A norm divides by the size of what it reads, so that ablating a node that nobody reads still changes what everybody else
reads. Held at the scale that it has on the unablated run on the same input, token by token, it is an affine map: linear
but for a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdprune.decomposition.folding import OutputRule, output_rules
from pdprune.decomposition.sites import at_least_float32
from pdprune.errors import UserError

NormScaling = Literal["live", "frozen"]
"""Whether norms divide by the size of what they read on a masked run, or on the unablated one."""


def norms_of(target: nn.Module) -> dict[str, nn.Module]:
    """The norms of a target by module path: LayerNorm, RMSNorm, and the RMSNorm of Hugging Face's Llama and its kin.

    Raises:
        UserError: none at all, or one of another kind, which would stay live unnoticed.
    """
    norms = {}
    for path, module in target.named_modules():
        if _is_known(module):
            norms[path] = module
        elif type(module).__name__.endswith("Norm"):
            raise UserError(
                f"norm_scales 'frozen': {path!r} is a {type(module).__name__}; expected nn.LayerNorm, nn.RMSNorm or a "
                "Hugging Face RMSNorm with variance_epsilon: use norm_scales 'live'"
            )
    if not norms:
        raise UserError("norm_scales 'frozen': the target has no norm; use norm_scales 'live'")
    return norms


def scale_of(norm: nn.Module, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead #D"]:
    """What a norm multiplies each token of `x` by, one over its size, detached and at least in float32."""
    dims, eps = _dims(norm), _eps(norm, x)
    mean_square = at_least_float32(_centred(norm, x.detach())).square().mean(dims, keepdim=True)
    return (mean_square + eps).rsqrt()


def norms_frozen(target: nn.Module, scales: Mapping[str, Float[Tensor, "*lead #D"]]) -> AbstractContextManager[None]:
    """A context in which the target's norms multiply by the given scales, whatever the size of what they read."""

    def frozen(norm: nn.Module, scale: Tensor) -> OutputRule:
        def rule(x: Tensor, output: Tensor) -> Tensor:
            y = at_least_float32(_centred(norm, x)) * scale
            weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
            y = y if weight is None else y * weight
            return (y if bias is None else y + bias).to(output.dtype)

        return rule

    norms = norms_of(target)
    return output_rules([(path, norms[path], frozen(norms[path], scale)) for path, scale in scales.items()])


def _is_known(module: nn.Module) -> bool:
    if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return True
    # Known by name and attribute, as `Conv1D` is: importing `transformers` for it would be a heavy dependency. Gemma's,
    # which adds one to its weight, calls it `eps`.
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _dims(norm: nn.Module) -> tuple[int, ...]:
    return tuple(range(-len(getattr(norm, "normalized_shape", (1,))), 0))


def _eps(norm: nn.Module, x: Tensor) -> float:
    eps = getattr(norm, "variance_epsilon", None) if not hasattr(norm, "eps") else norm.eps
    return torch.finfo(x.dtype).eps if eps is None else float(eps)  # type: ignore[arg-type]


def _centred(norm: nn.Module, x: Tensor) -> Tensor:
    return x - x.mean(_dims(norm), keepdim=True) if isinstance(norm, nn.LayerNorm) else x
