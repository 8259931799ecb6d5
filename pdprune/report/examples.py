"""Held-out examples as the target reads them, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from pdprune.batches import Batch, first_tensor
from pdprune.report.audited_run import AuditedRun
from pdprune.report.figures import Text

EXAMPLES_SHOWN = 256
"""Held-out examples that a report looks at."""
NUMBERS_SHOWN = 12
"""Of an example that is a vector."""


@dataclass(frozen=True)
class Texts:
    """The examples of some batches, one after another.

    Attributes:
        vocabulary: what tokens look like; each once.
        texts: the examples.
        first: the position of each example's first token in its batch, where padding lies before it.
    """

    vocabulary: list[str]
    texts: list[Text]
    first: list[int]


def first_examples(run: AuditedRun) -> list[Batch]:
    """The held-out batches up to a number of examples, the last of them cut."""
    batches: list[Batch] = []
    left = EXAMPLES_SHOWN
    for batch in run.batches:
        if left <= 0:
            break
        batches.append(batch if batch.size <= left else batch.select(torch.arange(left)))
        left -= batch.size
    return batches


def texts_of(run: AuditedRun, batches: list[Batch]) -> Texts:
    """Examples as text where the target reads some, else as what it reads."""
    vocabulary: dict[str, int] = {}
    texts: list[Text] = []
    firsts: list[int] = []
    answers = [getattr(prompt, "answer", None) for prompt in run.prompts]
    for batch in batches:
        read, mask = first_tensor(batch.inputs).cpu(), _mask(batch)
        for row in range(batch.size):
            answer = answers[len(texts)] if len(texts) < len(answers) else None
            if mask is None:
                texts.append(Text([], _numbers(read[row]), answer))
                firsts.append(0)
                continue
            positions = mask[row].nonzero().squeeze(-1)
            ids = read[row, positions]
            named = [_token(run, int(token)) for token in ids] if read.ndim == 2 else [str(int(at)) for at in positions]
            tokens = [vocabulary.setdefault(name, len(vocabulary)) for name in named]
            texts.append(Text(tokens, "", answer))
            firsts.append(int(positions[0]) if len(positions) else 0)
    return Texts(list(vocabulary), texts, firsts)


def token_mask(batch: Batch, lead: tuple[int, ...]) -> Bool[Tensor, "*lead"]:
    """True where a token counts, for values with these leading dimensions."""
    mask = _mask(batch)
    if mask is None or tuple(mask.shape) != tuple(lead):
        return torch.ones(lead, dtype=torch.bool)
    return mask


def _mask(batch: Batch) -> Bool[Tensor, "B T"] | None:
    """Where an example's tokens are; None where it is no sequence."""
    read = first_tensor(batch.inputs)
    is_sequence = read.ndim == 3 or (read.ndim == 2 and not read.is_floating_point())
    if not is_sequence:
        return None
    mask = batch.attention_mask
    return torch.ones(read.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()


def _token(run: AuditedRun, token: int) -> str:
    return str(token) if run.tokenizer is None else run.tokenizer.decode([token])


def _numbers(vector: Tensor) -> str:
    """The largest entries of a vector that are not zero, by index."""
    flat = vector.flatten().float()
    largest = flat.abs().argsort(descending=True, stable=True)[:NUMBERS_SHOWN].sort().values
    shown = [f"x{int(index)} = {float(flat[index]):.2g}" for index in largest if flat[index] != 0]
    more = int(flat.count_nonzero()) - len(shown)
    return (", ".join(shown) or "all zero") + (f" and {more} more" if more else "")
