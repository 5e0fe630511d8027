"""The searched spaces of a story: of one kernel on one problem and chip, every configuration that was tried, with how it ended."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from klab.harness.measure.stats import FLOOR_ROUNDS
from klab.harness.report.frames import DIMS
from klab.harness.report.subject import Story
from klab.harness.store.result import Status
from klab.kernels.contract import Json, canonical_json

if TYPE_CHECKING:
    import pandas as pd

# Spaces that are drawn: those of which most configurations were tried.
SPACES = 12
# With fewer configurations there is no landscape to look at.
LEAST = 4
NEAR = 1.05
SPACE = ["chip", "problem_key", "kernel_id"]
# What makes two times of one configuration different facts; rounds, seeds and energy do not.
_CONDITIONS = ("l2", "threads", "sm_clock_mhz", "power_limit_w")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """A parameter that took several values. `codes`: per configuration the position of its value in `values`.

    Numbers are in ascending order (`ordered`); a configuration without the parameter has the value None, which comes first.
    """

    name: str
    values: tuple[Json, ...]
    codes: NDArray[np.intp]
    ordered: bool

    @property
    def words(self) -> list[str]:
        """The values as people read them."""
        return [word(value) for value in self.values]


@dataclass(frozen=True)
class Space:
    """`tried`: a row per configuration with the columns of `frames.standing`; its status is ok exactly where it has a time.

    constant: parameters that had one value. default_key: of the default configuration, "" where it is not known. left_out: rows that
    were taken under other conditions than most. others: spaces that are not drawn.
    """

    tried: pd.DataFrame
    parameters: tuple[Parameter, ...]
    constant: Mapping[str, Json]
    default_key: str = ""
    left_out: int = 0
    others: int = 0

    @property
    def name(self) -> str:
        """Problem, kernel and chip: what a menu calls it."""
        return f"{self.first('problem')}, {self.first('kernel')}, {self.first('chip')}"

    def first(self, column: str) -> Any:
        """A value that all configurations share."""
        return self.tried[column].iloc[0]

    @cached_property
    def fine(self) -> NDArray[np.bool_]:
        """Which configurations have a time."""
        return (self.tried["status"] == Status.OK.value).to_numpy(dtype=bool)

    @cached_property
    def times_us(self) -> Floats:
        """Medians of all configurations; NaN for those that failed."""
        return self.tried["median_us"].to_numpy(dtype=np.float64)

    @property
    def best(self) -> pd.Series[Any] | None:
        """The row with the lowest median; None when all failed."""
        return self.tried.iloc[int(np.nanargmin(self.times_us))] if self.fine.any() else None

    @cached_property
    def default(self) -> pd.Series[Any] | None:
        """The row of the default configuration, where it was tried and has a time."""
        found = self.tried[(self.tried["config_key"] == self.default_key) & self.fine]
        return found.iloc[0] if self.default_key and len(found) else None


def spaces(frame: pd.DataFrame, story: Story, limit: int = SPACES) -> list[Space]:
    """The spaces with most configurations tried, the largest first; those in which nothing varied are none.

    frame: of `frames.standing(story)`. Published rows, and rows that were only compiled or only checked, are left out.
    """
    rows = trials(frame)
    sizes = rows.drop_duplicates([*SPACE, "config_key"]).groupby(SPACE, sort=True).size()
    sizes = sizes[sizes >= LEAST].sort_values(ascending=False, kind="stable")
    groups = rows.groupby(SPACE, sort=False).indices
    looked_at = sizes.index[: 2 * limit]
    wanted = {key for name in looked_at for key in rows["key"].iloc[groups[name]]}
    known, conditions = defaults(story), conditions_of(story, wanted)
    found: list[Space] = []
    for place, name in enumerate(looked_at):
        if len(found) == limit:
            break
        own = rows.iloc[groups[name]]
        made = space(own, own["key"].map(conditions), known.get(name, ""), len(sizes) - place - 1)
        found += [made] if made.parameters and len(made.tried) >= LEAST else []
    return found


def trials(frame: pd.DataFrame) -> pd.DataFrame:
    """Own rows that gave a time, or failed."""
    untimed = (frame["status"] == Status.OK.value) & ~frame["median_us"].between(0, math.inf, inclusive="neither")
    return frame[(frame["origin"] == "measured") & ~untimed & (frame["status"] != Status.SCREENED.value)]


def space(rows: pd.DataFrame, conditions: pd.Series[Any], default_key: str = "", others: int = 0) -> Space:
    """The space of one kernel's rows on one problem and chip. conditions: per row, under what it was taken (any text; NaN is one too).

    Only rows under the conditions that most configurations have count, and failures under any. Of a configuration the chosen row counts,
    else its newest with enough rounds for an interval; a wrong answer outweighs any time, and any time outweighs another failure.
    """
    timed = rows["status"] == Status.OK.value
    under = conditions.fillna("")
    if timed.any():
        usual = under[timed].groupby(under[timed]).size().sort_values(ascending=False, kind="stable").index[0]
        kept = rows[~timed | (under == usual)]
    else:
        kept = rows
    rank = np.select(
        [(kept["status"] == Status.INCORRECT.value), (kept["status"] == Status.OK.value) & kept["chosen"],
         (kept["status"] == Status.OK.value) & (kept["rounds"] >= FLOOR_ROUNDS), (kept["status"] == Status.OK.value)],
        [0, 1, 2, 3], default=4,
    )  # fmt: skip
    ordered = kept.assign(_rank=rank).sort_values(["_rank", "recorded_at"], ascending=[True, False], kind="stable")
    tried = ordered.drop_duplicates("config_key").sort_index().drop(columns="_rank").reset_index(drop=True)
    varying, constant = parameters(tried["settings"].tolist())
    return Space(tried, varying, constant, default_key, len(rows) - len(kept), others)


def parameters(settings: Sequence[Mapping[str, Json]]) -> tuple[tuple[Parameter, ...], dict[str, Json]]:
    """(those that vary, the value of each that does not), in the order of the configurations' fields."""
    varying, constant = [], {}
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name) for one in settings]
        identities = [_identity(value) for value in values]
        first = dict(zip(reversed(identities), reversed(values), strict=True))
        known = {identity: _text(value) for identity, value in first.items()}
        texts = [known[identity] for identity in identities]
        distinct = dict(zip(texts, values, strict=True))
        if len(distinct) == 1:
            constant[name] = values[0]
            continue
        numbers = all(value is None or is_number(value) for value in distinct.values())
        order = sorted(distinct, key=lambda text: _place(distinct[text], numbers, text))
        at = {text: n for n, text in enumerate(order)}
        codes = np.array([at[text] for text in texts], dtype=np.intp)
        varying.append(Parameter(name, tuple(distinct[text] for text in order), codes, numbers))
    return tuple(varying), constant


