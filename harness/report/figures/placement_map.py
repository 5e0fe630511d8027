"""Placement: over prompt and generated tokens, which of the page's chips prefill and which decode, together or apart, at the least cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from klab.harness.report.estimates import BOARD, GENERATED, PROMPTS, SIZES, placements, price_of, served
from klab.harness.report.figures.money import JUDGED, SLOS
from klab.harness.report.figures.style import INK, PALETTE, Figure, axis, layout, marks, plain
from klab.harness.report.subject import Story

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Which chips should prefill and decode"
PURPOSE = "Which chips should prefill and which decode, by the lengths of prompts and answers."
COLUMNS = (
    "chip", "model", "format", "prompt_tokens", "generated_tokens", "wins", "settled", "replicas", "usd_per_mtok", "usd_per_mtok_low",
    "usd_per_mtok_high", "runner_up", "runner_up_more_share", "corners_of_times_share", "corners_of_all_share", "times_are",
    "measured_share", "reference_share", "nearest",
)  # fmt: skip
NOBODY = "none is in time"


def data(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row per workload of `estimates.placements`: COLUMNS. `wins` is NOBODY where nothing keeps the SLOs; `settled`: with each chip's
    times at either end the same roles cost least.
    """
    import pandas as pd

    found = pd.DataFrame(list(rows), columns=list(COLUMNS))
    found["chip"] = [tuple(chips) for chips in found["chip"]]
    found["wins"] = [wins or NOBODY for wins in found["wins"]]
    found["settled"] = [share == 1 for share in found["corners_of_times_share"]]
    numbers = [name for name in COLUMNS if name.startswith("usd") or name.endswith("share")]
    return found.astype(dict.fromkeys(numbers, "float64"))


def draw(frame: pd.DataFrame, prices: Sequence[str], left_out: Sequence[str]) -> Figure:
    """A cell per workload, coloured by who wins; pale where the doubt of the times may change that."""
    names = [name for name, _ in Counter(frame["wins"]).most_common() if name != NOBODY]
    hues = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(names)} | {NOBODY: "#8a8a8a"}
    records = frame.to_dict("records")
    at = {(one["generated_tokens"], one["prompt_tokens"]): n for n, one in enumerate(records)}
    columns = [isl for isl in PROMPTS if any(isl == one["prompt_tokens"] for one in records)]
    lines = [osl for osl in GENERATED if any(osl == one["generated_tokens"] for one in records)]
    traces = []
    for settled in (True, False):
        cells = [[at.get((osl, isl), -1) for isl in columns] for osl in lines]
        cells = [[n if n >= 0 and _solid(records[n]) == settled else -1 for n in line] for line in cells]
        if any(n >= 0 for line in cells for n in line):
            traces.append(_cells(cells, records, list(hues), hues, columns, lines, settled))
    keys = [name for name in hues if name in set(frame["wins"])]
    traces += [
        {"type": "scatter", "mode": "markers", "name": plain(name), "x": [None], "y": [None], "hoverinfo": "skip",
         "marker": {"symbol": "square", "size": 12, "color": hues[name]}}
        for name in keys
    ]  # fmt: skip
    shape = layout(
        height=170 + 76 * len(lines),
        showlegend=True,
        xaxis=axis("prompt tokens", type="category", showgrid=False, categoryorder="array", categoryarray=[_tokens(n) for n in columns]),
        yaxis=axis("generated tokens", type="category", showgrid=False, categoryorder="array", categoryarray=[_tokens(n) for n in lines]),
    )
    shape["legend"] = shape["legend"] | {"y": -0.3}
    reading = (
        f"{frame['model'].iloc[0]} in {frame['format'].iloc[0]}: what costs least per token and keeps {SLOS} {JUDGED}, in a large fleet "
        f"(replicas are counted to a fraction), each on the fewest GPUs that hold the model or {SIZES} times as many (at most {BOARD}). "
        "A → B: A prefills and B decodes; together: one pool does both. The number says how much more the next roles cost. Pale: with each "
        "chip's times at either end of their ranges other roles may cost less. At these prices, which no slider moves: "
        f"{'; '.join(prices)}."
    )
    caption = " ".join([finding(frame), reading, *left_out])
    label = set(frame["times_are"].dropna())
    return Figure("placement", f"{TITLE}: {label.pop()}" if len(label) == 1 else TITLE, caption, traces, shape, table=frame)


