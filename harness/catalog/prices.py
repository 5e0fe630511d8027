"""What a GPU-hour, a kilowatt-hour and a GPU cost: dated, sourced figures from profiles/prices, never constants of the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date as day
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from klab.harness.catalog.models import PROFILES
from klab.harness.catalog.toml_file import read_toml
from klab.kernels.errors import UsageError

CONTRACTS = ("on_demand", "reserved", "owned")
# Files of a folder of prices that hold other facts.
FACILITY, OWNERSHIP = "facility.toml", "ownership.toml"
ENDS = ("low", "mid", "high")
_PRICE_FIELDS = ("chip", "contract", "usd_per_gpu_hour", "date", "source", "confidence", "guesses", "note")
_FIGURE_FIELDS = (*ENDS, "source", "confidence", "guesses", "note")
# Dollars per GPU-hour outside these are a slip of the pen, and no sum of them can be trusted.
LEAST_USD, MOST_USD = 1e-6, 1e6
# No fact of money or power is larger: the same for a figure of any unit.
MOST = 1e9
_FORMS = "dollars per GPU-hour (2.5, or low,mid,high: 2,2.5,3), a contract or a file of prices"


@dataclass(frozen=True)
class Price:
    """Dollars per GPU-hour of one chip under one contract, at a date.

    `contract`: "on_demand" (by the hour), "reserved" (a term of years, partly prepaid), "owned" (what an owner's hour costs, in
    service or not). `confidence`: "published" (the source prints these figures), "secondary" (read about, not traced), "given" (by the
    user), "computed" (by `klab price`). `guesses`: which of low, mid and high the source does not have.
    """

    chip: str
    contract: str
    low: float
    mid: float
    high: float
    date: str
    source: str
    confidence: str
    note: str = ""
    guesses: tuple[str, ...] = ()

    @property
    def trust(self) -> str:
        """`secondary, mid guessed`."""
        return _trust(self)

    @property
    def label(self) -> str:
        """`h200 on_demand 2.25..4.24..8.00 $/GPU-h (2026-11, secondary, mid guessed)`."""
        span = f"{self.mid:.2f}" if self.low == self.high else f"{self.low:.2f}..{self.mid:.2f}..{self.high:.2f}"
        return f"{self.chip} {self.contract} {span} $/GPU-h ({', '.join(filter(None, (self.date, self.trust)))})"


@dataclass(frozen=True)
class Figure:
    """One fact with its bounds and its source; the unit is in the name it is kept under. `guesses`: as of a Price."""

    low: float
    mid: float
    high: float
    source: str
    confidence: str = ""
    note: str = ""
    guesses: tuple[str, ...] = ()

    @property
    def trust(self) -> str:
        """`secondary, low and high guessed`."""
        return _trust(self)


@dataclass(frozen=True)
class Facility:
    """Where GPUs stand. `provisioned_kw_per_gpu`: by chip, all in (host, network, cooling), what a site must hold ready for one GPU.

    `pue`: facility power over IT power. `usd_per_kwh`: energy. `colocation_usd_per_kw_month`: rent of a site per kW of IT power, energy
    apart. `load_share`: what stands there draws on average over what is provisioned for it.
    """

    provisioned_kw_per_gpu: Mapping[str, Figure]
    pue: Figure
    usd_per_kwh: Figure
    colocation_usd_per_kw_month: Figure
    load_share: Figure

    def provisioned_kw(self, chip: str) -> float | None:
        """All-in kW per GPU of a chip, or None where nobody states it."""
        found = self.provisioned_kw_per_gpu.get(chip)
        return found.mid if found else None


@dataclass(frozen=True)
class Ownership:
    """What owning takes. `usd_per_gpu`: by chip, the street price with its share of the server. `beside_share`: what network, storage
    and racks add to that.
    `life_years`: until written off. `cost_of_capital`: per year. `opex_share`: staff, spares and insurance per year over the capex.
    Of rented GPUs: `prepaid_share` of the contract's value, `term_years`, `renewal_factor`: what a renewal is quoted at over the old price.
    """

    usd_per_gpu: Mapping[str, Figure]
    beside_share: Figure
    life_years: Figure
    cost_of_capital: Figure
    opex_share: Figure
    prepaid_share: Figure
    term_years: Figure
    renewal_factor: Figure


def load_prices(root: Path | None = None) -> tuple[Price, ...]:
    """Every price of a folder or a file (default: profiles/prices), by chip and contract. UsageError for a broken file or none."""
    root = root or PROFILES / "prices"
    if root.is_dir():
        paths = [path for path in sorted(root.glob("*.toml")) if path.name not in (FACILITY, OWNERSHIP)]
        if not paths:
            raise UsageError(f"{root} holds no prices; profiles/prices/h200.toml shows how a file of them looks")
    else:
        paths = [root]
    found = [price for path in paths for price in _prices_in(path)]
    return tuple(sorted(found, key=lambda one: (one.chip, CONTRACTS.index(one.contract), one.date)))


def find_price(chip: str, contract: str, root: Path | None = None) -> Price:
    """The newest price of a chip under a contract. UsageError names the prices that there are."""
    wanted, kind = chip.strip().lower(), _kind(contract)
    if kind not in CONTRACTS:
        raise UsageError(_no_contract(contract))
    prices = load_prices(root)
    found = [one for one in prices if (one.chip, one.contract) == (wanted, kind)]
    newest = [one for one in found if one.date == found[-1].date]
    if len(newest) == 1:
        return newest[0]
    if newest:
        raise UsageError(
            f"there are {len(newest)} {kind} prices of {newest[0].date} for {wanted} ({'; '.join(p.source for p in newest)}): keep one"
        )
    own = dict.fromkeys(one.contract for one in prices if one.chip == wanted)
    known = f"for {wanted} there is {', '.join(own)}" if own else f"there are prices for {', '.join(dict.fromkeys(p.chip for p in prices))}"
    raise UsageError(f"no {kind} price for chip {wanted}; {known}. Give dollars per GPU-hour (2.5, or low,mid,high) or a file of prices")


def read_price(text: str, chip: str, root: Path | None = None) -> Price:
    """A price as a user gives it: the name of a contract (of the prices of `root`), `2.5`, `2,2.5,3` (dollars per GPU-hour: low, mid,
    high) or the path of a file or folder of prices (`FILE:CONTRACT` to pick one; else the file's only one for this chip). UsageError for
    anything else.
    """
    text = text.strip()
    if not text:
        raise UsageError(f"an empty price: give {_FORMS}")
    if _kind(text) in CONTRACTS:
        return find_price(chip, text, root)
    if re.fullmatch(r"[\s\d.,eE+-]*\d[\s\d.,eE+-]*", text):
        return _given(text, chip)
    path_text, colon, contract = text.rpartition(":")
    named = Path(path_text if colon else text).expanduser()
    if named.suffix == ".toml" or _there(named):
        if colon:
            return find_price(chip, contract, named)
        own = [one for one in load_prices(named) if one.chip == chip.strip().lower()]
        if len({one.contract for one in own}) > 1:
            kinds = " or ".join(f"{text}:{one.contract}" for one in own)
            raise UsageError(f"{text} has several prices for {chip}; say {kinds}")
        return find_price(chip, own[-1].contract if own else CONTRACTS[0], named)
    raise UsageError(f"{_no_contract(text)}. A price is {_FORMS}")


def to_toml(prices: Iterable[Price]) -> str:
    """The text of a file of prices that `load_prices` reads back."""
    tables = []
    for one in prices:
        figures = f"{{ low = {one.low!r}, mid = {one.mid!r}, high = {one.high!r} }}"
        words = {"date": one.date, "source": one.source, "confidence": one.confidence, "note": one.note}
        lines = [f"chip = {_quoted(one.chip)}", f"contract = {_quoted(one.contract)}", f"usd_per_gpu_hour = {figures}"]
        lines += [f"{name} = {_quoted(text)}" for name, text in words.items() if text]
        lines += [f"guesses = {json.dumps(one.guesses)}"] if one.guesses else []
        tables.append("\n".join(["[[price]]", *lines, ""]))
    return "\n".join(tables)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML knows JSON's strings but for escaped pairs of surrogates


def _given(text: str, chip: str) -> Price:
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 3):
        raise UsageError(f"a price is dollars per GPU-hour, one figure (2.5) or low,mid,high (2,2.5,3), not {text!r}")
    if not all(LEAST_USD <= part <= MOST_USD for part in parts):
        raise UsageError(f"a price per GPU-hour is a positive number of dollars, {LEAST_USD:g} to {MOST_USD:g}, not {text}")
    low, mid, high = parts if len(parts) == 3 else parts * 3
    if not low <= mid <= high:
        raise UsageError(f"a price is low,mid,high in this order, not {text}")
    return Price(chip.strip().lower(), "given", low, mid, high, "", "given by you", "given")


@cache
def load_facility(root: Path | None = None) -> Facility:
    """Power and site facts of a folder (its facility.toml, else the shipped one), or of such a file. UsageError for a broken file."""
    path, data = _facts(root, FACILITY)
    names = ("pue", "usd_per_kwh", "colocation_usd_per_kw_month", "load_share")
    _only(path, data, ("provisioned_kw_per_gpu", *names))
    facility = Facility(_by_chip(path, data, "provisioned_kw_per_gpu"), **{name: _figure(path, name, data.get(name)) for name in names})
    if facility.pue.low < 1:
        raise UsageError(f"{path}: pue is facility power over IT power, at least 1, not {facility.pue.low:g}")
    _at_most_1(path, load_share=facility.load_share)
    return facility


@cache
def load_ownership(root: Path | None = None) -> Ownership:
    """Capex and terms of a folder (its ownership.toml, else the shipped one), or of such a file. UsageError for a broken file."""
    path, data = _facts(root, OWNERSHIP)
    names = ("beside_share", "life_years", "cost_of_capital", "opex_share", "prepaid_share", "term_years", "renewal_factor")
    _only(path, data, ("usd_per_gpu", *names))
    found = Ownership(_by_chip(path, data, "usd_per_gpu"), **{name: _figure(path, name, data.get(name)) for name in names})
    _at_most_1(path, prepaid_share=found.prepaid_share, cost_of_capital=found.cost_of_capital)
    for name, one in (("life_years", found.life_years), ("term_years", found.term_years)):
        if one.low < 1 / 12 or one.high > 50:
            raise UsageError(f"{path}: {name} is a number of years, a month (0.0834) to 50, not {one.low:g}..{one.high:g}")
    return found


def _facts(root: Path | None, name: str) -> tuple[Path, dict[str, Any]]:
    path = root if root and not root.is_dir() else (root or PROFILES / "prices") / name
    if root and root.is_dir() and not path.exists():
        path = PROFILES / "prices" / name
    return path, read_toml(path)


def _prices_in(path: Path) -> list[Price]:
    data = read_toml(path)
    _only(path, data, ("price",))
    tables = data.get("price")
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{path} holds no [[price]]; profiles/prices/h200.toml shows how one looks")
    return [_price(path, at, table) for at, table in enumerate(tables, 1)]


def _price(path: Path, at: int, table: Any) -> Price:
    where = f"{path}: price {at}"
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} is no table of {', '.join(_PRICE_FIELDS)}")
    _only(where, table, _PRICE_FIELDS)
    words = _words(where, table, ("chip", "source", "confidence", "note"))
    known = {**table, **words}
    missing = [name for name in ("chip", "contract", "usd_per_gpu_hour", "date", "source") if not known.get(name)]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}: a price without a date and a source is no fact")
    if table["contract"] not in CONTRACTS:
        raise UsageError(f"{where}: contract is {', '.join(CONTRACTS)}, not {table['contract']!r}")
    date = str(table["date"])
    if not _is_date(date):
        raise UsageError(f"{where}: date is YYYY-MM or YYYY-MM-DD, not {date!r}")
    low, mid, high = _bounds(f"{where}: usd_per_gpu_hour", table["usd_per_gpu_hour"])
    if not LEAST_USD <= low <= high <= MOST_USD:
        raise UsageError(f"{where}: usd_per_gpu_hour is {low:g}..{high:g}; a price lies between {LEAST_USD:g} and {MOST_USD:g} dollars")
    chip = words.pop("chip").lower()
    return Price(chip, table["contract"], low, mid, high, date, **words, guesses=_guesses(where, table))


def _is_date(text: str) -> bool:
    """A month or a day that there is."""
    try:
        day.fromisoformat(text if len(text) > 7 else f"{text}-01")
    except ValueError:
        return False
    return bool(re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", text))


def _words(where: str, table: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """The texts of a table, empty where they are not there; UsageError for what is no text."""
    for name in names:
        if not isinstance(table.get(name, ""), str):
            raise UsageError(f"{where}: {name} is {table[name]!r}; it must be a text")
    return {name: str(table.get(name, "")).strip() for name in names}


def _guesses(where: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    given = table.get("guesses", [])
    if not isinstance(given, list) or not all(one in ENDS for one in given):
        raise UsageError(f"{where}: guesses lists which of {', '.join(ENDS)} the source does not have, not {given!r}")
    return tuple(end for end in ENDS if end in given)


def _trust(one: Price | Figure) -> str:
    guessed = f"{' and '.join(one.guesses)} guessed" if one.guesses and one.confidence != "guess" else ""
    return ", ".join(filter(None, (one.confidence, guessed)))


def _kind(contract: str) -> str:
    return contract.strip().lower().replace("-", "_")


def _no_contract(contract: str) -> str:
    near = get_close_matches(_kind(contract), CONTRACTS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONTRACTS)}"
    return f"unknown contract {contract[:80]!r}; {hint}"


def _there(path: Path) -> bool:
    try:
        return path.is_dir() or path.is_file()
    except OSError:  # a name that no file can have
        return False


def _at_most_1(path: Path, **figures: Figure) -> None:
    for name, one in figures.items():
        if one.high > 1:
            raise UsageError(f"{path}: {name} is a share, at most 1, not {one.high:g}")


def _by_chip(path: Path, data: Mapping[str, Any], name: str) -> dict[str, Figure]:
    table = data.get(name)
    if not isinstance(table, Mapping) or not table:
        raise UsageError(f"{path} lacks [{name}.CHIP] tables")
    return {str(chip).lower(): _figure(path, f"{name}.{chip}", one) for chip, one in table.items()}


def _figure(path: Path, name: str, table: Any) -> Figure:
    where = f"{path}: {name}"
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} is missing: a table with low, mid, high and source")
    _only(where, table, _FIGURE_FIELDS)
    words = _words(where, table, ("source", "confidence", "note"))
    if not words["source"]:
        raise UsageError(f"{where} lacks its source")
    zero = name.endswith("_share") or name == "cost_of_capital"
    low, mid, high = _bounds(where, {key: table[key] for key in ENDS if key in table}, zero)
    return Figure(low, mid, high, **words, guesses=_guesses(where, table))


def _bounds(where: str, given: Any, zero: bool = False) -> tuple[float, float, float]:
    """Of one number or of low, mid and high; all above 0, or 0 too where `zero` says so."""
    if not isinstance(given, Mapping):
        given = {"low": given, "mid": given, "high": given}
    missing = [name for name in ENDS if name not in given]
    if missing or len(given) != 3:
        raise UsageError(f"{where} is one number or low, mid and high; it has {', '.join(map(str, given)) or 'nothing'}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST or not (zero or value):
            raise UsageError(f"{where}: {name} is {str(value)[:40]}, not a positive number{' or 0' if zero else ''}, at most {MOST:g}")
    low, mid, high = (float(given[name]) for name in ENDS)
    if not low <= mid <= high:
        raise UsageError(f"{where}: low {low:g}, mid {mid:g}, high {high:g} are not in order")
    return low, mid, high


def _only(where: Path | str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise UsageError(f"{where}: unknown field {', '.join(unknown)}; it has {', '.join(known)}")
