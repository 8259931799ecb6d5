"""The answers of the target and of its circuit, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pdprune.batches import UNUSED, Batch
from pdprune.losses import scored_positions


class Tokenizer(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def prediction_records(
    prompts: Sequence[Any],
    batch: Batch,
    target_output: Float[Tensor, "B T V"],
    circuit_output: Float[Tensor, "B T V"],
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """One record an example: the prompt, the right answer, and what target and circuit answer at its last position.

    `choice` is the likeliest of the task's answers with its probability among them; `next` the likeliest of all tokens.
    """
    records = []
    scored = scored_positions(target_output, batch)
    rows = {int(example): row for row, example in enumerate(scored.example)}
    for example, prompt in enumerate(prompts):
        record = {"prompt": prompt.text} | ({"answer": prompt.answer} if hasattr(prompt, "answer") else {})
        for name, output in (("target", target_output), ("circuit", circuit_output)):
            record[name] = _answer(scored.rows(output)[rows[example]], batch, example, tokenizer)
        record["agrees"] = _said(record["circuit"]) == _said(record["target"])
        records.append(record)
    return records


def _answer(logits: Float[Tensor, " V"], batch: Batch, example: int, tokenizer: Tokenizer) -> dict[str, Any]:
    likeliest = int(logits.argmax())
    answer: dict[str, Any] = {
        "next": tokenizer.decode([likeliest]),
        "next_probability": float(logits.softmax(-1)[likeliest]),
    }
    if batch.choices is not None:
        choices = batch.choices[example]
        choices = choices[choices != UNUSED]
        probabilities = torch.softmax(logits[choices], -1)
        best = int(probabilities.argmax())
        answer |= {"choice": tokenizer.decode([int(choices[best])]), "choice_probability": float(probabilities[best])}
    return answer


def _said(answer: dict[str, Any]) -> str:
    return str(answer.get("choice", answer["next"]))
