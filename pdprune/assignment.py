"""Which of the columns goes with which row, so that the matched entries sum to as much as possible."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def best_assignment(gain: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    """For every row the column that it is matched with, no column twice; optimal.

    Shortest augmenting paths with potentials (Kuhn 1955; Jonker and Volgenant 1987), in O(rows² · columns).

    Args:
        gain: `[rows, columns]`, finite, with no more rows than columns.
    """
    n_rows, n_columns = gain.shape
    assert n_rows <= n_columns, gain.shape
    cost = -np.asarray(gain, dtype=np.float64)
    of_row, of_column = np.zeros(n_rows), np.zeros(n_columns)  # potentials: cost - of_row - of_column >= 0
    row_of = np.full(n_columns, -1)
    for row in range(n_rows):
        distance = np.full(n_columns, np.inf)
        came_from = np.full(n_columns, -1)
        is_done = np.zeros(n_columns, dtype=bool)
        at_row, at_column, reached = row, -1, 0.0
        while True:
            through = reached + cost[at_row] - of_row[at_row] - of_column
            shorter = ~is_done & (through < distance)
            distance[shorter] = through[shorter]
            came_from[shorter] = at_column
            at_column = int(np.where(is_done, np.inf, distance).argmin())
            reached = distance[at_column]
            is_done[at_column] = True
            if row_of[at_column] < 0:
                break
            at_row = row_of[at_column]
        of_row[row] += reached
        passed = is_done & (row_of >= 0)
        of_row[row_of[passed]] += reached - distance[passed]
        of_column[is_done] -= reached - distance[is_done]
        while at_column >= 0:  # turn the path over: each row on it moves one column on
            before = came_from[at_column]
            row_of[at_column] = row_of[before] if before >= 0 else row
            at_column = before
    column_of = np.empty(n_rows, dtype=np.intp)
    matched = row_of >= 0
    column_of[row_of[matched]] = matched.nonzero()[0]
    return column_of
