"""Non-negative least squares for many right-hand sides that are nearly alike."""

from __future__ import annotations

import numpy as np

# Exchanges of a whole block are tried this often without progress before one variable at a time is exchanged.
_PATIENCE = 3
# What rounding makes of a zero, of the largest of a side: no unknown goes back and forth for that.
_ROUNDING = 1e-10


def nnls_many(rows: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return x >= 0 [sides, unknowns] that makes |rows x - right|² least for each row of *right* [sides, rows].

    *rows* [rows, unknowns] has full column rank. The unknowns, and how the squares change with more of each, form a
    linear complementarity problem. It is solved for the mean of the sides and pivoted to that solution (principal
    pivot transform, Tucker 1960), so that of each side only what differs is left to solve. scipy.optimize.nnls gives
    the same one by one; importing it takes longer than all of this.
    """
    # The triangle of the columns changes no squares but by a constant, and leaves fewer rows.
    basis, square = np.linalg.qr(rows)
    gram, toward = square.T @ square, right @ basis @ square
    sizes = np.diag(gram)
    least = _ROUNDING * np.maximum(np.abs(toward).max(axis=1), 1e-300)
    every = np.ones(len(gram), bool)
    above, _ = _complementary(gram, -toward.mean(axis=0), every, np.ones(len(gram)), sizes, float(least.mean()))
    pivoted, start = _pivoted(gram, -toward, above)
    own, other = np.where(above, sizes, 1.0), np.where(above, 1.0, sizes)
    found = np.zeros_like(start)
    for side, rest in enumerate(start):
        exchanged, value = _complementary(pivoted, rest, rest < 0, own, other, least[side])
        found[side] = np.where(above != exchanged, np.maximum(value, 0.0), 0.0)
    return found


def _pivoted(gram: np.ndarray, start: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return slope = gram x + start, for each row of *start*, solved for x where *above*, for the slope elsewhere."""
    inverse = np.linalg.inv(gram[np.ix_(above, above)])
    across = inverse @ gram[np.ix_(above, ~above)]
    matrix, rest = np.empty_like(gram), np.empty_like(start)
    matrix[np.ix_(above, above)] = inverse
    matrix[np.ix_(above, ~above)] = -across
    matrix[np.ix_(~above, above)] = across.T
    matrix[np.ix_(~above, ~above)] = gram[np.ix_(~above, ~above)] - gram[np.ix_(~above, above)] @ across
    rest[:, above] = -start[:, above] @ inverse
    rest[:, ~above] = start[:, ~above] - start[:, above] @ across
    return matrix, rest


def _complementary(
    matrix: np.ndarray, start: np.ndarray, exchanged: np.ndarray, own: np.ndarray, other: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which of v in u = matrix v + start are above zero, so that u, v >= 0 and u v = 0, and these and u else.

    *exchanged* are those to begin with. What is above -*least* once multiplied by *own* (u) or *other* (v) counts as
    zero. Block principal pivoting (Júdice and Pires 1994; Kim and Park 2011, doi:10.1137/110821172).
    """
    fewest, patience = len(start) + 1, _PATIENCE
    while True:
        value = start.copy()
        if exchanged.any():
            columns = matrix[:, exchanged]
            more = np.linalg.solve(columns[exchanged], -start[exchanged])
            value += columns @ more
            value[exchanged] = more
        wrong = value * np.where(exchanged, other, own) < -least
        count = int(wrong.sum())
        if not count:
            return exchanged, value
        if count < fewest:
            fewest, patience = count, _PATIENCE
        elif patience:
            patience -= 1
        else:
            # One at a time, the last of them, is slower and always ends (Murty 1974).
            wrong[: np.flatnonzero(wrong)[-1]] = False
        exchanged = exchanged ^ wrong
