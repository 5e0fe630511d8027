"""Two sides judged: what `klab compare` says of two sets of stored results, with the rows that its answers rest on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.choose.candidates import PREFERRED_L2
from klab.harness.report.frames import conditions
from klab.harness.store.query import age, standing_incorrect
from klab.harness.store.read import ReadReport
from klab.harness.store.result import Result, Status
from klab.harness.watch.compare_results import compare_rows, conditions_of
from klab.harness.watch.compare_rule import MARGIN, Found
from klab.harness.watch.compare_run import Request
from klab.harness.watch.comparison import ORDER, Comparison, Line
from klab.harness.watch.wording import joined, line, plural
from klab.kernels.contract import Json, canonical_json
from klab.kernels.errors import KlabError, UsageError

# A chip that no catalog has: between two chips neither an anchor nor a clock is common ground.
BETWEEN = "between-two-chips"
BEST = "best"
_TOKEN = re.compile("\x1e([0-9]+)\x1e")


@dataclass(frozen=True)
class Pair:
    """One answer. `a` and `b`: the newest row of what each side ran, None where it has none to show; `metered`: the newest with an energy,
    which is measured apart, and seldomer. kernel: "" for the best of each.
    """

    like: Result
    kernel: str
    found: Found
    a: Result | None
    b: Result | None
    metered: tuple[Result | None, Result | None] = (None, None)

    @property
    def problem(self) -> str:
        """The problem's label, and how it was measured where that was not with a cold cache on a device left as it is."""
        state = conditions(self.like)
        return self.like.problem_label + (f" ({state})" if state != PREFERRED_L2 else "")

    @property
    def energies(self) -> tuple[float, float] | None:
        """Joules per launch of A and B; None where either has none."""
        a, b = (row.energy_j if row else None for row in self.metered)
        return (a, b) if a and b else None

    @property
    def energy(self) -> tuple[float, float | None, float | None] | None:
        """(ratio of energy per launch, low, high) by the intervals of both rows; no ends where either row has none."""
        if self.energies is None:
            return None
        ratio = self.energies[1] / self.energies[0]
        ends = [end for row in self.metered if row for end in (row.energy_ci_low_j, row.energy_ci_high_j) if end and end > 0]
        return (ratio, ends[2] / ends[1], ends[3] / ends[0]) if len(ends) == 4 else (ratio, None, None)


@dataclass(frozen=True)
class Judged:
    """All answers in the order of `klab compare`, worst first. `alone`: (problem and kernel, side) that only one side has."""

    comparison: Comparison
    pairs: tuple[Pair, ...]
    alone: tuple[tuple[str, str], ...] = ()


def judge(a: Sequence[Result], b: Sequence[Result], *, between_chips: bool = False, best: bool = False, margin: float = MARGIN) -> Judged:
    """Every kernel of every problem that both sides have; with `best`, of each side the fastest kernel of every problem.

    between_chips: the sides are two chips, so that rows are matched without their chip, and neither anchors nor clocks correct anything.
    UsageError where the sides have nothing in common.
    """
    tokens: dict[str, int] = {}
    likes: list[Result] = []
    sides: list[list[Result]] = []
    for rows in (a, b):
        side = []
        for row in _bare(rows) if best else (row for row in rows if row.kind == "measured"):
            key = canonical_json([*_place(row, between_chips)])
            if key not in tokens:
                tokens[key] = len(likes)
                likes.append(row)
            side.append(_disguised(row, tokens[key], between_chips, best))
        sides.append(side)
    try:
        found = compare_rows(sides[0], sides[1], Request(margin=margin), (ReadReport(), ReadReport()), names=("A", "B"))
    except UsageError:
        raise UsageError(f"nothing to compare: {_have(a)} in A, {_have(b)} in B, and no kernel on a problem in common") from None
    newest = _newest(a, between_chips), _newest(b, between_chips)
    named = [(dataclasses.replace(one, name=_plain(one.name, likes, between_chips)), one) for one in found.lines]
    # What is alike but for its name came in the order of its label.
    named.sort(key=lambda both: (ORDER.index(both[0].found.answer), -(both[0].found.ratio or 0.0), both[0].name))
    pairs = tuple(_pair(one, likes, newest, between_chips, best) for _, one in named)
    alone = [(_plain(name, likes, between_chips), why) for name, why in found.alone]
    told = dataclasses.replace(found, lines=[one for one, _ in named], alone=alone)
    return Judged(told, pairs, tuple((name, why.removeprefix("only ")[:1]) for name, why in alone))


