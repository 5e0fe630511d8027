"""Columns: the rows of one table that differ from a problem in size alone, as arrays; a row becomes a point when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klab.harness.store.reference.families import PROVENANCE, Family, Mapped
from klab.harness.store.reference.points import Judge, Point
from klab.harness.store.reference.tables import Table, read_columns, usual_version
from klab.harness.store.reference.traps import HICCUP_SHARE, hiccups
from klab.kernels.contract import Chip, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Rows that tell what launches of a table take: as many, evenly spread.
SAMPLE = 400


class Columns:
    """`like`: the problem whose kind the rows are of. Of rows of one size the fastest is kept. Empty where the table holds none."""

    def __init__(self, chip: Chip, family: Family, table: Table, like: Problem) -> None:
        import numpy as np

        form = family.form_of(like)
        assert form is not None, "asked of a table that can hold such problems"
        names = tuple(dict.fromkeys((*family.form, *family.sizes, *PROVENANCE, "latency")))
        text = {*PROVENANCE, *(name for name in family.form if isinstance(form.get(name, ""), str))}
        default: dict[str, object] = {name: "" if name in text else 0 for name in names}
        raw = read_columns(table, names, form, default)
        self._family = family
        self._numbers = [name for name in (*family.form, *family.sizes) if name not in text]
        if family.by_kernel:
            raw = _of_operator(raw, family, like)
        timed = np.flatnonzero(raw["latency"] > 0)
        order = timed[np.argsort(raw["latency"][timed], kind="stable")]
        first, _ = _distinct([raw[name][order] for name in self._numbers])
        self._raw = {name: values[order[first]] for name, values in raw.items()}
        self._judge = Judge(chip, family, table, usual_version(table))
        if family.launch_floor_us is not None and len(self):
            step = max(1, len(self) // SAMPLE)
            seen = (self._judge.point(_row(self._raw, index)) for index in range(0, len(self), step))
            self._judge.learn(point for point in seen if isinstance(point, Point))
        _, self._groups = _distinct([self._raw[name] for name in self._numbers if name != family.more])
        self._slow = hiccups(self._groups, np.asarray(self._raw[family.more], dtype=float), 1e3 * self._raw["latency"])

    def __len__(self) -> int:
        return len(self._raw["latency"])

    def axes(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[rows, names]: the sizes of the problems along these of their axes."""
        import numpy as np

        return np.column_stack([np.asarray(self._family.axes[name](self._raw), dtype=float) for name in names])

    def point(self, index: int) -> Point | None:
        """One row; None for one that klab has no problem for, or that is a trap."""
        point = self._judge.point(_row(self._raw, index))
        return point if isinstance(point, Point) and not point.flag and not self._is_hiccup(index) else None

    def _is_hiccup(self, index: int) -> bool:
        """Whether a row that is no trap itself takes a fifth as long for more of the same."""
        import numpy as np

        if not self._slow[index]:
            return False
        amounts, times = self._raw[self._family.more], self._raw["latency"]
        more = (self._groups == self._groups[index]) & (amounts > amounts[index]) & (times < HICCUP_SHARE * times[index])
        found = (self._judge.point(_row(self._raw, int(other))) for other in np.flatnonzero(more))
        return any(isinstance(point, Point) and not point.flag for point in found)


def _row(raw: Mapping[str, Any], index: int) -> dict[str, Any]:
    values = {name: column[index] for name, column in raw.items()}
    return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}


def _of_operator(raw: Mapping[str, Any], family: Family, like: Problem) -> dict[str, Any]:
    """The rows of the operator of `like`, told by the names of their kernels."""
    import numpy as np

    _, first, numbers = np.unique(raw["kernel_source"].astype(str), return_index=True, return_inverse=True)
    kinds = [family.mapped(_row(raw, int(index))) for index in first]
    ours = [isinstance(kind, Mapped) and type(kind.one) is type(like) for kind in kinds]
    kept = np.array(ours, dtype=bool)[numbers] if len(first) else np.zeros(0, dtype=bool)
    return {name: column[kept] for name, column in raw.items()}


def _distinct(columns: Sequence[Any]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """(where each combination of values is for the first time, the number of each row's combination)."""
    import numpy as np

    order = np.lexsort(columns)
    new = np.zeros(len(order), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= np.diff(np.asarray(column)[order]) != 0
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = np.cumsum(new) - 1
    return np.sort(order[new]), groups
