"""What the page is about: per chip the results that stand, the choice made from them, and the limits of the chip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from klab.harness.choose.profile import Profile
from klab.harness.measure.stats import FLOOR_ROUNDS
from klab.harness.plan.rows import Plan
from klab.harness.report.limits import Limits
from klab.harness.store.query import latest
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import counting_rounds
from klab.harness.watch.series import Night
from klab.kernels.contract import canonical_json


@dataclass(frozen=True)
class Subject:
    """One chip on the page. `rows` stand (see `latest`) and are of the profile's device, or of none (they never reached one).

    `reference`: what was published of the chip; it never competes with `rows`. `light`: further standing rows of a large store, too far
    behind to be chosen, without their samples and traces. `left_out`: how many more of a large store's rows stand, by status. `recorded`:
    they ship with klab and are no measurements of this machine (see evidence_beside.py).
    """

    chip: str
    profile: Profile
    limits: Limits
    rows: tuple[Result, ...]
    reference: tuple[Result, ...] = ()
    light: tuple[Result, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    recorded: bool = False

    @property
    def title(self) -> str:
        """The chip's full name where it is known."""
        return self.limits.chip.title if self.limits.chip else self.profile.device or self.chip

    @cached_property
    def fine(self) -> list[Result]:
        """The rows with a checked time, of enough rounds for an interval."""
        ok = [row for row in self.rows if row.status is Status.OK and row.kind == "measured"]
        return [row for row in ok if row.median_us and math.isfinite(row.median_us) and len(counting_rounds(row)) >= FLOOR_ROUNDS]

    @property
    def failed(self) -> list[Result]:
        """The rows of trials that gave no time to rely on (published rows are no trials)."""
        rows = (*self.rows, *self.light)
        return [row for row in rows if row.status not in (Status.OK, Status.SCREENED) and row.kind != "reference"]

    def row_of(self, problem_key: str, kernel: str, config: Mapping[str, object]) -> Result | None:
        """The newest standing row of a chosen configuration."""
        return self._by_configuration.get((problem_key, kernel, canonical_json(config)))

    @cached_property
    def _by_configuration(self) -> dict[tuple[str, str, str], Result]:
        return {(row.problem_key, row.kernel, canonical_json(row.config)): row for row in self.fine}


@dataclass(frozen=True)
class Occurrence:
    """Where a problem occurs: in which model's step, as what, how often per step.

    `options`: what a verb that plans needs beside the model, the phase and a decode step's batch to get this very problem.
    """

    model: str
    phase: str
    batch: int
    role: str
    count: int
    options: str = field(default="", compare=False)


@dataclass(frozen=True)
class Story:
    """Everything that the page tells. `notes` come from the plan; `reading` names files that were not read whole.

    occurs: by problem key, where models of the catalog (or the one asked for) have the problem. plans: by chip, of the model asked for.
    nights: by chip, what `klab nightly` recorded, oldest first. before: by chip, the choices as they would be without the newest run;
    `newest_run` is that run by chip; `failed_before` by chip what ended how in earlier runs: (kernel, status) and (key of a trial, status).
    """

    subjects: tuple[Subject, ...]
    model: str = ""
    scenario: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    occurs: Mapping[str, tuple[Occurrence, ...]] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    nights: Mapping[str, tuple[Night, ...]] = field(default_factory=dict)
    before: Mapping[str, Profile] = field(default_factory=dict)
    newest_run: Mapping[str, str] = field(default_factory=dict)
    failed_before: Mapping[str, frozenset[tuple[str, str]]] = field(default_factory=dict)

    @property
    def statuses(self) -> Counter[str]:
        """How many standing rows ended how, those left out of the page included (published rows are no trials)."""
        found = Counter(row.status.value for subject in self.subjects for row in (*subject.rows, *subject.light) if row.kind != "reference")
        for subject in self.subjects:
            found.update(subject.left_out)
        return found


def tell(
    results: Iterable[Result],
    choice: Callable[[str, Sequence[Result]], Profile],
    limits: Callable[[str, str], Limits],
    *,
    chips: Sequence[str] = (),
    keys: Mapping[str, Collection[str]] | None = None,
) -> Story:
    """Arrange results by chip.

    choice(chip, rows): the profile made from a chip's rows. limits(chip, device). chips: only these, shown even without results
    (default: all that have any). keys: per chip the problems to show (default: all).
    """
    by_chip: dict[str, list[Result]] = {chip: [] for chip in chips}
    for row in results:
        if not chips or row.chip in by_chip:
            by_chip.setdefault(row.chip, []).append(row)
    subjects = []
    for chip, found in sorted(by_chip.items()):
        shown = (keys or {}).get(chip)
        rows = [row for row in found if shown is None or row.problem_key in shown]
        profile = choice(chip, rows)
        own = [row for row in rows if row.kind != "reference" and (not profile.device or row.device in (profile.device, ""))]
        published = [row for row in rows if row.kind == "reference"]
        subjects.append(Subject(chip, profile, limits(chip, profile.device), tuple(latest(own)), tuple(latest(published))))
    return Story(tuple(subjects))
