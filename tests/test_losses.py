"""Losses against slow, obvious loops, for every shape that labels and positions may have."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import Batch, as_batch, output_of
from pdprune.decomposition import DecomposedModel
from pdprune.errors import UserError
from pdprune.losses import answers, loss_function, loss_name, task_loss_and_accuracy
from pdprune.seeding import generator

B, T, V, P = 5, 6, 7, 3
SEEDS = st.integers(0, 10**6)


# -- the obvious way -----------------------------------------------------------------------------------------------


def rows_of(raw: dict[str, Any], example: int) -> list[tuple[int, int | None]]:
    """`(position, label)` of the scored positions of an example, one after another."""
    positions, labels = raw.get("positions"), raw.get("labels")
    attention = raw["inputs"].get("attention_mask")
    if positions is None:
        scored = [t for t in range(T) if attention is None or attention[example, t]]
    elif positions.dtype == torch.bool:
        scored = [t for t in range(T) if positions[example, t]]
    else:
        scored = [int(t) for t in positions[example].reshape(-1)]
    rows = []
    for column, t in enumerate(scored):
        if t == -1:
            continue
        if labels is None:
            label = None
        elif labels.ndim == 1:
            label = int(labels[example])
        elif labels.shape[1] == P:
            label = int(labels[example, column])
        else:
            label = int(labels[example, t])
        rows.append((t, label))
    return rows


def slow(loss: str, output: Tensor, target_output: Tensor, raw: dict[str, Any]) -> list[float]:
    values = []
    for example in range(B):
        row_values = []
        for t, label in rows_of(raw, example):
            q, p = output[example, t].softmax(-1).tolist(), target_output[example, t].softmax(-1).tolist()
            if loss == "kl":
                row_values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            elif loss == "mse":
                row_values.append(float((output[example, t] - target_output[example, t]).square().sum()) / V)
            elif label != -100:
                chosen = range(V) if "choices" not in raw else [c for c in raw["choices"][example].tolist() if c >= 0]
                row_values.append(-math.log(q[label] / sum(q[c] for c in chosen)))
        values.append(sum(row_values) / len(row_values) if row_values else 0.0)
    return values


# -- batches of every shape ----------------------------------------------------------------------------------------


def draw(low: int, high: int, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=rng)


def choices(rng: torch.Generator) -> Tensor:
    """Three classes an example, the last sometimes unused."""
    table = torch.stack([torch.randperm(V, generator=rng)[:3] for _ in range(B)])
    table[draw(0, 2, (B,), rng) > 0, 2] = -1
    return table


POSITIONS: dict[str, Callable[[torch.Generator], Tensor | None]] = {
    "all": lambda rng: None,
    "[B]": lambda rng: draw(0, T, (B,), rng),
    "[B, P]": lambda rng: torch.stack([torch.randperm(T, generator=rng)[:P] for _ in range(B)]).masked_fill(
        draw(0, 3, (B, P), rng) == 0, -1
    ),
    "Bool[B, T]": lambda rng: draw(0, 2, (B, T), rng) > 0,
}
LABELS: dict[str, tuple[int, ...]] = {"[B]": (B,), "[B, P]": (B, P), "[B, T]": (B, T)}


def raw_batch(rng: torch.Generator, positions: str, labels: str, padded: bool, with_choices: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {"inputs": {"input_ids": draw(0, V, (B, T), rng)}}
    if padded:
        lengths = draw(1, T + 1, (B, 1), rng)
        raw["inputs"]["attention_mask"] = (torch.arange(T) < lengths).long()
    if (chosen := POSITIONS[positions](rng)) is not None:
        raw["positions"] = chosen
    raw["labels"] = draw(0, V, LABELS[labels], rng)
    if with_choices:
        raw["choices"] = choices(rng)
        raw["labels"] = raw["choices"][:, :1].expand(B, raw["labels"][0].numel()).reshape(raw["labels"].shape)
    raw["labels"] = raw["labels"].masked_fill(draw(0, 5, LABELS[labels], rng) == 0, -100)
    return raw


CASES = [
    (positions, labels)
    for positions in POSITIONS
    for labels in LABELS
    if labels != "[B, P]" or positions == "[B, P]"  # labels beside positions need positions to be beside
]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("positions", "labels"), CASES)
@given(seed=SEEDS, with_choices=st.booleans())
@settings(max_examples=8, deadline=None)
def test_losses_are_those_of_a_loop(positions: str, labels: str, padded: bool, seed: int, with_choices: bool) -> None:
    rng = generator(seed, "losses")
    raw = raw_batch(rng, positions, labels, padded, with_choices)
    output, target_output = torch.randn(2, B, T, V, generator=rng, dtype=torch.float64)
    for loss in ("kl", "ce", "mse"):
        found = loss_function(loss)(output, target_output, as_batch(raw))
        assert found.tolist() == pytest.approx(slow(loss, output, target_output, raw), abs=1e-6)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_task_scores_are_those_of_a_loop(seed: int) -> None:
    rng = generator(seed, "task")
    raw = raw_batch(rng, "[B]", "[B]", padded=True, with_choices=True)
    output = torch.randn(B, T, V, generator=rng)
    nats, right = task_loss_and_accuracy(output, as_batch(raw))
    assert nats.tolist() == pytest.approx(slow("ce", output, output, raw), abs=1e-5)
    for example in range(B):
        if raw["labels"][example] == -100:
            assert right[example] == 0
            continue
        logits = output[example, raw["positions"][example]]
        rivals = [float(logits[c]) for c in raw["choices"][example].tolist() if c >= 0]
        assert right[example] == float(float(logits[raw["labels"][example]]) == max(rivals))


def test_answers_are_among_the_choices() -> None:
    output = torch.zeros(2, 4, V)
    output[:, :, 6] = 9
    output[0, 1, 2], output[1, 1, 3] = 1, 1
    raw = {"inputs": torch.zeros(2, 4), "positions": torch.tensor([1, 1])}
    assert answers(output, as_batch(raw)).tolist() == [6, 6]
    raw["choices"] = torch.tensor([[1, 2, -1], [3, 4, 5]])
    assert answers(output, as_batch(raw)).tolist() == [1, 0]  # places among the choices


def test_outputs_without_positions() -> None:
    rng = generator(0, "flat")
    output, target_output = torch.randn(2, B, V, generator=rng, dtype=torch.float64)
    batch = as_batch((torch.zeros(B, 2), torch.tensor([0, 1, 2, -100, 4])))
    log_q, log_p = output.log_softmax(-1), target_output.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(loss_function("kl")(output, target_output, batch), divergence)
    expected = -log_q[range(B), [0, 1, 2, 0, 4]] * torch.tensor([1, 1, 1, 0, 1])
    assert torch.allclose(loss_function("ce")(output, target_output, batch), expected)


@pytest.mark.parametrize("shape", [(B,), (B, V), (B, T, V), (B, 2, T, V)], ids=str)
def test_squared_error_takes_outputs_of_any_shape(shape: tuple[int, ...]) -> None:
    output, target_output = torch.randn(2, *shape, generator=generator(0, "mse"))
    found = loss_function("mse")(output, target_output, as_batch(torch.zeros(B, 2)))
    assert torch.allclose(found, (output - target_output).reshape(B, -1).square().mean(-1))


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_divergence_is_zero_at_the_target_and_never_below(seed: int) -> None:
    rng = generator(seed, "kl")
    output, target_output = 3 * torch.randn(2, B, T, V, generator=rng)
    batch = as_batch({"inputs": {"input_ids": torch.zeros(B, T)}})
    assert loss_function("kl")(output, output, batch).abs().max() < 1e-6
    assert loss_function("kl")(output, target_output, batch).min() >= 0


def test_half_precision_outputs_are_scored_in_single() -> None:
    output = torch.randn(B, T, V, generator=generator(0, "half"))
    batch = as_batch({"inputs": {"input_ids": torch.zeros(B, T)}})
    found = loss_function("kl")(output.bfloat16(), output.bfloat16() + 1, batch)
    assert found.dtype == torch.float32 and found.abs().max() < 0.05


def test_a_users_loss_reads_the_batch_as_it_came() -> None:
    raw = (torch.zeros(B, 2), torch.arange(B))

    def far(output: Tensor, target_output: Tensor, batch: Any) -> Tensor:
        assert batch is raw
        return (output - target_output).abs().sum(-1) + batch[1]

    output = torch.ones(B, V)
    assert loss_function(far)(output, 0 * output, as_batch(raw)).tolist() == [7, 8, 9, 10, 11]
    assert loss_name(far) == "far" and loss_name("kl") == "kl" and loss_name(nn.MSELoss()) == "MSELoss"


# -- outputs of every kind, through the masked model -----------------------------------------------------------------


class Wrapped(nn.Module):
    """A matrix whose output comes in one of several wrappings."""

    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.read = nn.Linear(4, 3)
        with torch.no_grad():
            self.read.weight.copy_(torch.arange(12.0).reshape(3, 4) / 10)
            self.read.bias.zero_()
        self.wrap = wrap

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        out = self.read(x)
        return {"tensor": out, "tuple": (out, x), "logits": SimpleNamespace(logits=out, loss=None)}[self.wrap]


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "logits"])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_targets_may_wrap_their_inputs_and_outputs(wrap: str, kind: str) -> None:
    x = torch.randn(6, 4, generator=generator(0, "wrapped"))
    inputs = {"tensor": x, "tuple": (x, None), "dict": {"x": x, "scale": None}}[kind]
    target = Wrapped(wrap)
    model = DecomposedModel.from_components(target, {"read": (torch.eye(4), target.read.weight.detach().T)})
    keep = torch.tensor([1.0, 0, 1, 0])
    found = MaskedLoss(model, as_batch({"inputs": inputs}), "kl").per_example(keep)
    log_p = (x @ target.read.weight.T).log_softmax(-1)
    log_q = ((x * keep) @ target.read.weight.T).log_softmax(-1)
    assert torch.allclose(found, (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-6)
    assert output_of(target(x)).shape == (6, 3)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "raw", "output", "says"),
    [
        ("ce", {"inputs": torch.zeros(B, T)}, (B, T, V), "loss 'ce' needs labels"),
        ("ce", {"inputs": torch.zeros(B, T), "labels": torch.zeros(B, T + 1).long()}, (B, T, V), "labels have shape"),
        ("ce", {"inputs": torch.zeros(B, 2), "labels": torch.zeros(B, 2).long()}, (B, V), "labels have shape"),
        (
            "ce",
            {"inputs": torch.zeros(B, 2), "labels": torch.ones(B).long(), "choices": torch.tensor([[2, 3]] * B)},
            (B, V),
            "not among its example's choices",
        ),
        ("kl", {"inputs": torch.zeros(B, 2)}, (B,), "expected [B, V] or [B, T, V] (or loss 'mse')"),
        ("kl", {"inputs": torch.zeros(B, 2)}, (B, 2, T, V), "expected [B, V] or [B, T, V] (or loss 'mse')"),
    ],
)
def test_batches_that_do_not_fit_are_refused_in_one_line(
    loss: str, raw: dict[str, Any], output: tuple[int, ...], says: str
) -> None:
    with pytest.raises(UserError) as error:
        loss_function(loss)(torch.zeros(output), torch.zeros(output), as_batch(raw))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_unknown_losses_and_losses_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(UserError, match="expected one of kl, ce, mse, or a function"):
        loss_function("KL")
    batch: Batch = as_batch(torch.zeros(B, 2))
    for wrong in (lambda output, target, batch: output.mean(), lambda output, target, batch: 0.0):
        with pytest.raises(UserError, match=r"expected one loss an example, shape \[5\]"):
            loss_function(wrong)(torch.zeros(B, V), torch.zeros(B, V), batch)


def test_gradients_follow_a_loss_in_inference_mode() -> None:
    batch, output, kl = as_batch(torch.zeros(2, 3, dtype=torch.long)), torch.randn(2, 3, 4), loss_function("kl")
    with torch.inference_mode():
        kl(output, output, batch)
    masked = output.clone().requires_grad_()
    kl(masked, output, batch).sum().backward()
    assert masked.grad is not None
