"""Means over seeds with their 95 % intervals, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pdprune.circuits.hypotheses import NORMAL
from pdprune.seeding import generator

RESAMPLES = 2000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""


class Interval(NamedTuple):
    """A mean and its 95 % interval over `n` independent repetitions; without a width where there is only one."""

    mean: float
    low: float
    high: float
    n: int

    def within(self, least: float, most: float) -> Interval:
        """Cut at the bounds of what is measured: a share lies between 0 and 1."""
        return self._replace(low=max(least, self.low), high=min(most, self.high))

    def through(self, rising: Callable[[float], float]) -> Interval:
        """Of logarithms, by `exp`: the geometric mean and its interval."""
        return self._replace(mean=rising(self.mean), low=rising(self.low), high=rising(self.high))

    def show(self, digits: int = 2) -> str:
        """`0.93 [0.87, 0.99]`, or the mean alone where all repetitions agree or there is one."""
        mean, low, high = (f"{value:,.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if self.n < 2 or low == high else f"{mean} [{low}, {high}]"


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean over seeds and Student's interval around it: for few values that are about normal."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, mean, mean, len(values))
    half = _student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def _student(degrees: int) -> float:
    """The 97.5 % quantile; beyond the table by the first term of its expansion, which is right to 1 %."""
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else NORMAL + (NORMAL**3 + NORMAL) / (4 * degrees)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean and its percentile interval over resamples: for many values, of any distribution."""
    drawn = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(0, len(drawn), (RESAMPLES, len(drawn)), generator=generator(seed, "bootstrap"))
    low, high = torch.quantile(drawn[chosen].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(drawn.mean()), low, high, len(values))


def paired(pairs: Sequence[tuple[float, float]]) -> str:
    """Positive figures of pairs: the geometric mean of first over second, and in how many pairs the first is lower."""
    ratios = bootstrap([math.log(first / second) for first, second in pairs]).through(math.exp)
    return f"{ratios.show()}; {sum(first < second for first, second in pairs)}/{len(pairs)}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are figures."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
