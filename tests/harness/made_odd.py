"""Stores as no one would make them on purpose: hostile names, absurd numbers, and too little or too much of everything."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from made_nights import history
from made_results import CONTEST, contest, failed, made, problems

from klab.harness.store.result import Result, Status
from klab.harness.watch.history import History
from klab.harness.watch.series import Call, Night, Point
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul

# Sets window.__pwned wherever it is taken for markup, a script, a handler, a link, or the end of one.
ATTACKS = (
    "</script><script>window.__pwned=1</script>",
    "<img src=x onerror=\"window.__pwned=2\">",
    "\"><svg onload=window.__pwned=3>",
    "'-(window.__pwned=4)-'",
    "`${window.__pwned=5}`",
    "<a href=\"javascript:window.__pwned=6\">link</a>",
    "--><script>window.__pwned=7</script><!--",
    "]]></style><script>window.__pwned=8</script>",
    "%{customdata} %{meta.caption} <b>bold</b><br>&lt;",
    "line\nbreak\r\n\ttab \u2028 \u2029 end",
    "\u202eright to left\u202c \u200f\u05d0\u05d1 \u0627\u0644",
    "\U0001f680\U0001f9ea emoji e\u0301\u0301\u0301",
    "\\u003cscript\\u003e \\ \" ' ` ; // /* */ #?&=%00",
    "__proto__", "constructor", "toString", "=cmd|' /C calc'!A0", " ", "",
)  # fmt: skip
LONG = "kernel_of_many_words_" * 14 + "end300"


def bare(text: str) -> str:
    """The text as the name of a kernel may have it: one slash is the operator's."""
    return text.replace("/", "\u2215")


def small(chip: str = "h200") -> list[Result]:
    """Every kernel on every second problem of the contest, and its failures: several operators, two points of each curve, energy."""
    shown = {problem.key for problem in problems()[::2]}
    return [row for row in contest(chip) if row.problem_key in shown]


def hostile() -> list[Result]:
    """Every text of a row is an attack, one after another."""
    rows = []
    for n, text in enumerate(ATTACKS):
        problem = Matmul(1 + n % 2, 64, 64)
        texts: dict[str, Any] = {
            "chip": f"chip {text}", "operator": bare(f"op {text}"), "problem_label": text, "backend": text, "reason": text, "run_id": text,
            "device": f"device {text}", "device_uuid": text, "epoch": text, "config": {text: text}, "l2_state": text, "launch_mode": text,
            "environment": {text: text, "commit": text, "driver": text, "torch": text}, "policy": {text: text}, "build": {text: text},
            "energy_reason": text, "math_dtype": text, "source_digest": text, "reference_device": text, "wide_key": text,
            "problem": {"m": 1 + n % 2, text: text, "dtype": text},
        }  # fmt: skip
        for kernel in ("a", "b"):
            rows.append(
                dataclasses.replace(
                    made(problem, f"{kernel} {bare(text)}", seed=n), **texts, kernel=bare(f"op {text}") + f"/{kernel} {bare(text)}"
                )
            )
        wrong = failed(problem, "x", Status.CRASHED, text)
        rows.append(dataclasses.replace(wrong, **texts, kernel=bare(f"op {text}") + f"/x {bare(text)}", key=f"x{n}"))
    # The same on a chip with limits, so that every figure has them to draw.
    for n, row in enumerate(small()):
        text = ATTACKS[n % len(ATTACKS)]
        rows.append(
            dataclasses.replace(
                row, kernel=f"{row.operator}/{row.kernel.partition('/')[2]} {bare(text)}", config=dict(row.config) | {text: text}
            )
        )
    return rows


def long_names() -> list[Result]:
    """Names of 300 characters and a little more."""
    rows = []
    for row in small():
        texts: dict[str, Any] = {"chip": "h200", "device": f"device {LONG}", "problem_label": f"{row.problem_label} {LONG}"}
        texts |= {"kernel": f"{row.operator}/{row.kernel.partition('/')[2]}_{LONG}", "config": dict(row.config) | {LONG: LONG}}
        rows.append(dataclasses.replace(row, **texts, run_id=LONG, reason=row.reason and f"{row.reason} {LONG}"))
    return rows


