"""The rounding of half precision where its hardware is missing: products in float32 of what has fewer bits.

Matrix products of half precision read operands of few bits and sum in float32. So does a product in float32 of operands
that have been rounded, but for the range of exponents, which a loss scale is there for. bfloat16 keeps 8 bits of each
number, float16 11, float32 24.

    python benchmarks/precision.py --bits 11

rounds what the layers of a network read and return in training steps, forwards and backwards, by a callback that any
fit can be given where this folder is on PYTHONPATH. What pdprune keeps in float32 is left alone: masks are not folded
by the operators that are rounded here, nor is anything outside of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from lightning import Callback
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

FLOAT32_BITS = 24
PRODUCTS = {F.linear, F.scaled_dot_product_attention}
"""What the layers of the shipped networks multiply with."""


def rounded(x: Tensor, bits: int) -> Tensor:
    """The nearest numbers of so many bits (Veltkamp's splitting: Dekker 1971, A floating-point technique)."""
    large = x * (2.0 ** (FLOAT32_BITS - bits) + 1)
    return large - (large - x)


class _Rounded(Function):
    """Rounds a tensor on its way forwards and its gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return rounded(x, bits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # one for each input
        return rounded(gradient, ctx.bits), None


class RoundedProducts(TorchFunctionMode):
    """A context in which layers' products have operands and results of so many bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        operands = [_Rounded.apply(x, self._bits) if isinstance(x, Tensor) else x for x in args]
        return _Rounded.apply(func(*operands, **(kwargs or {})), self._bits)


class RoundsProducts(Callback):
    """Rounds products in the steps of a training, and nowhere else.

    Args:
        bits: of the numbers that products read and return.
    """

    def __init__(self, bits: int) -> None:
        self._products = RoundedProducts(bits)

    def on_train_batch_start(self, *_: Any) -> None:
        self._products.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self._products.__exit__(None, None, None)
