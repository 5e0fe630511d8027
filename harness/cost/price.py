"""What a GPU-hour really costs: rent with its prepaid part, ownership with its capital, site and energy; and what moves the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from klab.harness.catalog.prices import (
    Facility,
    Figure,
    Ownership,
    Price,
    find_price,
    load_facility,
    load_ownership,
    load_prices,
    read_price,
)
from klab.harness.cost.ranges import Range
from klab.harness.cost.sensitivity import Function, Inputs, Swing, propagate
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

HOURS_PER_YEAR = 8760
HOURS_PER_MONTH = HOURS_PER_YEAR / 12
# A break-even above this share of the hours is as good as none; kept finite so that it can be printed and stored.
NEVER = 10.0
# Bounds of what a user may fix: shorter than a month, rarer than an hour a year and more than a milliard are slips of the pen.
LEAST_YEARS, LEAST_UTILISATION, MOST = 1 / 12, 1e-4, 1e9
# What a buyer fears of a renewal; one quote of 2026 was 1.94 times the price before (profiles/prices/ownership.toml).
DOUBLED = 2.0


def annuity(months: float, cost_of_capital: float) -> float:
    """Present value of one dollar at the end of each of `months` months; `cost_of_capital` per year, 0 allowed."""
    monthly = (1 + cost_of_capital) ** (1 / 12) - 1
    return months if monthly == 0 else (1 - (1 + monthly) ** -months) / monthly


def rent_usd_per_hour(at: Mapping[str, float]) -> float:
    """Dollars per used GPU-hour of a rental: the level monthly price whose present value equals what is paid, over `utilisation`.

    Of each contract of `term_years` the `prepaid_share` of its value is paid at its start, the rest monthly; contracts follow one another
    until `horizon_years`, all after the first at `renewal_factor` times `usd_per_gpu_hour`.
    """
    horizon, term, capital = at["horizon_years"], at["term_years"], at["cost_of_capital"]
    paid, start = 0.0, 0.0
    while start < horizon - 1e-9:
        years = min(term, horizon - start)
        price = at["usd_per_gpu_hour"] * (at["renewal_factor"] if start else 1.0)
        months = annuity(12 * years, capital)
        paid += (1 + capital) ** -start * price * (at["prepaid_share"] * 12 * years + (1 - at["prepaid_share"]) * months)
        start += years
    return paid / annuity(12 * horizon, capital) / at["utilisation"]


def own_parts(at: Mapping[str, float]) -> dict[str, float]:
    """Dollars per hour that an owned GPU stands there (used or not): capital (repaid with its cost over `life_years`, less what
    `residual_share` of the capex is left at the end), opex, site, energy.
    """
    capex = at["usd_per_gpu"] * (1 + at["beside_share"])
    years, capital = at["life_years"], at["cost_of_capital"]
    repaid = capex * (1 - at["residual_share"] * (1 + capital) ** -years) / annuity(12 * years, capital)
    return {
        "capital": repaid / HOURS_PER_MONTH,
        "opex": capex * at["opex_share"] / HOURS_PER_YEAR,
        "site": at["it_kw_per_gpu"] * at["colocation_usd_per_kw_month"] / HOURS_PER_MONTH,
        "energy": at["it_kw_per_gpu"] * at["load_share"] * at["pue"] * at["usd_per_kwh"],
    }


def own_usd_per_hour(at: Mapping[str, float]) -> float:
    """Dollars per used GPU-hour of an owned GPU."""
    return sum(own_parts(at).values()) / at["utilisation"]


@dataclass(frozen=True)
class Way:
    """One way to have a GPU: its effective dollars per used GPU-hour, what they consist of at the middle, and what moves them."""

    contract: str
    usd_per_gpu_hour: Range
    extreme: Range
    parts: Mapping[str, float]
    swings: tuple[Swing, ...]
    inputs: Inputs
    basis: str
    cost: Function = field(repr=False)
    notes: tuple[str, ...] = ()

    def at(self, utilisation: float) -> Range:
        """The same way where the GPU is used in another share of the hours; what is paid by the hour does not move."""
        if "utilisation" not in self.inputs:
            return self.usd_per_gpu_hour
        return propagate(self.cost, {**self.inputs, "utilisation": Range.exact(utilisation)}).likely

    def to_json(self) -> dict[str, Json]:
        """For --json."""
        return {
            "contract": self.contract,
            "usd_per_gpu_hour": self.usd_per_gpu_hour.to_json(),
            "extreme_usd_per_gpu_hour": self.extreme.to_json(),
            "parts_usd_per_hour": dict(self.parts),
            "inputs": {name: one.to_json() for name, one in self.inputs.items()},
            "swings": [swing.to_json() for swing in self.swings],
            "basis": self.basis,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class BreakEven:
    """`way` is the cheaper one where the GPU is used in more than this share of the hours; above 1: never. Capped at NEVER."""

    way: str
    against: str
    utilisation: Range

    def to_json(self) -> dict[str, Json]:
        """For --json."""
        return {"way": self.way, "against": self.against, "utilisation": self.utilisation.to_json(), "never": self.utilisation.mid > 1}


@dataclass(frozen=True)
class Terms:
    """What the user fixes; None: the shipped facts. Ranges in the units of the fields of Ownership and Facility."""

    utilisation: Range = field(default_factory=lambda: Range.exact(1.0))
    term_years: Range | None = None
    prepaid_share: Range | None = None
    cost_of_capital: Range | None = None
    renewal_factor: Range | None = None
    horizon_years: float | None = None
    usd_per_gpu: Range | None = None
    beside_share: Range | None = None
    life_years: Range | None = None
    residual_share: Range = field(default_factory=lambda: Range.exact(0.0))
    opex_share: Range | None = None
    it_kw_per_gpu: Range | None = None
    pue: Range | None = None
    usd_per_kwh: Range | None = None
    colocation_usd_per_kw_month: Range | None = None
    load_share: Range | None = None

    def __post_init__(self) -> None:
        """UsageError for what no contract and no machine has."""
        over, shares = ("usd_per_gpu", "it_kw_per_gpu", "renewal_factor"), ("prepaid_share", "residual_share", "load_share")
        for name, one in vars(self).items():
            option = f"--{OPTIONS.get(name, name.replace('_', '-'))}"
            if not isinstance(one, Range):
                continue
            if one.low < 0 or one.high > MOST:
                raise UsageError(f"{option} is not negative and at most {MOST:g}, not {one.low if one.low < 0 else one.high:g}")
            if one.low == 0 and name in over:
                raise UsageError(f"{option} is above 0, not 0")
            if one.high > 1 and name in (*shares, "utilisation"):
                raise UsageError(f"{option} is a share, at most 1, not {one.high:g}")
            if name == "utilisation" and one.low < LEAST_UTILISATION:
                raise UsageError(f"{option} is above 0: a share of the hours, at least {LEAST_UTILISATION:g}, not {one.low:g}")
            if name in ("term_years", "life_years") and one.low < LEAST_YEARS:
                raise UsageError(f"{option} is a number of years, at least a month (0.0834), not {one.low:g}")
            if name == "cost_of_capital" and one.high > 1:
                raise UsageError(f"{option} is a share per year (0.1 is 10%), not {one.high:g}")
        if self.pue and self.pue.low < 1:
            raise UsageError(f"--pue is facility power over IT power, at least 1, not {self.pue.low:g}")
        if self.horizon_years is not None and not LEAST_YEARS <= self.horizon_years <= 50:
            raise UsageError(f"--horizon is a number of years, at least a month (0.0834) and at most 50, not {self.horizon_years:g}")
        for name in ("term_years", "life_years"):
            one = getattr(self, name)
            if one and one.high > 50:
                raise UsageError(f"--{OPTIONS[name]} is a number of years, at most 50, not {one.high:g}")


# Names of the options of `klab price` where they are not the field's own.
OPTIONS = {
    "term_years": "term", "prepaid_share": "prepaid", "renewal_factor": "renewal", "usd_per_gpu": "capex", "beside_share": "beside",
    "life_years": "life", "residual_share": "residual", "opex_share": "opex", "it_kw_per_gpu": "it-kw",
    "colocation_usd_per_kw_month": "colocation", "load_share": "load",
}  # fmt: skip


def as_range(figure: Figure | Price) -> Range:
    """The bounds of a fact."""
    return Range(figure.low, figure.mid, figure.high)


def rented(price: Price, terms: Terms, facts: Ownership) -> Way:
    """Effective dollars of a rental at `price`. On demand there is no term: hours are paid when used, whatever the utilisation."""
    if price.contract == "on_demand":
        inputs: Inputs = {"usd_per_gpu_hour": as_range(price)}
        found = propagate(_list_price, inputs)
        note = "paid by the hour: assumes that GPUs can be had and given back at any time"
        notes = [note, *_guessed({"usd_per_gpu_hour": price}, inputs)]
        return Way(
            price.contract, found.likely, found.extreme, {"rent": price.mid}, found.swings, inputs, price.label, _list_price, tuple(notes)
        )
    term = terms.term_years or as_range(facts.term_years)
    inputs = {
        "usd_per_gpu_hour": as_range(price),
        "prepaid_share": terms.prepaid_share or as_range(facts.prepaid_share),
        "cost_of_capital": terms.cost_of_capital or as_range(facts.cost_of_capital),
        # The price holds for the usual term: another term is another quote, which only the user can bring.
        "term_years": terms.term_years or Range.exact(term.mid),
        "renewal_factor": terms.renewal_factor or as_range(facts.renewal_factor),
        "horizon_years": Range.exact(terms.horizon_years or term.mid),
        "utilisation": terms.utilisation,
    }
    found = propagate(rent_usd_per_hour, inputs)
    once = rent_usd_per_hour(_middle(inputs) | {"renewal_factor": 1.0, "utilisation": 1.0})
    later = rent_usd_per_hour(_middle(inputs) | {"utilisation": 1.0}) - once
    parts = {"rent": price.mid, "prepaid": once - price.mid} | ({"renewal": later} if later else {})
    notes = ["the prepaid part is taken as used up evenly over the term"]
    contracts = inputs["horizon_years"].mid / inputs["term_years"].mid
    if not math.isclose(contracts, round(contracts)):
        notes.append("the last contract is taken as one that ends with the horizon, as if it could be had for that long")
    notes += _guessed(
        {"usd_per_gpu_hour": price, **_not_given(terms, ("prepaid_share", "cost_of_capital", "renewal_factor"), facts)}, inputs
    )
    return Way(price.contract, found.likely, found.extreme, parts, found.swings, inputs, price.label, rent_usd_per_hour, tuple(notes))


def owned(chip: str, terms: Terms, facts: Ownership, facility: Facility) -> Way:
    """Effective dollars of an own GPU. UsageError where its price or its power is neither known nor given."""
    capex = terms.usd_per_gpu or _of_chip(chip, facts.usd_per_gpu, "street price", "--capex USD per GPU")
    # A site's all-in figure holds its cooling: rent is paid for the IT part, and energy gets its PUE back.
    power = terms.it_kw_per_gpu
    if power is None:
        power = _of_chip(chip, facility.provisioned_kw_per_gpu, "provisioned power", "--it-kw (IT power per GPU)") * (1 / facility.pue.mid)
    names = ("beside_share", "life_years", "cost_of_capital", "opex_share")
    sites = ("pue", "usd_per_kwh", "colocation_usd_per_kw_month", "load_share")
    inputs = {"usd_per_gpu": capex, "it_kw_per_gpu": power, "residual_share": terms.residual_share, "utilisation": terms.utilisation}
    inputs |= {name: getattr(terms, name) or as_range(getattr(facts, name)) for name in names}
    inputs |= {name: getattr(terms, name) or as_range(getattr(facility, name)) for name in sites}
    found = propagate(own_usd_per_hour, inputs)
    notes = tuple(_guessed(_not_given(terms, names, facts) | _not_given(terms, sites, facility), inputs))
    return Way("owned", found.likely, found.extreme, own_parts(_middle(inputs)), found.swings, inputs, "capex, site and energy",
               own_usd_per_hour, notes)  # fmt: skip


def break_even(way: Way, against: Way) -> BreakEven:
    """From which utilisation a way that is paid for all hours is cheaper than one that is paid for used ones only.

    Energy of an owned GPU is taken as drawn whether it is used or not (the load share says how much), so the answer is on the safe side.
    """
    inputs = {name: one for name, one in way.inputs.items() if name != "utilisation"} | {"against": against.usd_per_gpu_hour}
    found = propagate(lambda at: min(NEVER, way.cost({**at, "utilisation": 1.0}) / at["against"]), inputs)
    return BreakEven(way.contract, against.contract, found.likely)


def after_renewal(way: Way, factor: float) -> Range:
    """Effective dollars of a committed rental over two terms when the second costs `factor` times the first."""
    years = way.inputs["term_years"].mid
    two = {"renewal_factor": factor, "horizon_years": 2 * years, "term_years": years}
    return propagate(way.cost, {**way.inputs, **{name: Range.exact(value) for name, value in two.items()}}).likely


@dataclass(frozen=True)
class Answer:
    """What `klab price` says of one chip. `renewals`: effective dollars of a reservation over two terms, by the factor of the second."""

    ways: tuple[Way, ...]
    break_evens: tuple[BreakEven, ...]
    renewals: Mapping[float, Range]
    remarks: tuple[str, ...]
    prices: tuple[Price, ...]


def answer(chip: str, terms: Terms, root: Path | None = None, quotes: Mapping[str, str | None] | None = None) -> Answer:
    """Every way to have a chip that prices are known or given for. `quotes`: prices by contract that the user brings, else those of
    `root` (a folder or file of prices; None: the shipped ones). UsageError where there is no way at all.
    """
    facts, facility = load_ownership(_folder(root)), load_facility(_folder(root))
    prices = load_prices(root)  # a broken file is an error, a price that is not in it only a way less
    ways: list[Way] = []
    by_the_hour: Price | None = None
    missing: list[UsageError] = []
    for contract in ("on_demand", "reserved"):
        quote = (quotes or {}).get(contract)
        try:
            price = find_price(chip, contract, root) if quote is None else _quoted(quote, chip, contract, root)
            ways.append(rented(price, terms, facts))
            by_the_hour = price if contract == "on_demand" else by_the_hour
        except UsageError as error:
            # What is there twice is a fault of the file.
            if quote is not None or any((one.chip, one.contract) == (chip, contract) for one in prices):
                raise
            missing.append(error)
    try:
        ways.append(owned(chip, terms, facts, facility))
    except UsageError as error:
        missing.append(error)
    if not ways:
        raise missing[0]
    named = {way.contract: way for way in ways}
    evens = [break_even(way, named["on_demand"]) for way in ways if "on_demand" in named and way.contract != "on_demand"]
    renewals = {}
    if "reserved" in named:
        factors = (1.0, terms.renewal_factor.mid if terms.renewal_factor else DOUBLED)
        renewals = {factor: after_renewal(named["reserved"], factor) for factor in dict.fromkeys(factors)}
    today = date.today().isoformat()
    published = [one for one in prices if (one.chip, one.contract) == (chip, "owned")] if "owned" in named else []
    said = [f"owned: {one.low:.2f}..{one.high:.2f} per hour is published ({one.source}, {one.date})" for one in published]
    remarks = (*_compared(named, renewals), *said, *(f"{way.contract}: {note}" for way in ways for note in way.notes), *map(str, missing))
    # Nothing is computed of a price by the hour: it keeps its date and its confidence.
    kept = [replace(by_the_hour, date=by_the_hour.date or today)] if by_the_hour else []
    effective = [*kept, *(to_price(way, chip, today) for way in ways if way.contract != "on_demand")]
    return Answer(tuple(ways), tuple(evens), renewals, remarks, tuple(effective))


def _compared(named: Mapping[str, Way], renewals: Mapping[float, Range]) -> list[str]:
    """What a buyer asks next, in words."""
    said = []
    if "owned" in named and "reserved" in named:
        own, rent = named["owned"].usd_per_gpu_hour.mid, named["reserved"].usd_per_gpu_hour.mid
        said.append(f"owned costs {abs(1 - own / rent):.0%} {'less' if own < rent else 'more'} than reserved at the middle")
    if len(renewals) > 1:
        (_, as_before), (factor, then) = renewals.items()
        years = 2 * named["reserved"].inputs["term_years"].mid
        said.append(
            f"reserved over {years:g} years: {as_before.mid:.2f} $/used GPU-h when the renewal costs as much as the first term, "
            f"{then.mid:.2f} ({then.low:.2f}..{then.high:.2f}) when it costs {factor:g} times as much"
        )
    return said


def _quoted(quote: str, chip: str, contract: str, root: Path | None) -> Price:
    """A price that the user brings. UsageError for the known price of another contract: by another name it would be no fact."""
    price = read_price(quote, chip, root)
    if price.contract not in ("given", contract):
        raise UsageError(f"{quote} is the {price.contract} price of {chip}, where the {contract} one is asked for; give a figure")
    return replace(price, contract=contract)


def _folder(root: Path | None) -> Path | None:
    """Where other facts lie beside prices: a single file of prices has none."""
    return root if root and root.is_dir() else None


def to_price(way: Way, chip: str, date: str) -> Price:
    """A way as a price that the other verbs take: per paid hour, because they apply the utilisation themselves."""
    one = way.at(1.0)
    return Price(chip, way.contract, one.low, one.mid, one.high, date, f"klab price, from {way.basis}", "computed", "; ".join(way.notes))


def _list_price(at: Mapping[str, float]) -> float:
    return at["usd_per_gpu_hour"]


def _middle(inputs: Inputs) -> dict[str, float]:
    return {name: one.mid for name, one in inputs.items()}


def _of_chip(chip: str, table: Mapping[str, Figure], what: str, option: str) -> Range:
    if chip not in table:
        raise UsageError(f"no {what} for chip {chip} (there is {', '.join(table)}); give {option}")
    return as_range(table[chip])


def _not_given(terms: Terms, names: tuple[str, ...], facts: Ownership | Facility) -> dict[str, Figure]:
    return {name: getattr(facts, name) for name in names if getattr(terms, name) is None}


def _guessed(figures: Mapping[str, Figure | Price], inputs: Inputs) -> list[str]:
    """Which of these inputs are guesses or partly so, as a note; none: no note."""
    found = []
    for name, one in figures.items():
        if one.confidence == "guess" or one.guesses:
            ends = "" if one.confidence == "guess" else f" ({' and '.join(one.guesses)})"
            found.append(f"{name} {inputs[name].low:g}..{inputs[name].mid:g}..{inputs[name].high:g}{ends}")
    return [f"rests on guesses: {', '.join(found)}"] if found else []