def not_numbers() -> list[Result]:
    """Infinities where JSON lets them in (1e400 in a mapping), nulls, and whole numbers that no float holds."""
    odd: tuple[Any, ...] = (float("inf"), float("-inf"), None, 10**400, [float("inf"), None], {"a": float("inf")}, True, "", [])
    rows = []
    for n, value in enumerate(odd):
        for kernel in ("torch", "triton_a"):
            row = made(Matmul(8 + n, 64, 64), kernel, seed=n)
            mappings: dict[str, Any] = {"config": {"block": value}, "environment": {"driver": value, "commit": value, "torch": value}}
            mappings |= {"problem": {"m": value, "n": 64, "k": 64, "dtype": value}, "policy": {"rounds": value}, "build": {"spills": value}}
            rows.append(dataclasses.replace(row, **mappings))
        lens = made(DecodeAttention((8 + n,), 8, 8, 64))
        rows.append(dataclasses.replace(lens, problem={"kv_lens": value, "q_lens": [value, value], "heads": value}))
    return rows


def absurd() -> list[Result]:
    """Times, energies and clocks as no clock and no meter gives them, but of the right type."""
    rows = []
    for n, us in enumerate((1e-12, 1e-300, 1.0, 1e15, 1e300)):
        for kernel in ("torch", "triton_a", "cuda_b"):
            row = made(Matmul(2 + n, 64, 64), kernel, samples=[us] * 20, seed=n)
            rows.append(row)
    power: tuple[dict[str, Any], ...] = (
        {"energy_j": 0.0, "power_w": 0.0, "idle_power_w": 0.0, "sm_clock_mhz": 0.0},
        {"energy_j": -1.0, "energy_ci_low_j": 2.0, "energy_ci_high_j": -3.0, "power_w": -5.0, "sm_clock_mhz": -1.0},
        {"energy_j": 1e300, "power_w": 1e300, "sm_clock_mhz": 1e300, "error": 1e300, "tolerance": 0.0},
        {"energy_j": 1e-300, "power_w": 1e-300, "wide_error": -1.0, "wide_key": "nobody", "error": -1.0, "tolerance": -1.0},
        {"power_trace": ((0.0, 0.0), (-1.0, 1e300), (1e300, -1e300)), "energy_j": 1.0, "power_w": 400.0},
        {"clocks_mhz": (None,) * 20, "temperatures_c": (None, *(1e300,) * 19), "throttle_reasons": (2**62,) * 20},
        {"clocks_mhz": (1.0,), "temperatures_c": (1.0,) * 99, "marked": (), "launches_per_round": -7, "checks": -1, "compile_s": -1.0},
    )
    for n, changes in enumerate(power):
        for kernel in ("torch", "triton_a"):
            rows.append(made(Matmul(64 + n, 256, 256), kernel, seed=n, **changes))
    return rows


def no_success() -> list[Result]:
    """One trial of every way to fail, and none that gave a time."""
    ways = [status for status in Status if status is not Status.OK]
    return [failed(Matmul(m, 64, 64), f"triton_{way}", way, f"because of {way}") for m in (1, 2) for way in ways]


def one_point() -> list[Result]:
    """A store of one row."""
    return [made(Matmul(16, 64, 64), "triton_a")]


def few_rounds() -> list[Result]:
    """Rows with a time and fewer rounds than an interval takes, and one without any sample."""
    bare_row = made(Matmul(4, 64, 64), "triton_b", samples_us=(), ci_low_us=None, ci_high_us=None, q1_us=None, q3_us=None, marked=())
    return [made(Matmul(m, 64, 64), "triton_a", samples=[50.0 + m] * m) for m in (1, 2, 3)] + [bare_row]


