"""The Estimator of a chip from what is there: own measurements, then published tables, then the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.choose.profile import read_profile
from klab.harness.cost import reference_source
from klab.harness.cost.estimate import Estimate, Estimator, Origin, Source
from klab.harness.cost.known import Interpolated, Known
from klab.harness.cost.own import facts_of, measured_facts
from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective, Table, read_table
from klab.harness.tune.objective import LATENCY, Objective, as_objective
from klab.kernels.contract import Chip, Problem
from klab.kernels.errors import UsageError


def estimator_for(
    chip: Chip,
    *,
    results: Sequence[Path] | None = None,
    profile: Path | None = None,
    reference: Path | bool | None = None,
    table: Path | None = None,
    objective: Objective | str = LATENCY,
) -> Estimator:
    """The best that is known of a chip.

    results: folders or files of own results (None: where klab keeps them; an empty list: none). profile: a chosen pack, whose choices stand
    before the results. reference: published tables (None: where they are installed, False: never, True: they must be there, or a folder
    of them). table: what `klab communication --out` wrote. objective: by which the kernels are chosen among own results.
    The estimator's `notes` say what was used. UsageError for a file that is none, or of another chip.
    """
    sources: list[Source] = []
    notes: list[str] = []
    known: dict[str, Known] = {}
    if results is None or results:
        facts, said = measured_facts(chip, results, as_objective(objective))
        known |= {fact.problem.key: fact for fact in facts}
        notes += said
    if profile is not None:
        known |= {fact.problem.key: fact for fact in _from_profile(chip, profile, notes)}
    if known:
        sources.append(Interpolated(known.values(), chip))
    else:
        notes.append(f"no measurement of klab's own of {chip.name} is here: klab run --chip {chip.name} makes them, on such a chip")
    if table is not None:
        sources.append(Links(_own_table(table, chip), chip))
        notes.append(f"collectives between the sizes of {table}")
    if reference is not False:
        sources += reference_source.sources_for(chip, reference, notes)
    return Estimator(chip, sources, notes)


@dataclass(frozen=True)
class Links:
    """A Source of collectives: what was measured between the GPUs of one machine."""

    table: Table
    chip: Chip

    def launch(self, problem: Problem) -> Estimate | None:
        """None: a table of collectives knows no launches."""
        return None

    def collective(self, one: Collective) -> Estimate | None:
        """At or between measured sizes of the same kind and group; None elsewhere."""
        near = [p for p in self.table.points if (p.kind, p.gpus) == (one.kind, one.gpus)]
        sizes = [p.message_bytes for p in near]
        if not sizes or not min(sizes) <= one.message_bytes <= max(sizes):
            return None
        found = self.table.expected(one, self.chip.link_gb_per_s)
        low = min(p.ci_low_us / p.median_us for p in near)
        high = max(p.ci_high_us / p.median_us for p in near)
        return Estimate(Range(low * found.us, found.us, high * found.us), Origin.MEASURED, f"measured with {found.how}")


def _from_profile(chip: Chip, path: Path, notes: list[str]) -> list[Known]:
    found = read_profile(path)
    if found is None:
        raise UsageError(f"{path} does not exist: klab choose makes profiles")
    if found.chip != chip.name:
        raise UsageError(f"{path} is a profile of {found.chip}, which says nothing of {chip.name}")
    notes.append(f"{len(found.choices)} choices of {path}")
    return facts_of(found.choices)


def _own_table(path: Path, chip: Chip) -> Table:
    table = read_table(path)
    table.require(chip)
    return table
