"""A vocabulary of byte pairs: learned alike every time, lossless, and shipped beside the weights that read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdprune.errors import UserError
from pdprune.targets import StdlibCorpus, byte_pairs, load_target
from pdprune.targets.store import save_target
from pdprune.targets.transformer import Transformer, TransformerConfig
from pdprune.tasks import TaskData

TEXTS = [f"def function{i}(argument):\n    return argument + {i}\n" for i in range(20)]
SIZE = 300
LEARNED = byte_pairs.learn(TEXTS, SIZE)


def corpus(folder: Path, **options: object) -> StdlibCorpus:
    for i, text in enumerate(TEXTS):
        (folder / f"module{i:02}.py").write_text(text)
    return StdlibCorpus(str(folder), window=4, batch_size=8, steps_per_epoch=2, val_batches=1, **options)


def test_is_learned_alike_every_time() -> None:
    assert byte_pairs.learn(TEXTS, SIZE) == LEARNED


@given(st.text(st.characters(codec="ascii"), max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = byte_pairs.tokenizer_from(LEARNED, "here", SIZE)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_read_as_a_tokenizer_reads_them_and_lines_are_found() -> None:
    tokenizer = byte_pairs.tokenizer_from(LEARNED, "here", SIZE)
    pieces = [f"\n{text}" for text in TEXTS[:3]]
    ids, begins = byte_pairs.encode(LEARNED, pieces)
    assert ids.tolist() == [token for piece in pieces for token in tokenizer.encode(piece)]
    assert [tokenizer.decode([token])[0] == "\n" for token in ids.tolist()] == begins.tolist()
    assert len(ids) < sum(map(len, pieces)) / 2


@pytest.mark.parametrize(("size", "wanted"), [(256, "at least 257"), (5000, "expected fewer")])
def test_a_size_that_cannot_be_is_refused(size: int, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        byte_pairs.learn(TEXTS, size)


@pytest.mark.parametrize(("stored", "wanted"), [("{}", "no vocabulary"), (LEARNED, "expected the 299")])
def test_a_vocabulary_that_is_not_the_targets_is_refused(stored: str, wanted: str) -> None:
    with pytest.raises(UserError, match=f"tokenizer.json: .*{wanted}"):
        byte_pairs.tokenizer_from(stored, "tokenizer.json", SIZE - 1)


def test_windows_of_tokens_begin_at_a_line(tmp_path: Path) -> None:
    data = corpus(tmp_path, vocabulary=SIZE)
    ids = data.batch("train", 0)["inputs"]["input_ids"]
    assert data.tokenizer_json is not None
    tokenizer = byte_pairs.tokenizer_from(data.tokenizer_json, "here", SIZE)
    assert all(tokenizer.decode(row)[0] == "\n" for row in ids.tolist())
    source = "".join(f"\n{text}" for text in TEXTS)
    assert all(tokenizer.decode(row)[:8] in source for row in ids.tolist())


def test_characters_are_not_traded_in_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="swap_quotes trades characters"):
        corpus(tmp_path, vocabulary=SIZE, swap_quotes=0.5)


def test_a_trained_target_brings_its_vocabulary(tmp_path: Path) -> None:
    data = corpus(tmp_path, vocabulary=SIZE)
    data.setup()
    network = Transformer(TransformerConfig(SIZE, max_length=64, n_layers=1, n_heads=1, d_model=8, d_mlp=8))
    save_target(network, tmp_path / "target", data.tokenizer_json)
    target = load_target(tmp_path / "target")
    assert target.tokenizer is not None
    assert target.tokenizer.decode(target.tokenizer.encode("return x")) == "return x"
    batch = TaskData("colon", str(tmp_path / "target"), batch_size=4).train_batch(0)
    assert int(batch["inputs"]["input_ids"].max()) < SIZE
    with torch.no_grad():
        assert target.module(**batch["inputs"]).shape[-1] == SIZE
