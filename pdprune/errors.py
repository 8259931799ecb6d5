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


def require_at_least(least: float, where: str = "", **values: float | None) -> None:
    """Refuse numbers that are too small; None is none.

    Args:
        least: the smallest that will do.
        where: what the numbers are settings of, `"audit: "`.
        values: by name.

    Raises:
        UserError: for the first that is smaller, or NaN.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"{where}{name}: got {value}; expected {least:g} or more")


def require_above(bound: float, where: str = "", **values: float) -> None:
    """Refuse numbers that are not above a bound; as `require_at_least`."""
    for name, value in values.items():
        if not value > bound:
            raise UserError(f"{where}{name}: got {value}; expected more than {bound:g}")


def require_share(where: str = "", **values: float) -> None:
    """Refuse numbers that are not from 0 to 1; as `require_at_least`."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{where}{name}: got {value}; expected a share, from 0 to 1")


def require_gradients(what: str) -> None:
    """Refuse to begin where no gradient can be had.

    Raises:
        UserError: inside `torch.inference_mode`, which cannot be lifted for tensors made in it.
    """
    if torch.is_inference_mode_enabled():
        raise UserError(f"{what}: torch.inference_mode is on, but gradients are needed; expected at most torch.no_grad")
