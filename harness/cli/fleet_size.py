"""`klab fleet-size`: the chips, kW and dollars that a forecast takes, and what a given power or number of chips can serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk
from klab.harness.cli._options import AsJson
from klab.harness.cli.price import figures
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.cost.fleet_month import Capacity, Month, RowPlan
    from klab.harness.cost.fleet_options import Supply
    from klab.harness.cost.fleet_size import FleetSize
    from klab.harness.cost.ranges import Range
    from klab.harness.cost.serving import OperatingPoint

Demand = Annotated[Path, typer.Option("--demand", "-d", help="CSV file, one row per model; see below.")]
Chips = Annotated[
    str | None, typer.Option("--chips", help="Chips that can be had, by name: h200,b200. Default: those of --gpus, else these two.")
]
Months = Annotated[int, typer.Option("--months", help="How many months of growth to look ahead.")]
Contract = Annotated[str, typer.Option("--contract", help="Whose price: on_demand, reserved or owned (klab price shows them).")]
PriceOf = Annotated[
    list[str] | None,
    typer.Option(
        "--price", "-p", help="CHIP=PRICE: $ per GPU-hour, one figure or low,mid,high; a contract; or a file of prices. Repeatable."
    ),
]
Prices = Annotated[Path | None, typer.Option("--prices", help="Your own file or folder of prices, in the form of profiles/prices.")]
Headroom = Annotated[
    float, typer.Option("--headroom", help="Share of the capacity kept free at the peak: for bursts within it and failures.")
]
Machine = Annotated[int, typer.Option("--machine", help="GPUs that are had together; replicas do not straddle machines.")]
Least = Annotated[int, typer.Option("--least-replicas", help="Replicas of each row at the least: 2 survive the loss of one.")]
Kw = Annotated[
    float | None, typer.Option("--kw", help="What the site (a container, say) provides, all in: says how much of the demand fits.")
]
Gpus = Annotated[
    str | None, typer.Option("--gpus", help="GPUs that there are, h200=1024,b200=512: says how much of the demand they serve.")
]
KwPer = Annotated[list[str] | None, typer.Option("--kw-per-gpu", help="CHIP=KW that a site must provide per GPU, all in. Repeatable.")]
Sizes = Annotated[str, typer.Option("--tp", help="GPUs per replica that compete.")]
Host = Annotated[
    str | None, typer.Option("--host-us", help="What a GPU waits between two steps, us: one figure or low,mid,high. A guess by default.")
]
Objective = Annotated[str, typer.Option("--objective", help="What is made small: cost or kw.")]
Results = Annotated[list[Path] | None, typer.Option("--results", help="Folder of own results. Repeatable. Default: where klab keeps them.")]
Reference = Annotated[
    bool | None,
    typer.Option("--reference/--no-reference", help="Published tables beside own measurements. Default: where they are installed."),
]


def command(app: typer.Typer) -> None:
    """Register the verb."""
    from klab.harness.cost.demand_columns import COLUMNS

    columns = "\n\n".join(f"{name}: {what}." for name, what in COLUMNS.items())

    @app.command("fleet-size", epilog=f"Columns of the CSV file:\n\n{columns}\n\nprofiles/prices/demand-example.csv is one.")
    def fleet_size(
        demand: Demand,
        chips: Chips = None,
        months: Months = 12,
        contract: Contract = "reserved",
        price: PriceOf = None,
        prices: Prices = None,
        headroom: Headroom = 0.2,
        machine: Machine = 8,
        least_replicas: Least = 1,
        kw: Kw = None,
        gpus: Gpus = None,
        kw_per_gpu: KwPer = None,
        tp: Sizes = "1,2,4,8",
        objective: Objective = "cost",
        host_us: Host = None,
        results: Results = None,
        reference: Reference = None,
        as_json: AsJson = False,
    ) -> None:
        """Size a fleet for a forecast: GPUs, kW and $ per month, month by month; what a power budget or a number of chips serves.

        Every row gets one chip, size and batch that keeps its latencies, chosen for the largest month, and replicas for its peak. All hours
        of a month are paid. Intervals have all throughputs and prices at one end at once. Exit 1 where a row cannot be served.
        """
        from klab.harness.cost.answer import HOST_US
        from klab.harness.cost.demand import read_demand
        from klab.harness.cost.fleet_month import Limits
        from klab.harness.cost.fleet_size import fleet_for

        if not 0 <= months <= 120:
            raise UsageError(f"--months is 0 to 120, not {months}")
        had = _counts(gpus) if gpus else None
        limits = Limits(headroom, machine, least_replicas, kw, had, objective)
        needs = read_demand(demand)
        names = [name.strip() for name in chips.split(",")] if chips else list(had or ("h200", "b200"))
        supplies = _supplies(names, contract, _texts(price, "--price"), prices, _pairs(kw_per_gpu, "--kw-per-gpu"), results, reference)
        if had and (missing := sorted(set(had) - {supply.chip.name for supply in supplies})):
            raise UsageError(f"--gpus names {', '.join(missing)}, which --chips leaves out")
        host = HOST_US if host_us is None else figures(host_us, "--host-us")
        if host.low < 0:
            raise UsageError(f"--host-us is not negative, not {host_us}")
        size = fleet_for(needs, supplies, limits, _options.integers(tp, "--tp") or (), host)
        plan = size.months(months) if size.options else []
        limited = kw is not None or had is not None
        room = size.capacity() if limited and size.options else None
        full = size.lasts(months) if limited and size.options else None
        if as_json:
            _emit(size, plan, room, full)
        else:
            _show(size, plan)
            if limited and size.options:
                _show_room(size, room, full, months)
            for line in size.notes:
                talk.print(line, markup=False, soft_wrap=True)
            for one in size.unserved:
                talk.print(one.reason, markup=False, soft_wrap=True)
        if size.unserved or (limited and room is None):
            raise typer.Exit(1)


def _supplies(
    names: list[str],
    contract: str,
    price_of: dict[str, str],
    prices: Path | None,
    kw: dict[str, float],
    results: list[Path] | None,
    reference: bool | None,
) -> list[Supply]:
    from klab.harness.catalog import find_chip
    from klab.harness.cost.fleet_options import supply_of

    found = {}
    for chip in [find_chip(name) for name in names]:
        if chip.name not in found:
            price, kw_per_gpu = price_of.pop(chip.name, None), kw.pop(chip.name, None)
            options = {"contract": contract, "price": price, "prices": prices, "kw_per_gpu": kw_per_gpu, "results": results}
            found[chip.name] = supply_of(chip, **options, reference=reference)  # type: ignore[arg-type]
    for option, left in (("--price", price_of), ("--kw-per-gpu", kw)):
        if left:
            raise UsageError(f"{option} names {', '.join(left)}, which is not among the chips ({', '.join(found)})")
    return list(found.values())


def _texts(given: list[str] | None, option: str) -> dict[str, str]:
    """`["h200=2,2.5,3"]` -> {"h200": "2,2.5,3"}."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise UsageError(f"{option} {text!r}: write CHIP=VALUE, such as h200=2.5")
        if name.strip().lower() in found:
            raise UsageError(f"{option} gives {name.strip()} twice")
        found[name.strip().lower()] = value.strip()
    return found


