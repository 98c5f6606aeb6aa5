"""Non-negative least squares for many right-hand sides that are nearly alike."""

from __future__ import annotations

import numpy as np

# Exchanges of a whole block are tried this often without progress before one variable at a time is exchanged.
_PATIENCE = 3


def nnls_many(rows: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return x >= 0 [sides, unknowns] that makes |rows x - right|² least for each row of *right* [sides, rows].

    *rows* [rows, unknowns] has full column rank. Block principal pivoting (Júdice and Pires 1994; Kim and Park 2011,
    doi:10.1137/110821172); all sides for which the unknowns above zero of one that is solved are the right ones are
    solved with it at once. scipy.optimize.nnls gives the same one by one; importing it takes longer than all of this.
    """
    # The triangle of the columns changes no squares but by a constant, and leaves fewer rows.
    basis, square = np.linalg.qr(rows)
    right = right @ basis
    gram, toward = square.T @ square, right @ square
    found = np.zeros_like(right)
    left = np.arange(len(right))
    positive = np.ones(rows.shape[1], bool)
    pivot = _Pivot(square)
    while len(left):
        # On the way to one side's solution the others are not looked at.
        tried, slope = _tried(gram, toward[left[:1]], positive)
        exchanged = pivot.exchanged(positive, tried[0], slope[0], right[left[0]])
        if exchanged is not None:
            positive = exchanged
            continue
        tried, slope = _tried(gram, toward[left], positive)
        holds = np.logical_and((tried >= 0).all(axis=1), (slope >= 0).all(axis=1))
        # Rounding may leave the side that is solved a hair outside of its solution.
        holds[0] = True
        found[np.ix_(left[holds], positive)] = np.maximum(tried[holds], 0.0)
        pivot = _Pivot(square)
        left = left[~holds]
    return found


def _tried(gram: np.ndarray, toward: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the *positive* unknowns with all others at zero, and how the squares change with more of these.

    *gram* is that of the columns, *toward* the right-hand sides along them.
    """
    own = gram[:, positive]
    tried: np.ndarray = np.linalg.solve(own[positive], toward[:, positive].T).T
    return tried, tried @ own[~positive].T - toward[:, ~positive]


class _Pivot:
    """The way of one right-hand side from one set of unknowns above zero to the next."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self._squares = (rows**2).sum(axis=0)
        self._fewest, self._patience = rows.shape[1] + 1, _PATIENCE

    def exchanged(
        self, positive: np.ndarray, tried: np.ndarray, slope: np.ndarray, right: np.ndarray
    ) -> np.ndarray | None:
        """Return the next set, None where *tried* on *positive* is the solution."""
        # What rounding makes of a zero: no unknown goes back and forth for that.
        tolerance = 1e-10 * max(float(np.abs(right @ self._rows).max(initial=0.0)), 1e-300)
        wrong = np.zeros(len(positive), bool)
        wrong[positive] = tried * self._squares[positive] < -tolerance
        wrong[~positive] = slope < -tolerance
        count = int(wrong.sum())
        if not count:
            return None
        if count < self._fewest:
            self._fewest, self._patience = count, _PATIENCE
        elif self._patience:
            self._patience -= 1
        else:
            # One at a time, the last of them, is slower and always ends (Murty 1974).
            wrong[: np.flatnonzero(wrong)[-1]] = False
        return positive ^ wrong
