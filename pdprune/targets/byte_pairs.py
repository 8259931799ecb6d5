"""A vocabulary of byte pairs, for targets that are large enough to read more than a character at a time.

It is learned and applied by the `tokenizers` library, and lies beside a target's weights as `tokenizer.json`, which
`transformers` and most other programs read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pdprune.errors import UserError
from pdprune.targets.huggingface_tokenizer import HuggingFaceTokenizer

PAD = "<pad>"
"""Its id is 0; no text has it."""
NEWLINE = "Ċ"
"""How byte-level vocabularies write a newline."""
SMALLEST = 257
"""All bytes, and padding."""


def learn(texts: Sequence[str], size: int) -> str:
    """A vocabulary of `size` tokens, as the JSON of `tokenizers`: all bytes, and the pairs most frequent in the texts.

    Pairs are formed within words, and within a newline and the indentation after it.

    Raises:
        UserError: a size below 257, more than the texts have pairs for, or `tokenizers` not installed.
    """
    if size < SMALLEST:
        raise UserError(f"corpus: vocabulary is {size}; expected at least {SMALLEST}, all bytes and padding")
    tokenizers = _library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < size:
        raise UserError(
            f"corpus: vocabulary is {size}, but the text has pairs for {tokenizer.get_vocab_size()} tokens only; "
            "expected fewer"
        )
    learned: str = tokenizer.to_str()
    return learned


def encode(tokenizer_json: str, pieces: Sequence[str]) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """The tokens of pieces of text, one after the other, and which of them begin with a newline."""
    tokenizer = _library().Tokenizer.from_str(tokenizer_json)
    ids = torch.tensor(list(chain.from_iterable(tokenizer.encode(piece).ids for piece in pieces)), dtype=torch.int32)
    begins = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
    begins[[token for piece, token in tokenizer.get_vocab().items() if piece.startswith(NEWLINE)]] = True
    return ids, begins[ids.long()]


def tokenizer_from(tokenizer_json: str, where: str, vocab_size: int) -> HuggingFaceTokenizer:
    """What feeds a target that was trained on such a vocabulary.

    Args:
        tokenizer_json: the vocabulary.
        where: its file, for errors.
        vocab_size: rows of the target's embedding.

    Raises:
        UserError: not a vocabulary, one of another size than the target's, or `transformers` not installed.
    """
    try:
        size = len(json.loads(tokenizer_json)["model"]["vocab"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"target {where}: no vocabulary of byte pairs ({error!r})") from None
    if size != vocab_size:
        raise UserError(f"target {where}: {size} tokens; expected the {vocab_size} that the target's embedding has")
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(
            f"target {where}: byte pairs need transformers ({error}); install it with pip install 'pdprune[hf]'"
        ) from None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_library().Tokenizer.from_str(tokenizer_json),
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    return HuggingFaceTokenizer(tokenizer, vocab_size, "right")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"corpus: a vocabulary of byte pairs needs tokenizers ({error}); install it with pip install 'pdprune[hf]'"
        ) from None
    return tokenizers
