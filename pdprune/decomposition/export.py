"""Ships a learned decomposition: `python -m pdprune.decomposition.export RUN [--against RUN ...] [--out FOLDER]`.

RUN is the run folder of `python -m pdprune.train fit --config configs/decompose/<name>.yaml`. What comes out is a
folder with the decomposition, the config and a card: by default inside the package, beside the target that it
decomposes, where `load_decomposition(TARGET)` finds it. The card holds it against the runs that are named and against
SVD, where as many components a token are kept, all on the same held-out text and under the same attack.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from pdprune.batches import Batch
from pdprune.decomposition.audit import DecompositionChecks, Gates, audit_decomposition, held_out
from pdprune.decomposition.bases import decompose
from pdprune.decomposition.checkpoints import load_decomposition
from pdprune.decomposition.checkpoints.loading import IN_RUN_FOLDER
from pdprune.decomposition.importances import importance_mask
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.saved import JSON_FILE, TENSOR_FILE
from pdprune.decomposition.strongest import strongest
from pdprune.errors import UserError
from pdprune.files import read_bytes, write_atomically
from pdprune.progress import part, telling
from pdprune.targets import StdlibCorpus, load_target
from pdprune.targets.export import without_place
from pdprune.targets.store import SHIPPED

CONFIG = "config.yaml"
TIMES = (1, 2, 4)
"""SVD is also shown with so many times the components of the learned decomposition."""


WINDOWS = 32
"""Of text that the card's attack must serve with one source. Of few it would fit the noise."""


def export(
    run: Path,
    against: Sequence[Path] = (),
    out: Path | None = None,
    checks: DecompositionChecks = DecompositionChecks(batches=1, ladder=[]),
    windows: int = WINDOWS,
) -> Path:
    """Write a decomposition's folder from the run folder of a finished training of a shipped target; returns it.

    Args:
        run: the training.
        against: others of the same target and sites, to be shown beside it.
        out: the folder; by default inside the package.
        checks: what the card's figures are taken on.
        windows: in a batch of it.

    Raises:
        UserError: if a run folder lacks the decomposition or its config.
    """
    config = yaml.safe_load(read_bytes(run / CONFIG))
    target = config["model"]["init_args"]["target"]
    folder = out or SHIPPED / target / IN_RUN_FOLDER
    card = {
        "target": target,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m pdprune.train fit --config configs/decompose/{target}.yaml",
        "seed": config["seed_everything"],
        "steps": config["trainer"]["max_steps"],
        **figures(run, against, checks, windows),
    }
    for name in (TENSOR_FILE, JSON_FILE):
        write_atomically(folder / name, read_bytes(run / IN_RUN_FOLDER / name))
    write_atomically(folder / CONFIG, without_place(read_bytes(run / CONFIG)))
    write_atomically(folder / "card.json", (json.dumps(card, indent=1) + "\n").encode())
    write_atomically(folder / "card.md", card_text(card).encode())
    return folder


def figures(run: Path, against: Sequence[Path], checks: DecompositionChecks, windows: int) -> dict[str, Any]:
    """The audits of a run's decomposition, of others and of SVD, on the same held-out text."""
    config = yaml.safe_load(read_bytes(run / CONFIG))
    data = StdlibCorpus(**{**config["data"]["init_args"], "batch_size": windows})
    seed = config["seed_everything"]
    batches = held_out(data, checks.batches)
    learned = load_decomposition(run)
    rows: list[dict[str, Any]] = []
    n_rows = 2 + len(against) + len(TIMES)
    with telling("card") as tell:

        def add(what: str, model: DecomposedModel, gates: Gates) -> dict[str, Any]:
            with part(len(rows), n_rows):
                found = audit_decomposition(
                    model, gates, batches, "kl", checks, seed, lambda doing: tell(f"{what}, {doing}")
                )
            rows.append({"what": what, **found})
            return found

        found = add(mode_of(run), learned, important(learned))
        others = [(mode_of(other), load_decomposition(other)) for other in against]
        for what, model in others:
            add(what, model, important(model))
        counts = {name: max(1, round(site["l0"])) for name, site in found["sites"].items()}
        for what, model in [(mode_of(run), learned), *others]:
            add(f"{what}, the strongest", model, keeping(model, counts))
        svd = decompose(load_target(config["model"]["init_args"]["target"]).module, learned.site_names, "svd")
        for times in TIMES:
            more = {name: times * count for name, count in counts.items()}
            add(f"SVD, the strongest{f', {times} times as many' if times > 1 else ''}", svd, keeping(svd, more))
    return {name: found[name] for name in ("n_examples", "batch_size", "attack")} | {"rows": rows}


