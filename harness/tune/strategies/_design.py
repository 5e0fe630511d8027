"""The first candidates of a search that knows nothing: spread over the space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats32 = NDArray[np.float32]


def spread(x: Floats32, chosen: Sequence[int], count: int) -> list[int]:
    """`count` rows of x, each as far as can be from those before it and from rows `chosen` (maximin). Without any chosen, row 0 is first.

    Each feature is scaled to unit variance, so that a parameter counts by how it varies among the candidates and not by its range.
    """
    scaled = x / np.sqrt(x.var(axis=0) + 1e-9)
    far = np.full(len(x), np.inf, dtype=np.float32)
    picked: list[int] = []

    def near(row: int) -> None:
        np.minimum(far, ((scaled - scaled[row]) ** 2).sum(axis=1), out=far)
        far[row] = -1

    for row in chosen:
        near(row)
    while len(picked) < count and (far >= 0).any():
        row = int(np.argmax(far))
        picked.append(row)
        near(row)
    return picked
