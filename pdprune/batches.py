"""What a DataLoader yields, read once into one shape: `Batch`.

People's batches are a tensor, `(inputs, labels)`, or a dict with `inputs`, `labels`, `positions`, `choices`,
`counterfactual`. The rest of the package sees a `Batch` and the tensor in a model's output, and asks nothing else
about data.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pdprune.errors import UserError

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Found = TypeVar("Found")

KNOWN_KEYS = ("inputs", "labels", "positions", "choices", "counterfactual")
UNUSED = -1
"""Marks an unused entry in `positions` and `choices`."""
IGNORED_LABEL = -100
"""A label that is not scored, as in PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Batch:
    """One batch of examples.

    Attributes:
        raw: what the data loader yielded, for a user's own loss function.
        inputs: the target's arguments: a tensor, a tuple of arguments, or a dict of keyword arguments.
        labels: class indices: `[B]`, `[B, P]` (beside `positions` of that shape), or `[B, T]`; −100 is ignored.
        positions: which positions are scored, as indices, −1 unused; or a Bool mask. None: all of them.
        choices: the class indices that a task's answer is chosen from, −1 unused. None: the whole vocabulary.
        counterfactual: other inputs of the same shape, read by resample ablation.
    """

    raw: Any
    inputs: Inputs
    labels: Int[Tensor, " B *P"] | None = None
    positions: Int[Tensor, "B P"] | Bool[Tensor, "B T"] | None = None
    choices: Int[Tensor, "B K"] | None = None
    counterfactual: Inputs | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, question: Hashable, find: Callable[[], Found]) -> Found:
        """The answer to a question about this batch, found the first time that it is asked.

        Losses ask the same ones under every mask, and a GPU has to stop for each. In inference mode answers are not
        kept: no later pass could go backward through them.
        """
        if torch.is_inference_mode_enabled():
            return find()
        if question not in self._found:
            self._found[question] = find()
        found: Found = self._found[question]
        return found

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return first_tensor(self.inputs).shape[0]

    @property
    def attention_mask(self) -> Bool[Tensor, "B T"] | None:
        """True where a token is no padding, from a dict of inputs; None where every position counts."""
        if isinstance(self.inputs, Mapping) and isinstance(mask := self.inputs.get("attention_mask"), Tensor):
            return mask.bool()
        return None

    def select(self, examples: Int[Tensor, " b"]) -> Batch:
        """The batch of some of the examples, in the order asked for."""
        return as_batch(_take(self.raw, examples, self.size))


def as_batch(raw: Any) -> Batch:
    """Read what a data loader yielded.

    Args:
        raw: a tensor, alone or as the one element of a list; `(inputs, labels)`; or a dict with `inputs` and any of
            `labels`, `positions`, `choices`, `counterfactual`. A `Batch` is returned as it is.

    Raises:
        UserError: for anything else, or for labels, positions or choices of the wrong shape.
    """
    match raw:
        case Batch():
            return raw
        case Tensor():
            batch = Batch(raw, raw)
        case (inputs,):
            batch = Batch(raw, inputs)
        case (inputs, labels):
            batch = Batch(raw, inputs, labels)
        case {"inputs": _}:
            if unknown := set(raw) - set(KNOWN_KEYS):
                raise UserError(f"batch: unknown key {sorted(unknown)[0]!r}; expected some of {', '.join(KNOWN_KEYS)}")
            batch = Batch(raw, **raw)
        case _:
            raise UserError(
                f"batch: got {_describe(raw)}; expected a tensor, (inputs, labels), or a dict with the key 'inputs'"
            )
    return _checked(batch)


def as_batches(raw_batches: Iterable[Any]) -> list[Batch]:
    """Read all batches of a re-iterable.

    Raises:
        UserError: if it can be read only once (a generator), if it is empty, or if a batch cannot be read.
    """
    if isinstance(raw_batches, Tensor | Mapping):
        raise UserError("batches: got one batch; expected a list or DataLoader of batches: write [batch]")
    if isinstance(raw_batches, Iterator):
        raise UserError("batches: got a generator, which can be read only once; expected a list or a DataLoader")
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for its workers from the global generator
        batches = [as_batch(raw) for raw in raw_batches]
    if not batches:
        raise UserError("batches: got none; expected at least one batch")
    return batches


def output_of(output: Any) -> Tensor:
    """The tensor in a target's output: itself, the first of a tuple, or `.logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UserError(
        f"target: its output is {_describe(output)}; expected a tensor, a tuple that starts with one, or .logits"
    )


def to_device(raw: Any, device: torch.device) -> Any:
    """A batch or inputs with every tensor in it on `device`."""
    match raw:
        case Batch():
            return as_batch(to_device(raw.raw, device))
        case Tensor():
            return raw.to(device)
        case Mapping():
            return {key: to_device(value, device) for key, value in raw.items()}
        case tuple() | list():
            return type(raw)(to_device(value, device) for value in raw)
        case _:
            return raw


def first_tensor(inputs: Inputs) -> Tensor:
    """The first tensor among inputs: its leading dimension is the batch."""
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else (inputs,)
    )
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise UserError("batch: its inputs hold no tensor with a batch dimension")


def _checked(batch: Batch) -> Batch:
    if not isinstance(batch.inputs, Tensor | Mapping | tuple | list):
        raise UserError(
            f"batch: inputs is {_describe(batch.inputs)}; expected a tensor, a tuple of arguments, or a dict of them"
        )
    size = batch.size
    for name in ("labels", "positions", "choices"):
        value = getattr(batch, name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            raise UserError(f"batch: {name} is {_describe(value)}; expected a tensor with {size} rows, one an example")
    if batch.positions is not None and batch.positions.ndim == 1:
        return _replace_positions(batch, batch.positions[:, None])
    return batch


def _replace_positions(batch: Batch, positions: Tensor) -> Batch:
    return Batch(batch.raw, batch.inputs, batch.labels, positions, batch.choices, batch.counterfactual)


def _take(raw: Any, examples: Tensor, size: int) -> Any:
    match raw:
        case Tensor():
            return raw[examples] if raw.ndim and raw.shape[0] == size else raw
        case Mapping():
            return {key: _take(value, examples, size) for key, value in raw.items()}
        case tuple() | list():
            return cast("type[Any]", type(raw))(_take(value, examples, size) for value in raw)
        case _:
            return raw


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {sorted(map(str, value))}"
    return f"a {type(value).__name__}"
