"""A task as a Hugging Face model reads it: padding, positions, answers, and prompts that it can't take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from targets.tiny_models import refuse_network, save_byte_level, save_model, save_whole_words, save_word_start

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch, output_of
from pdprune.decomposition import decompose, mean_reference
from pdprune.errors import UserError
from pdprune.losses import scored_positions
from pdprune.targets import load_target
from pdprune.targets.store import load_reader
from pdprune.tasks import TaskData

ROWS = [
    {"prompt": f"the {who} {'the ' * (i % 4)}{i}", "answer": " sat", "wrong": [" ran", "'"][: i % 2 + 1]}
    for i, who in enumerate(["cat", "dog", "mat"] * 8)
]
SAVE: dict[str, Callable[..., None]] = {
    "byte_level": save_byte_level,
    "word_start": save_word_start,
    "whole_words": save_whole_words,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model with a tokenizer, made once for each kind."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str = "gpt2", tokenizer: str = "byte_level", side: str = "right", **options: Any) -> Path:
        made = root / "-".join((family, tokenizer, side, *options))
        if not made.exists():
            save_model(made, family)
            SAVE[tokenizer](made, padding_side=side, **options)
        return made

    return make


Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_network(monkeypatch)


def task_data(tmp_path: Path, target: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> TaskData:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskData(str(path), str(target), **options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_prompt_is_asked_at_its_end_as_if_it_were_alone(
    tmp_path: Path, folder: Make, family: str, side: str
) -> None:
    path = folder(family, "byte_level", side)
    data, target = task_data(tmp_path, path), load_target(path)
    (batch,) = data.held_out_batches()
    ids, real = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"].bool()
    assert not real.all()
    assert bool(real[:, -1].all()) == (side == "left")
    model = decompose(target.module, "*", "svd")
    mask = torch.rand(model.n_nodes)
    asked = scored_positions(model(batch["inputs"], mask).logits, as_batch(batch)).rows(
        output_of(model(batch["inputs"], mask))
    )
    for i, prompt in enumerate(data.prompts("held_out")):
        alone = target.tokenizer.encode(prompt.text)
        assert ids[i][real[i]].tolist() == alone
        torch.testing.assert_close(asked[i], model(torch.tensor([alone]), mask).logits[0, -1], atol=2e-5, rtol=1e-4)
        choices = [target.tokenizer.decode([int(choice)]) for choice in batch["choices"][i] if choice >= 0]
        assert choices == [prompt.answer, *prompt.wrong]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_and_the_mean_reference_do_not_see_padding(tmp_path: Path, folder: Make, side: str) -> None:
    path = folder("gpt2", "byte_level", side)
    model = decompose(load_target(path).module, "*", "svd")
    mask = torch.rand(model.n_nodes)
    held_out = [{**row, "split": "held_out"} for row in ROWS[:6]]
    lengths, losses, means = [], [], []
    for longest in (1, 8):
        others = [{**ROWS[0], "prompt": "cat " * longest, "split": "train"}]
        others += [{**ROWS[0], "prompt": "dog " * longest, "split": "select"}]
        (batch,) = task_data(tmp_path, path, held_out + others).held_out_batches()
        lengths.append(batch["inputs"]["input_ids"].shape[1])
        losses.append(MaskedLoss(model, as_batch(batch), "kl").per_example(mask))
        means.append(mean_reference(model, [batch]))
    assert lengths[0] < lengths[1]
    torch.testing.assert_close(losses[0], losses[1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(means[0], means[1], atol=2e-5, rtol=1e-4)


def test_a_beginning_of_text_token_is_read_first(tmp_path: Path, folder: Make) -> None:
    rows = [{"prompt": "the " * n + "cat", "answer": " sat", "wrong": " ran"} for n in range(8)]
    (batch,) = task_data(tmp_path, folder("llama", "word_start"), rows).held_out_batches()
    assert (batch["inputs"]["input_ids"][:, 0] == 1).all()
    assert torch.equal(batch["positions"], batch["inputs"]["attention_mask"].sum(-1) - 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_running_text_is_asked_for_at_every_token(tmp_path: Path, folder: Make, side: str) -> None:
    rows = [{"text": "the cat sat on the mat"[: 22 - i]} for i in range(6)]
    path = folder("gpt2", "byte_level", side)
    data = task_data(tmp_path, path, rows)
    tokenizer = load_reader(path).tokenizer
    for batch, split in ((data.train_batches()[0], "train"), (data.held_out_batches()[0], "held_out")):
        real = batch["inputs"]["attention_mask"].bool()
        assert (batch["labels"][~real] == -100).all()
        for i, window in enumerate(data.prompts(split)):
            read, asked = batch["inputs"]["input_ids"][i][real[i]].tolist(), batch["labels"][i][real[i]].tolist()
            assert [*read, asked[-1]] == [read[0], *asked] == tokenizer.encode(window.text)


@pytest.mark.parametrize(
    ("tokenizer", "row", "named"),
    [
        ("byte_level", {"answer": "zebra"}, r"answer 'zebra' has 5 tokens \('z', 'e', 'b', 'r', 'a'\), expected one$"),
        ("byte_level", {"answer": "her"}, r"'her' has 2 tokens \('he', 'r'\).*; ' her', with a leading space, is one$"),
        ("byte_level", {"answer": " foo"}, r"' foo' has 2 tokens .*; 'foo', without its leading space, is one$"),
        ("byte_level", {"wrong": [" ran", " her cat"]}, r"' her cat' has 2 tokens \(' her', ' cat'\)"),
        ("byte_level", {"answer": ""}, "answer '' has 0 tokens, expected one$"),
        ("byte_level", {"prompt": ""}, "text of 0 tokens"),
        ("byte_level", {"prompt": "the cat " * 13}, "tokens, expected at most 24 for target"),
        ("word_start", {"answer": "é"}, "'é' holds something outside the vocabulary"),
        ("word_start", {"prompt": "the zoo"}, "'the zoo' holds something outside the vocabulary"),
    ],
)  # fmt: skip
def test_prompts_that_the_model_cannot_take_are_refused_by_line(
    tmp_path: Path, folder: Make, tokenizer: str, row: dict[str, Any], named: str
) -> None:
    rows = [{"prompt": "the " * n + "cat", "answer": " sat", "wrong": " ran"} for n in range(8)]
    rows.append({"prompt": "last", "answer": " sat", "wrong": " ran", **row})
    with pytest.raises(UserError, match=named) as refusal:
        task_data(tmp_path, folder("llama", tokenizer), rows)
    assert str(refusal.value).startswith(f"{tmp_path / 'mine.jsonl'}:9: ")
    assert "\n" not in str(refusal.value)


def test_answers_that_are_the_same_token_are_refused(tmp_path: Path, folder: Make) -> None:
    rows = [{"prompt": "the " * n + "cat", "answer": "sat", "wrong": ["ran", " sat"]} for n in range(3)]
    with pytest.raises(UserError, match="jsonl:1: answer 'sat' and wrong ' sat' are the same token"):
        task_data(tmp_path, folder("llama", "whole_words"), rows)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "bare", "llama")
    with pytest.raises(UserError, match="target bare reads no text, expected one with a tokenizer"):
        task_data(tmp_path, tmp_path / "bare")
