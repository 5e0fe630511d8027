"""Where the time of a step goes: by operator, prefill and decode, chip beside chip; what was not measured is shown as modelled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from klab.harness.catalog import find_model
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.plan import plan as make_plan
from klab.harness.plan.communication import KINDS, Collective
from klab.harness.plan.rows import Plan, Row
from klab.harness.report.estimates import estimator_of, fastest_published
from klab.harness.report.figures.style import INK, PALETTE, Figure, axis, digits, layout, marks, short
from klab.harness.report.subject import Story, Subject
from klab.harness.report.units import interval, percent, time
from klab.kernels.dtypes import SHORT, SIZE_BYTES
from klab.kernels.errors import KlabError

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Where the time of a step goes"
MEASURED, PUBLISHED, MODELLED = "measured", "reference", "not measured"
COLUMNS = (
    "chip", "model", "phase", "operator", "dtype", "kernel", "batch", "rests_on", "time_us", "time_low_us", "time_high_us", "share",
    "step_us", "measured_share", "launches", "how",
)  # fmt: skip
# Filled with the operator's colour; hatched; dotted.
PATTERNS = {MEASURED: "", PUBLISHED: "/", MODELLED: "."}
WORDS = {MEASURED: "measured", PUBLISHED: "published by others", MODELLED: "not measured: modelled"}
OTHERS = "#8a8a8a"
# Chips in one figure; models where none was asked for, those with most measured problems first; of these, steps with less measured are
# left out.
MOST_CHIPS, MOST_MODELS, LEAST_SHARE = 6, 4, 0.5
# A plan is worth an estimate where so much of some step's roofline time has a choice.
LEAST_KNOWN = LEAST_SHARE / 2
# Shares below this have no room for their number.
READABLE = 0.04
# The batch that the first sentence tells, or the next one to it.
TOLD_BATCH = 32


def data(planned: Iterable[tuple[Plan, Subject, Estimator]]) -> pd.DataFrame:
    """A row per chip, step, operator and what its time rests on: COLUMNS.

    MEASURED: count x median of the chosen kernels, with the sums of their intervals' ends. PUBLISHED: the fastest published row of the
    very problem. MODELLED: what nobody measured, as the estimator has it (neighbours, tables, the model), with its range. `share` is of
    `step_us`, the sum of all three; `measured_share` is the step's.
    """
    import pandas as pd

    rows = [
        one for plan, subject, estimator in planned for phase, batch in plan.steps for one in _step(plan, subject, estimator, phase, batch)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass
class _Part:
    """What one operator takes of one step, of one origin."""

    us: Range = ZERO
    launches: int = 0
    dtypes: dict[str, None] = field(default_factory=dict)
    kernels: dict[str, None] = field(default_factory=dict)
    how: dict[str, None] = field(default_factory=dict)


def _step(plan: Plan, subject: Subject, estimator: Estimator, phase: str, batch: int) -> list[dict[str, Any]]:
    """The rows of one step."""
    published = fastest_published(subject)
    choices = {choice.wanted.problem_key: choice for choice in subject.profile.choices}
    parts: dict[tuple[str, str], _Part] = defaultdict(_Part)
    for row in plan.step(phase, batch):
        choice = choices.get(row.problem.key) if row.problem else None
        us, how = ZERO, ""
        if choice is not None:
            low, high = choice.evidence.interval_us
            us, rests_on = Range(*sorted((low, choice.evidence.median_us, high))), MEASURED
        elif row.problem is not None and row.problem.key in published:
            us, rests_on = published[row.problem.key][1], PUBLISHED
        else:
            (us, how), rests_on = _estimated(row, plan, estimator), MODELLED
        part = parts[(row.operator, rests_on)]
        part.us += us * row.count
        part.launches += row.count
        if row.problem is not None:
            part.dtypes[row.problem.math_dtype or str(getattr(row.problem, "dtype", plan.dtype))] = None
        if choice is not None:
            part.kernels[choice.kernel.partition("/")[2]] = None
        if how:
            part.how[how] = None
    whole = sum(part.us.mid for part in parts.values())
    measured = sum(part.us.mid for (_, rests_on), part in parts.items() if rests_on == MEASURED)
    return [
        {
            "chip": subject.chip, "model": plan.model.name, "phase": phase, "operator": operator, "dtype": tuple(part.dtypes),
            "kernel": tuple(part.kernels), "batch": batch, "rests_on": rests_on, "time_us": part.us.mid, "time_low_us": part.us.low,
            "time_high_us": part.us.high, "share": part.us.mid / whole if whole else 0.0, "step_us": whole,
            "measured_share": measured / whole if whole else 0.0, "launches": part.launches, "how": "; ".join(list(part.how)[:2]),
        }
        for (operator, rests_on), part in parts.items()
    ]  # fmt: skip


def draw(frame: pd.DataFrame, identity: str, *, shares: bool, note: str = "") -> Figure:
    """A bar per step and chip, stacked by operator: shares of the step, or microseconds with prefill and decode on axes of their own."""
    model = str(frame["model"].iloc[0])
    groups = [frame] if shares else [part for part in (frame[frame["phase"] != "decode"], frame[frame["phase"] == "decode"]) if len(part)]
    hues = _hues(frame)
    bars = [_bars(group) for group in groups]
    space, whole = (0.16 if len(groups) > 1 else 0.0), sum(map(len, bars))
    shape = layout(
        barmode="stack",
        showlegend=True,
        uniformtext={"minsize": 9, "mode": "hide"},
        height=190 + 44 * whole + (60 if len(groups) > 1 else 0),
    )
    shape["legend"] = shape["legend"] | {"y": -90 / (shape["height"] - 120)}
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    top = 1.0
    for n, (group, held) in enumerate(zip(groups, bars, strict=True), 1):
        end = "" if n == 1 else str(n)
        title, scale = (
            ("% of the step's time", 0.01) if shares else ("ms per step", 1e3) if group["step_us"].max() >= 1e3 else ("µs per step", 1.0)
        )
        for operator, rests_on in product(hues, PATTERNS):
            part = group[(group["operator"] == operator) & (group["rests_on"] == rests_on)]
            if part.empty:
                continue
            values = (part["share"] if shares else part["time_us"]) / scale
            legend = {"name": short(operator) if hues[operator] != OTHERS else "other operators", "xaxis": f"x{end}", "yaxis": f"y{end}"}
            shown = {"legendgroup": legend["name"], "showlegend": legend["name"] not in named}
            named.add(legend["name"])
            traces.append(_stack(part, digits(values), hues[operator]) | legend | shown)
        height = (1.0 - space * (len(groups) - 1)) * len(held) / whole
        across = {"range": [0, 100]} if shares else {"rangemode": "tozero"}
        shape[f"xaxis{end}"] = axis(title, anchor=f"y{end}", **across)
        down = {"domain": [max(0.0, top - height), top], "categoryorder": "array", "categoryarray": held[::-1]}
        shape[f"yaxis{end}"] = axis("", anchor=f"x{end}", showgrid=False, **down)
        top -= height + space
    caption = f"{finding(frame)} {READING} {note}".strip()
    variant = f"{short(model)}: {'shares' if shares else 'times'}"
    return Figure(identity, TITLE, caption, [*traces, *_key(frame)], shape, table=frame, variant=variant)


def _stack(part: pd.DataFrame, values: list[float | None], hue: str) -> dict[str, Any]:
    """The bars of one operator and origin, one per step."""
    told = part.to_dict("records")
    operator, rests_on = told[0]["operator"], told[0]["rests_on"]
    how = "<br>%{customdata[3]}" if rests_on == MODELLED else ""
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [_label(one) for one in told],
        "x": values,
        "text": [percent(one["share"]) if one["share"] >= READABLE else "" for one in told],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "insidetextfont": {"color": "#fff" if rests_on == MEASURED else INK},
        "customdata": [[time(one["time_us"]), percent(one["share"]), _doubt(one), short(one["how"], 120)] for one in told],
        "hovertemplate": f"<b>{short(operator)}</b>, {WORDS[rests_on]}<br>%{{customdata[0]}}%{{customdata[2]}}, "
        f"%{{customdata[1]}} of the step{how}<extra></extra>",
        "marker": _filling(hue, rests_on),
    }
    return marks(trace, [int(at) for at in part.index])


def _filling(hue: str, rests_on: str) -> dict[str, Any]:
    """Measured: full. The others: a pattern on a pale ground, on which their numbers can be read."""
    if rests_on == MEASURED:
        return {"color": hue}
    pattern = {"shape": PATTERNS[rests_on], "bgcolor": f"{hue}40", "fgcolor": hue, "size": 7, "solidity": 0.18}
    return {"color": hue, "pattern": pattern, "line": {"color": hue, "width": 1}}


NOTHING = "none of it measured"
READING = (
    "Times are launches × median of the chosen kernels, without the gaps between launches. In brackets: all at the low and all at the high "
    "end of their 95% intervals, or of the range of what is published or modelled. Full: measured. Hatched: published by others. Dotted: "
    "not measured, drawn at its modelled time, so that nothing is left out."
)


def finding(frame: pd.DataFrame) -> str:
    """Of one step (a usual decode step, where some of one is measured) the two operators that take most of it on each chip, how long it
    takes and how much of that is measured.
    """
    held = list(zip(frame["phase"], frame["batch"], frame["measured_share"], strict=True))
    some = {(phase, batch) for phase, batch, share in held if share}
    steps = dict.fromkeys((str(phase), int(batch)) for phase, batch, _ in held)
    phase, batch = min(steps, key=lambda step: (step not in some, step[0] != "decode", abs(step[1] - TOLD_BATCH)))
    step = frame[(frame["phase"] == phase) & (frame["batch"] == batch)]
    said = []
    for chip, part in step.groupby("chip", sort=False):
        most = part.groupby("operator")["share"].sum().sort_values(ascending=False)
        told = ", ".join(f"{percent(share)} in {operator}" for operator, share in most.head(2).items())
        low, high = part["time_low_us"].sum(), part["time_high_us"].sum()
        span = f" ({interval(low, high)})" if high > low else ""
        share = part["measured_share"].iloc[0]
        said.append(
            f"on {chip} {told} of {time(part['step_us'].iloc[0])}{span}; {f'measured share {percent(share)}' if share else NOTHING}"
        )
    shares = frame.drop_duplicates(["chip", "phase", "batch"])["measured_share"]
    span = f"{percent(shares.min())} to {percent(shares.max())} is measured" if shares.max() else "nothing is measured"
    rest = f" Over all steps {span}." if len(shares) > len(said) else ""
    told = ". ".join(part[0].upper() + part[1:] if n else part for n, part in enumerate(said))
    return f"{frame['model'].iloc[0]}, {phase}, batch {batch}: {told}.{rest}"


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """Shares and times of the model asked for on all chips; without one, of the models of the catalog that enough was measured of."""
    subjects = {subject.chip: subject for subject in story.subjects}
    if story.plans:
        chips = [chip for chip in sorted(story.plans) if chip in subjects]
        left = f" Of {len(chips)} chips the first {MOST_CHIPS} are drawn." if len(chips) > MOST_CHIPS else ""
        chips = chips[:MOST_CHIPS]
        planned = "; ".join(dict.fromkeys(_scenario(story.plans[chip]) for chip in chips))
        note = f"As planned: {planned}.{left}"
        return _both(data(_with_estimators(story.plans[chip], subjects[chip]) for chip in chips), "time", note)
    models = Counter(
        model
        for models in frame.loc[frame["chosen"], ["problem_key", "model"]].drop_duplicates("problem_key")["model"]
        for model in models
        if model
    )
    note = f"At each chip's usual lengths, on one GPU; steps of which less than {percent(LEAST_SHARE)} is measured are left out."
    return [
        figure
        for n, (model, _) in enumerate(models.most_common(MOST_MODELS))
        for figure in _both(_enough(_planned(model, subjects.values())), f"time-{n}", note)
    ]


def _scenario(plan: Plan) -> str:
    s = plan.scenario
    gpus = "one GPU" if plan.chip.kind != "cpu" else "the CPU"
    format = s.quantization or SHORT.get(plan.dtype, plan.dtype)
    return f"{gpus if s.tp == 1 else f'{s.tp} GPUs'}, {format}, {s.isl:,} prompt and {s.osl:,} generated tokens"


def _both(frame: pd.DataFrame, identity: str, note: str) -> list[Figure]:
    if frame.empty:
        return []
    return [draw(frame, f"{identity}-shares", shares=True, note=note), draw(frame, f"{identity}-times", shares=False, note=note)]


def _with_estimators(plan: Plan, subject: Subject, *, published: bool = True) -> tuple[Plan, Subject, Estimator]:
    return plan, subject, estimator_of(subject, plan.chip, published=published)


def _planned(model: str, subjects: Iterable[Subject]) -> pd.DataFrame:
    """`data` of a catalog's model on the chips that have enough of its problems."""
    found: list[tuple[Plan, Subject, Estimator]] = []
    for subject in subjects:
        if subject.limits.chip is None or len(found) == MOST_CHIPS:
            continue
        try:
            plan = make_plan(find_model(model), subject.limits.chip)
        except KlabError:
            continue
        chosen = {choice.wanted.problem_key for choice in subject.profile.choices}
        if max((_known(plan.step(*step), chosen) for step in plan.steps), default=0.0) >= LEAST_KNOWN:
            found.append(_with_estimators(plan, subject, published=False))
    return data(found)


