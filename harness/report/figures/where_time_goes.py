"""Where the time of a step goes: the chosen kernels' times, counted as the plan counts them, by operator and phase."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.choose.profile import Profile
from klab.harness.report.figures.style import PALETTE, Figure, axis, layout, plain
from klab.harness.report.subject import Story
from klab.harness.report.units import percent, sum_time, time

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Part:
    """One operator's part of one step, in microseconds and as a share of what was measured of the step."""

    phase: str
    batch: int
    operator: str
    us: float
    share: float

    @property
    def step(self) -> str:
        """The step's name."""
        return f"{self.phase}, batch {self.batch}"


def data(profile: Profile) -> list[Part]:
    """Per step and operator: the sum of count x median. Empty without a plan. Problems without a choice are not in it."""
    sums: dict[tuple[str, int, str], float] = defaultdict(float)
    for choice in profile.choices:
        for use in choice.wanted.uses:
            sums[(use.phase, use.batch, choice.wanted.operator)] += use.count * choice.evidence.median_us
    whole = {(step.phase, step.batch): step.us for step in profile.steps}
    return [Part(phase, batch, operator, us, us / whole[(phase, batch)]) for (phase, batch, operator), us in sorted(sums.items())]


def draw(parts: list[Part], profile: Profile, identity: str) -> Figure:
    """One bar per step, stacked by operator, as shares of what was measured of the step."""
    title = "Where the time of a step goes"
    caption = "Kernel time only: the medians of the chosen kernels times their launches per step. " + _left_out(profile)
    if not parts:
        return Figure(identity, title, caption, empty="This needs a model (--model) and at least one result for its problems.")
    totals = {f"{step.phase}, batch {step.batch}": sum_time(step.us, step.open) for step in profile.steps}
    order = [name for name in totals if any(part.step == name for part in parts)]
    labels = {name: plain(f"{name}: {totals[name]}") for name in order}
    traces: list[dict[str, Any]] = []
    for n, operator in enumerate(sorted({part.operator for part in parts})):
        mine = [part for part in parts if part.operator == operator]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plain(operator),
                "y": [labels[part.step] for part in mine],
                "x": [100 * part.share for part in mine],
                "text": [percent(part.share) for part in mine],
                "customdata": [time(part.us) for part in mine],
                "hovertemplate": "<b>%{fullData.name}</b><br>%{customdata}, %{text} of %{y}<extra></extra>",
                "textposition": "inside",
                "insidetextanchor": "middle",
                "marker": {"color": PALETTE[n % len(PALETTE)]},
            }
        )
    shape = layout(
        barmode="stack",
        showlegend=True,
        height=150 + 46 * len(order),
        xaxis=axis("% of the step's measured kernel time", range=[0, 100]),
        yaxis=axis("", categoryorder="array", categoryarray=[labels[name] for name in reversed(order)]),
    )
    return Figure(identity, title, caption, traces, shape)


def _left_out(profile: Profile) -> str:
    missing = [f"{step.phase} batch {step.batch}: {step.open}" for step in profile.steps if step.open]
    return f"Problems without a valid result are not in it ({', '.join(missing)})." if missing else ""


def figures(story: Story, _: pd.DataFrame) -> list[Figure]:
    """One per chip whose problems are those of a model."""
    found = [(n, subject.profile, data(subject.profile)) for n, subject in enumerate(story.subjects)]
    return [draw(parts, profile, f"time-{n}") for n, profile, parts in found if parts]
