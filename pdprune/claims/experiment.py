"""What an experiment is: cells that are computed one by one, each saved as soon as it is done.

A stopped run goes on where it was, and a table is made of whatever cells there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jsonargparse

from pdprune.circuits.circuit import installed_versions
from pdprune.errors import UserError
from pdprune.files import read_json, write_atomically
from pdprune.progress import telling

SCHEMA = "pdprune.claims.cell/1"

Cell = Mapping[str, Any]
"""The arguments that decide a cell's figures: names, numbers, flags, or lists of them."""
Figures = dict[str, Any]
"""What a cell came to, as JSON has it."""


class Result(NamedTuple):
    """A cell that is done."""

    cell: Cell
    figures: Figures
    cpu_seconds: float


def _anything_goes(settings: Any) -> None:
    """The requirement of an experiment that has none."""


@dataclass(frozen=True)
class Experiment:
    """A claim that is put to the test.

    Attributes:
        name: what the command line calls it.
        claim: what is claimed, in one sentence.
        settings: what may be changed, with the values that docs/claims.md reports: a frozen dataclass.
        small: the same with values that take seconds, for tests.
        cells: the cells that settings ask for, in order.
        run: computes one cell; called with the cell's entries as arguments.
        table: the results as a Markdown table.
        require: raises `UserError` for settings that no cell could be computed with, before the first one is.
    """

    name: str
    claim: str
    settings: Any
    small: Any
    cells: Callable[[Any], Sequence[Cell]]
    run: Callable[..., Figures]
    table: Callable[[Sequence[Result]], str]
    require: Callable[[Any], None] = _anything_goes

    def set_up(self, small: bool, changes: Mapping[str, Any]) -> Any:
        """The settings, or the small ones, with some of them changed.

        Raises:
            UserError: for a setting that there is not, or a value of another type than its own.
        """
        settings = self.small if small else self.settings
        known = [field.name for field in dataclasses.fields(settings)]
        for name in changes:
            if name not in known:
                raise UserError(f"claim {self.name}: no setting {name!r}; expected one of {', '.join(known)}")
        return dataclasses.replace(settings, **{name: self._typed(name, value) for name, value in changes.items()})

    def _typed(self, name: str, value: Any) -> Any:
        """The value as one of the setting's type."""
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{name}", type=get_type_hints(type(self.settings))[name])
        try:
            return parser.parse_object({name: value})[name]
        except jsonargparse.ArgumentError:
            usual = getattr(self.settings, name)
            raise UserError(f"claim {self.name}: {name} is {value!r}; expected values as in {usual!r}") from None


def require_known(setting: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a choice that there is not.

    Raises:
        UserError: for the first of `values` that is none of the `known`.
    """
    expected = list(known)
    for value in values:
        if value not in expected:
            raise UserError(f"{setting}: got {value!r}; expected some of {', '.join(expected)}")


def crossed(axes: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> list[Cell]:
    """A cell for every choice of one value an axis, those of the first axis next to one another.

    Args:
        axes: what is varied; the most important first, since files are named by it.
        shared: what is the same in all cells.
    """
    choices = itertools.product(*reversed(list(axes.values())))
    return [{**dict(zip(axes, reversed(chosen), strict=True)), **shared} for chosen in choices]


def shared_by(settings: Any, *names: str) -> dict[str, Any]:
    """The settings that all cells have alike, by name."""
    return {name: getattr(settings, name) for name in names}


def grouped(results: Sequence[Result], *names: str) -> dict[tuple[Any, ...], list[Figures]]:
    """The figures of those cells that agree in some entries, by these entries, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Figures]] = {}
    for result in results:
        groups.setdefault(tuple(result.cell[name] for name in names), []).append(result.figures)
    return groups


def run_cells(
    folder: Path, cells: Sequence[Cell], run: Callable[..., Figures], tell: Callable[[str], None] = print
) -> list[Result]:
    """Compute the cells that `folder` does not hold yet, and save each when it is done.

    Args:
        folder: holds one JSON file a cell.
        cells: what to compute.
        run: called with a cell's entries as arguments.
        tell: told a line for every cell that is computed.

    Returns:
        the results of all cells, in their order.
    """
    results = []
    with telling("cells") as work:
        for number, cell in enumerate(cells, start=1):
            result = _saved(folder, cell)
            if result is None:
                work(f"{number} of {len(cells)}, {_title(cell)}", (number - 1) / len(cells))
                start = time.process_time()
                figures = run(**cell)
                result = Result(cell, figures, round(time.process_time() - start, 1))
                _save(folder, result)
                tell(f"[{number}/{len(cells)}] {_title(cell)}: {result.cpu_seconds:.0f} CPU s")
            results.append(result)
    return results


def saved_cells(folder: Path, cells: Sequence[Cell]) -> list[Result]:
    """The results of those cells that are done, in their order."""
    found = (_saved(folder, cell) for cell in cells)
    return [result for result in found if result is not None]


def _saved(folder: Path, cell: Cell) -> Result | None:
    path = folder / _file_name(cell)
    if not path.is_file():
        return None
    content = read_json(path, SCHEMA)
    return Result(content["cell"], content["figures"], content["cpu_seconds"])


def _save(folder: Path, result: Result) -> None:
    content = {"schema": SCHEMA, **result._asdict(), "versions": installed_versions()}
    write_atomically(folder / _file_name(result.cell), (json.dumps(content, indent=1) + "\n").encode())


def _file_name(cell: Cell) -> str:
    """Readable, and another one as soon as any entry is another."""
    digest = hashlib.sha256(json.dumps(dict(cell), sort_keys=True).encode()).hexdigest()[:8]
    words = "".join(letter if letter.isalnum() else "-" for letter in _title(cell))
    return f"{words[:60].strip('-')}-{digest}.json"


def _title(cell: Cell) -> str:
    return " ".join(f"{value}" if isinstance(value, str) else f"{name} {value}" for name, value in cell.items())
