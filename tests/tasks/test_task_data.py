"""Tasks as batches: what a target reads, what is asked where, training batches that depend on their number alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdprune.batches import as_batch
from pdprune.errors import UserError
from pdprune.loaders import StepLoader
from pdprune.targets import AsciiTokenizer, Transformer, TransformerConfig, save_target
from pdprune.tasks import TaskData

ROWS = [{"prompt": "x" * (i % 5 + 1) + str(i), "answer": ")", "wrong": ["]", "}"][: i % 2 + 1]} for i in range(40)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target") / "tiny"
    torch.manual_seed(0)
    save_target(Transformer(TransformerConfig(max_length=8, n_layers=1, n_heads=1, d_model=4, d_mlp=4)), folder)
    return str(folder)


def task_data(folder: Path, target: str, rows: list[dict[str, Any]] = ROWS, **options: Any) -> TaskData:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskData(str(path), target, **options)


def ids_of(batch: dict[str, Any]) -> list[list[int]]:
    return batch["inputs"]["input_ids"].tolist()


def test_a_batch_holds_prompt_answer_and_wrong_ones(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target)
    (batch,) = data.held_out_batches()
    prompts = data.prompts("held_out")
    decode = AsciiTokenizer().decode
    assert as_batch(batch).size == len(prompts) == 8
    for i, prompt in enumerate(prompts):
        length = len(prompt.text)
        ids, mask = batch["inputs"]["input_ids"][i], batch["inputs"]["attention_mask"][i]
        assert decode(ids[:length].tolist()) == prompt.text
        assert mask.tolist() == [1] * length + [0] * (data.length - length)
        assert batch["positions"][i] == length - 1
        assert chr(batch["labels"][i]) == prompt.answer
        choices = [chr(choice) for choice in batch["choices"][i] if choice >= 0]
        assert choices == [prompt.answer, *prompt.wrong]


def test_every_batch_has_the_length_of_the_longest_prompt(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target, batch_size=2, audit_batch_size=2)
    batches = [data.train_batch(0), *data.train_batches(), *data.select_batches(), *data.held_out_batches()]
    assert {batch["inputs"]["input_ids"].shape[1] for batch in batches} == {max(len(row["prompt"]) for row in ROWS)}


def test_batches_of_a_split_cover_it_in_order(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target, audit_batch_size=3)
    assert [len(ids_of(batch)) for batch in data.held_out_batches()] == [3, 3, 2]
    texts = [AsciiTokenizer().decode(row).rstrip("\0") for batch in data.held_out_batches() for row in ids_of(batch)]
    assert texts == [prompt.text for prompt in data.prompts("held_out")]


def test_no_prompt_is_in_two_splits(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target)
    texts = [prompt.text for split in ("train", "select", "held_out") for prompt in data.prompts(split)]
    assert sorted(texts) == sorted(row["prompt"] for row in ROWS)


def test_a_pass_takes_every_training_prompt_once_and_the_next_in_another_order(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target, batch_size=6)
    assert data.steps_per_epoch == 4
    passes = [[row for step in range(4 * e, 4 * e + 4) for row in ids_of(data.train_batch(step))] for e in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(ids_of(data.train_batches()[0]))
    assert passes[0] != passes[1]


def test_a_training_batch_depends_on_seed_and_step_alone(tmp_path: Path, target: str) -> None:
    rows = [{**row, "split": ["train", "train", "select", "held_out"][i % 4]} for i, row in enumerate(ROWS)]
    first, same, other = (task_data(tmp_path, target, rows, batch_size=4, seed=seed) for seed in (0, 0, 1))
    first.train_batch(1)
    torch.manual_seed(7)
    assert ids_of(first.train_batch(5)) == ids_of(same.train_batch(5)) != ids_of(other.train_batch(5))


def test_ranks_share_the_batch_of_one_process(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target, batch_size=6)
    whole = ids_of(data.train_batch(3))
    shares = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append(ids_of(data.train_batch(3)))
    assert sorted(shares[0] + shares[1]) == sorted(whole)
    data.trainer = SimpleNamespace(global_rank=0, world_size=7)
    with pytest.raises(UserError, match="6 examples over 7 processes"):
        data.train_batch(0)


def test_a_batch_larger_than_the_split_is_the_whole_split(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target, batch_size=1000)
    assert sorted(ids_of(data.train_batch(0))) == sorted(ids_of(data.train_batches()[0]))


def test_sizes_take_the_first_of_a_split(tmp_path: Path, target: str) -> None:
    all_of_them = task_data(tmp_path, target)
    few = task_data(tmp_path, target, n_train=5, n_select=3, n_held_out=2)
    assert few.prompts("train") == all_of_them.prompts("train")[:5]
    assert few.describe() == {**all_of_them.describe(), "n_train": 5, "n_select": 3, "n_held_out": 2}


def test_running_text_is_asked_for_at_every_position(tmp_path: Path, target: str) -> None:
    data = task_data(tmp_path, target, [{"text": "abcdefghi"[: 9 - i]} for i in range(5)])
    for batch in (data.train_batch(0), *data.held_out_batches()):
        ids, labels, mask = batch["inputs"]["input_ids"], batch["labels"], batch["inputs"]["attention_mask"].bool()
        assert ids.shape == labels.shape
        assert torch.equal(labels >= 0, mask)
        assert torch.equal(labels[mask], ids[mask] + 1)
        assert (labels[~mask] == -100).all()


@pytest.mark.parametrize("task", ["quote", "bracket", "colon", "quote_nonsense", "text"])
def test_shipped_tasks_can_be_read_by_shipped_targets(task: str) -> None:
    data = TaskData(task, "dense-py")
    assert data.name == task
    assert as_batch(data.train_batch(0)).size == 64
    assert data.length <= {"bracket": 48, "text": 64}.get(task, 32)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"answer": "))"}, r"answer '\)\)' has 2 tokens"),
        ({"answer": ""}, "answer '' has 0 tokens"),
        ({"wrong": ["]", "no"]}, "answer 'no' has 2 tokens"),
        ({"answer": "é"}, "outside the vocabulary"),
        ({"prompt": "naïve"}, "outside the vocabulary"),
        ({"prompt": ""}, "text of 0 tokens"),
        ({"prompt": "123456789"}, "9 tokens, expected at most 8"),
    ],
)
def test_prompts_that_the_target_cannot_take_are_refused_by_line(
    tmp_path: Path, target: str, row: dict[str, Any], named: str
) -> None:
    rows = [*ROWS, {"prompt": "last", "answer": ")", "wrong": "]", **row}]
    with pytest.raises(UserError, match=named) as refusal:
        task_data(tmp_path, target, rows)
    assert str(refusal.value).startswith(f"{tmp_path / 'mine.jsonl'}:41: ")
    assert "\n" not in str(refusal.value)


def test_prompts_beyond_the_asked_for_length_are_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(UserError, match="expected at most 4"):
        task_data(tmp_path, target, max_length=4)


@pytest.mark.parametrize("option", ["batch_size", "audit_batch_size", "n_train", "n_held_out", "max_length"])
def test_sizes_below_one_are_refused(tmp_path: Path, target: str, option: str) -> None:
    with pytest.raises(UserError, match=f"{option} is 0"):
        task_data(tmp_path, target, **{option: 0})


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target 'nobody'"):
        task_data(tmp_path, "nobody")


def test_a_loader_goes_on_after_an_interruption() -> None:
    loader = StepLoader(lambda step: step, steps_per_pass=4)
    assert [list(loader), list(loader)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    iterator = iter(loader)
    assert [next(iterator), next(iterator)] == [8, 9]
    resumed = StepLoader(lambda step: step, steps_per_pass=4)
    resumed.load_state_dict(loader.state_dict())
    assert [list(resumed), list(resumed)] == [[10, 11], [12, 13, 14, 15]]
    assert len(resumed) == 4
