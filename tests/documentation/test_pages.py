"""What the pages of the documentation say to type works, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documentation.pages import PAGES, ROOT, Block, blocks_of, commands_in
from documentation.session import make_results, session

FENCED = ("sh", "python", "json", "yaml")
TRIED = [page for page in PAGES if any(block.kind in FENCED or commands_in(block) for block in blocks_of(page))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_results(folder)
    return folder


@pytest.mark.parametrize("page", TRIED, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, results: Path, tmp_path: Path) -> None:
    with session(tmp_path, results) as here:
        for block in blocks_of(page):
            here.run(block)


def test_no_kind_of_block_is_left_out() -> None:
    kinds = {block.kind for page in PAGES for block in blocks_of(page)}
    assert kinds == {"sh", "python", "json", "yaml", "text", "", "indented"}


@pytest.mark.parametrize(
    "command",
    [
        "python -m pdprune.train fit --config configs/quickstart.yaml --model.no_such_key 1",
        "python -m pdprune.train fit --config configs/nowhere.yaml",
        "python -m pdprune.train fit --config configs/quickstart.yaml --trainer.accelerator gpu --nonsense",
        "python benchmarks/recovery.py no_such_toy",
        "make nothing",
        "pip install '.[nothing]'",
        "curl https://example.org",
    ],
)
def test_a_command_that_does_not_work_is_noticed(command: str, results: Path, tmp_path: Path) -> None:
    with session(tmp_path, results) as here, pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        here.run(Block("sh", command))


def test_continued_lines_variables_and_remarks() -> None:
    block = Block("sh", "A=1 python -m x.y fit \\\n  --key 'a b'   # why\n\npip install . &")
    first, second = commands_in(block)
    assert (first.program, first.arguments, first.environment) == ("python -m x.y", ["fit", "--key", "a b"], {"A": "1"})
    assert (second.program, second.arguments) == ("pip", ["install", "."])


def test_blocks_are_read_in_order(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n    indented\n      more\n\n```sh\nfenced\n```\n- list\n\n```python\nx = 1\n\ny = 2\n```\n"
    )
    assert blocks_of(page) == [
        Block("indented", "indented\n  more"),
        Block("sh", "fenced"),
        Block("python", "x = 1\n\ny = 2"),
    ]


def test_readme_names_every_command_of_the_training_command_line() -> None:
    from pdprune.train import COMMANDS

    named = re.findall(r"^    python -m pdprune\.train (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(named) == set(COMMANDS)
