"""What the README says to type works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from pdprune.train import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINES = [line.strip().split("   #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
OWN_PROMPTS = next(line for line in LINES if "--data.task my.jsonl" in line)


def test_the_python_that_it_shows_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["audit"].faithful is True  # type: ignore[attr-defined]


def test_own_prompts_go_through_the_command_that_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pdprune.circuits.pruning.CircuitPruner.finish", lambda *_, **__: None)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    prompt = re.search(r'`(\{"prompt".*?\})`', README)
    assert prompt is not None
    line = json.loads(prompt[1])
    (tmp_path / "my.jsonl").write_text(
        "".join(json.dumps(line | {"prompt": f"text {number}"}) + "\n" for number in range(60))
    )
    arguments = shlex.split(OWN_PROMPTS)
    assert arguments[:3] == ["python", "-m", "pdprune.train"]
    shortened = ["--data.n_select", "10", "--data.n_held_out", "10", "--trainer.max_steps", "1"]
    assert main([*arguments[3:], *shortened]) == 0
    assert (tmp_path / "runs/mine/checkpoints/finished").is_file()


def test_every_command_is_one_that_there_is() -> None:
    commands = [re.match(r"python -m pdprune\.train (\w+)", line) for line in LINES]
    assert {match[1] for match in commands if match} == set(COMMANDS)


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
