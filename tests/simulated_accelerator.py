"""A device that PyTorch and Lightning take for an accelerator, and that computes on the CPU.

It refuses what a GPU refuses: operands on two devices, NumPy's view of its memory. So what runs on it, to the same
numbers as on the CPU, puts every tensor where it belongs. It also counts how often the host waits for the device, which
no CPU shows. It says nothing of kernels: not of their speed, and not of how they round.

A process that has it cannot be rid of it: install it in one of its own, before anything goes backward there.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "simulated"
ON_IT = ["--trainer.accelerator", NAME, "--trainer.strategy", NAME]
"""Arguments of the command line."""

waits: Counter[str] = Counter()
"""How often the host had to wait for what the device computes, by what it asked for."""

_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_COPYING = ("copy_", "_to_copy", "set_")
_JOINING = ("cat", "stack")
_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
    "allclose",
    "repeat_interleave",
)
"""Operations whose answer, or the size of whose answer, the host has to see."""
_ASKED_FOR_BY_NAME = ("copy_", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "randperm")
"""Operations for which PyTorch does not ask the fallback: data on its way to the device, sizes that are found late."""
_REGISTRATIONS: list[Any] = []
"""Registrations, which end with the objects that hold them."""


class OnDevice(Tensor):
    """A tensor on the device; what it holds lies on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            *(OnDevice, held.shape),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operation, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # a checkpoint is read back on the CPU first


def _computed(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operation gives on the device."""
    name = operation._schema.name.removeprefix("aten::")
    of_held: dict[int, OnDevice] = {}
    # An index may lie on the CPU where what it picks from is on the device, and not the other way round.
    may_lie_elsewhere = args[1] if name in _INDEXING and isinstance(args[0], OnDevice) else ()

    def held(value: Any) -> Any:
        match value:
            case OnDevice():
                of_held[id(value.held)] = value
                return value.held
            case Tensor():
                # A number may lie on the CPU, but not among tensors that are joined.
                is_operand = value.ndim > 0 or name in _JOINING
                if is_operand and name not in _COPYING and not any(value is index for index in may_lie_elsewhere):
                    raise RuntimeError(f"{name}: operands are on two devices, {NAME}:0 and {value.device}")
                return value
            case torch.Generator():
                raise RuntimeError(f"{name}: the generator is on {value.device}, not on {NAME}:0")
            case torch.device():
                return torch.device("cpu")
            case _:
                return value

    to_host = _goes_to_host(name, args, kwargs)
    if to_host or name in _WAITS or _reads_flags(name, args):
        waits["copy to the host" if to_host else name] += 1
    if name == "_efficientzerotensor":  # has no memory, which nothing below this knows
        operation = torch.ops.aten.zeros.default
    args, kwargs = pytree.tree_map(held, (args, kwargs))
    found = operation(*args, **kwargs | ({"pin_memory": None} if "pin_memory" in kwargs else {}))
    if to_host:
        return found
    for tensor in of_held.values():
        if tensor.shape != tensor.held.shape or tensor.stride() != tensor.held.stride():
            _reshape(tensor)  # it was given another in place
    # What was changed in place is the tensor that it was.
    return pytree.tree_map_only(Tensor, lambda one: of_held[id(one)] if id(one) in of_held else OnDevice.of(one), found)


def _reshape(tensor: OnDevice) -> None:
    """Give a tensor the shape of what it holds."""
    above, held = torch._C.DispatchKeySet(torch._C.DispatchKey.Python), tensor.held
    with torch._C._ExcludeDispatchKeyGuard(above):
        torch.ops.aten.as_strided_(tensor, held.shape, held.stride(), held.storage_offset())


def _goes_to_host(name: str, args: Any, kwargs: Any) -> bool:
    if name == "copy_":
        return not isinstance(args[0], OnDevice)
    return name == "_to_copy" and kwargs.get("device") == torch.device("cpu")


def _reads_flags(name: str, args: Any) -> bool:
    """Whether an index is by flags, of which there are as many as the device says."""
    return name in _INDEXING and any(getattr(index, "dtype", None) == torch.bool for index in args[1])


class SimulatedAccelerator(Accelerator):
    """Lightning's side of it."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class OneSimulatedDevice(SingleDeviceStrategy):
    """That of a run on it."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(device=torch.device(NAME, 0), **rest)


def can_be_simulated() -> bool:
    """Whether this PyTorch takes devices that are written in Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def install() -> None:
    """Let PyTorch and Lightning know the device, in this process and for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    everything, one = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_computed, "PrivateUse1")  # type: ignore[no-untyped-call]
    for name in _ASKED_FOR_BY_NAME:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        one.impl(name, functools.partial(_computed, operation), "PrivateUse1")
    _REGISTRATIONS.extend([everything, one])
    AcceleratorRegistry.register(NAME, SimulatedAccelerator)  # type: ignore[no-untyped-call]
    StrategyRegistry.register(NAME, OneSimulatedDevice)


class _Backend:
    """What PyTorch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]