def important(model: DecomposedModel) -> Gates:
    """Gates that keep what the model's own importances say."""

    def gates(batch: Batch, index: int) -> Any:
        return importance_mask(model, batch.inputs)

    return gates


def mode_of(run: Path) -> str:
    """How a run learned, for people."""
    mode: str = json.loads(read_bytes(run / IN_RUN_FOLDER / JSON_FILE))["about"]["mode"]
    return f"learned ({mode})"


def keeping(model: DecomposedModel, counts: Mapping[str, int]) -> Gates:
    """Gates that keep so many components of each site, those that write most on a token."""

    def gates(batch: Batch, index: int) -> Any:
        return strongest(model, batch.inputs, counts)

    return gates


def card_text(card: Mapping[str, Any]) -> str:
    """The card to read, from the one for machines."""
    attack, first = card["attack"], card["rows"][0]
    longer = f"; after the semicolon {rungs(first)[-1]} steps" if rungs(first) else ""
    sites = "\n".join(
        f"| {name} | {site['n_components']} | {site['alive']} | {site['l0']:.1f} | {site['left_over']:.2%} |"
        for name, site in first["sites"].items()
    )
    return f"""# Components of {card["target"]}

{first["n_components"]} rank-one components at {len(first["sites"])} weight matrices of the shipped target
`{card["target"]}`, and a function that says how much each matters on a token: {first["what"]}.
`pdprune.load_decomposition("{card["target"]}")` loads them.

| site | components | alive | mean L0 | left over |
|---|---|---|---|---|
{sites}

Alive: of an importance above {first["matters_above"]} on some token; mean L0: components of an importance above 0 on a
token; left over: the length of what the components do not sum to, relative to the weight's.

## What the model loses without the rest

KL to the model's own predictions in nats a byte, on {card["n_examples"]} held-out windows.

- Complete: all that does not matter is ablated.
- Stochastic: it is partly ablated, by chance, token by token.
- Adversarial: it is partly ablated, the same way at all tokens of {card["batch_size"]} windows, so as to hurt most:
  {attack["restarts"]} restarts of {attack["steps"]} sign steps of {attack["step_size"]}{longer}.

| components | all | alive | mean L0 | complete | stochastic | adversarial |
|---|---|---|---|---|---|---|
{chr(10).join(row_text(row) for row in card["rows"])}

"The strongest" keeps the components that write most on a token, `|x·V| ‖U‖`, as many at each site as the learned
importances keep on average: that is all one can do with components that were not learned. With nothing left of these
matrices KL is {first["reconstruction"]["ablated"]:.3f}.

## How it was made

    {card["command"]}

Seed {card["seed"]}, {card["steps"]:,} steps, CPU, Python {card["python"]}, torch {card["torch"]}, {card["date"]};
`config.yaml` is that config. `python -m pdprune.decomposition.export RUN` wrote this folder.
"""


def rungs(row: Mapping[str, Any]) -> list[int]:
    """The longer attacks of a row's audit, in steps."""
    return [int(name.rpartition("_")[2]) for name in row["reconstruction"] if name.startswith("adversarial_")]


def row_text(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    losses = row["reconstruction"]
    longest = "".join(f"; {losses[f'adversarial_{steps}']:.4f}" for steps in rungs(row)[-1:])
    return (
        f"| {row['what']} | {row['n_components']} | {row['alive']} | {row['l0']:.1f} "
        f"| {losses['complete']:.4f} | {losses['stochastic']:.4f} | {losses['adversarial']:.4f}{longest} |"
    )


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pdprune.decomposition.export", description="Ship a learned decomposition of a shipped target."
    )
    parser.add_argument("run", type=Path, help="run folder of the training")
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="other run folders, for the card's table")
    parser.add_argument("--out", type=Path, help="folder to write; by default inside the package")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.against, arguments.out))
    except UserError as error:
        print(f"pdprune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