def _pairs(given: list[str] | None, option: str) -> dict[str, float]:
    """`["h200=8,b200=16"]` -> {"h200": 8.0, "b200": 16.0}."""
    found = {}
    for name, value in _texts([part for text in given or () for part in text.split(",")], option).items():
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"{option} {name}={value}: {value!r} is not a number") from None
    return found


def _counts(text: str) -> dict[str, int]:
    """`h200=1024,b200=512` -> whole numbers."""
    found = _pairs([text], "--gpus")
    for name, count in found.items():
        if not count.is_integer():  # nor nan nor inf
            raise UsageError(f"--gpus {name}={count:g}: not a number of whole GPUs")
    return {name: int(count) for name, count in found.items()}


def _emit(size: FleetSize, plan: list[Month], room: Capacity | None, full: int | None) -> None:
    for chip, supply in size.chips.items():
        emit({"kind": "chip", "chip": chip, "usd_per_gpu_hour": supply.usd_per_gpu_hour.to_json(), "price": supply.price_label,
              "provisioned_kw_per_gpu": supply.kw_per_gpu})  # fmt: skip
    chosen = {at for month in plan for at in month.replicas}
    for at, option in enumerate(size.options):
        p = option.point
        emit({"kind": "option", "name": size.needs[option.need].name, "model": size.needs[option.need].model, "chip": option.chip,
              "gpus_per_replica": option.gpus, "deployment": p.deployment.label, "concurrency": p.concurrency, "chosen": at in chosen,
              "ttft_s": p.ttft_s.to_json(), "tpot_s": p.tpot_s.to_json(), "requests_per_s": p.requests_per_s.to_json(),
              "limit": p.limit, "label": str(p.label), "energy_label": str(p.energy_label)})  # fmt: skip
    for month in plan:
        per_need = [
            {"name": size.needs[size.options[row.option].need].name, "chip": size.options[row.option].chip, "replicas": row.replicas,
             "gpus": row.gpus, "usd": row.usd.to_json(), "usd_per_mtok": row.usd_per_mtok.to_json(), "provisioned_kw": row.kw,
             "gpu_board_kw": row.board_kw.to_json(), "use": row.use, "tokens": row.tokens, "revenue_usd": row.revenue_usd}
            for row in month.rows
        ]  # fmt: skip
        margin = month.gross_margin
        emit({"kind": "month", "month": month.month, "gpus": dict(month.gpus), "gpus_range": month.gpus_range.to_json(),
              "usd": month.usd.to_json(), "provisioned_kw": month.kw, "gpu_board_kw": month.board_kw.to_json(), "use": month.use,
              "tokens": month.tokens, "usd_per_mtok": month.usd_per_mtok.to_json(), "revenue_usd": month.revenue_usd,
              "gross_margin": margin.to_json() if margin else None, "label": str(size.label(month)),
              "energy_label": str(size.label(month, energy=True)), "needs": per_need})  # fmt: skip
    if room is not None:
        served = [{"name": size.needs[n].name, "requests_per_s": size.needs[n].average(0) * room.scale.mid, "alone_scale": alone}
                  for n, alone in room.alone.items()]  # fmt: skip
        by = [{"name": size.needs[o.need].name, "chip": o.chip, "gpus_per_replica": o.gpus, "concurrency": o.point.concurrency,
               "replicas": count} for o, count in ((size.options[at], count) for at, count in room.replicas.items())]  # fmt: skip
        emit({"kind": "capacity", "scale": room.scale.to_json(), "gpus": dict(room.gpus), "provisioned_kw": room.kw, "needs": served,
              "served_by": by, "usd": room.usd.to_json(), "tokens": room.tokens, "usd_per_mtok": room.usd_per_mtok.to_json(),
              "outgrown_in_month": full, "label": str(size.label(room))})  # fmt: skip
    elif full is not None:  # not even the least number of replicas fits
        few, kw = size.least()
        emit({"kind": "capacity", "scale": None, "outgrown_in_month": full, "least_gpus": few, "least_provisioned_kw": kw})
    for line in size.notes:
        emit({"kind": "note", "text": line})
    for one in size.unserved:
        emit({"kind": "unserved", "name": size.needs[one.need].name, "reason": one.reason, "nearest": _near(one.nearest)})


