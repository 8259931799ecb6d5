"""The text that the shipped targets learn: the source of Python's own standard library."""

import hashlib
import itertools
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from lightning import LightningDataModule
from torch import Tensor

from pdprune.errors import UserError
from pdprune.loaders import FixedLoader, StepLoader
from pdprune.ranks import ALONE, Ranks
from pdprune.seeding import generator
from pdprune.targets import byte_pairs
from pdprune.targets.tokenizer import NON_ASCII, VOCAB_SIZE, substitute_non_ascii

Split = Literal["train", "val"]

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "_bundled", "__pycache__"})
"""Vendored packages, and what was installed beside the standard library."""
LEFT_OUT_FILES = frozenset({"pydoc_data/topics.py", "html/entities.py"})
"""Generated: a text in one literal, and a table."""
TABLE_FOLDER = "encodings/"
TABLE_MARK = "decoding_table"
"""Four fifths of `encodings/` are generated character tables, which say nothing about source code."""
MACHINE_PREFIX = "_sysconfigdata"
"""Written when Python was built, full of that machine's paths."""

NEWLINE = ord("\n")
QUOTES_SWAPPED = torch.arange(VOCAB_SIZE)
QUOTES_SWAPPED[[ord("'"), ord('"')]] = torch.tensor([ord('"'), ord("'")])
"""The token that each token becomes where quotes are traded."""

BRACKET_PAIRS = ("()", "[]", "{}")


def _brackets_permuted() -> Int[Tensor, "6 vocab"]:
    """What each token becomes in each of the six ways to trade the kinds of brackets; the first changes nothing."""
    ways = []
    for order in itertools.permutations(BRACKET_PAIRS):
        way = torch.arange(VOCAB_SIZE)
        for old, new in zip("".join(BRACKET_PAIRS), "".join(order), strict=True):
            way[ord(old)] = ord(new)
        ways.append(way)
    return torch.stack(ways)


BRACKETS_PERMUTED = _brackets_permuted()