def _disguised(row: Result, token: int, between_chips: bool, best: bool) -> Result:
    """The row under a label by which its answer is found again; what the judge does not read is left out."""
    changes: dict[str, object] = {"problem_label": f"\x1e{token}\x1e", "power_trace": (), "clocks_mhz": ()}
    changes |= {"temperatures_c": (), "throttle_reasons": ()}
    if between_chips:
        changes |= {"chip": BETWEEN, "sm_clock_mhz": None}
    if row.ci_low_us is not None and row.ci_high_us is not None and (between_chips or not row.build.get("anchors")):
        changes |= {"samples_us": (), "marked": ()}
    if best:
        config = {"kernel": row.kernel, "config": dict(row.config), "source_digest": row.source_digest}
        changes |= {"kernel": f"{row.operator}/{BEST}", "config": config, "source_digest": "", "reason": f"{row.kernel}: {row.reason}"}
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def _bare(rows: Iterable[Result]) -> Iterator[Result]:
    """What may win: good rows of each kernel as it is now, without code that was wrong anywhere."""
    measured = sorted((row for row in rows if row.kind == "measured"), key=age)
    now = {(row.chip, row.problem_key, row.kernel): row.source_digest for row in measured}
    wrong = {(row.chip, row.kernel, row.source_digest) for row in standing_incorrect(measured)}
    for row in measured:
        if now[row.chip, row.problem_key, row.kernel] == row.source_digest and (row.chip, row.kernel, row.source_digest) not in wrong:
            yield row


# The newest row, and the newest with an energy.
Known = dict[tuple[str, ...], tuple[Result, Result | None]]


def _place(row: Result, between_chips: bool) -> tuple[str, str, str]:
    """(chip, problem, conditions): where kernels compete."""
    try:
        state = conditions_of(row)
    except (KlabError, TypeError, ValueError):
        state = ""  # such a row is left out, and the comparison's notes say so
    return "" if between_chips else row.chip, row.problem_key, state


def _newest(rows: Iterable[Result], between_chips: bool) -> Known:
    found: Known = {}
    fine = (row for row in rows if row.kind == "measured" and row.status is Status.OK and (row.median_us or 0.0) > 0)
    for row in sorted(fine, key=age):
        name = (*_place(row, between_chips), row.kernel, row.source_digest, canonical_json(row.config))
        found[name] = row, row if (row.energy_j or 0.0) > 0 else found.get(name, (None, None))[1]
    return found


def _pair(one: Line, likes: Sequence[Result], newest: tuple[Known, Known], between_chips: bool, best: bool) -> Pair:
    like = _like(one.name, likes)
    place = _place(like, between_chips)
    (a, metered_a), (b, metered_b) = (
        known.get((*place, *_ran(said, best)), (None, None)) for said, known in zip((one.a, one.b), newest, strict=True)
    )
    return Pair(like, "" if best else one.name.rpartition("\x1e ")[2], one.found, a, b, (metered_a, metered_b))


def _ran(said: Mapping[str, Json], best: bool) -> tuple[str, str, str]:
    """(kernel, source, configuration) that a side ran."""
    ran: Mapping[str, Json] = said.get("config", {}) if best else said
    return str(ran.get("kernel")), str(ran.get("source_digest")), canonical_json(ran.get("config"))


def _like(name: str, likes: Sequence[Result]) -> Result:
    token = _TOKEN.search(name)
    assert token is not None, "every row was given one"
    return likes[int(token[1])]


def _plain(name: str, likes: Sequence[Result], between_chips: bool) -> str:
    like = _like(name, likes)
    return " ".join([*([] if between_chips else [like.chip]), like.problem_label, name.rpartition("\x1e ")[2]])


def _have(rows: Sequence[Result]) -> str:
    fine = [row for row in rows if row.kind == "measured"]
    chips = joined(sorted({line(row.chip, 60) for row in fine})) or "no chip"
    return f"{plural(len(fine), 'measured result')} of {plural(len({row.problem_key for row in fine}), 'problem')} on {chips}"
