"""A task as batches: prompts padded to one length, split in three, training batches a pure function of their number.

Shape suffixes: B batch, T position, K choices of an answer.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor

from pdprune.batches import IGNORED_LABEL, UNUSED
from pdprune.errors import UserError
from pdprune.loaders import FixedLoader, StepLoader
from pdprune.ranks import Ranks
from pdprune.seeding import generator
from pdprune.targets.reader import Reader, Tokenizer
from pdprune.targets.store import load_reader
from pdprune.tasks.prompts import Example, Prompt, Split, TaskFile, Window, read_task

TaskBatch = dict[str, Any]
"""`inputs`: `input_ids` and `attention_mask`, `Int[B, T]`, padded on the right, or on the left if the tokenizer
says so. For prompts `labels: Int[B]`, `positions: Int[B]` (the last token of each prompt), `choices: Int[B, K]` (the
answer and the wrong ones, -1 unused). For text `labels: Int[B, T]` (-100 at padding), every position scored."""


class TaskData(LightningDataModule):
    """The prompts of a task, as a target reads them.

    Three splits by prompt: the gates learn on `train`, the circuit is chosen on `select`, `held_out` is for the audit
    alone. They are Lightning's train, validation and test (and predict) loaders. All batches have one length T, that
    of the longest prompt of the task, so that positions mean the same in every batch.

    Raises `UserError`, naming file and line, for prompts that the target cannot read or answer.

    Args:
        task: name of a shipped task, or path of a JSONL file (`pdprune.tasks.prompts` says what is in it).
        target: name of a shipped target, or folder of one, also of a Hugging Face model.
        max_length: refuse prompts of more tokens; the target's own limit if not given.
        batch_size: prompts per training step, over all ranks together.
        audit_batch_size: prompts per batch of the other two splits; the audit's adversary makes one choice per batch.
        n_train: use only the first so many prompts of the training split; all of them if not given.
        n_select: the same for the select split.
        n_held_out: the same for the held-out split.
        seed: of the order of training prompts, and of the splits of a file that names none.
    """

    def __init__(
        self,
        task: str,
        target: str,
        max_length: int | None = None,
        batch_size: int = 64,
        audit_batch_size: int = 256,
        n_train: int | None = None,
        n_select: int | None = None,
        n_held_out: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        limits: dict[Split, int | None] = {"train": n_train, "select": n_select, "held_out": n_held_out}
        sizes = {f"n_{split}": limit for split, limit in limits.items()}
        sizes |= {"batch_size": batch_size, "audit_batch_size": audit_batch_size, "max_length": max_length}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"task {task}: {name} is {value}, expected at least 1")
        self.file = read_task(task, seed)
        self.name = self.file.name
        self.target = load_reader(target)
        self.audit_batch_size = audit_batch_size
        self.seed = seed
        encoded = encode(self.file, self.target, max_length)
        self._indices: dict[Split, list[int]] = {
            split: [index for index, example in enumerate(self.file.examples) if example.split == split][:limit]
            for split, limit in limits.items()
        }
        self._splits = {split: _take(encoded, torch.tensor(indices)) for split, indices in self._indices.items()}
        self.length = encoded["inputs"]["input_ids"].shape[1]
        """Tokens of every prompt, padding included."""
        self.batch_size = min(batch_size, len(self._indices["train"]))
        """Prompts per training step: as asked for, or all there are."""

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in one pass over the training split; what is left over waits for the next shuffle."""
        return len(self._indices["train"]) // self.batch_size

    def train_batch(self, step: int) -> TaskBatch:
        """Training batch `step`: a pure function of seed and step, of which a rank takes its share.

        Each pass takes the prompts in a new order.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self._indices["train"]), generator=generator(self.seed, "prompts", epoch))
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        return _take(self._splits["train"], Ranks.of(self.trainer).share(chosen))

    def train_batches(self) -> list[TaskBatch]:
        """The whole training split in the order of the file, in batches of `audit_batch_size`."""
        return self._batches("train")

    def select_batches(self) -> list[TaskBatch]:
        """The whole select split in the order of the file, in batches of `audit_batch_size`."""
        return self._batches("select")

    def held_out_batches(self) -> list[TaskBatch]:
        """The whole held-out split in the order of the file, in batches of `audit_batch_size`."""
        return self._batches("held_out")

    def prompts(self, split: Split) -> list[Example]:
        """The examples of a split, in the order of its batches."""
        return [self.file.examples[index] for index in self._indices[split]]

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return {
            "task": self.name,
            "task_sha256": self.file.sha256,
            "target": self.target.name,
            "length": self.length,
            "n_train": len(self._indices["train"]),
            "n_select": len(self._indices["select"]),
            "n_held_out": len(self._indices["held_out"]),
        }

    def train_dataloader(self) -> StepLoader:
        """`train_batch(0)`, `train_batch(1)`, ...; goes on from a checkpoint exactly."""
        return StepLoader(self.train_batch, self.steps_per_epoch)

    def val_dataloader(self) -> FixedLoader:
        """The select split, the same on every rank."""
        return FixedLoader(self.select_batches())

    def test_dataloader(self) -> FixedLoader:
        """The held-out split, the same on every rank."""
        return FixedLoader(self.held_out_batches())

    def predict_dataloader(self) -> FixedLoader:
        """The held-out split, the same on every rank."""
        return FixedLoader(self.held_out_batches())

    def _batches(self, split: Split) -> list[TaskBatch]:
        everything = torch.arange(len(self._indices[split]))
        return [_take(self._splits[split], part) for part in everything.split(self.audit_batch_size)]


def encode(file: TaskFile, target: Reader, max_length: int | None = None) -> TaskBatch:
    """All examples of a task file as one batch.

    Raises `UserError` for a target that reads no text, and, naming file and line, for what is outside the vocabulary,
    an answer that is not one token or the same as a wrong one, and a prompt that is empty or longer than `max_length`
    tokens (by default, and at most, what the target reads).
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise UserError(f"target {target.name} reads no text, expected one with a tokenizer")
    limit = min(max_length or math.inf, target.max_length or math.inf)
    rows = []
    for index, example in enumerate(file.examples):
        try:
            rows.append(_encode_example(example, target.name, tokenizer, limit))
        except UserError as error:
            raise UserError(f"{file.where(index)}: {error}") from None
    if isinstance(file.examples[0], Window):
        labels = _pad([ids[1:] for ids, _ in rows], IGNORED_LABEL, tokenizer.padding_side)
        return {"inputs": _inputs([ids[:-1] for ids, _ in rows], tokenizer), "labels": labels}
    inputs, choices = _inputs([ids for ids, _ in rows], tokenizer), _pad([choices for _, choices in rows], UNUSED)
    length = inputs["input_ids"].shape[1]
    return {
        "inputs": inputs,
        "labels": choices[:, 0].clone(),
        "positions": torch.tensor(
            [len(ids) - 1 if tokenizer.padding_side == "right" else length - 1 for ids, _ in rows]
        ),
        "choices": choices,
    }


