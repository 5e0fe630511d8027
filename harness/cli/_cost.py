"""`klab cost`: the answer printed, for people and as JSON lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from klab.harness.cli._console import emit, table
from klab.harness.cli._figures import coverage, g, say, seconds, show_launches, show_operators, span, talk_notes

if TYPE_CHECKING:
    from klab.harness.cost.answer import Answer, Option, Priced
    from klab.harness.cost.estimate import Origin
    from klab.harness.cost.ranges import Range


def emit_answer(found: Answer, model: str, chip: str) -> None:
    """JSON lines; `type` tells them apart."""
    from klab.harness.cost.explain import commands, missing, spent, step_times

    q = found.question
    price = q.price
    emit({
        "type": "scenario", "model": q.model.name, "chip": q.chip.name, "objective": q.objective, "workload": vars(q.workload),
        "formats": list(q.formats), "dtype": q.dtype, "kv_dtype": q.kv_dtype, "expert_parallel": q.expert_parallel,
        "memory_share": q.memory_share, "host_us": q.host_us.to_json(), "price": vars(price) if price else None,
        "provisioned_kw_per_gpu": q.provisioned_kw, "sell_usd_per_mtok": vars(q.sell) if q.sell else None,
    })  # fmt: skip
    for option, priced in zip(found.options, found.shown, strict=True):
        emit({"type": "option", **_option_json(option), "point": _point_json(priced) if priced else None})
    for format, option, priced in found.by_format() if len(q.formats) > 1 else ():
        error = (found.errors or {}).get(format)
        emit({
            "type": "format", "format": format or "none", **_option_json(option), "point": _point_json(priced) if priced else None,
            "wide_error": error.to_json() if error else None,
        })  # fmt: skip
    for one in found.front:
        emit({"type": "front", "point": _point_json(one)})
    if found.priced:
        point = found.priced.point
        assert found.chosen is not None
        for step in step_times(found.chosen.steps, q.workload, point.concurrency, found.chosen.fit.requests):
            emit({"type": "step", **step.to_json()})
        for operator in spent(point):
            emit({"type": "operator", **operator.to_json()})
        lacking = missing(point)
        for launch in lacking:
            emit({"type": "missing", **launch.to_json()})
        for line in commands(point, model, chip, lacking):
            emit({"type": "measure", "command": line})
        for contract, money in found.contracts:
            emit({"type": "contract", "price": vars(contract), "money": money.to_json()})
        if found.offline:
            emit({"type": "offline", "point": _point_json(found.offline)})
    for note in found.notes:
        emit({"type": "note", "text": note})
    for remedy in found.remedies:
        emit({"type": "remedy", "text": remedy})
    emit({
        "type": "answer", "feasible": found.feasible, "slos_missed_at_upper_end_s": found.at_worst,
        "label": str(found.label), "energy_label": str(found.energy_label),
        "deployment": found.chosen.deployment.label if found.chosen else None, "point": _point_json(found.priced) if found.priced else None,
    })  # fmt: skip


def _option_json(option: Option) -> dict[str, Any]:
    d, fit = option.deployment, option.fit
    return {
        "tp": d.tp, "quantization": d.quantization, "why_not": option.why_not, "feasible": option.best is not None,
        "weight_bytes_per_gpu": fit.weight_bytes, "cache_bytes_per_request_and_gpu": fit.request_bytes, "most_requests": fit.requests,
    }  # fmt: skip


def _point_json(one: Priced) -> dict[str, Any]:
    p = one.point
    figures: dict[str, Any] = {
        "tp": p.deployment.tp, "concurrency": p.concurrency, "meets_slo": one.meets(), "limit": p.limit, "label": str(p.label),
        "energy_label": str(p.energy_label), "time_shares": _shares(p.time_shares), "energy_shares": _shares(p.energy_shares),
        "prefill_share": p.prefill_share,
    }  # fmt: skip
    ranges = {
        "ttft_s": p.ttft_s, "tpot_s": p.tpot_s, "end_to_end_s": p.end_to_end_s, "requests_per_s": p.requests_per_s,
        "joules_per_request": p.joules_per_request, "output_tokens_per_s_per_gpu": p.output_tokens_per_s_per_gpu,
        "total_tokens_per_s_per_gpu": p.total_tokens_per_s_per_gpu, "tokens_per_s_per_user": p.tokens_per_s_per_user, "power_w": p.power_w,
    }  # fmt: skip
    figures |= {name: one.to_json() if math.isfinite(one.high) else None for name, one in ranges.items()}
    told = one.money or one.efficiency
    return figures | {name: value if value is None or isinstance(value, str) else value.to_json() for name, value in vars(told).items()}


def _shares(shares: Mapping[Origin, float]) -> dict[str, float]:
    return {str(origin): share for origin, share in shares.items()}


def show_answer(found: Answer, model: str, chip: str) -> None:
    """Tables."""
    q = found.question
    w = q.workload
    say(f"{q.model.name} on {q.chip.title}: {_workload(found)}")
    promises = [f"TTFT {seconds(w.slo_ttft_s)}" if w.slo_ttft_s else "", f"TPOT {seconds(w.slo_tpot_s)}" if w.slo_tpot_s else ""]
    promised = ", ".join(filter(None, promises)) or ("none, a batch job" if w.offline else "none")
    say(f"promised: {promised}; objective: {q.objective}; {q.price.label if q.price else 'no price is known: no dollars (--price)'}")
    _show_options(found)
    if found.priced is None:
        say(f"\n{q.model.name} does not fit: {found.options[-1].why_not} (--tp {found.options[-1].deployment.tp}).", "red")
        _show_remedies(found)
        talk_notes(found.notes)
        return
    p = found.priced.point
    where = f"{p.deployment.label}, {p.concurrency} request{'s' * (p.concurrency > 1)} in flight per replica"
    if found.feasible:
        say(f"\nAnswer: {where}.")
        if found.at_worst:
            ends = " and ".join(f"{name} is {seconds(high)}" for name, high in found.at_worst.items())
            say(f"The SLOs hold in the middle of the range; at its upper end {ends}. Latencies are means over requests.")
    else:
        say(f"\nNo configuration keeps the SLOs. The nearest: {where}.", "red")
        _show_remedies(found)
    _show_figures(found)
    _show_doubt(found)
    _show_coverage(found)
    if len(q.formats) > 1:
        _show_formats(found)
    _show_front(found)
    _show_contracts(found)
    _show_steps(found)
    show_operators(p)
    _show_missing(found, model, chip)
    talk_notes(found.notes)


def _workload(found: Answer) -> str:
    w = found.question.workload
    words = [f"{w.isl:,} prompt + {w.osl:,} generated tokens"]
    words += [f"{w.cached_tokens:,} of the prompt cached"] if w.cached_tokens else []
    words += [f"{w.draft_tokens} drafts per step, {w.acceptance:.0%} accepted"] if w.draft_tokens else []
    words += [f"at work in {w.utilisation:.0%} of the paid time"] if w.utilisation < 1 else []
    return ", ".join(words)


_OPTIONS = (
    "tp", "format", "GB weights\n+ a request", "in flight\nof most", "TTFT", "TPOT", "out\ntok/s\n/GPU", "$/Mtok", "J/tok", "SLO",
    "stopped\nby",
)  # fmt: skip


def _show_options(found: Answer) -> None:
    many = len(found.question.formats) > 1
    first = found.question.formats[0]
    rows, unfit = [], []
    for option, priced in zip(found.options, found.shown, strict=True):
        d = option.deployment
        if many and d.quantization != first and option is not found.chosen:
            continue
        fit = option.fit
        start = (d.tp, d.quantization or d.dtype or option.steps.dtype, f"{fit.weight_bytes / 1e9:.1f} + {g(fit.request_bytes / 1e9)}")
        rows.append((*start, *_cells(priced, fit.requests, found)) if priced else (*start, *[""] * 7, "memory"))
        if option.why_not:
            unfit.append(f"tp {d.tp}: {option.why_not}")
    table("Deployments (per GPU; each at its best point, or the nearest)", _OPTIONS, rows, right=("tp", *_OPTIONS[2:9]))
    for line in unfit:
        say(line)


def _cells(one: Priced, most: int, found: Answer) -> tuple[object, ...]:
    p, money = one.point, one.money
    return (
        f"{p.concurrency} of {most}",
        seconds(p.ttft_s.mid),
        seconds(p.tpot_s.mid or None),
        f"{p.output_tokens_per_s_per_gpu.mid:,.0f}",
        g(money.usd_per_mtok_total.mid) if money else "",
        g(one.efficiency.joules_per_token.mid),
        _slo(one),
        _LIMITS.get(p.limit) or ("engines" if p.concurrency == most else found.question.objective),
    )


def _slo(one: Priced) -> str:
    """Whether the SLOs are kept; empty where none was promised."""
    w = one.point.workload
    if w.offline or not (w.slo_ttft_s or w.slo_tpot_s):
        return ""
    return "kept" if one.meets() else "missed"


# The wait for the host is told from this share of the time on.
HOST_TOLD = 0.01
# What stops more requests in flight; "": as many as engines take ("engines"), or the objective prefers fewer.
_LIMITS = {"slo_tpot": "TPOT", "slo_ttft": "TTFT", "memory": "memory", "chunk": "--chunk", "prefill": "prompts"}


def _show_figures(found: Answer) -> None:
    assert found.priced is not None
    one, p = found.priced, found.priced.point
    time, energy = str(found.label), str(found.energy_label)
    rows = [
        _row("time to first token", p.ttft_s * 1e3, "ms", time),
        _row("time per output token", p.tpot_s * 1e3, "ms", time),
        _row("a whole request", p.end_to_end_s, "s", time),
        _row("tokens/s per user", p.tokens_per_s_per_user, "", time),
        _row("output tokens/s per GPU", p.output_tokens_per_s_per_gpu, "", time),
        _row("all tokens/s per GPU", p.total_tokens_per_s_per_gpu, "", time),
    ]
    if one.money:
        m = one.money
        rows += [
            _row("$ per million tokens, all", m.usd_per_mtok_total, "$", time),
            _row("$ per million input tokens", m.usd_per_mtok_input, "$", time),
            _row("$ per million cached input tokens", m.usd_per_mtok_cached_input, "$", time),
            _row("$ per million output tokens", m.usd_per_mtok_output, "$", time),
            _row("the whole cost per million output tokens", m.usd_per_mtok_all_on_output, "$", time),
        ]
        if m.gross_margin:
            rows.append(_row("gross margin", m.gross_margin * 100, "%", time))
    of_boards = one.efficiency.megawatt != "provisioned"
    e, boards = one.efficiency, "GPU boards" if found.question.chip.kind != "cpu" else "chip"
    rows += [
        _row(f"joules per token, all ({boards})", e.joules_per_token, "J", energy),
        _row(f"joules per output token ({boards})", e.joules_per_output_token, "J", energy),
        _row(f"power per {boards.removesuffix('s')} at work", p.power_w, "W", energy),
        _row(f"tokens/s per MW ({boards if of_boards else e.megawatt})", e.tokens_per_s_per_mw, "", energy if of_boards else time),
    ]
    table("What it takes", ("figure", "low", "middle", "high", "", "rests on"), rows, right=("low", "middle", "high"))


def _row(name: str, value: Range | None, unit: str, rests: str) -> tuple[object, ...]:
    if value is None or not math.isfinite(value.high) or value.high == 0:
        return (name, "", "none", "", "", "")
    return (name, g(value.low), g(value.mid), g(value.high), unit, rests)


def _show_doubt(found: Answer) -> None:
    """Which part of the dollars' range is the price's, which the times'."""
    assert found.priced is not None
    price, rate = found.question.price, found.priced.point.requests_per_s
    if price and found.priced.money:
        say(
            f"the dollars' range: {price.low / price.mid:.2f} to {price.high / price.mid:.2f} of the middle from the price, "
            f"{rate.mid / rate.high:.2f} to {rate.mid / rate.low:.2f} from the times"
        )


