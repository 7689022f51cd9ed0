"""What is known of the inputs of a matrix product: which can be used, and their second moments."""

from __future__ import annotations

import numpy as np

from calib.affine import Array
from calib.workers import over_samples

# Parts in which second moments are summed, side by side.
PARTS = 4


def usable(drawn: Array) -> Array:
    """Which of the inputs (groups, drawn, columns) have finite squares, as a mask (drawn,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        energy = np.einsum("gdk,gdk->d", drawn, drawn) * np.float32(drawn.shape[1])
    finite: Array = np.isfinite(energy)
    return finite


def usable_of(*drawn: Array) -> list[Array]:
    """Inputs that stand for one another, without those that cannot be used; ones where none can, as
    nothing is known of them then.
    """
    mask = np.logical_and.reduce([usable(x) for x in drawn])
    if mask.size and mask.all():
        return list(drawn)
    if mask.any():
        return [x[:, mask] for x in drawn]
    return [np.ones((len(x), 1, x.shape[2]), np.float32) for x in drawn]


def second_moments(drawn: Array, threads: int) -> Array:
    """E[x x'] over x drawn: float32 (groups, drawn, columns) to float64 (groups, columns,
    columns).
    """
    # Always the same parts, so that the sum does not depend on the number of workers.
    parts = np.array_split(drawn, PARTS, axis=1)

    def moments(index: int) -> Array:
        # In float64 the order in which a processor sums costs no digit that decides.
        x = parts[index].astype(np.float64)
        return np.asarray(np.matmul(x.transpose(0, 2, 1), x))

    total = np.zeros((len(drawn), drawn.shape[2], drawn.shape[2]))
    for part in over_samples(PARTS, moments, threads):
        total += part
    return np.asarray(total / drawn.shape[1])


def with_mean_squares(moments: Array, squares: Array) -> Array:
    """`moments` (groups, columns, columns) of some inputs with the mean `squares` (groups, columns)
    of all: how columns go together is taken over, how loud they are is not.
    """
    some = np.einsum("gkk->gk", moments)
    ratio = np.sqrt(np.divide(squares, some, out=np.zeros_like(some), where=some > 0))
    whole: Array = moments * ratio[:, :, None] * ratio[:, None, :]
    columns = np.arange(whole.shape[1])
    whole[:, columns, columns] = squares
    return whole
