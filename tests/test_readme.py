"""What the README promises beyond what `documentation/` tries: its example, its options, its links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pdprune.tasks.prompts import read_task
from pdprune.train import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_that_it_shows_finds_a_faithful_circuit() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["audit"].faithful is True  # type: ignore[attr-defined]


def test_the_prompt_that_it_shows_is_a_line_of_a_task(tmp_path: Path) -> None:
    shown = re.search(r'`(\{"prompt".*?\})`', README)
    assert shown is not None
    lines = [json.dumps(json.loads(shown[1]) | {"prompt": f"text {number}"}) + "\n" for number in range(10)]
    (tmp_path / "my.jsonl").write_text("".join(lines))
    assert len(read_task(tmp_path / "my.jsonl").examples) == 10


def test_every_option_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--print_config"])
    assert not exit.value.code
    keys = set(re.findall(r"^\s*(\w+):", capsys.readouterr().out, flags=re.MULTILINE))
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `") and "`fit" not in line]
    named = {key for row in rows for key in re.findall(r"`\.?([\w.]+)`", row)}
    assert named and {key.split(".")[-1] for key in named} <= keys


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()
