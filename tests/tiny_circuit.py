"""A circuit to be found through the command line, in a network small enough to audit in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from pdprune.targets.store import save_target
from pdprune.targets.transformer import Transformer, TransformerConfig

PROMPTS = [
    {"prompt": f"{'abcd'[n % 4]}{n % 7} = {quote}x{n}", "answer": quote, "wrong": other}
    for n in range(40)
    for quote, other in (("'", '"'), ('"', "'"))
]
CONFIG: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "max_steps": 20, "check_val_every_n_epoch": 1000},
    "checkpoint": {"every_n_steps": 4},
    "model": {
        "class_path": "pdprune.circuits.pruning.CircuitPruner",
        "init_args": {
            "decomposition": {"target": "tiny", "sites": ["*.mlp.down", "*.attn.out"], "basis": "neuron"},
            "target_loss": 0.05,
            "seed": "${seed_everything}",
        },
    },
    "data": {
        "class_path": "pdprune.tasks.TaskData",
        "init_args": {"task": "quotes.jsonl", "target": "tiny", "batch_size": 16, "seed": "${seed_everything}"},
    },
}
QUICK = [
    *("--config", "circuit.yaml", "--trainer.max_steps", "3", "--model.selection.drop_scores", "0"),
    *("--model.audit.draws", "2", "--model.audit.random_circuits", "0", "--model.audit.test_ladder", "[]"),
]
"""Arguments of a run that takes as little as it can."""


def network() -> Transformer:
    """Random weights, large enough for parts of it to matter: a block of 2 heads of 4 channels, and 16 neurons."""
    torch.manual_seed(0)
    made = Transformer(TransformerConfig(max_length=16, n_layers=1, n_heads=2, d_model=8, d_mlp=16))
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(8)
    return made


def write_material(folder: Path) -> Path:
    """The target `tiny`, the task `quotes.jsonl` and the config `circuit.yaml`; returns the folder."""
    save_target(network(), folder / "tiny")
    (folder / "quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    (folder / "circuit.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder
