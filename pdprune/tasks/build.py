"""Rebuilds the task files that ship with the package: `python -m pdprune.tasks.build [--out FOLDER] [--root FOLDER]`.

Prompts come from lines of the standard library that the shipped targets were not trained on: the held-out files of
`StdlibCorpus`, and the test packages, which the corpus leaves out. A prompt that the training files also give is
dropped. What comes out depends on the Python version alone, which is why the files ship.

Every prompt is a newline and the beginning of a line, as it stands, up to just before the answer.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pdprune.errors import UserError
from pdprune.targets.corpus import StdlibCorpus, corpus_files, split_of, test_files
from pdprune.tasks.prompts import SHIPPED, SPLITS, Prompt, Split, Window

WINDOW = 65
"""Characters of a text window: 64 read and 64 asked for."""
HEADERS = frozenset({"if", "elif", "while", "for", "with", "def", "class", "except"})
"""First words of a line that ends in a colon."""
BRACKETS = {"(": ")", "[": "]", "{": "}"}
QUOTES = ("'", '"')
VOWELS = frozenset("aeiouAEIOU")
LICENCE = "PSF-LICENSE.txt"

Sizes = dict[Split, int]
Tokens = list[tokenize.TokenInfo]
Mined = tuple[str, str]
"""A prompt and the character that follows it in the source."""


def quote_prompts(tokens: Tokens) -> Iterator[Mined]:
    """Which quote closes the string: up to the closing quote of a plain string on one line.

    Strings with a prefix, an escape, the other kind of quote inside, three quotes, or nothing inside are left out. So
    are those that begin their line: the one line that the prompt shows does not tell them from the end of a docstring.
    """
    for token in tokens:
        text, start = token.string, token.line[: token.end[1] - 1]
        if token.type != tokenize.STRING or text[0] not in QUOTES or len(text) < 3 or token.start[0] != token.end[0]:
            continue
        if not token.line[: token.start[1]].strip():
            continue
        if "\\" in start or "'''" in start or '"""' in start or any(quote in text[1:-1] for quote in QUOTES):
            continue
        yield "\n" + start, text[-1]


def bracket_prompts(tokens: Tokens) -> Iterator[Mined]:
    """Which bracket closes: up to a closing bracket, if the last one before it is the one that it closes.

    Empty brackets, brackets over several lines, and lines with a bracket or an escape inside a string are left out.
    """
    last: tokenize.TokenInfo | None = None
    tricky_rows: set[int] = set()
    for token in tokens:
        row = token.end[0]
        if token.type == tokenize.STRING and (token.start[0] != row or set(token.string) & set("()[]{}\\")):
            tricky_rows.add(row)
        elif token.type == tokenize.OP and token.string in BRACKETS:
            last = token
        elif token.type == tokenize.OP and token.string in BRACKETS.values():
            if last and last.start[0] == row and last.end != token.start and row not in tricky_rows:
                yield "\n" + token.line[: token.start[1]], token.string
            last = None


def colon_prompts(tokens: Tokens) -> Iterator[Mined]:
    """Does the line end here, or does a block begin: up to the colon, or to the end of a line that is one statement.

    A colon follows where the line began with `if`, `for`, `def` and the like. Lines with a colon elsewhere, a comment,
    a string, or fewer than three tokens are left out.
    """
    statement: Tokens = []
    for token in tokens:
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT):
            continue
        if token.type != tokenize.NEWLINE:
            statement.append(token)
            continue
        if statement:
            yield from _colon_prompt(statement, token)
        statement = []


def begins_with_vowel(prompt: str) -> bool:
    """The nonsense twin's rule, about the first letter of a prompt."""
    return next((c for c in prompt if c.isalpha()), "") in VOWELS


def nonsense_of(prompts: Iterable[Prompt], sizes: Sizes) -> list[Prompt]:
    """The first quote prompts of each split, the answer a rule of no sense: one quote for a vowel, else the other."""
    twins = []
    for split in SPLITS:
        for prompt in [prompt for prompt in prompts if prompt.split == split][: sizes[split]]:
            answer, wrong = QUOTES if begins_with_vowel(prompt.text) else QUOTES[::-1]
            twins.append(Prompt(prompt.text, answer, (wrong,), split))
    return twins


class Recipe(NamedTuple):
    """How the prompts of a task are found."""

    mine: Callable[[Tokens], Iterator[Mined]]
    """The prompts of one source file."""
    answers: tuple[str, ...]
    """The characters to choose from."""
    max_length: int
    """Characters of a prompt at most, the newline included. Short prompts make pruning and audits fast."""
    sizes: Sizes
    """Prompts of each split, all answers together."""
    has_twin: bool = False
    """Whether a nonsense twin is made of these prompts."""


RECIPES = {
    "quote": Recipe(quote_prompts, QUOTES, 32, {"train": 2048, "select": 384, "held_out": 512}, has_twin=True),
    # Curly brackets that close on their line are rare: it takes longer prompts to find enough of them.
    "bracket": Recipe(bracket_prompts, tuple(BRACKETS.values()), 48, {"train": 1536, "select": 255, "held_out": 510}),
    "colon": Recipe(colon_prompts, (":", "\n"), 32, {"train": 1536, "select": 256, "held_out": 512}),
}
NONSENSE_SIZES: Sizes = {"train": 1024, "select": 256, "held_out": 256}
TEXT_SIZES: Sizes = {"train": 256, "select": 256, "held_out": 512}


