"""What the documentation tells people to type: the commands and the Python of its pages, in their order.

A block is indented by four spaces, or fenced and marked `sh`, `python`, `json` or `yaml`. In a fenced `sh` block every
line is a command; in an indented one, which may be output or a file too, those are that begin with a program that pages
use.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = ("python", "make", "pip", "torchrun", "srun")


@dataclass(frozen=True)
class Block:
    """A piece of a page that is not prose."""

    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    """One line to type, continued lines joined."""

    environment: dict[str, str]
    """Variables set in front of it."""
    words: list[str]

    @property
    def program(self) -> str:
        """`make`, or with its module or script: `python -m pdprune.train`, `python docs/picture.py`."""
        n_words = {"python": 3 if self.words[1:2] == ["-m"] else 2}.get(self.words[0], 1)
        return " ".join(self.words[:n_words])

    @property
    def arguments(self) -> list[str]:
        return self.words[len(self.program.split()) :]

    @property
    def is_synopsis(self) -> bool:
        """Whether it shows how a command is called rather than a call: with dots or capitals to fill in."""
        return bool({"...", "RUN", "FILE", "FOLDER"} & set(self.words)) or "[--key" in self.words


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page."""
    blocks: list[Block] = []
    fence: str | None = None
    lines: list[str] = []
    for line in [*page.read_text().splitlines(), "end"]:
        opening = re.match(r"```(\w*)", line)
        indented = fence is None and line.startswith("    ")
        if fence is not None and line.startswith("```"):
            blocks.append(Block(fence, "\n".join(lines)))
            fence, lines = None, []
        elif fence is not None or indented:
            lines.append(line.removeprefix("    ") if indented else line)
        else:
            if lines:
                blocks.append(Block("indented", "\n".join(lines)))
                lines = []
            fence = opening[1] if opening else None
    return blocks


def commands_in(block: Block) -> list[Command]:
    """The commands of a block of them.

    Raises:
        AssertionError: a line of a fenced `sh` block begins with a program that no page used before.
    """
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        line = re.split(r"\s+#", line)[0].removesuffix("&").strip()
        assignments = re.match(r"(\w+=\S+\s+)*", line)
        assert assignments is not None
        environment = dict(word.split("=", 1) for word in assignments[0].split())
        rest = line[assignments.end() :]
        if rest.split(" ")[0] in PROGRAMS:
            commands.append(Command(environment, shlex.split(rest)))
        else:
            assert block.kind != "sh" or not line, f"not known how to try {line!r}"
    return commands