def _show_coverage(found: Answer) -> None:
    from klab.harness.cost.explain import spent

    assert found.priced is not None
    p = found.priced.point
    say(coverage(p.time_shares, p.energy_shares, found.question.chip.name))
    host = next((one.share for one in spent(p) if one.operator == "host"), 0.0)
    if host >= HOST_TOLD:
        say(f"{host:.1%} of the time is the wait for the host between steps, which counts as modelled (--host-us)")
    share = found.question.model.covered_share
    if share != 1:
        known = "an unknown share" if share is None else f"{share:.1%}"
        say(f"{known} of the model's flops is understood: its totals lack the rest", "yellow")


_FORMATS = ("format", "tp", "in\nflight", "TPOT", "$/Mtok", "J/tok", "GB", "SLO", "error (median, worst)", "rests on", "native")


def _show_formats(found: Answer) -> None:
    rows: list[tuple[object, ...]] = []
    for format, option, priced in found.by_format():
        error = (found.errors or {}).get(format)
        d = option.deployment
        told = "0 (unquantised)" if not format else "not measured"
        if error:
            of = "" if error.own else ", of other shapes"
            told = f"{error.median:.2g}, {error.worst:.2g} ({error.problems} problems on {', '.join(error.chips)}{of})"
        start = (format or d.dtype or option.steps.dtype, d.tp)
        weights = f"{option.fit.weight_bytes / 1e9:.1f}"
        if priced is None:
            rows.append((*start, "", "", "", "", weights, "does not fit", told, "", ""))
            continue
        p, money = priced.point, priced.money
        cost = (g(money.usd_per_mtok_total.mid) if money else "", g(priced.efficiency.joules_per_token.mid))
        rows.append((*start, p.concurrency, seconds(p.tpot_s.mid), *cost, weights, _slo(priced), told, str(p.label), _native(option)))
    title = "Formats (error: ||out - wide|| / ||wide|| of the format's kernels, measured by klab; GB: weights per GPU)"
    table(title, _FORMATS, rows, right=_FORMATS[1:7])
    if any(o.deployment.quantization not in (found.errors or {}) for o in found.options if o.deployment.quantization):
        say("klab run ... --with quantization=FORMAT measures an error; the format decides it, so any chip will do")


