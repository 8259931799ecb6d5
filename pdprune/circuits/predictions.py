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
    target_output: Float[Tensor, "B *T V"],
    circuit_output: Float[Tensor, "B *T V"],
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """One record an example: the prompt, the right answer, and what target and circuit answer at its last position.

    `choice` is the likeliest of the task's answers with its probability among them; `next` the likeliest of all tokens.
    """
    records = []
    by_target, by_circuit = (answers_to(batch, output, tokenizer) for output in (target_output, circuit_output))
    for prompt, target, circuit in zip(prompts, by_target, by_circuit, strict=True):
        record = {"prompt": prompt.text} | ({"answer": prompt.answer} if hasattr(prompt, "answer") else {})
        agrees = said(circuit)[0] == said(target)[0]
        records.append(record | {"target": target, "circuit": circuit, "agrees": agrees})
    return records


def answers_to(batch: Batch, output: Float[Tensor, "B *T V"], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What an output answers to each example, at the last of its positions that are scored."""
    scored = scored_positions(output, batch)
    last = {int(example): row for row, example in enumerate(scored.example)}
    rows = scored.rows(output)
    return [_answer(rows[last[example]], batch, example, tokenizer) for example in range(batch.size)]


def said(answer: dict[str, Any]) -> tuple[str, float]:
    """The answer itself and its probability: of the task's answers, where it has some to choose from."""
    name = "choice" if "choice" in answer else "next"
    return str(answer[name]), float(answer[f"{name}_probability"])


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
