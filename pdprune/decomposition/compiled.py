"""The target's own pass through `torch.compile`: one folded network after another, all of the same shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pdprune.errors import UserError

MOST_KINDS = 64
"""Kinds of arguments (shapes, with or without gradients, precisions) that are compiled; others run as they are."""


def call(target: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The target's output with these parameters in place of its own; tied ones are replaced one by one."""
    return torch.func.functional_call(target, dict(parameters), args, dict(kwargs), tie_weights=False)


class CompiledCall:
    """`call`, compiled for every kind of arguments when it is first met.

    Copied or sent elsewhere, it is compiled anew.

    Args:
        device: where to find out whether anything can be compiled at all.
        options: of `torch.compile`.

    Raises:
        UserError: nothing can be compiled here: for want of a compiler, say.
    """

    def __init__(self, device: torch.device, options: dict[str, Any]) -> None:
        self.options = options
        _silence_compiler()
        self._compiled = self._compile(call)
        _told_in_one_line("nothing can", self._compile(_plus_one), torch.zeros(2, device=device))

    def __call__(
        self, target: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What `call` gives.

        Raises:
            UserError: the target cannot be compiled.
        """
        return _told_in_one_line(f"{type(target).__name__} cannot", self._compiled, target, parameters, args, kwargs)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # PyTorch counts what it has compiled by the function's code: with a copy of it a model has a count of its own.
        assert isinstance(function, FunctionType)
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        return torch.compile(own, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._compiled = self._compile(call)


def _told_in_one_line(what: str, compiled: Callable[..., Any], *args: Any) -> Any:
    """Call what is compiled, and say why that fails."""
    from torch._dynamo import config  # loads what only compiling needs
    from torch._dynamo.exc import TorchDynamoException

    try:
        with config.patch(cache_size_limit=MOST_KINDS):  # the name that PyTorch 2.6 knows too
            return compiled(*args)
    except TorchDynamoException as error:
        why = " ".join(str(error).strip().split("\n\n")[0].split())[:200]  # then follows how to see more of it
        raise UserError(f"compile: {what} be compiled here ({why}); run without") from error


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether something listens to the modules, or answers for them: what is compiled may not notice a new hook."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _plus_one(x: Tensor) -> Tensor:
    return x + 1


def _silence_compiler() -> None:
    """The compiler looks for gradients on folded weights, and loads old modules of its own."""
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", r"`torch\.jit\..*is deprecated", DeprecationWarning)