def _near(point: OperatingPoint | None) -> dict[str, object] | None:
    if point is None:
        return None
    return {"deployment": point.deployment.label, "concurrency": point.concurrency, "ttft_s": point.ttft_s.to_json(),
            "tpot_s": point.tpot_s.to_json(), "requests_per_s": point.requests_per_s.to_json(), "label": str(point.label)}  # fmt: skip


def _show(size: FleetSize, plan: list[Month]) -> None:
    for supply in size.chips.values():
        kw = f"{supply.kw_per_gpu:g} kW provisioned per GPU" if supply.kw_per_gpu else "kW per GPU not stated"
        talk.print(f"{supply.price_label}; {kw}", markup=False, soft_wrap=True)
    if not plan:
        return
    last = plan[-1]
    boards = f"boards draw kW ({size.label(last, energy=True)})"
    columns = ["row", "served by", "req/s per replica", "TTFT ms", "TPOT ms", "limit", "rests on", f"in month {last.month} on other chips"]
    table("Configurations, chosen for the largest month", columns, [_served(size, last, at) for at in last.replicas], columns[2:5])
    columns = ["month", "row", "replicas", "GPUs", "kW held ready", boards, "$ per month", "$/Mtok", "use"]
    rows = [_row(size, month, row) for month in dict.fromkeys((plan[0].month, last.month)) for row in plan[month].rows]
    table("By row, without the rest of machines", columns, rows, [name for name in columns if name != "row"])
    sold = any(month.gross_margin for month in plan)
    columns = ["month", "tokens/s", *size.chips, "GPUs", "kW held ready", boards, "$ per month", "$/Mtok", "use"]
    columns += ["margin"] if sold else []
    unlimited = ", were neither chips nor power limited" if size.limits.kw or size.limits.gpus else ""
    table(f"Month by month ({size.label(last)}){unlimited}", columns, [_month(size, month, sold) for month in plan], columns)
    if last.batch_gpus:
        idle = f"in month {last.month} the other rows leave {last.idle_gpus:.0f} of their GPUs without work on average"
        talk.print(f"{idle}; the offline rows would keep {last.batch_gpus:.0f} busy if they ran there", markup=False, soft_wrap=True)


