"""What tensors and nested values consist of, to tell whether two are the same: in every process, on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor


def bytes_of(tensor: Tensor) -> UInt8[Tensor, " n"]:
    """The bytes of a tensor in memory order, of whatever type it is."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def leaves_of(value: Any) -> Iterator[Any]:
    """What is in dicts, lists and tuples; of a dict its names as well."""
    match value:
        case Mapping():
            for name in sorted(value, key=str):
                yield name
                yield from leaves_of(value[name])
        case tuple() | list():
            for one in value:
                yield from leaves_of(one)
        case _:
            yield value


def digest_of(*values: Any) -> str:
    """A fingerprint of tensors, of dicts, lists and tuples of them, and of what else a `repr` says all of."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in leaves_of(values):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(bytes_of(leaf).numpy().data)
        else:
            digest.update(repr(leaf).encode())
        digest.update(b";")
    return digest.hexdigest()
