"""The corpus: which files, which split, and windows that depend on seed and step alone."""

import itertools
from pathlib import Path

import pytest
import torch

from pdprune.errors import UserError
from pdprune.ranks import Ranks
from pdprune.targets import StdlibCorpus
from pdprune.targets.corpus import corpus_files, split_of
from pdprune.targets.corpus import test_files as source_of_tests

WINDOW = 16


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of twenty small modules, with tests, a vendored package and a generated table beside them."""
    for i in range(20):
        (tmp_path / f"module{i:02}.py").write_text(
            f"def function{i}(argument):\n    return argument + {i}\n", encoding="utf-8"
        )
    for left_out in ("test/test_a.py", "package/tests/test_b.py", "site-packages/c.py", "pydoc_data/topics.py"):
        (tmp_path / left_out).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left_out).write_text("left_out = 1\n")
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "table.py").write_text("decoding_table = 1\n")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    return tmp_path


def test_reads_source_sorted_without_tests_vendored_and_generated_files(library: Path) -> None:
    assert [path for path, _ in corpus_files(library)] == [f"module{i:02}.py" for i in range(20)]
    assert [path for path, _ in source_of_tests(library)] == ["package/tests/test_b.py", "test/test_a.py"]


def test_splits_by_path_alone() -> None:
    paths = [f"module{i}.py" for i in range(2000)]
    held_out = [path for path in paths if split_of(path, 0.2) == "val"]
    assert 0.17 < len(held_out) / len(paths) < 0.23
    assert set(held_out) < {path for path in paths if split_of(path, 0.3) == "val"}


def test_windows_begin_at_a_line_and_ask_for_the_next_byte(library: Path) -> None:
    batch = StdlibCorpus(str(library), window=WINDOW, batch_size=4).batch("train", 0)
    ids, labels = batch["inputs"]["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (4, WINDOW)
    assert (ids[:, 0] == ord("\n")).all()
    assert torch.equal(ids[:, 1:], labels[:, :-1])


def test_a_batch_depends_on_seed_and_step_alone(library: Path) -> None:
    def ids(seed: int, step: int) -> list[list[int]]:
        corpus = StdlibCorpus(str(library), window=WINDOW, batch_size=8, seed=seed)
        return corpus.batch("train", step)["inputs"]["input_ids"].tolist()

    assert ids(0, 3) == ids(0, 3)
    assert ids(0, 3) != ids(0, 4)
    assert ids(0, 3) != ids(1, 3)


def test_ranks_share_a_batch_out(library: Path) -> None:
    corpus = StdlibCorpus(str(library), window=WINDOW, batch_size=6)
    whole = corpus.batch("train", 0)["labels"]
    shares = [corpus.batch("train", 0, Ranks(rank, 2))["labels"] for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)


def test_validation_does_not_depend_on_the_seed(library: Path) -> None:
    first, second = (
        StdlibCorpus(str(library), window=WINDOW, val_batches=2, seed=seed).val_dataloader() for seed in (0, 1)
    )
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["labels"], b["labels"])


def test_characters_outside_ascii_become_one_token_each(library: Path) -> None:
    for path in library.glob("module*.py"):
        path.write_text("é€" * 20 + "\n" + "x" * 40, encoding="utf-8")
    ids = StdlibCorpus(str(library), window=WINDOW, batch_size=64).batch("train", 0)["inputs"]["input_ids"]
    assert ids.max() < 128
    assert (ids == 0x1A).any()


def test_swapped_windows_are_the_same_but_for_their_quotes(library: Path) -> None:
    for path in library.glob("module*.py"):
        path.write_text("x = 'a', \"b\"\n" * 10)

    def text(swap_quotes: float, split: str = "train") -> str:
        corpus = StdlibCorpus(str(library), window=WINDOW, batch_size=16, swap_quotes=swap_quotes)
        return "".join(map(chr, corpus.batch(split, 0)["inputs"]["input_ids"].flatten().tolist()))

    traded = str.maketrans("'\"", "\"'")
    assert text(1.0) == text(0.0).translate(traded)
    assert text(0.5) not in (text(0.0), text(1.0))
    assert text(1.0, "val") == text(0.0, "val")


def test_permuted_windows_are_the_same_but_for_their_brackets(library: Path) -> None:
    for path in library.glob("module*.py"):
        path.write_text("f(a)[b] = {c}\n" * 10)

    def windows(permute_brackets: float, split: str = "train") -> list[str]:
        corpus = StdlibCorpus(str(library), window=WINDOW, batch_size=16, permute_brackets=permute_brackets)
        return ["".join(map(chr, row)) for row in corpus.batch(split, 0)["inputs"]["input_ids"].tolist()]

    ways = [str.maketrans("()[]{}", "".join(order)) for order in itertools.permutations(("()", "[]", "{}"))]
    used = set()
    for plain, permuted in zip(windows(0.0), windows(1.0), strict=True):
        versions = [plain.translate(way) for way in ways]
        assert permuted in versions
        used.add(versions.index(permuted))
    assert len(used) > 2
    assert 0 < sum(a != b for a, b in zip(windows(0.0), windows(0.5), strict=True)) < 16
    assert windows(1.0, "val") == windows(0.0, "val")


def test_the_hash_tells_corpora_apart(library: Path) -> None:
    def digest() -> str:
        return StdlibCorpus(str(library), window=WINDOW).describe()["corpus_sha256"]

    before = digest()
    assert digest() == before
    (library / "module00.py").write_text("def other():\n    return 0\n")
    assert digest() != before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"root": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"val_fraction": 1.5}, "val_fraction"),
        ({"window": 0}, "window"),
        ({"swap_quotes": 2.0}, "swap_quotes"),
        ({"permute_brackets": -1.0}, "permute_brackets"),
        ({"window": 10_000}, "window of 10000"),
    ],
)
def test_a_corpus_that_cannot_be_is_refused(library: Path, arguments: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        StdlibCorpus(**{"root": str(library), **arguments}).setup()