def finding(frame: pd.DataFrame) -> str:
    """How many workloads each arrangement wins, where the border lies at usual answers, and how sure that is."""
    counts = Counter(frame["wins"])
    won = [f"{name} wins {count}" for name, count in counts.most_common() if name != NOBODY]
    if not won:
        return f"Of {len(frame)} workloads no arrangement of these chips keeps {SLOS} in any."
    missed = [f"in {counts[NOBODY]} none is in time"] if counts[NOBODY] else []
    said = [f"Of {len(frame)} workloads {', '.join([*won, *missed])}."]
    decided = frame[frame["wins"] != NOBODY]
    usual = decided[decided["generated_tokens"] == _usual(decided)].sort_values("prompt_tokens")
    runs = [(name, list(part)) for name, part in groupby(usual.to_dict("records"), key=lambda one: one["wins"])]
    spans = [f"{name} {_stretch(part)}" for name, part in runs]
    said.append(f"With {_usual(decided):,} generated tokens: {', '.join(spans)} prompt tokens.")
    open_cells = int((~decided["settled"]).sum())
    if open_cells:
        which = "all" if open_cells == len(decided) else f"{open_cells}"
        said.append(f"In {which} of these {len(decided)} the doubt of the times may change who wins.")
    else:
        said.append("The doubt of the times changes none of them.")
    measured = decided["measured_share"]
    if measured.max() == 0 and decided["reference_share"].max() == 0:
        said.append("All times are modelled.")
    else:
        shared = measured + decided["reference_share"]
        said.append(f"Of the winners' GPU time {100 * shared.min():.0f}% to {100 * shared.max():.0f}% is measured or published.")
    return " ".join(said)


def figures(story: Story, _: pd.DataFrame) -> list[Figure]:
    """The map of the model asked for, where the page has two priced GPUs or more; else a sentence. None on CPUs, or without a model."""
    asked = served(story)
    if not asked.plans and not asked.left_out:
        return []
    rows, left_out = placements(story)
    if not rows:
        fewer = "This compares two kinds of GPU or more that have a price: klab report --model NAME --chip h200 --chip b200."
        return [Figure("placement", TITLE, PURPOSE, empty=" ".join(left_out) or fewer)]
    prices = [price.label for chip in asked.plans if (price := price_of(chip))]
    return [draw(data(rows), prices, left_out)]


def _solid(one: Mapping[Any, Any]) -> bool:
    return bool(one["settled"]) or one["wins"] == NOBODY


def _cells(
    cells: list[list[int]],
    records: Sequence[Mapping[Any, Any]],
    names: Sequence[str],
    hues: dict[str, str],
    columns: Sequence[int],
    lines: Sequence[int],
    settled: bool,
) -> dict[str, Any]:
    last = max(1, len(names) - 1)
    # Steps of colour: half a step around each whole number.
    scale = [[edge, hues[name]] for n, name in enumerate(names) for edge in (max(0.0, (n - 0.5) / last), min(1.0, (n + 0.5) / last))]
    trace = {
        "type": "heatmap",
        "x": [_tokens(n) for n in columns],
        "y": [_tokens(n) for n in lines],
        "z": [[None if n < 0 else names.index(records[n]["wins"]) for n in line] for line in cells],
        "zmin": 0,
        "zmax": last,
        "colorscale": scale,
        "showscale": False,
        "opacity": 1.0 if settled else 0.4,
        "xgap": 2,
        "ygap": 2,
        "text": [["" if n < 0 else _short(records[n]) for n in line] for line in cells],
        "texttemplate": "%{text}",
        "textfont": {"color": "#fff" if settled else INK},
        "customdata": [["" if n < 0 else _hover(records[n]) for n in line] for line in cells],
        "hovertemplate": "%{x} prompt and %{y} generated tokens<br>%{customdata}<extra></extra>",
        "hoverongaps": False,
    }
    return marks(trace, cells)


def _short(one: Mapping[Any, Any]) -> str:
    if one["wins"] == NOBODY:
        return "none in time" if one["nearest"] else "does not fit"
    more = one["runner_up_more_share"]
    return plain(one["wins"]) + (f"<br>+{100 * more:.1f}%" if more == more else "<br>alone in time")


def _hover(one: Mapping[Any, Any]) -> str:
    if one["wins"] == NOBODY:
        return plain(f"Nothing keeps {SLOS}; nearest: {one['nearest']}" if one["nearest"] else "Not one such request fits into the memory")
    runner = (
        f"{one['runner_up']} costs {100 * one['runner_up_more_share']:.1f}% more" if one["runner_up"] else "nothing else keeps the SLOs"
    )
    return "<br>".join(
        map(
            plain,
            (
                f"{one['wins']}: {one['replicas']}",
                f"${one['usd_per_mtok']:.3g} per million tokens ({one['usd_per_mtok_low']:.3g} to {one['usd_per_mtok_high']:.3g})",
                runner,
                f"wins {100 * one['corners_of_times_share']:.0f}% of the corners of the times, "
                f"{100 * one['corners_of_all_share']:.0f}% of those of times and prices",
                f"times {one['times_are']}: {100 * one['measured_share']:.0f}% measured, {100 * one['reference_share']:.0f}% published",
            ),
        )
    )


def _usual(frame: pd.DataFrame) -> int:
    """The middle one of the answers' lengths."""
    lengths = sorted(set(frame["generated_tokens"]))
    return int(lengths[len(lengths) // 2])


def _stretch(part: Sequence[Mapping[Any, Any]]) -> str:
    low, high = part[0]["prompt_tokens"], part[-1]["prompt_tokens"]
    return f"at {low:,}" if low == high else f"from {low:,} to {high:,}"


def _tokens(number: int) -> str:
    return f"{number:,}"