def _encode_example(example: Example, target: str, tokenizer: Tokenizer, limit: float) -> tuple[list[int], list[int]]:
    """Token ids of the text, and of the answer followed by the wrong ones (none for running text)."""
    ids = tokenizer.encode(example.text)
    shortest, n_read = (1, len(ids)) if isinstance(example, Prompt) else (2, len(ids) - 1)
    if len(ids) < shortest:
        raise UserError(f"text of {len(ids)} tokens, expected at least {shortest}")
    if n_read > limit:
        raise UserError(f"prompt of {n_read} tokens, expected at most {limit} for target {target}")
    if isinstance(example, Window):
        return ids, []
    answer, *wrong = (_one_token(example.text, text, tokenizer) for text in (example.answer, *example.wrong))
    if answer in wrong:
        same = example.wrong[wrong.index(answer)]
        raise UserError(f"answer {example.answer!r} and wrong {same!r} are the same token, expected different ones")
    return ids, [answer, *wrong]


def _one_token(prompt: str, text: str, tokenizer: Tokenizer) -> int:
    """The token by which an answer goes on from a prompt."""
    ids = tokenizer.encode_after(prompt, text)
    if len(ids) != 1:
        tokens = f" ({', '.join(repr(tokenizer.decode([token])) for token in ids)})" if ids else ""
        hint = _space_matters(prompt, text, tokenizer)
        raise UserError(f"answer {text!r} has {len(ids)} tokens{tokens}, expected one{hint}")
    return ids[0]


def _space_matters(prompt: str, text: str, tokenizer: Tokenizer) -> str:
    """What to say where an answer would be one token with a space before it, or without the one that is there."""
    other, how = (
        (text[1:], "without its leading space") if text.startswith(" ") else (f" {text}", "with a leading space")
    )
    try:
        is_one = bool(text) and len(tokenizer.encode_after(prompt, other)) == 1
    except UserError:
        return ""
    return f"; {other!r}, {how}, is one" if is_one else ""


def _inputs(rows: list[list[int]], tokenizer: Tokenizer) -> dict[str, Int[Tensor, "B T"]]:
    side = tokenizer.padding_side
    return {
        "input_ids": _pad(rows, tokenizer.pad_id, side),
        "attention_mask": _pad([[1] * len(ids) for ids in rows], 0, side),
    }


def _pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Int[Tensor, "B T"]:
    length = max(map(len, rows))
    padding = [[value] * (length - len(row)) for row in rows]
    parts = zip(rows, padding, strict=True) if side == "right" else zip(padding, rows, strict=True)
    return torch.tensor([[*first, *second] for first, second in parts])


def _take(batch: TaskBatch, chosen: Int[Tensor, " b"]) -> TaskBatch:
    """Some of the examples of a batch."""
    return {key: _take(value, chosen) if isinstance(value, dict) else value[chosen] for key, value in batch.items()}
