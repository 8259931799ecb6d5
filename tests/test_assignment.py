"""The best assignment is that of trying all of them."""

import itertools

import numpy as np
import pytest

from pdprune.assignment import best_assignment


@pytest.mark.parametrize("seed", range(40))
def test_is_the_best_of_all(seed: int) -> None:
    draws = np.random.default_rng(seed)
    n_rows = int(draws.integers(1, 5))
    shape = (n_rows, n_rows + int(draws.integers(0, 3)))
    gain = draws.normal(size=shape) if seed % 2 else draws.integers(0, 3, size=shape).astype(float)
    chosen = best_assignment(gain)
    assert len(set(chosen.tolist())) == n_rows
    best = max(
        sum(gain[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(shape[1]), n_rows)
    )
    assert gain[np.arange(n_rows), chosen].sum() == pytest.approx(best)


def test_finds_a_permutation_again() -> None:
    order = np.random.default_rng(0).permutation(60)
    noise = 0.4 * np.random.default_rng(1).random((60, 80))
    gain = noise.copy()
    gain[np.arange(60), order] += 1
    assert best_assignment(gain).tolist() == order.tolist()
