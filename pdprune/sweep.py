"""Sweeps over the command line, without an account: `python -m pdprune.sweep SWEEP.yaml [--count N] [--seed S]`.

The file is one of Weights & Biases (`configs/sweeps/`), which `wandb sweep` and `wandb agent` read as well. Of it are
read here: `method` (`grid` or `random`), `parameters` (`value`, `values`, or `min` and `max` with a `distribution` of
`uniform`, `log_uniform_values` or `int_uniform`), and of `command` the flags of `pdprune.train fit`.

Trials are a function of the file and the seed. Each is a run folder of its own; one that is finished is not made again,
and one that was stopped goes on, so that the same command completes an interrupted sweep. The table goes to
`sweep.json` beside the folders.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdprune.circuits.findings import Audit
from pdprune.errors import UserError
from pdprune.files import write_atomically
from pdprune.run_folder import RunFolder
from pdprune.seeding import generator
from pdprune.train import main as train

RUN_ID = "${oc.env:WANDB_RUN_ID}"
"""What stands in the folder's name for the trial's."""
FOLDER = "--trainer.default_root_dir="
DISTRIBUTIONS: dict[str, Callable[[float, float, float], float]] = {
    "uniform": lambda low, high, u: low + u * (high - low),
    "log_uniform_values": lambda low, high, u: low * (high / low) ** u,
    "int_uniform": lambda low, high, u: min(int(high), int(low + u * (high + 1 - low))),
}
"""From a number drawn uniformly on [0,1)."""

Trial = dict[str, Any]
"""A value for every swept flag."""


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        method: `grid`, all combinations of values; or `random`, draws.
        parameters: by flag, what it may be.
        flags: those that all trials share.
        folder: where the trials' run folders lie.
    """

    method: str
    parameters: Mapping[str, Mapping[str, Any]]
    flags: tuple[str, ...]
    folder: Path

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a file.

        Raises:
            UserError: it cannot be read, or asks for what is not done here.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except OSError as error:
            raise UserError(f"sweep {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise UserError(f"sweep {path} is no valid YAML: {' '.join(str(error).split())}") from error
        for key in ("method", "parameters", "command"):
            if not isinstance(content, dict) or not content.get(key):
                raise UserError(f"sweep {path}: it has no {key}; see configs/sweeps/quickstart.yaml")
        if content["method"] not in ("grid", "random"):
            raise UserError(f"sweep {path}: method is {content['method']!r}; expected grid or random (others: wandb)")
        command = [str(part) for part in content["command"]]
        flags = [part for part in command if part.startswith("--")]
        folders = [part for part in flags if part.startswith(FOLDER) and part.endswith(f"/{RUN_ID}")]
        if "fit" not in command or len(folders) != 1:
            raise UserError(f"sweep {path}: command is not `pdprune.train fit` with {FOLDER}FOLDER/{RUN_ID}")
        folder = Path(folders[0].removeprefix(FOLDER).removesuffix(f"/{RUN_ID}"))
        for name, choice in content["parameters"].items():
            _check_parameter(path, name, choice, content["method"])
        return cls(content["method"], content["parameters"], tuple(f for f in flags if f not in folders), folder)

    def trials(self, count: int | None, seed: int = 0) -> list[Trial]:
        """The first `count` trials; of a grid all, of random draws ten, if none is said."""
        if self.method == "grid":
            combinations = itertools.product(*map(_values, self.parameters.values()))
            return [dict(zip(self.parameters, values, strict=True)) for values in combinations][:count]
        return [
            {name: _drawn(choice, seed, name, trial) for name, choice in self.parameters.items()}
            for trial in range(10 if count is None else count)
        ]


def _check_parameter(path: Path, name: str, choice: Any, method: str) -> None:
    match choice:
        case {"value": _} | {"values": [_, *_]}:
            return
        case {"min": int() | float() as low, "max": int() | float() as high} if method == "random":
            kind = choice.get("distribution", "uniform")
            if kind in DISTRIBUTIONS and low <= high and (low > 0 or kind != "log_uniform_values"):
                return
    raise UserError(
        f"sweep {path}: {name} is {choice}; expected value, values, or under random min and max with a distribution of "
        f"{', '.join(DISTRIBUTIONS)}"
    )


def _values(choice: Mapping[str, Any]) -> list[Any]:
    return list(choice["values"]) if "values" in choice else [choice["value"]]


def _drawn(choice: Mapping[str, Any], seed: int, name: str, trial: int) -> Any:
    u = float(torch.rand((), generator=generator(seed, "sweep", name, trial)))
    if "min" not in choice:
        values = _values(choice)
        return values[min(len(values) - 1, int(u * len(values)))]
    value = DISTRIBUTIONS[choice.get("distribution", "uniform")](choice["min"], choice["max"], u)
    return value if isinstance(value, int) else float(f"{value:.4g}")


def run(sweep: Sweep, trials: list[Trial]) -> list[dict[str, Any]]:
    """Make the trials that are not finished yet, one after another; what each of them found, the best first.

    Raises:
        SystemExit: a trial was stopped or refused; its one line has been printed.
    """
    rows = []
    for number, trial in enumerate(trials):
        folder = sweep.folder / f"{number:03d}"
        print(f"trial {number + 1} of {len(trials)}: {_told(trial)}", flush=True)
        _require_same(folder, trial)
        if not RunFolder(folder).is_finished:
            write_atomically(folder / "trial.json", json.dumps(trial).encode())
            swept = [f"--{name}={value}" for name, value in trial.items()]
            if status := train(["fit", *sweep.flags, *swept, f"{FOLDER}{folder}", "--ckpt_path=last"]):
                sys.exit(status)
        rows.append({"folder": str(folder), "parameters": trial, **_result(folder)})
        write_atomically(sweep.folder / "sweep.json", json.dumps(rows, indent=1).encode())
    return sorted(rows, key=_worth)


def _require_same(folder: Path, trial: Trial) -> None:
    """Refuse to go on with a folder that another sweep has left."""
    file = folder / "trial.json"
    if file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(trial)):
        raise UserError(f"run folder {folder} holds another trial; remove {folder.parent}, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _result(folder: Path) -> dict[str, Any]:
    """What is compared of a finished run: of a circuit its size and its worst case."""
    if not (folder / "audit.json").is_file():
        return {}
    audit = Audit.load(folder)
    return {"n_kept": audit.n_kept, "adversarial_loss": audit.adversarial.loss, "faithful": audit.faithful}


def _worth(row: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Faithful circuits first, the smallest of them ahead; then the rest, the least loss ahead."""
    faithful = row.get("faithful") is not False
    loss = row.get("adversarial_loss", math.inf)
    return (not faithful, row.get("n_kept", math.inf) if faithful else loss, loss)


def _told(trial: Trial) -> str:
    return ", ".join(f"{name.split('init_args.')[-1]} {value}" for name, value in trial.items())


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=SIMPLE_HEAD)
    for header in ("trial", "nodes kept", "worst case", "faithful", "folder"):
        shown.add_column(header, justify="left" if header in ("trial", "folder") else "right")
    for row in rows:
        loss, verdict = row.get("adversarial_loss"), {None: "-", True: "yes", False: "no"}[row.get("faithful")]
        cells = str(row.get("n_kept", "-")), "-" if loss is None else f"{loss:.3f}", verdict, row["folder"]
        shown.add_row(_told(row["parameters"]), *cells)
    return shown


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m pdprune.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, help="trials; all of a grid, 10 at random")
    parser.add_argument("--seed", type=int, default=0, help="of random draws")
    given = parser.parse_args(args)
    try:
        if given.count is not None and given.count < 1:
            raise UserError(f"--count is {given.count}; expected at least 1")
        sweep = Sweep.read(given.file)
        Console().print(table(run(sweep, sweep.trials(given.count, given.seed))))
    except UserError as error:
        print("pdprune: error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
