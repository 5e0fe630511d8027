"""Money: dollars per million tokens and joules per token against the speed that a user sees, a curve per chip and format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klab.harness.catalog.prices import Price, load_facility, load_prices
from klab.harness.report.estimates import ENDS, SLO_TPOT_S, SLO_TTFT_S, no_price, price_of, served, serving
from klab.harness.report.figures.style import INK, Figure, colours, digits, hollow, layout, log_axis, marks, short
from klab.harness.report.html import Markup, el
from klab.harness.report.subject import Story

if TYPE_CHECKING:
    import pandas as pd

TITLE = "What a million tokens cost, against speed for the user"
ENERGY = "What a token takes of energy, against speed for the user"
SYMBOLS = {"measured": "circle", "reference": hollow("circle"), "modelled": "x"}
DASHES = ("solid", "dash", "dot")
PALE = 0.35
SLOS = f"TPOT ≤ {SLO_TPOT_S * 1e3:g} ms and TTFT ≤ {SLO_TTFT_S:g} s"
# A range may reach beyond what its middle keeps.
JUDGED = "by the middle of the ranges"
USD = tuple(f"usd_per_mtok{end}" for end in ENDS)
JOULES = tuple(f"joules_per_token{end}" for end in ENDS)
SPEED = tuple(f"tokens_per_s_per_user{end}" for end in ENDS)
COLUMNS = (
    "chip", "model", "format", "gpus", "in_flight", *SPEED, *USD, "usd_per_gpu_hour", *(f"gpu_s_per_mtok{end}" for end in ENDS), *JOULES,
    "ttft_s", "tpot_s", "keeps_slos", "best", "measured_share", "reference_share", "modelled_share", "times_are", "joules_are",
)  # fmt: skip


def data(rows: Sequence[dict[str, Any]], prices: dict[str, Price | None]) -> pd.DataFrame:
    """The operating points of `estimates.serving` with what they cost at the middle of each chip's price (NaN without one): COLUMNS.

    The dollars' range is that of the times alone: the price is one figure, which the page's slider moves.
    """
    import pandas as pd

    found = pd.DataFrame(list(rows), columns=[name for name in COLUMNS if not name.startswith("usd")])
    mids = {chip: price.mid for chip, price in prices.items() if price}
    found["usd_per_gpu_hour"] = found["chip"].map(mids).astype("float64")
    for end, name in zip(ENDS, USD, strict=True):
        found[name] = found[f"gpu_s_per_mtok{end}"].astype("float64") * found["usd_per_gpu_hour"] / 3600
    return found[list(COLUMNS)]


def draw(frame: pd.DataFrame, prices: dict[str, Price | None], reading: str, left_out: Sequence[str]) -> Figure:
    """Dollars per million tokens; the page's script draws the same at other prices (script/derive_money.js)."""
    priced = frame[frame["usd_per_gpu_hour"].notna()].reset_index(drop=True)
    if priced.empty:
        why = " ".join(left_out) or "No price is known for these chips: profiles/prices shows how one is given."
        return Figure("money", TITLE, "Dollars per million tokens against the tokens per second that a user sees.", empty=why)
    words = " ".join([f"A slider sets a chip's price. {reading}", *left_out])
    shape = _shape(priced, USD, "$ per million tokens, prompt and generated", words)
    return Figure(
        "money",
        _title(TITLE, priced, "times_are"),
        f"{finding(priced)} {words}",
        _curves(priced, USD, "times_are", "$%{y:.3~g} per million tokens<br>%{text} by the doubt of the times"),
        shape,
        table=priced,
        derive="money",
        controls=sliders(list(dict.fromkeys(priced["chip"])), prices),
    )