def _text(value: Json) -> str:
    """One text per value, infinities included."""
    try:
        return canonical_json(value)
    except ValueError:
        return repr(value)


def is_number(value: Json) -> bool:
    """True for what has a place on an axis: no truth value, nothing that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _identity(value: Json) -> tuple[type, object]:
    """What tells values apart quickly; True is not 1."""
    return type(value), value if isinstance(value, str | int | float | None) else _text(value)


def _place(value: Json, numbers: bool, text: str) -> tuple[bool, float, str]:
    return value is not None, float(value) if numbers and value is not None else 0.0, "" if numbers else text


def word(value: Json) -> str:
    """A value of a parameter: `none` where a configuration does not have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else _text(value)


def defaults(story: Story) -> dict[tuple[str, str, str], str]:
    """(chip, problem key, kernel) -> the key of the default configuration, where the choice between kernels names it."""
    found = {}
    for subject in story.subjects:
        for choice in subject.profile.choices:
            default = choice.evidence.default
            if default is not None:
                found[(subject.chip, choice.wanted.problem_key, default.kernel)] = canonical_json(dict(default.config))
            elif "is the default" in choice.evidence.default_reason:
                found[(subject.chip, choice.wanted.problem_key, choice.kernel)] = canonical_json(dict(choice.config))
    return found


def conditions_of(story: Story, keys: Collection[str]) -> dict[str, str]:
    """By a row's key, of these: the policy's conditions that are not at their default, as text."""
    return {
        row.key: " ".join(f"{name}={row.policy[name]}" for name in _CONDITIONS if name in row.policy)
        for subject in story.subjects
        for rows in (subject.rows, subject.light)
        for row in rows
        if row.key in keys
    }


def dims(space: Space) -> dict[str, Any]:
    """The values of `frames.DIMS` that every mark of the space has; its status is each mark's own."""
    return {name: space.first(name) for name in DIMS if name != "status"}


def repeated(space: Space, count: int) -> dict[str, list[Any]]:
    """`dims` as columns of so many rows."""
    return {name: [value] * count for name, value in dims(space).items()}
