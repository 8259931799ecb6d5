"""Mixed precision: the network runs in half precision; gates, sources and whatever is summed up stay in float32.

The forward passes of a training step run in Lightning's autocast. Masks are folded outside of it (`folding.py`), losses
are taken of float32 outputs (`losses.py`), and float16 needs its losses scaled for the adversary too: `LossScale`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.errors import UserError

Compute = Literal["float32", "bfloat16", "float16"]
"""What matrix products are computed in."""


def computing_in(compute: Compute, device: torch.device) -> torch.autocast:
    """A context in which matrix products are computed in this type, whatever the context around it says.

    Casts are not cached: a source that has moved since would go on being read as it was.
    """
    dtype = None if compute == "float32" else getattr(torch, compute)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def computed_in(device: torch.device) -> str:
    """What matrix products are computed in here and now, as text."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "as they are"


def require_compute(where: str, compute: str) -> None:
    """Raise a `UserError` for an unknown type."""
    if compute not in get_args(Compute):
        raise UserError(f"{where}: got {compute!r}; expected one of {', '.join(get_args(Compute))}")


def require_float32_parameters(trainer: Any) -> None:
    """Refuse precisions in which parameters themselves are halved.

    Raises:
        UserError: steps of a gate or a source would be lost in rounding.
    """
    if trainer.precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise UserError(
            f"trainer.precision: got {trainer.precision!r}; expected 32-true, bf16-mixed or 16-mixed, in which gates "
            "and sources stay in float32"
        )


class LossScale:
    """Keeps the gradients of sources from vanishing in float16, as Lightning's scaler does those of parameters.

    Lightning multiplies the loss that gates descend on before its backward pass, and divides the gradients of the
    optimiser's parameters before they are used. The adversary asks for gradients that neither reaches. Here they are
    scaled by the same scaler. Where one overflows it counts as zero, so that the source stays where it is, and the
    scale backs off after the step, as it does when the optimiser has to skip one.

    Args:
        scaler: Lightning's; None in float32 and bfloat16, where nothing is scaled.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.scaler = scaler
        self._overflowed_at: float | None = None

    @classmethod
    def of(cls, trainer: Any) -> LossScale:
        """That of a trainer's precision plugin."""
        return cls(getattr(trainer.precision_plugin, "scaler", None))

    def scaled(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What to take the gradient of."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscaled(self, gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The gradient of the loss itself; zero if that of the scaled loss overflowed anywhere."""
        if self.scaler is None:
            return gradient
        scale = self.scaler.get_scale()
        if bool(torch.isfinite(gradient).all()):
            return gradient / scale
        self._overflowed_at = scale
        return torch.zeros_like(gradient)

    def after_step(self) -> None:
        """Back off after an overflow, once the optimiser has stepped, unless the scaler did so by itself."""
        if self.scaler is None or self._overflowed_at is None:
            return
        if self.scaler.get_scale() >= self._overflowed_at:
            self.scaler.update(self._overflowed_at * self.scaler.get_backoff_factor())
        self._overflowed_at = None


UNSCALED = LossScale()
"""That of float32."""