def _known(step: Sequence[Row], chosen: Collection[str]) -> float:
    """The share of a step's roofline time that has a choice."""
    whole = sum(row.count * row.bound_us for row in step)
    return sum(row.count * row.bound_us for row in step if row.problem and row.problem.key in chosen) / whole if whole else 0.0


def _enough(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["measured_share"] >= LEAST_SHARE].reset_index(drop=True)


def _estimated(row: Row, plan: Plan, estimator: Estimator) -> tuple[Range, str]:
    """Of one launch, and from what."""
    if row.problem is not None:
        one = estimator.launch(row.problem)
        return one.us, f"{one.how} ({one.origin})"
    if row.operator in KINDS:
        size = int(row.shape["rows"]) * int(row.shape["width"]) * SIZE_BYTES[plan.dtype]
        one = estimator.collective(Collective(row.operator, int(row.shape["gpus"]), size))
        return one.us, f"{one.how} ({one.origin})"
    return Range.exact(row.bound_us), f"its roofline alone: {row.why or 'klab has no such problem'}"


def _hues(frame: pd.DataFrame) -> dict[str, str]:
    """A colour per operator, those that take most time first."""
    order = frame.groupby("operator")["share"].sum().sort_values(ascending=False, kind="stable").index
    return {operator: PALETTE[n] if n < len(PALETTE) else OTHERS for n, operator in enumerate(order)}