class StdlibCorpus(LightningDataModule):
    """Random windows of source, each beginning with the newline before a line.

    Files are split by the SHA-256 of their path, so the split depends neither on the order of files nor on a seed.
    Training batch `t` is a pure function of `(seed, t)`, of which a rank takes its share; the validation batches never
    change.

    Args:
        root: folder of the source; the running Python's standard library if not given.
        window: tokens per example; the targets read this many and predict the next one at each.
        batch_size: windows per training step, over all ranks together.
        val_batches: number of validation batches of `batch_size` windows.
        val_fraction: share of the files held out.
        steps_per_epoch: batches that make an "epoch", after which Lightning validates.
        swap_quotes: probability that a training window has single and double quotes traded. Code still means the same,
            and neither quote is the likelier, so that only the opening quote tells which one closes a string.
        permute_brackets: probability that the three kinds of brackets of a training window are permuted, all alike.
            What comes out is no Python, but brackets match, and curly ones are no longer rare.
        vocabulary: size of a vocabulary of byte pairs, learned from the training files (needs the extra `hf`); None
            for one token a character.
        seed: seed of the training windows.
    """

    def __init__(
        self,
        root: str | None = None,
        window: int = 128,
        batch_size: int = 16,
        val_batches: int = 32,
        val_fraction: float = 0.18,
        steps_per_epoch: int = 500,
        swap_quotes: float = 0.0,
        permute_brackets: float = 0.0,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise UserError(f"corpus: val_fraction is {val_fraction}, expected a number between 0 and 1")
        for name, probability in (("swap_quotes", swap_quotes), ("permute_brackets", permute_brackets)):
            if not 0 <= probability <= 1:
                raise UserError(f"corpus: {name} is {probability}, expected a probability")
            if probability and vocabulary is not None:
                raise UserError(f"corpus: {name} trades characters; expected 0 with a vocabulary of byte pairs")
        for name, value in (("window", window), ("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch)):
            if value < 1:
                raise UserError(f"corpus: {name} is {value}, expected at least 1")
        self.root = Path(root or sysconfig.get_path("stdlib"))
        self.window = window
        self.batch_size = batch_size
        self.val_batches = val_batches
        self.val_fraction = val_fraction
        self.steps_per_epoch = steps_per_epoch
        self.swap_quotes = swap_quotes
        self.permute_brackets = permute_brackets
        self.vocabulary = vocabulary
        self.seed = seed
        self.tokenizer_json: str | None = None
        self._splits: dict[str, tuple[Int[Tensor, " tokens"], Int[Tensor, " starts"]]] = {}
        self._n_bytes: dict[str, int] = {}
        self._sha256 = ""

    def setup(self, stage: str | None = None) -> None:
        """Read the files, once. Raises `UserError` for a folder without source or too small for one window."""
        if self._splits:
            return
        texts: dict[Split, list[str]] = {"train": [], "val": []}
        digest = hashlib.sha256()
        for path, text in corpus_files(self.root):
            digest.update(f"{path}\0{text}\0".encode())
            texts[split_of(path, self.val_fraction)].append(substitute_non_ascii(text))
        self._sha256 = digest.hexdigest()
        if self.vocabulary is not None:
            self.tokenizer_json = byte_pairs.learn(texts["train"], self.vocabulary)
        for split, parts in texts.items():
            pieces = [f"\n{part}" for part in parts]
            self._n_bytes[split] = sum(map(len, pieces))
            data, begins_line = self._tokens(pieces)
            starts = begins_line[: max(0, len(data) - self.window)].nonzero().squeeze(1)
            if len(starts) == 0:
                raise UserError(
                    f"corpus: {self.root} has {len(parts)} files of Python source for the {split} split, "
                    f"expected at least one longer than the window of {self.window}"
                )
            self._splits[split] = (data, starts)

    def _tokens(self, pieces: list[str]) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
        """The tokens of pieces of text, one after the other, and which of them begin with a newline."""
        if self.tokenizer_json is not None:
            return byte_pairs.encode(self.tokenizer_json, pieces)
        data = torch.tensor(bytearray("".join(pieces), "ascii"), dtype=torch.uint8)
        return data, data == NEWLINE

    def batch(self, split: Split, step: int, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Batch `step` of a split, or one rank's share of it: `{"inputs": {"input_ids": [B, T]}, "labels": [B, T]}`."""
        self.setup()
        data, starts = self._splits[split]
        draws = generator(0 if split == "val" else self.seed, "corpus", split, step)
        chosen = starts[torch.randint(len(starts), (self.batch_size,), generator=draws)]
        ids = data[chosen[:, None] + torch.arange(self.window + 1)].long()
        if split == "train" and self.vocabulary is None:
            ids = self._traded(ids, draws)
        ids = ranks.share(ids)
        return {"inputs": {"input_ids": ids[:, :-1]}, "labels": ids[:, 1:]}

    def _traded(self, ids: Int[Tensor, "B T"], draws: torch.Generator) -> Int[Tensor, "B T"]:
        """Windows of characters, in some of which quotes are swapped, or brackets permuted."""
        swapped = torch.rand(self.batch_size, generator=draws) < self.swap_quotes
        ids = torch.where(swapped[:, None], QUOTES_SWAPPED[ids], ids)
        permuted = torch.rand(self.batch_size, generator=draws) < self.permute_brackets
        way = torch.randint(len(BRACKETS_PERMUTED), (self.batch_size,), generator=draws) * permuted
        return BRACKETS_PERMUTED[way[:, None], ids]

    def train_dataloader(self) -> StepLoader:
        """Windows of the training files."""
        ranks = Ranks.of(self.trainer)
        return StepLoader(lambda step: self.batch("train", step, ranks), self.steps_per_epoch)

    def val_dataloader(self) -> FixedLoader:
        """Windows of the held-out files: the same ones every time, on every rank."""
        return FixedLoader([self.batch("val", step) for step in range(self.val_batches)])

    def describe(self) -> dict[str, Any]:
        """What a model card says about the corpus."""
        self.setup()
        return {
            "source": "Python standard library",
            "python": platform.python_version(),
            "corpus_sha256": self._sha256,
            "train_bytes": self._n_bytes["train"],
            "val_bytes": self._n_bytes["val"],
            **({} if self.vocabulary is None else {"train_tokens": len(self._splits["train"][0])}),
            "non_ascii": f"characters outside ASCII replaced by {NON_ASCII!r}",
        }


def corpus_files(root: Path) -> Iterator[tuple[str, str]]:
    """`(path relative to root, text)` of every source file of the corpus, sorted by path.

    Raises `UserError` if the folder does not exist. Files that are not UTF-8 are left out.
    """
    for path, text in _source_files(root):
        is_table = path.startswith(TABLE_FOLDER) and TABLE_MARK in text
        if not (TEST_FOLDERS & set(path.split("/")) or path in LEFT_OUT_FILES or is_table):
            yield path, text


def test_files(root: Path) -> Iterator[tuple[str, str]]:
    """The same for the test packages, none of which is in the corpus."""
    return ((path, text) for path, text in _source_files(root) if TEST_FOLDERS & set(path.split("/")))


def _source_files(root: Path) -> Iterator[tuple[str, str]]:
    if not root.is_dir():
        raise UserError(f"corpus: no folder {root}, expected one with Python source")
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if FOREIGN_FOLDERS & set(path.split("/")) or path.startswith(MACHINE_PREFIX):
            continue
        try:
            yield path, (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def split_of(path: str, val_fraction: float) -> Split:
    """Which split a file belongs to, by the SHA-256 of its path relative to the corpus."""
    position = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return "val" if position < val_fraction else "train"
