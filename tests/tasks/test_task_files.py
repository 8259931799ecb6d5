"""Task files: what is read, how it is split, and every mistake told by file and line."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pdprune.errors import UserError
from pdprune.tasks import Prompt, Window, read_task, shipped_tasks
from pdprune.tasks.prompts import SHIPPED, SPLITS

GOOD = {"prompt": "x = 'a", "answer": "'", "wrong": '"'}


def task_file(folder: Path, *rows: object, raw: str = "") -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + raw)
    return path


def many(n: int) -> list[dict]:
    return [{**GOOD, "prompt": f"x = '{i}"} for i in range(n)]


def test_the_shipped_tasks_are_there_with_the_licence_and_small_enough() -> None:
    assert shipped_tasks() == ["bracket", "colon", "quote", "quote_nonsense", "text"]
    assert "PYTHON SOFTWARE FOUNDATION" in (SHIPPED / "PSF-LICENSE.txt").read_text()
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 1_000_000


@pytest.mark.parametrize("name", ["bracket", "colon", "quote", "quote_nonsense"])
def test_classes_are_balanced_in_every_split_and_at_its_beginning(name: str) -> None:
    for split in SPLITS:
        examples = [example for example in read_task(name).examples if example.split == split]
        assert len(examples) >= 250
        answers = [example.answer for example in examples]
        assert len(set(Counter(answers).values())) == 1
        assert max(Counter(answers[:120]).values()) - min(Counter(answers[:120]).values()) <= 1


@pytest.mark.parametrize("name", ["bracket", "colon", "quote", "quote_nonsense"])
def test_shipped_prompts_are_one_line_each_with_the_other_answers_as_wrong_ones(name: str) -> None:
    examples = read_task(name).examples
    answers = {example.answer for example in examples}
    for example in examples:
        assert isinstance(example, Prompt)
        assert example.text.startswith("\n") and example.text.count("\n") == 1
        assert set(example.wrong) == answers - {example.answer}


def test_quote_prompts_end_inside_a_string_that_the_answer_closes() -> None:
    for example in read_task("quote").examples:
        line = example.text[1:] + example.answer
        assert line.count(example.answer) % 2 == 0
        opened = line[:-1].rindex(example.answer)
        assert example.wrong[0] not in line[opened:]


def test_the_nonsense_twin_asks_quote_prompts_for_unrelated_answers() -> None:
    real = {example.text: example for example in read_task("quote").examples}
    twins = read_task("quote_nonsense").examples
    for twin in twins:
        assert twin.split == real[twin.text].split
        letter = next(c for c in twin.text if c.isalpha()) if any(map(str.isalpha, twin.text)) else ""
        assert twin.answer == ("'" if letter and letter in "aeiouAEIOU" else '"')
    agreeing = sum(twin.answer == real[twin.text].answer for twin in twins)
    assert agreeing == len(twins) / 2


def test_text_is_windows_of_one_length() -> None:
    examples = read_task("text").examples
    assert {type(example) for example in examples} == {Window}
    assert len({len(example.text) for example in examples}) == 1


def test_a_file_without_splits_is_split_by_prompt_and_seed_alone(tmp_path: Path) -> None:
    rows = many(50)
    first = {example.text: example.split for example in read_task(task_file(tmp_path, *rows)).examples}
    assert Counter(first.values()) == {"train": 30, "select": 10, "held_out": 10}
    again = {example.text: example.split for example in read_task(task_file(tmp_path, *rows[::-1])).examples}
    assert again == first
    other = {example.text: example.split for example in read_task(task_file(tmp_path, *rows), seed=1).examples}
    assert other != first


def test_given_splits_are_kept_and_blank_lines_skipped(tmp_path: Path) -> None:
    rows = [{**row, "split": split} for row, split in zip(many(3), SPLITS, strict=True)]
    file = read_task(task_file(tmp_path, *rows, raw="\n  \n"))
    assert [example.split for example in file.examples] == list(SPLITS)
    assert file.where(2) == f"{file.path}:3"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ([1, 2], "expected an object"),
        ({"question": "?"}, "expected an object"),
        ({"prompt": "x", "wrong": "b"}, "no 'answer'"),
        ({"prompt": "x", "answer": "a"}, "no 'wrong'"),
        ({**GOOD, "prompt": 3}, "'prompt' is 3"),
        ({**GOOD, "answer": None}, "'answer' is None"),
        ({**GOOD, "wrong": []}, "'wrong' is"),
        ({**GOOD, "wrong": 3}, "'wrong' is 3"),
        ({**GOOD, "wrong": ["a", 3]}, "'wrong' is"),
        ({**GOOD, "wrong": ["'", '"']}, "among the wrong ones"),
        ({**GOOD, "split": "test"}, "split 'test'"),
        ({**GOOD, "split": ["train"]}, "split"),
        ({**GOOD, "spilt": "train"}, "unknown field 'spilt'"),
        ({"text": "running text"}, "no 'prompt'"),
        ({**GOOD, "prompt": "x = '0"}, "same prompt as on line 1"),
        ({**GOOD, "split": "train"}, "no 'split'"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, row: object, named: str) -> None:
    path = task_file(tmp_path, *many(3), row)
    with pytest.raises(UserError, match=named) as refusal:
        read_task(path)
    line = 1 if named == "no 'split'" else 4
    assert str(refusal.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("raw", ['{"prompt": "cut off', "not json", "\udcff"])
def test_a_line_that_is_no_json_is_refused_by_its_number(tmp_path: Path, raw: str) -> None:
    path = task_file(tmp_path, *many(3))
    path.write_bytes(path.read_bytes() + raw.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(UserError, match="not JSON") as refusal:
        read_task(path)
    assert str(refusal.value).startswith(f"{path}:4: ")


@pytest.mark.parametrize("raw", ["", "\n\n"])
def test_an_empty_task_is_refused(tmp_path: Path, raw: str) -> None:
    with pytest.raises(UserError, match="no prompts"):
        read_task(task_file(tmp_path, raw=raw))


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_prompts_for_three_splits_are_refused(tmp_path: Path, n: int) -> None:
    with pytest.raises(UserError, match="split"):
        read_task(task_file(tmp_path, *many(n)))


def test_a_split_left_empty_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "split": "train"} for row in many(5)]
    with pytest.raises(UserError, match="select"):
        read_task(task_file(tmp_path, *rows))


def test_an_unknown_task_is_answered_with_those_there_are(tmp_path: Path) -> None:
    for missing in ("qoute", tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="bracket, colon, quote"):
            read_task(missing)
