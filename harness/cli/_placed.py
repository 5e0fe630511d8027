"""How a placement is shown: for people, and as JSON lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from klab.harness.cost.estimate import Origin
    from klab.harness.cost.flips import Certainty, Sensitivity
    from klab.harness.cost.place import Option
    from klab.harness.cost.placement import Answer
    from klab.harness.cost.ranges import Range

_UNITS = {"cost": "$/h", "energy": "W", "kw": "kW"}


def show(answer: Answer, top: int) -> None:
    """Tables, reasons and flips on stdout, notes on stderr."""
    q, ranking = answer.question, answer.ranking
    w = q.demand.workload
    slos = [f"{name} <= {_time(slo)}" for name, slo in (("TTFT", w.slo_ttft_s), ("TPOT", w.slo_tpot_s)) if slo and not w.offline]
    asked = (
        f"{q.model.name}{f' {q.quantization}' if q.quantization else ''}, {w.isl:,} + {w.osl:,} tokens, {q.demand.rate_per_s:g} requests/s"
    )
    _print(", ".join([asked, *slos, f"least {_UNITS[q.demand.objective]}"]))
    winner = ranking.winner
    if winner is None:
        _nearest(answer)
    else:
        shown = _unlike(ranking.options, top)
        table(
            f"{len(ranking.options)} of {ranking.compared} arrangements meet the SLOs (by middle values)",
            _COLUMNS,
            map(_cells, shown),
            _RIGHT,
        )
        _print(f"\nBest: {_words(winner)}. {_label(answer)}")
        _print(answer.verdict)
        if answer.reasons:
            _print("\nWhy")
        for reason in answer.reasons:
            _print(f"  {reason}")
        _counts(answer)
        _print("\nWhat flips it")
        for one in answer.sensitivities:
            _print(f"  {_flip(one)}")
        for what, sure in (("times", answer.sure_of_times), ("times and prices", answer.sure_of_all)):
            if sure:
                rest = f"; {_who(sure.rival)} wins most of the others" if sure.rival else ""
                _print(
                    f"  With each chip's {what} at either end, these roles cost least in {sure.share:.0%} of {sure.corners} corners{rest}."
                )
    for line in answer.left_out:
        _print(f"left out: {line}")
    for note in answer.notes:
        talk.print(f"note: {note}", markup=False, soft_wrap=True)


def _print(text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)


def _unlike(options: Sequence[Option], top: int) -> list[Option]:
    """The best of each shape first in order of value, not twenty sizes of the same."""
    seen: dict[Any, int] = {}
    shown = []
    for option in options:
        seen[option.shape] = seen.get(option.shape, 0) + 1
        if seen[option.shape] <= 2:
            shown.append(option)
    return shown[:top]


_COLUMNS = ("prefill -> decode", "replicas", "GPUs", "TTFT", "TPOT", "$/h", "$/M tokens", "J/token", "kW", "busy", "rests on")
_RIGHT = ("GPUs", "TTFT", "TPOT", "$/h", "$/M tokens", "J/token", "kW", "busy")


def _cells(option: Option) -> tuple[object, ...]:
    fleet = option.fleet
    gpus = " + ".join(f"{one.mid:.0f} {chip}" for chip, one in fleet.gpus.items())
    return (
        option.name if option.apart else f"{option.name} (together)",
        " : ".join(str(pool.replicas) for pool in option.pools),
        gpus,
        _time(option.ttft_s.mid),
        _time(option.tpot_s.mid),
        _span(fleet.usd_per_hour),
        _span(option.usd_per_mtok),
        _span(option.joules_per_token),
        _figure(fleet.provisioned_kw.mid),
        f"{fleet.busy_share:.0%}",
        str(option.label) if option.label == option.energy_label else f"{option.label}; J {option.energy_label}",
    )


def _words(option: Option) -> str:
    parts = []
    for pool in option.pools:
        many = f"{pool.replicas} replica{'s' if pool.replicas > 1 else ''} of {pool.side.name}"
        does = {"both": "for all", "prefill": "for prefill", "decode": "for decode"}[pool.role]
        extra = f" in steps of {pool.point.chunk_tokens} tokens" if pool.role == "both" else ""
        parts.append(f"{many} {does}{extra}, {pool.point.concurrency} at a time")
    ratio = f" ({option.ratio:.2f} prefill per decode replica before rounding)" if option.ratio else ""
    sure = "" if option.surely_meets else "; at the slow end of the ranges the SLOs are missed"
    return "; ".join(parts) + ratio + sure


def _label(answer: Answer) -> str:
    shown = answer.ranking.winner or answer.ranking.nearest
    assert shown is not None

    def told(shares: Mapping[Origin, float]) -> str:
        return ", ".join(f"{share:.0%} {origin}" for origin, share in shares.items() if share >= 0.005)

    return f"Its times are {answer.label} ({told(shown.time_shares)}), its joules {answer.energy_label} ({told(shown.energy_shares)})."


def _counts(answer: Answer) -> None:
    from klab.harness.cost.placement import overhead

    unit = _UNITS[answer.question.demand.objective]
    names = {"fractions": "to a fraction of a replica", "replicas": "in whole replicas"}
    names["machines"] = f"in whole machines of {answer.question.demand.machine_gpus}"
    found = overhead(answer)
    _print("\nWhole numbers")
    for count, option in found:
        _print(f"  {names[count]}: {_figure(option.value)} {unit} with {option.name}")
    ideal, paid = found[0][1], answer.ranking.winner
    if paid is not None and ideal.value:
        changed = "" if ideal.shape == paid.shape else f", and it makes {paid.name} win instead of {ideal.name}"
        _print(f"  Rounding adds {paid.value / ideal.value - 1:.0%}{changed}.")


def _who(option: Option) -> str:
    return option.name if option.apart else f"{option.name} together"


def _flip(one: Sensitivity) -> str:
    now = f"{one.what} ({_figure(one.now)} {one.unit})"
    if not one.flips:
        return f"{now}: none from {_figure(one.low)} to {_figure(one.high)}"
    parts = []
    for flip in one.flips:
        side = "from" if flip.up else "down to"
        behind = f" by {flip.behind:.0%}" if flip.behind and flip.behind >= 0.005 else ""
        if flip.behind_unrounded is not None:
            behind += f" ({flip.behind_unrounded:.0%} without rounding)" if flip.behind_unrounded > 0 else " (by rounding alone)"
        elif flip.behind is None and not one.what.startswith("price"):
            behind = " (the present one misses the SLOs there)"
        who = f"{_who(flip.winner)} wins{behind}" if flip.winner else "nothing meets the SLOs"
        kept = f" (not yet at {_figure(flip.kept)})" if flip.kept is not None else ""
        parts.append(f"{side} {_figure(flip.at)}{kept}: {who}")
    return f"{now}: {'; '.join(parts)}"


def _nearest(answer: Answer) -> None:
    option = answer.ranking.nearest
    if option is None:
        _print("no arrangement can serve this at all")
        return
    times = f"TTFT {_time(option.ttft_s.mid)} and TPOT {_time(option.tpot_s.mid)}, {option.missed:.2f} times what is allowed"
    _print(f"No arrangement of {answer.ranking.compared} meets the SLOs. The nearest: {_words(option)}: {times}.")
    table("The nearest", _COLUMNS, [_cells(option)], _RIGHT)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _span(one: Range | None) -> str:
    if one is None:
        return ""
    return _figure(one.mid) if one.low == one.high else f"{_figure(one.mid)} ({_figure(one.low)}..{_figure(one.high)})"


def emit_all(answer: Answer, top: int) -> None:
    """One line for the answer, one per arrangement, role, sensitivity and note; `type` tells them apart."""
    q, winner = answer.question, answer.ranking.winner
    nearest = answer.ranking.nearest
    emit({
        "type": "placement", "model": q.model.name, "chips": [chip.name for chip in q.chips], "workload": vars(q.demand.workload),
        "rate_per_s": q.demand.rate_per_s, "objective": q.demand.objective, "machine_gpus": q.demand.machine_gpus,
        "compared": answer.ranking.compared, "feasible": len(answer.ranking.options), "label": str(answer.label),
        "energy_label": str(answer.energy_label),
        "winner": _row(winner) if winner else None, "nearest": _row(nearest) if nearest else None,
        "reasons": list(answer.reasons), "verdict": answer.verdict,
        "sure_of_times": _sure(answer.sure_of_times), "sure_of_all": _sure(answer.sure_of_all),
        "by_count": {count: {"arrangement": o.name, "value": o.value} for count, r in answer.by_count.items() if (o := r.winner)},
    })  # fmt: skip
    for option in answer.ranking.options[: max(top, 0)]:
        emit({"type": "option", **_row(option)})
    for one in answer.roles:
        emit({
            "type": "role", "role": one.role, "side": one.side.name, "per_1000_requests": one.per_1000, "unit": one.unit,
            "concurrency": one.pool.point.concurrency, "requests_per_s_per_gpu": one.requests_per_s_per_gpu.to_json(),
        })  # fmt: skip
    for found in answer.sensitivities:
        flips = [
            {
                "at": f.at,
                "up": f.up,
                "winner": f.winner.name if f.winner else None,
                "behind": f.behind,
                "behind_unrounded": f.behind_unrounded,
                "kept": f.kept,
            }
            for f in found.flips
        ]
        said = {name: getattr(found, name) for name in ("what", "unit", "now", "low", "high")}
        emit({"type": "sensitivity", **said, "flips": flips})
    for line in answer.left_out:
        emit({"type": "left_out", "reason": line})
    for note in answer.notes:
        emit({"type": "note", "note": note})


def _sure(one: Certainty | None) -> dict[str, Any] | None:
    return {"corners": one.corners, "share": one.share, "rival": one.rival.name if one.rival else None} if one else None


def _row(option: Option) -> dict[str, Any]:
    fleet, way = option.fleet, option.transfer
    pools = [
        {
            "role": pool.role, "chip": pool.side.deployment.chip.name, "tp": pool.side.deployment.tp, "replicas": pool.replicas,
            "needed": pool.needed, "concurrency": pool.point.concurrency, "limit": pool.point.limit,
            "requests_per_s": pool.point.requests_per_s.to_json(),
        }
        for pool in option.pools
    ]  # fmt: skip
    return {
        "arrangement": option.name, "kind": option.kind, "pools": pools, "value": option.value, "unit": _UNITS[option.demand.objective],
        "gpus": {chip: one.to_json() for chip, one in fleet.gpus.items()}, "ratio": option.ratio,
        "ttft_s": option.ttft_s.to_json(), "tpot_s": option.tpot_s.to_json(), "surely_meets": option.surely_meets,
        "usd_per_hour": fleet.usd_per_hour.to_json() if fleet.usd_per_hour else None,
        "usd_per_mtok_total": option.usd_per_mtok.to_json() if option.usd_per_mtok else None,
        "joules_per_token": option.joules_per_token.to_json(), "board_w": fleet.board_w.to_json(),
        "provisioned_kw": fleet.provisioned_kw.to_json(), "busy_share": fleet.busy_share,
        "transfer": {
            "received_bytes_per_gpu": way.received_bytes, "gb_per_s_per_gpu": way.link.gb_per_s, "seconds": way.seconds.to_json(),
            "exposed_s": option.exposed_s.to_json(), "source": way.link.source,
        } if way else None,
        "time_shares": {str(origin): share for origin, share in option.time_shares.items()}, "label": str(option.label),
        "energy_shares": {str(origin): share for origin, share in option.energy_shares.items()}, "energy_label": str(option.energy_label),
    }  # fmt: skip
