"""The model card of a toy network: what it computes, how well, and whether it represents every feature."""

import datetime
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch
import yaml

from pdprune.errors import UserError
from pdprune.files import read_bytes
from pdprune.targets.representation import representation
from pdprune.targets.store import load_target
from pdprune.targets.toy_data import DrawnData, InductionSequences, SparseFeatures
from pdprune.targets.toy_training import toy_loss
from pdprune.targets.toys import Toy

HELD_OUT_BATCHES = 20
"""Batches of held-out data over which the loss on the card is taken."""
DATA = {"SparseFeatures": SparseFeatures, "InductionSequences": InductionSequences}

WHAT_IT_IS = {
    "TMS": (
        "A toy model of superposition (Elhage et al. 2022, arXiv 2209.10652): {n_features} features, each rarely on, "
        "go through {n_hidden} dimensions and shall come out as they were: `relu(linear2(linear1(x)))`. The two "
        "matrices were each other's transpose in training and are stored one by one. Known answer: a component a "
        "feature, in each matrix."
    ),
    "ResidualMLP": (
        "A residual network (Braun et al. 2025, arXiv 2501.14926) of {n_layers} MLP(s) with {d_mlp} {act_fn_name} "
        "neurons each, that shall compute `x + {act_fn_name}(x)` of {n_features} features, each rarely on. Embedding "
        "and unembedding are fixed. Known answer: a component a feature in `mlp_in`, over all layers.\n\n"
        "The residual stream has {d_embed} dimensions, the published one 1000. The features' directions were drawn as "
        "unit vectors in {d_random} dimensions and are written in a basis of their span, so that their cosines, all "
        "that the network's function depends on, are those of the published size. They matter: with orthonormal "
        "directions half the features were given up (52 of 100 represented, one layer, seed 0)."
    ),
    "InductionTransformer": (
        "A transformer of {n_layers} layers of attention with {n_heads} head(s), width {d_model}, without MLPs, norms "
        "or biases, that continues sequences `BOS ... s m ... s` of {max_length} tokens with `m`; `s` is any word, "
        "another one in every sequence. {vocab_size} token ids. Known answer: an early head tells each token what "
        "came before it, a late one looks for the token that came after `s` (Olsson et al. 2022, arXiv 2209.11895)."
    ),
}


LOSS = {"TMS": "mean squared error", "ResidualMLP": "mean squared error", "InductionTransformer": "nats"}


def model_card(folder: Path) -> dict[str, Any]:
    """What is known about the target in a folder, measured now.

    Raises `UserError` if its config names data that is not known.
    """
    target = load_target(folder)
    network = target.module
    assert isinstance(network, Toy)
    config = yaml.safe_load(read_bytes(folder / "config.yaml"))
    data = _data(config["data"])
    training = config["model"]["init_args"]
    return {
        "name": target.name,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m pdprune.train fit --config configs/targets/{target.name}.yaml",
        "seed": config["seed_everything"],
        "steps": config["trainer"]["max_steps"],
        "network": type(network).__name__,
        "sizes": vars(network.config),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "training": {name: training[name] for name in ("lr", "schedule", "warmup", "weight_decay")},
        "data": data.describe(),
        "held_out_loss": mean_loss(network, data),
        "representation": representation(network).summary(),
    }


@torch.no_grad()
def mean_loss(network: Toy, data: DrawnData) -> float:
    """Mean loss over held-out batches."""
    losses = [toy_loss(network, data.batch("held_out", step)) for step in range(HELD_OUT_BATCHES)]
    return float(torch.stack(losses).mean())


def card_text(card: dict[str, Any]) -> str:
    """The model card to read, from the one for machines."""
    found = card["representation"]
    n_there = found["n_features"] - len(found["missing"])
    verdict = "yes" if found["represents_every_feature"] else f"no, it lacks {', '.join(map(str, found['missing']))}"
    rows = [f"| {name} | {m['min']:.3g} | {m['mean']:.3g} | {m['max']:.3g} |" for name, m in found["measures"].items()]
    settings = ", ".join(f"{name} {value}" for name, value in {**card["training"], **card["data"]}.items())
    sizes = card["sizes"]
    drawn_in = {"d_random": sizes["d_random"] or sizes["d_embed"]} if "d_random" in sizes else {}
    what_it_is = WHAT_IT_IS[card["network"]].format(**{**sizes, **drawn_in})
    note = f"\n{_wrapped(card['note'])}\n" if card["note"] else ""
    return f"""# {card["name"]}

{_wrapped(what_it_is)}

{card["parameters"]:,} parameters. Held-out loss: **{card["held_out_loss"]:.3g}** ({LOSS[card["network"]]}).

## Does it represent every feature?

{_wrapped(f"**{verdict}** ({n_there} of {found['n_features']}). Asked for: {found['criterion']}.")}

| of each feature | least | mean | greatest |
|---|---|---|---|
{chr(10).join(rows)}

## How it was made

    {card["command"]}

Seed {card["seed"]}, {card["steps"]:,} steps, CPU, Python {card["python"]}, torch {card["torch"]}, {card["date"]};
`config.yaml` is that config. `python -m pdprune.targets.export RUN {card["name"]}` wrote this folder.
{_wrapped(f"AdamW; {settings}.")}
{note}"""


def _wrapped(text: str) -> str:
    """Paragraph by paragraph, within the line length of this repository."""
    return "\n\n".join(textwrap.fill(part, 120, break_on_hyphens=False) for part in text.split("\n\n"))


def _data(config: dict[str, Any]) -> DrawnData:
    name = config["class_path"].rpartition(".")[2]
    if name not in DATA:
        raise UserError(f"model card: data {config['class_path']!r}, expected one of {', '.join(DATA)}")
    return DATA[name](**config["init_args"])
