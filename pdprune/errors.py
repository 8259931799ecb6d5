"""What goes wrong through no fault of ours, told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: what, where, what was expected, what to do.

    Raised at the edge, where arguments and files come in. The command line prints it as one line and exits with
    status 2.
    """


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite, so that nothing computed after it would mean anything."""
