"""The model card of a shipped language model: what it scores on text and tasks, and what made it."""

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pdprune.batches import as_batch
from pdprune.files import read_bytes
from pdprune.loaders import FixedLoader
from pdprune.losses import task_loss_and_accuracy
from pdprune.targets.corpus import StdlibCorpus
from pdprune.targets.store import load_target
from pdprune.targets.training import matrices_of, next_token_loss
from pdprune.tasks import TaskData, shipped_tasks

HELD_OUT_BATCHES = 200
"""Batches of the corpus's held-out windows over which the loss on the card is taken."""


def model_card(folder: Path) -> dict[str, Any]:
    """What is known about the target in a folder, measured now. The corpus is that of the running Python."""
    target = load_target(folder)
    config = yaml.safe_load(read_bytes(folder / "config.yaml"))
    corpus = StdlibCorpus(**{**config["data"]["init_args"], "val_batches": HELD_OUT_BATCHES})
    training = config["model"]["init_args"]
    matrices = matrices_of(target.module)
    return {
        "name": target.name,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m pdprune.train fit --config configs/targets/{target.name.removesuffix('-py')}.yaml",
        "seed": config["seed_everything"],
        "steps": config["trainer"]["max_steps"],
        "sizes": vars(target.module.config),
        "parameters": sum(parameter.numel() for parameter in target.module.parameters()),
        "kept_fraction": (training.get("sparsity") or {}).get("final_fraction", 1.0),
        "nonzero_weights": {name: int(weight.count_nonzero()) for name, weight in matrices.items()},
        "weights": {name: weight.numel() for name, weight in matrices.items()},
        "corpus": corpus.describe(),
        "held_out_loss": mean_loss(target.module, corpus.val_dataloader()),
        "held_out_tokens": HELD_OUT_BATCHES * corpus.batch_size * corpus.window,
        "tasks": {task: task_scores(target.module, TaskData(task, str(folder))) for task in shipped_tasks()},
    }


@torch.no_grad()
def mean_loss(network: nn.Module, batches: FixedLoader) -> float:
    """Mean next-token loss over batches of one size, in nats per token."""
    return float(torch.stack([next_token_loss(network, batch) for batch in batches]).mean())


@torch.no_grad()
def task_scores(network: nn.Module, data: TaskData) -> dict[str, float]:
    """The target's scores on the held-out split: cross-entropy among the choices in nats, accuracy; and the sizes."""
    scores: list[tuple[Tensor, Tensor]] = []
    for raw in data.held_out_batches():
        scores.append(task_loss_and_accuracy(network(**raw["inputs"]), as_batch(raw)))
    ce, accuracy = (torch.cat(parts).mean().item() for parts in zip(*scores, strict=True))
    counts = {name: count for name, count in data.describe().items() if name.startswith("n_")}
    return {"ce": ce, "accuracy": accuracy, **counts}


def card_text(card: dict[str, Any]) -> str:
    """The model card to read, from the one for machines."""
    n_nonzero, n_weights = sum(card["nonzero_weights"].values()), sum(card["weights"].values())
    sizes, corpus = card["sizes"], card["corpus"]
    unit, alphabet = ("token", "byte pairs") if "train_tokens" in corpus else ("byte", "ASCII")
    rows = [
        f"| {task} | {s['accuracy']:.1%} | {s['ce']:.3f} | {s['n_train']} / {s['n_select']} / {s['n_held_out']} |"
        for task, s in card["tasks"].items()
    ]
    return f"""# {card["name"]}

A decoder-only transformer that predicts the next {unit} of Python source: {sizes["n_layers"]} layers, width
{sizes["d_model"]}, {sizes["n_heads"]} heads, {sizes["d_mlp"]} MLP neurons a layer, {sizes["max_length"]} positions,
{sizes["vocab_size"]} tokens ({alphabet}). {card["parameters"]:,} parameters; of the {n_weights:,} entries of its weight
matrices {n_nonzero:,} are not zero (at most {card["kept_fraction"]:.4g} of each matrix).

Held-out loss: **{card["held_out_loss"]:.3f} nats per {unit}**, on {card["held_out_tokens"]:,} {unit}s of windows that
begin at a line, from files it was not trained on.

Held-out scores. Accuracy: the answer's logit is above that of every wrong one. Cross-entropy in nats, among the
choices; for text, over the whole vocabulary.

| task | accuracy | cross-entropy | prompts: train / select / held out |
|---|---|---|---|
{chr(10).join(rows)}

`quote_nonsense` asks for an answer that has nothing to do with the model's, so chance is what to expect.

## How it was made

    {card["command"]}

Seed {card["seed"]}, {card["steps"]:,} steps, CPU, Python {card["python"]}, torch {card["torch"]}, {card["date"]};
`config.yaml` is that config. `python -m pdprune.targets.export RUN {card["name"]}` wrote this folder.
{card["note"]}

Corpus: the standard library of Python {corpus["python"]} without its tests, vendored packages and generated tables;
{corpus["train_bytes"]:,} bytes for training, {corpus["val_bytes"]:,} held out, split by file; {corpus["non_ascii"]}.
SHA-256 `{corpus["corpus_sha256"]}`. The prompts come from held-out files and from test packages.

## Limits

A small network for trying methods on, not for writing code. It has read ASCII only, {sizes["max_length"]} {unit}s at
most.
"""