def reference_only() -> list[Result]:
    """Published times alone: no sample, no energy, no run of one's own."""
    empty: dict[str, Any] = {"samples_us": (), "ci_low_us": None, "ci_high_us": None, "q1_us": None, "q3_us": None, "marked": ()}
    empty |= {
        "clocks_mhz": (),
        "temperatures_c": (),
        "throttle_reasons": (),
        "sm_clock_mhz": None,
        "recorded_at": "",
        "epoch": "",
        "checks": 0,
    }
    return [
        made(problem, "trtllm.gemm", chip="h200", kind="reference", run_id="reference", policy={}, level_us=20.0 + n, seed=n, **empty)
        for n, problem in enumerate(problems())
    ]


def mixed_devices() -> list[Result]:
    """One chip by name, three devices of two kinds."""
    names = ("NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H200")
    return [
        dataclasses.replace(row, device=names[n % 3], device_uuid=f"GPU-{n % 3}", epoch=f"epoch-{n % 3}") for n, row in enumerate(small())
    ]


def fifty_chips(count: int = 1) -> list[Result]:
    """Fifty chips of which the catalog knows one, the same `count` problems on each."""
    rows = []
    for n in range(50):
        chip = "h200" if n == 0 else f"chip-{n}"
        for problem in problems()[2 : 2 + count]:
            for kernel, *_ in CONTEST[problem.operator][:2]:
                row = made(problem, kernel, level_us=50.0 * (1 + n / 10), seed=n)
                rows.append(dataclasses.replace(row, chip=chip, device=f"Example {n}", device_uuid=f"GPU-{n}", key=f"{row.key}{n}"))
    return rows


def twins() -> list[Result]:
    """Chips and kernels whose names differ only where identities of HTML do not."""
    found = []
    for chip in ("h200", "H200", "h 200", "h-200", "h.200"):
        for kernel in ("triton_a", "triton-a", "triton a", "Triton_A"):
            row = made(Matmul(16, 64, 64), kernel)
            found.append(dataclasses.replace(row, chip=chip, key=f"{chip} {kernel}", backend="triton"))
    return found


def unknown_chip() -> list[Result]:
    """A GPU that the catalog does not have."""
    return [dataclasses.replace(row, chip="mi999", device="Example MI999") for row in small()]


def many_problems(count: int = 50) -> list[Result]:
    """One operator, very many shapes, two kernels."""
    kernels = ("torch", "triton_a")
    return [made(Matmul(1 + n, 128, 64), k, level_us=10.0 + n / 50, rounds=6) for n in range(count) for k in kernels]


def no_work() -> list[Result]:
    """Problems that count neither operations nor bytes, one of the two, or more than there are."""
    work = ((0.0, 0.0), (0.0, 1e6), (1e9, 0.0), (1e300, 1e300), (1e-300, 1e-300))
    return [
        made(Matmul(8 + n, 64, 64), kernel, flops=f, bytes_moved=b, seed=n)
        for n, (f, b) in enumerate(work)
        for kernel in ("torch", "triton_a")
    ]


def unknown_dtype() -> list[Result]:
    """A dtype that no chip has a peak for."""
    rows = [row for row in small() if row.status is Status.OK]
    return [dataclasses.replace(row, problem=dict(row.problem) | {"dtype": "posit7"}, math_dtype="posit7") for row in rows]


