"""What goes wrong through no fault of ours, told in one line."""

from __future__ import annotations

import torch


class UserError(ValueError):
    """A mistake that the user can mend: what, where, what was expected, what to do.

    Raised at the edge, where arguments and files come in. The command line prints it as one line and exits with
    status 2.
    """


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite, so that nothing computed after it would mean anything."""


def require_gradients(what: str) -> None:
    """Refuse to begin where no gradient can be had.

    Raises:
        UserError: inside `torch.inference_mode`, which cannot be lifted for tensors made in it.
    """
    if torch.is_inference_mode_enabled():
        raise UserError(f"{what}: torch.inference_mode is on, but gradients are needed; expected at most torch.no_grad")