def _served(size: FleetSize, last: Month, at: int) -> list[object]:
    option, p = size.options[at], size.options[at].point
    latencies = (f"{p.ttft_s.mid * 1e3:.0f}", f"{p.tpot_s.mid * 1e3:.1f}", p.limit, str(p.label))
    name, rate = size.needs[option.need].name, _three(p.requests_per_s, ".3g")
    return [name, option.label, rate, *latencies, _elsewhere(size, option.need, option.chip, last.month)]


def _row(size: FleetSize, month: int, row: RowPlan) -> list[object]:
    kw = ["" if row.kw is None else f"{row.kw:,.0f}", f"{row.board_kw.mid:,.0f}"]
    name = size.needs[size.options[row.option].need].name
    return [month, name, row.replicas, row.gpus, *kw, _three(row.usd, ",.0f"), _three(row.usd_per_mtok, ".3f"), f"{row.use:.0%}"]


def _month(size: FleetSize, m: Month, sold: bool) -> list[object]:
    counts = [*(m.gpus.get(chip, 0) for chip in size.chips), f"{m.gpus_range.low:.0f}..{m.gpus_range.high:.0f}"]
    kw = ["" if m.kw is None else f"{m.kw:,.0f}", f"{m.board_kw.mid:,.0f}"]
    margin = [_three(m.gross_margin, ".0%") if m.gross_margin else ""] if sold else []
    return [m.month, f"{m.tokens_per_s:,.0f}", *counts, *kw, _three(m.usd, ",.0f"), _three(m.usd_per_mtok, ".3f"), f"{m.use:.0%}", *margin]


def _three(one: Range, form: str) -> str:
    return f"{one.mid:{form}} ({one.low:{form}}..{one.high:{form}})"


def _elsewhere(size: FleetSize, need: int, chosen: str, month: int) -> str:
    """What the same need takes on each other chip."""
    said = []
    for chip in size.chips:
        found = size.best_of(need, chip, month) if chip != chosen else None
        if chip != chosen:
            said.append(f"{chip}: {found[1]} x {size.options[found[0]].gpus} GPUs" if found else f"{chip}: not served")
    return ", ".join(said)


def _show_room(size: FleetSize, room: Capacity | None, full: int | None, months: int) -> None:
    limits = size.limits
    said = ", ".join([f"{count} {chip}" for chip, count in (limits.gpus or {}).items()] + ([f"{limits.kw:g} kW"] if limits.kw else []))
    if room is None:
        few, held = size.least()
        least = " and ".join(f"{count} {chip}" for chip, count in few.items()) + (f" ({held:,.2f} kW)" if held is not None else "")
        many = f"{limits.least_replicas} replica{'s' if limits.least_replicas > 1 else ''} of every row"
        talk.print(
            f"{said}: not even {many} fits into whole machines of {limits.machine} GPUs; that takes {least}", markup=False, soft_wrap=True
        )
        return
    columns = ("row", "tokens per day served", "of today's", "if it had all", "served by")
    rows = [
        (size.needs[n].name, f"{size.needs[n].average(0) * room.scale.mid * size.needs[n].tokens_per_request * 86_400:,.3g}",
         f"{room.scale.mid:.2f} x ({room.scale.low:.2f}..{room.scale.high:.2f})", f"{alone:.2f} x",
         " + ".join(f"{count} x ({size.options[at].label})" for at, count in room.replicas.items() if size.options[at].need == n))
        for n, alone in room.alone.items()
    ]  # fmt: skip
    used = ", ".join(f"{count} {chip}" for chip, count in room.gpus.items())
    kw = "" if room.kw is None else f" ({room.kw:,.0f} kW)"
    cost = f"{_three(room.usd, ',.0f')} $ per month, {_three(room.usd_per_mtok, '.3f')} $/Mtok at that demand"
    table(f"What {said} can serve ({size.label(room)}), all rows in today's proportion: {used}{kw}", columns, rows, columns[1:4])
    talk.print(f"{said}: {cost}", markup=False, soft_wrap=True)
    if full is None:
        talk.print(f"{said}: enough until month {months}")
    else:
        talk.print(f"{said}: {'not enough for today' if full == 0 else f'outgrown in month {full}'}")
