"""The tokenizer that came with a Hugging Face model, asked the few things that a task asks.

What it puts before a text (a beginning-of-text token, where it is set up to) is kept, what it puts after it is not:
the next token is asked for at the end of a prompt. An answer is the token that goes on from there, which is not always
the one that the answer has by itself: many tokenizers take a space into the token that follows, and some put one before
any text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pdprune.errors import UserError

WORD_START = "▁"
"""How vocabularies in the manner of SentencePiece write the space before a word; decoded alone, it gets lost."""
PROBE = "a"
"""A text that shows what is put before any text."""


class HuggingFaceTokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: rows of the model's embedding: no id may reach it.
        pad_id: for padding, which is masked: the tokenizer's own, or any other if it has none.
        padding_side: where padding goes.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, padding_side: Literal["left", "right"]) -> None:
        """From a `transformers` tokenizer."""
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        own = tokenizer.pad_token_id
        self.pad_id: int = own if own is not None and own < vocab_size else 0
        self.padding_side: Literal["left", "right"] = padding_side
        alone, whole = self._plain(PROBE, checked=False), tokenizer.encode(PROBE)
        starts = (start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
        self._before: list[int] = whole[: next(starts, 0)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it.

        Raises:
            UserError: the text holds something that the tokenizer or the model has no token for.
        """
        return self._before + self._plain(text)

    def encode_after(self, prompt: str, text: str) -> list[int]:
        """Token ids of a text where it goes on from a prompt.

        Where the tokenizer would join the end of the prompt and the beginning of the text into one token, the ids are
        those of the text at the beginning of a line: the prompt is read to its end, and joined to nothing.

        Raises:
            UserError: as in `encode`.
        """
        for before in (prompt, "\n"):
            read, whole = self._plain(before, checked=False), self._plain(before + text, checked=False)
            if whole[: len(read)] == read:
                return self._checked(text, whole[len(read) :])
        return self._plain(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, with the space that the first of them may begin with."""
        ids = list(ids)
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        starts_word = bool(ids) and str(self._tokenizer.convert_ids_to_tokens(ids[0])).startswith(WORD_START)
        return f" {text}" if starts_word and not text.startswith(" ") else text

    def _plain(self, text: str, checked: bool = True) -> list[int]:
        """The ids of a text alone."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return self._checked(text, ids) if checked else ids

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        unknown = self._tokenizer.unk_token
        if unknown is not None and unknown not in text and self._tokenizer.unk_token_id in ids:
            raise UserError(
                f"{text!r} holds something outside the vocabulary: the tokenizer reads {unknown!r} in its place"
            )
        if ids and max(ids) >= self.vocab_size:
            raise UserError(
                f"{text!r} has token {max(ids)}, where the target's vocabulary ends at {self.vocab_size - 1}: expected "
                "the tokenizer that belongs to the weights"
            )
        return ids
