"""The tokenizer of the shipped targets: one ASCII character, one token."""

from collections.abc import Iterable
from typing import Literal

from pdprune.errors import UserError

VOCAB_SIZE = 128
PAD_ID = 0
"""NUL, which no text has."""
NON_ASCII = "\x1a"
"""SUBSTITUTE: what a character outside ASCII becomes in the corpus. In prompts such characters are refused."""


class AsciiTokenizer:
    """Token id = ASCII code. Small enough to read every id as a character."""

    vocab_size = VOCAB_SIZE
    pad_id = PAD_ID
    padding_side: Literal["left", "right"] = "right"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises `UserError` for a character outside ASCII."""
        try:
            return list(text.encode("ascii"))
        except UnicodeEncodeError as error:
            character = text[error.start]
            raise UserError(
                f"character {character!r} at offset {error.start} of {text!r} is outside the vocabulary, expected ASCII"
            ) from None

    def encode_after(self, prompt: str, text: str) -> list[int]:
        """Token ids of `text` where it goes on from a prompt: the same as anywhere. Raises as `encode`."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        return "".join(map(chr, ids))


def substitute_non_ascii(text: str) -> str:
    """`text` with every character outside ASCII replaced by `NON_ASCII`, one for one."""
    return text if text.isascii() else "".join(c if c.isascii() else NON_ASCII for c in text)