def draw_energy(frame: pd.DataFrame, reading: str, left_out: Sequence[str]) -> Figure:
    """Joules of the boards per token."""
    if frame.empty:
        why = " ".join(left_out) or "Nothing is known of these chips."
        return Figure("energy-per-token", ENERGY, "Joules per token against the tokens per second that a user sees.", empty=why)
    words = " ".join([reading, *left_out])
    return Figure(
        "energy-per-token",
        _title(ENERGY, frame, "joules_are"),
        f"{finding_of_energy(frame)} {words}",
        _curves(frame, JOULES, "joules_are", "%{y:.3~g} J per token<br>%{text} by its doubt"),
        _shape(frame, JOULES, "joules per token, prompt and generated", words),
        table=frame,
    )


def finding(frame: pd.DataFrame) -> str:
    """Which chip is the cheapest within the SLOs, by how much, how sure, and at which price of the next one that ends.

    The page's script writes the same sentences at other prices: a change here is one there too.
    """
    best = _best(frame, USD[0])
    if not best:
        return f"Nothing shown keeps {SLOS}."
    first, *others = best
    dollars = tuple(first[name] for name in USD)
    said = [
        f"Within {SLOS} {first['chip']}{_in(frame)} {'is the cheapest:' if others else 'takes'} {_usd(dollars[0])} per million tokens "
        f"({_usd(dollars[1])} to {_usd(dollars[2])} by the doubt of its times) at {_usd(first['usd_per_gpu_hour'])} per GPU-hour."
    ]
    if others:
        second = others[0]
        less = 1 - dollars[0] / second[USD[0]]
        flip = second["usd_per_gpu_hour"] * dollars[0] / second[USD[0]]
        said.append(
            f"That is {_percent(less)} less than {second['chip']} ({_usd(second[USD[0]])}, {_usd(second[USD[1]])} to "
            f"{_usd(second[USD[2]])}, at {_usd(second['usd_per_gpu_hour'])}), which would be as cheap at {_usd(flip)} per GPU-hour; "
            f"{_overlap(dollars[2] < second[USD[1]])}"
        )
    said.append(f"Of the GPU time behind it {'; '.join(map(_rests_on, best))}.")
    return " ".join(said)


def finding_of_energy(frame: pd.DataFrame) -> str:
    """Which chip takes the fewest joules within the SLOs, and what that is in electricity."""
    best = _best(frame, JOULES[0])
    if not best:
        return f"Nothing shown keeps {SLOS}."
    first, *others = best
    least, low, high = (first[name] for name in JOULES)
    lead = "the least, " if others else ""
    said = [f"Within {SLOS} {first['chip']}{_in(frame)} takes {lead}{_figure(least)} J per token ({_span(low, high)})."]
    if others:
        second = others[0]
        said.append(
            f"That is {_percent(1 - least / second[JOULES[0]])} less than {second['chip']} ({_figure(second[JOULES[0]])} J, "
            f"{_span(second[JOULES[1]], second[JOULES[2]])}); {_overlap(high < second[JOULES[1]])}"
        )
    site = load_facility()
    kwh = site.usd_per_kwh
    usd = [least * each * site.pue.mid / 3.6 for each in (kwh.mid, kwh.low, kwh.high)]
    said.append(
        f"A million tokens take {_usd(usd[0])} of electricity for the boards ({_usd(usd[1])} to {_usd(usd[2])} at {kwh.low:g} to "
        f"{kwh.high:g} $/kWh, PUE {site.pue.mid:g})."
    )
    labels = ", ".join(f"{one['joules_are']} on {one['chip']}" for one in best)
    said.append(f"The joules of the boards are {labels}.")
    return " ".join(said)


def _in(frame: pd.DataFrame) -> str:
    """The format that the chips are compared in, where there are several."""
    return f" in {frame['format'].iloc[0]}" if frame["format"].nunique() > 1 else ""


def _overlap(apart: bool) -> str:
    return "their ranges do not overlap." if apart else "their ranges overlap, so the order is open."