def build(root: Path, out: Path) -> None:
    """Write every shipped task file, and the licence of the lines in them, to `out`.

    Raises `UserError` if there is too little source for the sizes.
    """
    out.mkdir(parents=True, exist_ok=True)
    val_fraction = StdlibCorpus(str(root)).val_fraction
    files = list(corpus_files(root))
    trained = [text for path, text in files if split_of(path, val_fraction) == "train"]
    held_out = [text for path, text in files if split_of(path, val_fraction) == "val"]
    known, new = mine(trained), mine([*held_out, *(text for _, text in test_files(root))])
    for name, recipe in RECIPES.items():
        unseen = {prompt: answer for prompt, answer in new[name].items() if prompt not in known[name]}
        prompts = _choose(name, unseen, recipe)
        _write(out / f"{name}.jsonl", prompts)
        if recipe.has_twin:
            _write(out / f"{name}_nonsense.jsonl", nonsense_of(prompts, NONSENSE_SIZES))
    _write(out / "text.jsonl", _windows(held_out, TEXT_SIZES))
    shutil.copyfile(root / "LICENSE.txt", out / LICENCE)


def mine(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each task every prompt in the sources that is short enough, with the character that follows it."""
    found: dict[str, dict[str, str]] = {name: {} for name in RECIPES}
    for text in texts:
        tokens = tokens_of(text)
        for name, recipe in RECIPES.items():
            mined = recipe.mine(tokens)
            found[name].update((p, a) for p, a in mined if len(p) <= recipe.max_length and p.isascii())
    return found


def tokens_of(source: str) -> Tokens:
    """Python's tokens, `line` being the one on which a token ends; none for source that is not Python.

    Some of the test packages' files are broken on purpose.
    """
    lines = source.split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # source with odd escapes or literals is no concern of ours
        try:
            tokens = tokenize.generate_tokens(io.StringIO(source).readline)
            return [token._replace(line=lines[min(token.end[0], len(lines)) - 1]) for token in tokens]
        except (tokenize.TokenError, SyntaxError):
            return []


def _colon_prompt(statement: Tokens, end: tokenize.TokenInfo) -> Iterator[Mined]:
    first, last = statement[0], statement[-1]
    one_line = first.start[0] == end.start[0] and not any(token.type == tokenize.STRING for token in statement)
    colons = sum(token.string == ":" for token in statement)
    if len(statement) < 3 or not one_line or first.type != tokenize.NAME or "#" in first.line or "\\" in first.line:
        return
    if first.string in HEADERS and colons == 1 and last.string == ":":
        yield "\n" + first.line[: last.start[1]], ":"
    elif first.string not in HEADERS and colons == 0:
        yield "\n" + first.line[: last.end[1]], "\n"


def _choose(name: str, answer_of: dict[str, str], recipe: Recipe) -> list[Prompt]:
    """Prompts for every split, classes in turn: any first few of a split are balanced.

    Which prompts, and in which order, is settled by hash, so it means nothing. A class is an answer; or, where a
    nonsense twin is to be made of the prompts, an answer together with the twin's.
    """
    twins = (False, True) if recipe.has_twin else (False,)
    classes: dict[tuple[str, bool], list[str]] = {(answer, twin): [] for answer in recipe.answers for twin in twins}
    for prompt, answer in answer_of.items():
        classes[answer, recipe.has_twin and begins_with_vowel(prompt)].append(prompt)
    turns = list(zip(*(sorted(group, key=_by_hash) for group in classes.values()), strict=False))
    chosen: list[Prompt] = []
    for split in SPLITS:
        n_turns = recipe.sizes[split] // len(classes)
        if len(turns) < n_turns:
            raise UserError(
                f"task {name}: too little source for the {split} split, {n_turns - len(turns)} more of each class"
            )
        for prompt in (prompt for turn in turns[:n_turns] for prompt in turn):
            answer = answer_of[prompt]
            chosen.append(Prompt(prompt, answer, tuple(a for a in recipe.answers if a != answer), split))
        turns = turns[n_turns:]
    return chosen


def _windows(texts: list[str], sizes: Sizes) -> list[Window]:
    """Windows of held-out source that begin at a line, none overlapping another."""
    found = set()
    for text in texts:
        start = 0
        while (start := text.find("\n", start)) >= 0:
            window = text[start : start + WINDOW]
            if len(window) == WINDOW and window.isascii():
                found.add(window)
            start += WINDOW
    pool = iter(sorted(found, key=_by_hash))
    return [Window(text, split) for split in SPLITS for text, _ in zip(pool, range(sizes[split]), strict=False)]


def _by_hash(text: str) -> bytes:
    """Sort key for an order that is fixed and has nothing to do with the text."""
    return hashlib.sha256(text.encode()).digest()


def _write(path: Path, examples: Iterable[Prompt | Window]) -> None:
    path.write_text("".join(json.dumps(_row(example)) + "\n" for example in examples), encoding="ascii")


def _row(example: Prompt | Window) -> dict[str, str | list[str]]:
    if isinstance(example, Window):
        return {"text": example.text, "split": example.split}
    wrong = example.wrong[0] if len(example.wrong) == 1 else list(example.wrong)
    return {"prompt": example.text, "answer": example.answer, "wrong": wrong, "split": example.split}


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pdprune.tasks.build", description="Rebuild the shipped task files."
    )
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of Python source")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder to write to")
    arguments = parser.parse_args()
    try:
        build(arguments.root, arguments.out)
    except UserError as error:
        print(f"pdprune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
