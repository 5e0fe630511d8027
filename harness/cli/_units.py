"""`klab cost` for pictures, videos, hours of speech and encoders' requests, printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from klab.harness.cli._console import emit, table
from klab.harness.cli._figures import coverage, g, say, seconds, show_launches, show_operators, span, talk_notes

if TYPE_CHECKING:
    from klab.harness.cost.ranges import Range
    from klab.harness.cost.single_pass import PassPoint
    from klab.harness.cost.units import UnitAnswer

_OPTIONS = ("tp", "format", "batch", "seconds", "per GPU-hour", "$ each", "J each", "in time", "why not more")


def emit_units(found: UnitAnswer, model: str, chip: str) -> None:
    """JSON lines; `type` tells them apart."""
    from klab.harness.cost.explain import missing, spent, unit_command

    q = found.question
    emit({
        "type": "scenario", "model": q.model.name, "chip": q.chip.name, "objective": q.objective, "task": vars(found.task),
        "formats": list(q.formats), "price": vars(q.price) if q.price else None, "provisioned_kw_per_gpu": q.provisioned_kw,
        "sell_usd_per_unit": q.sell_unit,
    })  # fmt: skip
    for option in found.options:
        d = option.steps.deployment
        emit({"type": "option", "tp": d.tp, "quantization": d.quantization, "why_not": option.why_not})
        for point in option.points:
            emit({"type": "point", **_point_json(found, point)})
    if found.point:
        for operator in spent(found.point):
            emit({"type": "operator", **operator.to_json()})
        for launch in missing(found.point):
            emit({"type": "missing", **launch.to_json()})
        emit({"type": "measure", "command": unit_command(found.point, model, chip)})
        for price, money in found.contracts:
            emit({"type": "contract", "price": vars(price), "money": money.to_json()})
    for note in found.notes:
        emit({"type": "note", "text": note})
    for remedy in found.remedies:
        emit({"type": "remedy", "text": remedy})
    emit({
        "type": "answer", "feasible": found.feasible, "label": str(found.label), "energy_label": str(found.energy_label),
        "point": _point_json(found, found.point) if found.point else None,
    })  # fmt: skip


def _point_json(found: UnitAnswer, p: PassPoint) -> dict[str, Any]:
    return {
        "unit": p.unit, "tp": p.deployment.tp, "quantization": p.deployment.quantization, "batch": p.batch, "limit": p.limit,
        "latency_s": p.latency_s.to_json(), "units_per_s": p.units_per_s.to_json(), "label": str(p.label),
        "time_shares": {str(o): s for o, s in p.time_shares.items()}, "energy_shares": {str(o): s for o, s in p.energy_shares.items()},
        **found.money_of(p).to_json(),
    }  # fmt: skip


def show_units(found: UnitAnswer, model: str, chip: str) -> None:
    """Tables."""
    from klab.harness.cost.explain import unit_command

    q = found.question
    promised = f"promised: {seconds(found.task.slo_s)} for a batch; " if found.task.slo_s else ""
    say(f"{q.model.name} on {q.chip.title}")
    say(f"{promised}objective: {q.objective}; {q.price.label if q.price else 'no price is known: no dollars (--price)'}")
    rows = []
    for option in found.options:
        d = option.steps.deployment
        start = (d.tp, d.quantization or option.steps.dtype)
        p = option.best or option.fastest
        if p is None:
            rows.append((*start, *[""] * 6, option.why_not))
            continue
        money = found.money_of(p)
        each = (g(money.usd_per_unit.mid) if money.usd_per_unit else "", g(money.joules_per_unit.mid))
        rows.append((*start, p.batch, g(p.latency_s.mid), g(p.units_per_gpu_hour.mid), *each, "yes" if p.meets else "no", p.limit))
    table("Deployments, each at its best batch (or its fastest)", _OPTIONS, rows, right=("tp", *_OPTIONS[2:7]))
    if found.point is None:
        say(f"\n{q.model.name} does not fit: {found.options[-1].why_not}.", "red")
        talk_notes(found.notes)
        return
    p = found.point
    where = f"{p.deployment.label}, {p.batch} at once"
    say(f"\nAnswer: {where}." if found.feasible else f"\nNothing ends in time. The fastest: {where}.", None if found.feasible else "red")
    for line in found.remedies:
        say(f"  {line}")
    _show_figures(found, p)
    say(coverage(p.time_shares, p.energy_shares, q.chip.name))
    contracts = [(price.label, span(money.usd_per_unit)) for price, money in found.contracts]
    if contracts:
        table("By other contracts", ("price", f"$ per {p.unit}"), contracts)
    show_operators(p, p.unit)
    if show_launches(p, q.chip.name):
        say(f"measure it there with:\n  {unit_command(p, model, chip)}")
    talk_notes(found.notes)


def _show_figures(found: UnitAnswer, p: PassPoint) -> None:
    money = found.money
    assert money is not None
    time, energy = str(found.label), str(found.energy_label)

    def row(name: str, value: Range, unit: str, rests: str) -> tuple[object, ...]:
        return (name, g(value.low), g(value.mid), g(value.high), unit, rests)

    rows = [row(f"a batch of {p.batch}", p.latency_s, "s", time), row(f"{p.unit}s per GPU-hour", p.units_per_gpu_hour, "", time)]
    if money.usd_per_unit:
        rows.append(row(f"$ per {p.unit}", money.usd_per_unit, "$", time))
    if money.gross_margin:
        rows.append(row("gross margin", money.gross_margin * 100, "%", time))
    rows.append(row(f"joules per {p.unit} (GPU boards)", money.joules_per_unit, "J", energy))
    per_mw = money.units_per_s_per_mw
    rows.append(row(f"{p.unit}s/s per MW ({money.megawatt})", per_mw, "", time if money.megawatt == "provisioned" else energy))
    table("What it takes", ("figure", "low", "middle", "high", "", "rests on"), rows, right=("low", "middle", "high"))