def odd_dates() -> list[Result]:
    """Recorded in the future, at the beginning of time, in another zone, and at no time at all."""
    dates = ("2999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "2026-11-20T10:00:00+14:00", "yesterday", "", "2026-11-20", "20261120T100000")
    return [dataclasses.replace(row, recorded_at=dates[n % len(dates)], run_id=f"run-{n % 3}") for n, row in enumerate(small())]


def no_environment() -> list[Result]:
    """Nobody knows where these were measured, nor by what."""
    nothing: dict[str, Any] = {"environment": {}, "device": "", "device_uuid": "", "epoch": "", "policy": {}, "build": {}, "run_id": ""}
    return [dataclasses.replace(row, **nothing) for row in small()]


def energy_without_power() -> list[Result]:
    """Joules without watts, watts without joules, and joules without an interval."""
    rows = []
    for n, row in enumerate(contest()):
        if row.energy_j is None:
            continue
        gone: tuple[dict[str, Any], ...] = (
            {"power_w": None},
            {"energy_j": None, "energy_ci_low_j": None, "energy_ci_high_j": None},
            {"energy_ci_low_j": None, "energy_ci_high_j": None},
        )
        rows.append(dataclasses.replace(row, **gone[n % 3]))
    return rows


def no_library() -> list[Result]:
    """Nothing to compare with."""
    return [row for row in small() if not row.library]


def large_space(count: int = 200) -> list[Result]:
    """One problem with so many configurations of five knobs, a tenth of them failed; knobs that come and go."""
    rng = random.Random(3)
    problem, rows = Matmul(256, 2048, 1024), []
    for n in range(count):
        config: dict[str, Any] = {"block_m": 16 << n % 4, "block_n": 16 << n // 4 % 4, "warps": 1 << n // 16 % 4, "stages": n // 64 % 6}
        config |= {"seed": n, "mode": ("a", None, True)[n % 3]} | ({"rare": n} if n % 7 == 0 else {})
        if n % 10 == 9:
            rows.append(failed(problem, "triton_a", list(Status)[2 + n % 7], f"reason {n % 5}", config=config))
        else:
            rows.append(made(problem, "triton_a", config=config, level_us=20 + 30 * rng.random(), rounds=5))
    return [*rows, made(problem, "torch", level_us=30.0)]


def many_runs() -> list[Result]:
    """The same trials in ten runs, the last of which finds everything slower and one kernel crashed."""
    rows = []
    for n in range(10):
        at = f"2026-10-{1 + n:02d}T10:00:00Z"
        for row in contest()[::9]:
            slow = 1.5 if n == 9 else 1.0
            if row.median_us is None:
                continue
            again = made(Matmul(16, 64, 64), row.kernel.partition("/")[2], level_us=40.0 * slow, seed=n) if n % 2 else row
            rows.append(dataclasses.replace(again, run_id=f"run-{n:02d}", recorded_at=at))
    return rows


def odd_nights() -> list[Night]:
    """Nights with holes: no values, not finite ones, none of zero, nights without a verdict, and a new series in the last."""
    nights = history(6, 24)
    holes = (Point(status="crashed"), None, Point((float("nan"), float("inf"))), Point((0.0, 0.0, 0.0)), Point((1e300,)), Point((1e-300,)))
    for day in range(3, 20):
        told = [
            dataclasses.replace(one, call=Call.BROKEN.value, point=holes[(day + n) % 6]) if n < 3 else one
            for n, one in enumerate(nights[day].verdicts)
        ]
        nights[day] = dataclasses.replace(nights[day], verdicts=tuple(told))
    nights[8] = dataclasses.replace(nights[8], verdicts=(), notes=("no device answered",), incomplete="a device was lost")
    new = dataclasses.replace(
        nights[-1].verdicts[0], series=dataclasses.replace(nights[-1].verdicts[0].series, problem_key="new", label=ATTACKS[1])
    )
    nights[-1] = dataclasses.replace(nights[-1], verdicts=(*nights[-1].verdicts, new))
    return nights


ODD: dict[str, Callable[[], list[Result]]] = {
    make.__name__: make
    for make in (
        hostile, long_names, not_numbers, absurd, no_success, one_point, few_rounds, reference_only, mixed_devices, fifty_chips, twins,
        unknown_chip, many_problems, no_work, unknown_dtype, odd_dates, no_environment, energy_without_power, no_library, large_space,
        many_runs,
    )
} | {"cpu_only": lambda: small("cpu")}  # fmt: skip


def store(folder: Path, rows: Iterable[Result], nights: Iterable[Night] = ()) -> Path:
    """The rows as a file of the store, infinite numbers spelled 1e400 as another program might; nights where `klab nightly` keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row.to_json()).replace("-Infinity", "-1e400").replace("Infinity", "1e400") for row in rows)
    (folder / "odd.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = History(folder / "nights")
    for night in nights:
        kept.add(night)
    return folder
