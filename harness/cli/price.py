"""`klab price`: what a GPU-hour costs by contract, what it really costs when used less, and from where owning pays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli._console import emit, table, talk
from klab.harness.cli._options import AsJson
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.catalog.prices import Figure, Price
    from klab.harness.cost.price import BreakEven, Terms, Way
    from klab.harness.cost.ranges import Range

FIGURES = "One figure, or low,mid,high."
UTILISATIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
SWINGS_SHOWN = 8

Chip = Annotated[
    str | None, typer.Option("--chip", "-c", help="A chip's name. Without one: all prices that klab knows, with their sources.")
]
Prices = Annotated[
    Path | None,
    typer.Option("--prices", help="Your own file or folder of prices, in the form of profiles/prices, instead of the shipped ones."),
]
ListPrice = Annotated[str | None, typer.Option("--price", "-p", help=f"A quote for a term, $ per GPU-hour. {FIGURES}")]
OnDemand = Annotated[str | None, typer.Option("--on-demand", help=f"$ per GPU-hour without a term. {FIGURES}")]
Utilisation = Annotated[
    str | None, typer.Option("--utilisation", "-u", help=f"Share of the hours in which the GPU is used. Default 1. {FIGURES}")
]
Term = Annotated[str | None, typer.Option("--term", help=f"Years of the contract. {FIGURES}")]
Prepaid = Annotated[str | None, typer.Option("--prepaid", help=f"Share of the contract's value paid at its start. {FIGURES}")]
Capital = Annotated[str | None, typer.Option("--cost-of-capital", help=f"Share per year, 0.1 is 10%. {FIGURES}")]
Horizon = Annotated[
    float | None, typer.Option("--horizon", help="Years to look at; beyond the term the contract is renewed. Default: the term.")
]
Renewal = Annotated[str | None, typer.Option("--renewal", help=f"Price of a renewal over the price before: 2 doubles. {FIGURES}")]
Capex = Annotated[str | None, typer.Option("--capex", help=f"$ for one GPU with its share of the server. {FIGURES}")]
Beside = Annotated[str | None, typer.Option("--beside", help=f"What network, storage and racks add to that, as a share of it. {FIGURES}")]
Life = Annotated[str | None, typer.Option("--life", help=f"Years until an own GPU is written off. {FIGURES}")]
Residual = Annotated[str | None, typer.Option("--residual", help=f"Share of the capex that it is sold for then. Default 0. {FIGURES}")]
Opex = Annotated[str | None, typer.Option("--opex", help=f"Staff, spares, insurance per year, as a share of the capex. {FIGURES}")]
ItKw = Annotated[str | None, typer.Option("--it-kw", help=f"kW of IT power that one GPU and its share of the rest are given. {FIGURES}")]
Load = Annotated[str | None, typer.Option("--load", help=f"Average draw over that power. {FIGURES}")]
Pue = Annotated[str | None, typer.Option("--pue", help=f"Facility power over IT power. {FIGURES}")]
Kwh = Annotated[str | None, typer.Option("--usd-per-kwh", help=f"$ per kWh of energy. {FIGURES}")]
Colocation = Annotated[str | None, typer.Option("--colocation", help=f"$ per month and kW of IT power for the site. {FIGURES}")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write what was computed as a file of prices, for --price of other verbs.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def price(
        chip: Chip = None,
        prices: Prices = None,
        quote: ListPrice = None,
        on_demand: OnDemand = None,
        utilisation: Utilisation = None,
        term: Term = None,
        prepaid: Prepaid = None,
        cost_of_capital: Capital = None,
        horizon: Horizon = None,
        renewal: Renewal = None,
        capex: Capex = None,
        beside: Beside = None,
        life: Life = None,
        residual: Residual = None,
        opex: Opex = None,
        it_kw: ItKw = None,
        load: Load = None,
        pue: Pue = None,
        usd_per_kwh: Kwh = None,
        colocation: Colocation = None,
        out: Out = None,
        as_json: AsJson = False,
    ) -> None:
        """Show what a GPU-hour costs: rented by the hour, reserved for years or owned; from which utilisation which of them is cheapest.

        Every figure has an interval: of inputs whose errors are independent, and, as "extreme", of all at their best or worst end.
        """
        from klab.harness.cost.price import Terms

        given = {
            "utilisation": (utilisation, "--utilisation"), "term_years": (term, "--term"), "prepaid_share": (prepaid, "--prepaid"),
            "cost_of_capital": (cost_of_capital, "--cost-of-capital"), "renewal_factor": (renewal, "--renewal"),
            "usd_per_gpu": (capex, "--capex"), "beside_share": (beside, "--beside"), "life_years": (life, "--life"),
            "residual_share": (residual, "--residual"), "opex_share": (opex, "--opex"), "it_kw_per_gpu": (it_kw, "--it-kw"),
            "load_share": (load, "--load"), "pue": (pue, "--pue"), "usd_per_kwh": (usd_per_kwh, "--usd-per-kwh"),
            "colocation_usd_per_kw_month": (colocation, "--colocation"),
        }  # fmt: skip
        if chip is None:
            others = {"--price": quote, "--on-demand": on_demand, "--horizon": horizon, "--out": out}
            asked = [option for option, one in [*((o, text) for text, o in given.values()), *others.items()] if one is not None]
            if asked:
                raise UsageError(f"{', '.join(asked)}: of which chip? Give --chip")
            _all(prices, as_json)
            return
        if not chip.strip():
            raise UsageError("--chip is empty: give a chip's name (klab price shows which have prices) or the path of its TOML file")
        fields = {name: figures(text, option) for name, (text, option) in given.items() if text is not None}
        terms = Terms(horizon_years=horizon, **fields)  # type: ignore[arg-type]
        _one(
            chip.strip() if chip.endswith(".toml") else chip.strip().lower(),
            terms,
            prices,
            {"reserved": quote, "on_demand": on_demand},
            out,
            as_json,
        )


def figures(text: str, option: str) -> Range:
    """`0.6` or `0.5,0.6,0.8` -> a Range; UsageError for anything else."""
    from klab.harness.cost.ranges import Range

    try:
        parts = [float(part) for part in text.split(",")]
        return Range(*(parts if len(parts) == 3 else parts * 3 if len(parts) == 1 else ()))
    except (ValueError, TypeError):
        raise UsageError(f"{option} {text!r} is not a number, nor low,mid,high in this order") from None


def _all(root: Path | None, as_json: bool) -> None:
    from klab.harness.catalog.prices import load_facility, load_ownership, load_prices

    prices = load_prices(root)
    for one in prices if as_json else ():
        emit({"kind": "price", **vars(one)})
    tables = {} if root and root.is_file() else {"facility": load_facility(root), "ownership": load_ownership(root)}
    facts: list[tuple[str, str, Figure]] = []
    for where, found in tables.items():
        for name, value in vars(found).items():
            named = {f"{name}.{chip}": one for chip, one in value.items()} if isinstance(value, dict) else {name: value}
            facts += [(where, key, one) for key, one in named.items()]
    if as_json:
        for where, name, fact in facts:
            emit({"kind": where, "name": name, **vars(fact)})
        return
    sources = dict.fromkeys(pair for pair in [*((p.source, p.note) for p in prices), *((f.source, f.note) for _, _, f in facts)])
    number = {key: str(at) for at, key in enumerate(sources, 1)}
    columns = ("low", "mid", "high")
    cells = [(p.chip, p.contract, _usd(p.low), _usd(p.mid), _usd(p.high), p.date, p.trust, number[p.source, p.note]) for p in prices]
    table("Dollars per GPU-hour", ("chip", "contract", *columns, "date", "confidence", "source"), cells, (*columns, "source"))
    if facts:
        rows = [(name, f"{f.low:g}", f"{f.mid:g}", f"{f.high:g}", f.trust, number[f.source, f.note]) for _, name, f in facts]
        table("Site, energy and ownership", ("figure", *columns, "confidence", "source"), rows, (*columns, "source"))
    table("Sources", ("", "source", "note"), [(number[key], *key) for key in sources], ("",))


def _one(chip: str, terms: Terms, root: Path | None, quotes: dict[str, str | None], out: Path | None, as_json: bool) -> None:
    from klab.harness.catalog import find_chip
    from klab.harness.cost.price import answer

    chip = find_chip(chip).name if chip.endswith(".toml") else chip
    found = answer(chip, terms, root, quotes)
    if out is not None:
        _write(out, found.prices)
    if as_json:
        for way in found.ways:
            emit({"kind": "way", "chip": chip, **way.to_json(), "by_utilisation": {str(u): way.at(u).to_json() for u in UTILISATIONS}})
        for one in found.break_evens:
            emit({"kind": "break_even", "chip": chip, **one.to_json()})
        for what, figure in found.renewals.items():
            emit({"kind": "renewal", "chip": chip, "contract": "reserved", "factor": what, "usd_per_gpu_hour": figure.to_json()})
        for text in found.remarks:
            emit({"kind": "note", "chip": chip, "text": text})
        return
    used = terms.utilisation
    columns = ("contract", "$/used GPU-h", "likely", "extreme", "of which per paid hour", "from")
    cells = [
        (w.contract, _usd(w.usd_per_gpu_hour.mid), _span(w.usd_per_gpu_hour), _span(w.extreme), _parts(w), w.basis) for w in found.ways
    ]
    table(f"{chip}: a GPU that is used in {used.mid:.0%} of the hours", columns, cells, columns[1:4])
    rows = [(w.contract, *(f"{_usd(w.at(u).mid)} ({_span(w.at(u))})" for u in UTILISATIONS)) for w in found.ways]
    table("By utilisation, $ per used GPU-hour", ("contract", *(f"{u:.0%}" for u in UTILISATIONS)), rows)
    for way in found.ways:
        swings = [(s.name, f"{s.given.low:g}..{s.given.high:g}", _usd(s.at_low), _usd(s.at_high)) for s in way.swings[:SWINGS_SHOWN]]
        if len(way.swings) > 1:
            table(
                f"What moves {way.contract}: one figure alone at its ends",
                ("figure", "from..to", "$ at low", "$ at high"),
                swings,
                ("$ at low", "$ at high"),
            )
    for line in [*(_even(one) for one in found.break_evens), *found.remarks]:
        talk.print(line, markup=False, soft_wrap=True)


def _usd(value: float) -> str:
    return f"{value:.2f}"


def _span(one: Range) -> str:
    return f"{one.low:.2f}..{one.high:.2f}"


def _parts(way: Way) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in way.parts.items())


def _even(one: BreakEven) -> str:
    from klab.harness.cost.price import NEVER

    u = one.utilisation
    if u.low > 1:
        times = f"{u.mid:.2f} times as much ({u.low:.2f}..{u.high:.2f})" if u.high < NEVER else f"at least {u.low:.3g} times as much"
        return f"{one.way} is never cheaper than {one.against}: all hours of it cost {times}"
    if u.mid > 1:
        at_best = f"at the best in more than {u.low:.0%} of the hours"
        return f"{one.way} is not cheaper than {one.against} at the middle (all hours of it cost {u.mid:.2f} times as much), {at_best}"
    never = f", at the worst not even at full use (x {u.high:.2f})" if u.high > 1 else f"..{u.high:.0%}"
    return f"{one.way} is cheaper than {one.against} where GPUs are used in more than {u.mid:.0%} of the hours ({u.low:.0%}{never})"


def _write(out: Path, prices: tuple[Price, ...]) -> None:
    from klab.harness.catalog.prices import to_toml

    try:
        out.write_text(to_toml(prices), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