def sliders(chips: Sequence[str], prices: dict[str, Price | None]) -> Markup:
    """A slider per chip over the price of a GPU-hour, with what is known of it."""
    lines = []
    for n, chip in enumerate(chips):
        price = prices.get(chip)
        if price is None:
            continue
        identity = f"money-price-{n}"
        known = [one for one in load_prices() if one.chip == chip]
        least = max(0.01, min(one.low for one in (price, *known)) / 2)
        ends = {"min": f"{least:.2f}", "max": f"{1.25 * price.high:.2f}", "step": "0.01", "value": f"{price.mid:.2f}"}
        said = [f"{_span_of(price)} ({', '.join(filter(None, (price.date, price.trust, price.source)))})"]
        said += [_span_of(one) for one in known if one.contract != price.contract]
        lines.append(
            el(
                "p",
                el("label", f"{chip}: $", el("output", ends["value"], for_=identity), " per GPU-hour ", for_=identity),
                el("input", id=identity, type="range", data_state=f"price.{chip}", **ends),
                el("span", f" {'; '.join(said)}", class_="note"),
                class_="price",
            )
        )
    return Markup("".join(lines))


def _span_of(price: Price) -> str:
    return f"{price.contract.replace('_', ' ')} {price.low:.2f}..{price.mid:.2f}..{price.high:.2f}"


def figures(story: Story, _: pd.DataFrame) -> list[Figure]:
    """Dollars and joules of the model asked for, on the GPUs of the page. None on CPUs alone."""
    if all(subject.chip == "cpu" or (subject.limits.chip and subject.limits.chip.kind == "cpu") for subject in story.subjects):
        return []
    asked = served(story)
    if not asked.plans and not asked.left_out:
        ask = "This needs a model: klab report --model NAME --chip h200 --chip b200 tells what its tokens cost on these chips."
        return [Figure("money", TITLE, "Dollars per million tokens against the tokens per second that a user sees.", empty=ask)]
    rows, left_out = serving(story)
    prices = {chip: price_of(chip) for chip in asked.plans}
    frame = data(rows, prices)
    without = [f"{no_price(chip)}, so it has no dollars." for chip, price in prices.items() if price is None]
    plan = next(iter(asked.plans.values()), None)
    reading = _reading(plan.model.name, plan.scenario.isl, plan.scenario.osl) if plan else ""
    reading += " Formats differ in accuracy, so chips are compared in one." if frame["format"].nunique() > 1 else ""
    return [draw(frame, prices, reading, [*left_out, *without]), draw_energy(frame, reading, left_out)]


def _reading(model: str, isl: int, osl: int) -> str:
    return (
        f"{model}, {isl:,} prompt and {osl:,} generated tokens; lower and further to the right is better. A point is the best number of "
        "GPUs and of requests in flight at its speed, the large one what klab cost chooses. "
        f"The dashed line is TPOT {SLO_TPOT_S * 1e3:g} ms; "
        f"pale points miss it or TTFT {SLO_TTFT_S:g} s, {JUDGED}. Full circle: 90% is measured; hollow: measured or published; "
        "cross: modelled. A band has all times at the low end on one edge and at the high end on the other."
    )


def _title(title: str, frame: pd.DataFrame, label: str) -> str:
    kinds = set(frame[label])
    return f"{title}: {kinds.pop()}" if len(kinds) == 1 else title


def _best(frame: pd.DataFrame, by: str) -> list[dict[Any, Any]]:
    """Of each chip the row with the least of those that keep the SLOs, in the first row's format; the least of all first."""
    if frame.empty:
        return []
    kept = frame[frame["keeps_slos"].astype(bool) & (frame["format"] == frame["format"].iloc[0])]
    found: list[dict[Any, Any]] = kept.sort_values(by, kind="stable").drop_duplicates("chip").to_dict("records")
    return found


