"""The target's own pass through `torch.compile`: one folded network after another, all of the same shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pdprune.errors import UserError

Call = Callable[[nn.Module, Mapping[str, Tensor], tuple[Any, ...], Mapping[str, Any]], Any]
"""Runs a target with some tensors in place of its own parameters."""


def call(target: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The target's output with these parameters in place of its own; tied ones are replaced one by one."""
    return torch.func.functional_call(target, dict(parameters), args, dict(kwargs), tie_weights=False)


def compiled_call(**options: Any) -> Call:
    """`call`, compiled anew for every kind of arguments.

    Args:
        options: of `torch.compile`.

    Raises (from the first call of a kind):
        UserError: the target cannot be compiled here.
    """
    with _known_warnings_silenced():
        compiled = torch.compile(call, **options)

    def run(
        target: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # loads what only compiling needs

        try:
            with _known_warnings_silenced():
                return compiled(target, parameters, args, kwargs)
        except TorchDynamoException as error:
            why = " ".join(str(error).strip().split("\n\n")[0].split())[:200]  # then follows how to see more of it
            raise UserError(f"compile: {type(target).__name__} cannot be compiled here ({why}); run without") from error

    return run


@contextmanager
def _known_warnings_silenced() -> Iterator[None]:
    """The compiler looks for gradients on folded weights, and loads old modules of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        yield


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether something listens to the modules, or answers for them: what is compiled may not notice a new hook."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