def _native(option: Option) -> str:
    from klab.harness.cost.answer import native

    return "yes" if native(option.deployment) else "no: wide"


def _show_front(found: Answer) -> None:
    columns = ("tp", "in flight", "tok/s/user", "TTFT", "TPOT", "out tok/s/GPU", "$/Mtok", "J/tok", "SLO")
    rows = []
    for one in found.front:
        p = one.point
        cost = g(one.money.usd_per_mtok_total.mid) if one.money else ""
        user = p.tokens_per_s_per_user.mid
        figures = (
            g(user) if math.isfinite(user) else "",
            seconds(p.ttft_s.mid),
            seconds(p.tpot_s.mid),
            f"{p.output_tokens_per_s_per_gpu.mid:,.0f}",
        )
        rows.append((p.deployment.tp, p.concurrency, *figures, cost, g(one.efficiency.joules_per_token.mid), _slo(one)))
    assert found.chosen is not None
    title = "Speed against throughput: of the points looked at, those that none beats in both"
    table(title, columns, rows, right=columns[:8])


def _show_contracts(found: Answer) -> None:
    rows = []
    q = found.question
    if found.priced and found.priced.money and q.price:
        for price, m in ((q.price, found.priced.money), *found.contracts):
            margin = f"{m.gross_margin.mid:.0%} ({m.gross_margin.low:.0%}..{m.gross_margin.high:.0%})" if m.gross_margin else ""
            rows.append((price.label, span(m.usd_per_mtok_total), span(m.usd_per_mtok_input), span(m.usd_per_mtok_output), margin))
    if rows:
        columns = ("price", "$/Mtok, all", "input", "output", "gross margin")
        table("By contract", columns, rows)
    if not found.offline or not found.priced or q.workload.offline:
        return
    if (
        found.offline.point.concurrency == found.priced.point.concurrency
        and found.offline.point.deployment == found.priced.point.deployment
    ):
        say("without a promise of latency (--offline) no more tokens per GPU would be gained")
    else:
        a, b = found.offline, found.priced
        gain = a.point.requests_per_s.mid / a.point.deployment.tp / (b.point.requests_per_s.mid / b.point.deployment.tp)
        cost = f": ${g(a.money.usd_per_mtok_total.mid)} per million tokens" if a.money else ""
        say(
            f"without a promise of latency (--offline): {a.point.deployment.label}, {a.point.concurrency} in flight give {gain:.2f} times "
            f"the tokens per GPU{cost}" + (f", TPOT {seconds(a.point.tpot_s.mid)}" if a.point.tpot_s.mid else "")
        )


def _show_steps(found: Answer) -> None:
    from klab.harness.cost.explain import step_times

    assert found.chosen is not None and found.priced is not None
    w = found.question.workload
    rows: list[tuple[object, ...]] = []
    for one in step_times(found.chosen.steps, w, found.priced.point.concurrency, found.chosen.fit.requests):
        what = f"prefill of {w.new_tokens:,} tokens" if one.phase == "prefill" else f"decode, batch {one.batch}"
        rows.append((what, f"{one.context:,}", *(g(us / 1e3) for us in (one.us.low, one.us.mid, one.us.high)), one.label))
    table("Steps", ("step", "context", "ms low", "middle", "high", "rests on"), rows, right=("context", "ms low", "middle", "high"))


def _show_missing(found: Answer, model: str, chip: str) -> None:
    from klab.harness.cost.explain import commands

    assert found.priced is not None
    lacking = show_launches(found.priced.point, found.question.chip.name)
    if lacking:
        say("measure it there with:")
    for line in commands(found.priced.point, model, chip, lacking):
        say(f"  {line}")


def _show_remedies(found: Answer) -> None:
    for line in found.remedies:
        say(f"  {line}")