def _curves(frame: pd.DataFrame, ends: Sequence[str], label: str, hover: str) -> list[dict[str, Any]]:
    """A line with marks per chip and format, and a band (of the first format) from the low to the high end of all times."""
    hues = colours(frame["chip"])
    first = frame["format"].iloc[0]
    formats = list(dict.fromkeys(frame["format"]))
    bands: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for chip, format in dict.fromkeys(zip(frame["chip"], frame["format"], strict=True)):
        part = frame[(frame["chip"] == chip) & (frame["format"] == format)]
        name = short(chip if len(formats) == 1 else f"{chip} {format}")
        rows = [int(n) for n in part.index]
        if format == first:
            band = {
                "type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": f"{hues[chip]}22", "line": {"width": 0},
                "x": digits([*part[SPEED[2]], *part[SPEED[1]][::-1]]), "y": digits([*part[ends[1]], *part[ends[2]][::-1]]),
                "hoverinfo": "skip", "showlegend": False, "name": name, "legendgroup": name, "meta": {"part": "band"},
            }  # fmt: skip
            bands.append(marks(band, [*rows, *reversed(rows)]))
        told = part.to_dict("records")
        line = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "legendgroup": name,
            "x": digits(part[SPEED[0]]),
            "y": digits(part[ends[0]]),
            "text": [_span(one[ends[1]], one[ends[2]]) for one in told],
            "customdata": [
                [one["gpus"], one["in_flight"], *digits([1e3 * one["ttft_s"], 1e3 * one["tpot_s"]]), short(_rests_on(one), 120), one[label]]
                for one in told
            ],
            "hovertemplate": "<b>%{fullData.name}</b>: %{customdata[0]} GPUs, %{customdata[1]} in flight<br>"
            f"%{{x:.3~g}} tokens/s per user<br>{hover}<br>"
            "TTFT %{customdata[2]:.3~g} ms, TPOT %{customdata[3]:.3~g} ms<br>%{customdata[5]}; %{customdata[4]}<extra></extra>",
            "line": {"color": hues[chip], "width": 1.5, "dash": DASHES[formats.index(format) % len(DASHES)]},
            "marker": {
                "color": hues[chip],
                "line": {"width": 0},
                "symbol": [SYMBOLS[one[label]] for one in told],
                "opacity": [1.0 if one["keeps_slos"] else PALE for one in told],
                "size": [13 if one["best"] else 7 for one in told],
            },
            "meta": {"part": "line"},
        }
        lines.append(marks(line, rows))
    return [*bands, *lines]


def _shape(frame: pd.DataFrame, ends: Sequence[str], title: str, words: str) -> dict[str, Any]:
    at = 1 / SLO_TPOT_S
    return layout(
        xaxis=log_axis("tokens per second that a user sees (1 / TPOT)", [*frame[SPEED[1]], *frame[SPEED[2]]]),
        yaxis=log_axis(title, [*frame[ends[1]], *frame[ends[2]]]),
        shapes=[{
            "type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": INK, "width": 1, "dash": "dash"},
        }],
        annotations=[{
            "x": math.log10(at), "xref": "x", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False,
            "text": f"TPOT {SLO_TPOT_S * 1e3:g} ms",
        }],
        meta={"words": words, "slos": SLOS},
        margin={"l": 64, "r": 16, "t": 28, "b": 56},
    )  # fmt: skip


def _rests_on(one: Mapping[Any, Any]) -> str:
    shares = (("measured", "measured"), ("reference", "published"), ("modelled", "modelled"))
    told = ", ".join(f"{_percent(one[f'{name}_share'])} {word}" for name, word in shares)
    return f"{one['chip']} {told}"


def _span(low: float, high: float) -> str:
    return f"{_figure(low)} to {_figure(high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _usd(value: float) -> str:
    return f"${_figure(value)}"


def _figure(value: float) -> str:
    """Three digits with their zeros, as the page's script writes them too."""
    if 1e-4 <= value < 999.5:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.0f}" if value >= 1 else f"{value:.7f}"
