"""Text to token ids: what is put around a text, how an answer goes on from a prompt, and what can't be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from targets.tiny_models import VOCAB, save_byte_level, save_whole_words, save_word_start
from transformers import AutoTokenizer

from pdprune.errors import UserError
from pdprune.targets.huggingface_tokenizer import HuggingFaceTokenizer

Save = Callable[..., None]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[..., HuggingFaceTokenizer]:
    def make(save: Save, vocab_size: int = VOCAB, **options: Any) -> HuggingFaceTokenizer:
        save(tmp_path, **options)
        read = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        return HuggingFaceTokenizer(read, vocab_size, read.padding_side)

    return make


Make = Callable[..., HuggingFaceTokenizer]


def test_what_comes_before_a_text_stays_and_what_comes_after_goes(tokenizer: Make) -> None:
    made = tokenizer(save_word_start)
    beginning, *words = made.encode("the cat sat")
    assert (beginning, [made.decode([word]) for word in words]) == (1, [" the", " cat", " sat"])
    assert made.encode("") == [1]


def test_nothing_is_put_before_a_text_where_the_tokenizer_does_not(tokenizer: Make) -> None:
    made = tokenizer(save_byte_level)
    assert [made.decode([token]) for token in made.encode("the cat sat")] == ["the", " cat", " sat"]
    assert made.encode("") == []
    assert made.decode(made.encode("l'été\n")) == "l'été\n"


@pytest.mark.parametrize("save", [save_byte_level, save_word_start])
@pytest.mark.parametrize(
    ("prompt", "text", "read"),
    [
        ("the cat", " sat", [" sat"]),  # the token of the word with its space
        ("the cat", "sat", ["sat"]),  # the one without it
        ("the cat ", "sat", ["sat"]),  # though "cat sat" would have been " sat"
        ("foo(", ")", [")"]),  # though "()" may be one token
        ("x = 'ab", "'", ["'"]),
        ("the princess lost", " her", [" her"]),
        ("", " the", [" the"]),
    ],
)
def test_an_answer_is_the_token_that_goes_on(
    tokenizer: Make, save: Save, prompt: str, text: str, read: list[str]
) -> None:
    made = tokenizer(save)
    assert [made.decode([token]) for token in made.encode_after(prompt, text)] == read


def test_whole_words_need_no_space(tokenizer: Make) -> None:
    made = tokenizer(save_whole_words)
    assert made.encode_after("the cat", "sat") == made.encode_after("the cat", " sat") == made.encode("sat")


def test_a_tokenizers_own_padding_is_used_if_it_has_one(tokenizer: Make) -> None:
    assert tokenizer(save_whole_words).pad_id == 1
    assert tokenizer(save_byte_level).pad_id == 0
    assert tokenizer(save_byte_level, padding_side="left").padding_side == "left"


@pytest.mark.parametrize("save", [save_word_start, save_whole_words])
def test_what_is_outside_the_vocabulary_is_refused(tokenizer: Make, save: Save) -> None:
    made = tokenizer(save)
    with pytest.raises(UserError, match=r"'the zoo' holds something outside the vocabulary.*'<unk>'"):
        made.encode("the zoo") if save is save_whole_words else made.encode_after("cat", "the zoo")
    made.encode("the <unk> cat")  # asked for outright


def test_tokens_beyond_the_models_vocabulary_are_refused(tokenizer: Make) -> None:
    made = tokenizer(save_byte_level, vocab_size=200)
    with pytest.raises(UserError, match="the target's vocabulary ends at 199"):
        made.encode("the cat")