def _bars(frame: pd.DataFrame) -> list[str]:
    """The names of the bars from top to bottom: steps as the plan has them, the chips of one next to one another."""
    steps = frame.drop_duplicates(["phase", "batch", "chip"]).sort_values(["batch", "chip"], kind="stable")
    steps = steps.sort_values("phase", key=lambda phases: phases == "decode", kind="stable")
    return [_label(one) for one in steps.to_dict("records")]


def _label(one: Mapping[Any, Any]) -> str:
    return f"{one['phase']}, batch {one['batch']}<br>{short(one['chip'], 18)}: {time(one['step_us'])}"


def _doubt(one: Mapping[Any, Any]) -> str:
    return f" ({interval(one['time_low_us'], one['time_high_us'])})" if one["time_high_us"] > one["time_low_us"] else ""


def _key(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """What the patterns say, for the legend."""
    there = [rests_on for rests_on in PATTERNS if rests_on in set(frame["rests_on"])]
    if there == [MEASURED]:
        return []
    return [
        {
            "type": "bar", "orientation": "h", "name": WORDS[rests_on], "legendgroup": rests_on,
            "x": [None], "y": [None], "hoverinfo": "skip",
            "marker": _filling(OTHERS, rests_on),
        }
        for rests_on in there
    ]  # fmt: skip
