"""The command line of the claims: `python -m pdprune.claims list | run NAME | table NAME`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pdprune.claims.experiment import Experiment, run_cells, saved_cells
from pdprune.claims.registry import EXPERIMENTS
from pdprune.errors import UserError

FOLDER = Path("runs/claims")


def main(args: Sequence[str] | None = None) -> int:
    """Run or show an experiment and return the exit status: 2 for a mistake of the user's, told in one line."""
    given = _parser().parse_args(args)
    if given.command == "list":
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:<14} {experiment.claim}")
        return 0
    try:
        _show(given.command, EXPERIMENTS[given.name], given.small, _changes(given.set), given.folder)
    except UserError as error:
        print("pdprune: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _show(command: str, experiment: Experiment, small: bool, changes: Mapping[str, Any], folder: Path) -> None:
    settings = experiment.set_up(small, changes)
    cells = experiment.cells(settings)
    place = folder / experiment.name
    if command == "run":
        experiment.require(settings)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        results = run_cells(place, cells, experiment.run, lambda line: print(line, file=sys.stderr, flush=True))
    else:
        results = saved_cells(place, cells)
        if not results:
            raise UserError(f"claim {experiment.name}: {place} holds none of its cells; expected results: run it first")
    print(experiment.claim)
    print(settings, end="\n\n")
    print(experiment.table(results), end="\n\n")
    seconds = sum(result.cpu_seconds for result in results)
    print(f"{len(results)} of {len(cells)} cells, {seconds:,.0f} CPU seconds.")


def _changes(given: Sequence[str]) -> dict[str, Any]:
    """`["seeds=[0, 1]"]` as settings; lists become tuples, as settings are frozen."""
    changes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected NAME=VALUE, for instance --set 'seeds=[0, 1]'")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {text}: the value is no YAML; expected a number, a word or a list") from None
        changes[name] = tuple(read) if isinstance(read, list) else read
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pdprune.claims", description="The claims, as experiments.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is claimed")
    for command, does in (
        ("run", "compute the cells that are not done yet, then print the table"),
        ("table", "print the table of the cells that are done"),
    ):
        one = commands.add_parser(command, help=does)
        one.add_argument("name", choices=sorted(EXPERIMENTS))
        one.add_argument("--small", action="store_true", help="the small version, which takes seconds")
        one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
        one.add_argument("--folder", type=Path, default=FOLDER, help=f"where cells are saved; by default {FOLDER}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
