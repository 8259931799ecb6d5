"""What it takes to feed a target, without the target's weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def pad_id(self) -> int: ...
    @property
    def padding_side(self) -> Literal["left", "right"]: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_after(self, prompt: str, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class Reader(NamedTuple):
    """What it takes to feed a target."""

    tokenizer: Tokenizer | None
    """Text to token ids and back; None for a network that reads no text."""
    name: str
    """Its folder's name."""
    max_length: int | None
    """Longest input, in tokens; None where there is no limit."""
