"""What is taken from source lines as a prompt, and what is left out."""

import json
from pathlib import Path

import pytest

from pdprune.errors import UserError
from pdprune.tasks import build as mining
from pdprune.tasks import read_task, shipped_tasks


def mined(task: str, source: str) -> list[tuple[str, str]]:
    return list(mining.RECIPES[task].mine(mining.tokens_of(source)))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = 'ab'", [("\nx = 'ab", "'")]),
        ("    f(\"a\", 'b')", [('\n    f("a', '"'), ('\n    f("a", \'b', "'")]),
        ("'ab'", []),
        ("x = ''", []),
        ("x = b'ab'", []),
        ("x = f'ab'", []),
        (r"x = 'a\n'", []),
        ('x = "don\'t"', []),
        ("x = '''ab'''", []),
        ("x = 1  # 'comment'", []),
    ],
)
def test_quote_prompts(line: str, expected: list[tuple[str, str]]) -> None:
    assert mined("quote", f"if True:\n{line}\n" if line[0] == " " else f"{line}\n") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f(a[1])", [("\nf(a[1", "]")]),
        ("x = {1: y}", [("\nx = {1: y", "}")]),
        ("f()", []),
        ("f('(', 1)", []),
        ("f(1,\n  2)", []),
    ],
)
def test_bracket_prompts(line: str, expected: list[tuple[str, str]]) -> None:
    assert mined("bracket", f"{line}\n") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("if a == b:\n    pass", [("\nif a == b", ":")]),
        ("def f(x):\n    return f(x)", [("\ndef f(x)", ":"), ("\n    return f(x)", "\n")]),
        ("x = y", [("\nx = y", "\n")]),
        ("if a: b = 1", []),
        ("x = y[1:2]", []),
        ("x = 'y'", []),
        ("x = y  # why", []),
        ("pass", []),
        ("return x", []),
        ("f(x,\n  y)", []),
    ],
)
def test_colon_prompts(line: str, expected: list[tuple[str, str]]) -> None:
    assert mined("colon", f"{line}\n") == expected


def test_source_that_is_not_python_gives_nothing() -> None:
    assert mining.mine(["x = (\n", "    x = 'a'\n  y\n"]) == {"quote": {}, "bracket": {}, "colon": {}}


def module(first: int, last: int) -> str:
    """Source with a prompt of every class for each number."""
    return "".join(
        f"{vowel}{i} = {quote}w{i}{quote}\nf{i}(a{i})\ng[b{i}]\nh = {{c{i}}}\nif d{i}{vowel}:\n    pass\n"
        for i in range(first, last)
        for vowel in "eb"
        for quote in "'\""
    )


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty equal modules for the corpus; tests that hold their lines and as many more; small tasks to build."""
    sizes: mining.Sizes = {"train": 4, "select": 4, "held_out": 4}
    small = {name: recipe._replace(sizes=sizes) for name, recipe in mining.RECIPES.items()}
    monkeypatch.setattr(mining, "RECIPES", small)
    monkeypatch.setattr(mining, "TEXT_SIZES", sizes)
    monkeypatch.setattr(mining, "NONSENSE_SIZES", {**sizes, "train": 2})
    for i in range(20):
        (tmp_path / f"module{i:02}.py").write_text(module(0, 10))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_all.py").write_text(module(0, 20))
    (tmp_path / "LICENSE.txt").write_text("the licence")
    return tmp_path


def test_build_writes_every_task_without_a_prompt_that_training_files_give(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mining.build(library, out)
    assert sorted(path.stem for path in out.glob("*.jsonl")) == shipped_tasks()
    assert (out / mining.LICENCE).read_text() == "the licence"
    trained = mining.mine([module(0, 10)])
    for name in mining.RECIPES:
        texts = [example.text for example in read_task(out / f"{name}.jsonl").examples]
        assert len(set(texts)) >= 9
        assert not set(texts) & set(trained[name])
    twins = read_task(out / "quote_nonsense.jsonl").examples
    assert [twin.split for twin in twins] == ["train"] * 2 + ["select"] * 4 + ["held_out"] * 4


def test_too_little_source_is_refused(library: Path, tmp_path: Path) -> None:
    (library / "test" / "test_all.py").write_text(module(0, 10))
    with pytest.raises(UserError, match="too little source"):
        mining.build(library, tmp_path / "out")


def test_classes_take_turns_and_splits_share_no_prompt() -> None:
    recipe = mining.RECIPES["quote"]._replace(sizes={"train": 8, "select": 4, "held_out": 4})
    answer_of = {f"\n{vowel}{i}": quote for i in range(9) for vowel in "eb" for quote in ["'\""[i % 2]]}
    chosen = mining._choose("quote", answer_of, recipe)
    assert [prompt.split for prompt in chosen] == ["train"] * 8 + ["select"] * 4 + ["held_out"] * 4
    assert len({prompt.text for prompt in chosen}) == 16
    for start in range(0, 16, 4):
        classes = {(p.answer, mining.begins_with_vowel(p.text)) for p in chosen[start : start + 4]}
        assert len(classes) == 4


def test_rows_are_written_as_they_are_read(tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    mining._write(again, read_task("bracket").examples)
    assert [json.loads(line) for line in again.read_text().splitlines()] == [
        json.loads(line) for line in (mining.SHIPPED / "bracket.jsonl").read_text().splitlines()
    ]
