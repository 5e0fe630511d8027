"""Recorded spaces as files: what other tuners write is read, what klab writes they read, and nothing is lost on the way."""

from __future__ import annotations

import gzip
import json
import math
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klab.harness.store.result import Status
from klab.harness.tune.replay.assemble import Candidate, assemble
from klab.harness.tune.replay.decimal_text import decoder, number, text, without
from klab.harness.tune.replay.files import FORMATS, read_space, write_space
from klab.harness.tune.replay.ragged import Ragged
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.strategy import Ask
from klab.kernels.errors import UsageError

FAILED = [s for s in Status if s is not Status.OK]


def entry(x: int, flag: bool = True, **changes: Any) -> dict[str, Any]:
    """As Kernel Tuner writes one: milliseconds."""
    times = [0.25 * x, 0.26 * x, 0.27 * x]
    made = {
        "x": x,
        "flag": flag,
        "time": 0.26 * x,
        "times": times,
        "compile_time": 500.0 + x,
        "verification_time": 1.5,
        "benchmark_time": 20.25,
    }
    return made | {"GFLOP/s": 3.5 / x, "strategy_time": 0, "framework_time": 2.04, "timestamp": f"2023-12-22 13:17:{x:02d}+00:00"} | changes


def lacking(made: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in made.items() if k not in names}


def cache(*entries: dict[str, Any], end: str = "}\n}", **changes: Any) -> str:
    """A cache file as Kernel Tuner appends to it: an entry a line."""
    head = {
        "device_name": "NVIDIA A100",
        "kernel_name": "convolution",
        "problem_size": [4096, 4096],
        "tune_params_keys": ["x", "flag"],
        "tune_params": {"x": [1, 2, 4], "flag": [True, False]},
        "objective": "time",
    }
    lines = ",".join(f'\n"{e["x"]},{e["flag"]}": {json.dumps(e)}' for e in entries)
    return json.dumps(head | changes, indent="")[:-2] + ',\n"cache": {' + lines + end


def read(tmp_path: Path, content: str | bytes, name: str = "conv.json") -> RecordedSpace:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_space(tmp_path / name)


ENTRIES = (entry(1), entry(2), entry(2, False), entry(4))


def test_a_cache_of_kernel_tuner(tmp_path: Path) -> None:
    found = read(tmp_path, cache(*ENTRIES))
    assert (found.name, found.device, found.kernel, found.problem_size) == ("conv", "NVIDIA A100", "convolution", [4096, 4096])
    assert found.kind == "reference" and not found.notes
    assert [found.space.point(c) for c in range(4)] == [{"x": e["x"], "flag": e["flag"]} for e in ENTRIES]
    assert found.time_us == pytest.approx([260.0, 520.0, 520.0, 1040.0])
    assert found.compile_s == pytest.approx([0.501, 0.502, 0.502, 0.504])
    assert found.benchmark_s == pytest.approx([0.02175] * 4)
    assert found.verification_s == pytest.approx([0.0015] * 4)
    assert found.samples_us[1] == pytest.approx([500.0, 520.0, 540.0])
    assert list(found.metrics) == ["GFLOP/s"] and found.metrics["GFLOP/s"][3] == 3.5 / 4
    assert found.recorded_at[0] == "2023-12-22 13:17:01+00:00"
    (short,) = found.evaluate(Ask((1,), rounds=2))
    assert short.value == pytest.approx(510.0) and short.rounds == 2
    assert short.spent_s == pytest.approx(0.502 + 0.02175 * 2 / 3)


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    plain = read(tmp_path, cache(*ENTRIES), "conv.json")
    assert read(tmp_path, gzip.compress(cache(*ENTRIES).encode()), "conv.json") == plain
    assert read(tmp_path, cache(*ENTRIES), "conv.gz") == plain
    members = gzip.compress(cache(*ENTRIES)[:500].encode()) + gzip.compress(cache(*ENTRIES)[500:].encode())
    assert read(tmp_path, members, "conv.json.gz") == plain
    write_space(plain, tmp_path / "conv.txt", "t4")
    assert read_space(tmp_path / "conv.txt") == plain


def test_failures_of_both_generations(tmp_path: Path) -> None:
    modern = lacking(entry(4), "time", "times") | {"__error__": "CompilationFailedConfig"}
    old = [lacking(entry(2, f), "times") | {"time": word} for f, word in ((True, "RuntimeFailedConfig"), (False, "InvalidConfig"))]
    elsewhere = lacking(entry(4, False), "time", "GFLOP/s") | {"GFLOP/s": "RuntimeFailedConfig"}
    found = read(tmp_path, cache(entry(1), *old, modern, elsewhere, objective=["time"]))
    assert found.status == (Status.OK, Status.CRASHED, Status.UNSUPPORTED, Status.COMPILE_ERROR, Status.CRASHED)
    assert np.isinf(found.time_us[1:]).all() and found.compile_s[3] == 0.504
    assert found.by_status == {"crashed": 2, "ok": 1, "unsupported": 1, "compile_error": 1}
    (short,) = found.evaluate(Ask((4,), rounds=1))
    assert short.value == math.inf and not short.ok


def test_another_objective_is_replayed_by_its_time(tmp_path: Path) -> None:
    failed = lacking(entry(2), "time") | {"GFLOP/s": "RuntimeFailedConfig"}
    found = read(tmp_path, cache(entry(1), failed, objective="GFLOP/s"))
    assert found.status == (Status.OK, Status.CRASHED) and found.optimum_us == 260.0
    assert found.notes == ("it was tuned for GFLOP/s; replayed is the time",)
    with pytest.raises(UsageError, match=r"records GFLOP/s and no time"):
        read(tmp_path, cache(lacking(entry(1), "time", "times"), objective="GFLOP/s"))


@pytest.mark.parametrize("time", [math.nan, math.inf, -1.0, 0, 0.0, None, True])
def test_a_time_that_is_none(tmp_path: Path, time: Any) -> None:
    found = read(tmp_path, cache(entry(1), entry(2, time=time)))
    assert found.status == (Status.OK, Status.CRASHED) and found.time_us[1] == math.inf
    assert "no failure and no positive time" in found.notes[0]


def test_missing_times(tmp_path: Path) -> None:
    bare = lacking(entry(2), "times", "compile_time", "verification_time", "benchmark_time")
    found = read(tmp_path, cache(entry(1), bare, lacking(entry(4), "time"), entry(1, False, times=[1.0, None])))
    assert list(map(len, found.samples_us)) == [3, 0, 3, 0]
    assert found.time_us[2] == pytest.approx(1040.0), "the mean of its samples"
    assert found.compile_s[1] == found.benchmark_s[1] == 0.0
    assert found.notes == ("1 candidates have no record of what they cost; they are replayed as if they took no time",)


def test_values_are_told_apart_by_type(tmp_path: Path) -> None:
    values: list[Any] = [1, True, 1.0, "1", None, [1, 2]]
    found = read(tmp_path, cache(*(entry(1, v) for v in values)))
    assert [found.space.point(c)["flag"] for c in range(6)] == values
    assert [type(found.space.point(c)["flag"]) for c in range(3)] == [int, bool, float]


def test_the_last_of_equal_entries_counts(tmp_path: Path) -> None:
    found = read(tmp_path, cache(entry(1), entry(2), entry(1, time=7.0), entry(1, time=5.0)))
    assert len(found.space) == 2 and found.time_us[0] == 5000.0
    assert found.notes == ("2 entries are of a candidate that has a later one; the last counts",)


@pytest.mark.parametrize("end", ["", ",", ",\n", "}", "}\n", "}\n}\n"])
def test_a_file_without_its_end(tmp_path: Path, end: str) -> None:
    found = read(tmp_path, cache(*ENTRIES, end=end))
    assert found == read(tmp_path, cache(*ENTRIES))
    read_again = read(tmp_path, cache(*ENTRIES, end=end))
    closed = end.count("}") == 2
    assert read_again.notes == (() if closed else ("the file was not closed by its writer; all its entries are whole",))


def test_a_file_torn_anywhere_gives_what_is_whole(tmp_path: Path) -> None:
    whole = cache(*ENTRIES).encode()
    ends = [whole.index(b"}", at) + 1 for at in (whole.index(b'\n"%d,%s"' % (e["x"], str(e["flag"]).encode())) for e in ENTRIES)]
    for cut in range(ends[0], len(whole) - len("}\n}"), 7):
        found = read(tmp_path, whole[:cut])
        complete = [end for end in ends if end <= cut]
        assert len(found.space) == len(complete)
        told = [n for n in found.notes if "bytes" in n]
        dropped = int(told[0].split()[0]) if told else 0
        after = cut - complete[-1]
        assert max(0, after - 2) <= dropped <= max(0, after - 1), "all but the comma, and a new line"
    torn = read(tmp_path, whole[: whole.index(b'\n"4,True"') + 60])
    assert len(torn.space) == 3
    assert torn.notes == ("60 bytes are torn or damaged and were dropped; 3 entries are whole",)


def test_damage_in_the_midst_costs_its_entry_alone(tmp_path: Path) -> None:
    content = cache(*ENTRIES).replace('"2,True": {"x": 2,', '"2,True": {"x": \0\0,')
    found = read(tmp_path, content)
    assert [found.space.point(c)["x"] for c in range(3)] == [1, 2, 4]
    assert "3 entries are whole" in found.notes[0]


def test_a_compressed_file_cut_short(tmp_path: Path) -> None:
    rng = random.Random(1)
    entries = [entry(x, times=[rng.random() for _ in range(32)]) for x in range(1, 200)]
    packed = gzip.compress(cache(*entries).encode())
    found = read(tmp_path, packed[: len(packed) // 2], "a.json.gz")
    assert 80 < len(found.space) < 120
    assert found.notes[0] == "the compressed file ends early; kept is what there is"
    hurt = bytearray(packed)
    hurt[len(hurt) // 2 : len(hurt) // 2 + 40] = bytes(40)
    assert 80 < len(read(tmp_path, bytes(hurt), "b.json.gz").space) < 200


FOREIGN = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "damaged gzip": (gzip.compress(b"{}")[:10] + bytes(20), "damaged; .* and that is nothing"),
    "binary": (bytes(range(128, 256)), "is not text"),
    "prose": (b"hello", "not a JSON object"),
    "list": (b"[1, 2]", "not a JSON object"),
    "another's": (b'{"a": 1, "b": []}', "this has a, b"),
    "cut before anything": (b'{"dev', "damaged before its first candidate"),
    "no parameters": (b'{"cache": {"1": {"x": 1}}}', "does not say its parameters"),
    "no entry": (cache().encode(), "has no candidate"),
    "only strangers": (cache(end=',"a": {"y": 3}}}').replace('{,"a"', '{"a"').encode(), "lack parameters"),
    "all failed": (cache(entry(1, time="InvalidConfig"), entry(2, time="RuntimeFailedConfig")).encode(), "1 crashed, 1 unsupported"),
    "deep": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "object for a value": (cache(entry(1), entry(2, flag={"a": 1})).encode(), "values are objects"),  # type: ignore[arg-type]
    "no result": (b'{"results": [], "metadata": {"timeunit": "ms"}}', "has no candidate"),
    "strange unit": (b'{"results": [], "metadata": {"timeunit": "fortnight"}}', "'fortnight' is unknown"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_file_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    content, told = FOREIGN[what]
    with pytest.raises(UsageError, match=told) as refusal:
        read(tmp_path, content)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_space(tmp_path / "none.json")
    with pytest.raises(UsageError, match="is not a file"):
        read_space(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_is_never_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(CONTENTS[data.draw(st.sampled_from(sorted(CONTENTS)))])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"{", b"}", b"[", b"]", b",", b'"', b"null", b"1e999", b"\xff", b"-", b"[]", b"{}", b'"a"'])
        )
        content[at : at + data.draw(st.integers(0, 30))] = piece
    (folder / "hurt").write_bytes(content)
    try:
        found = read_space(folder / "hurt")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert found.digest and math.isfinite(found.optimum_us)


def recorded_space() -> RecordedSpace:
    """Two kernels and a library, as an export makes them: with failures, clocks, power and parameters that do not apply."""
    points: list[dict[str, Any]] = [{"kernel": "matmul/a", "block": b, "flag": f} for b in (16, 32) for f in (True, False)]
    points += [{"kernel": "matmul/b", "alpha": a, "shape": [1, 2], "mode": "-"} for a in (0.5, 1.0)] + [{"kernel": "matmul/torch"}]
    made = [
        Candidate(
            p, Status.OK, 10.1 + i, 0.5, 0.25, 0.1, [10.1 + i, 11.3], [1755.0, math.nan], 1755.0, 650.5, 0.0071 * i, "", f"2026-11-20 {i}",
            {"error": 0.001 * i} if i else {},
        )
        for i, p in enumerate(points)
    ]  # fmt: skip
    made += [
        Candidate({"kernel": "matmul/a", "block": 64 + i}, s, None, None if i % 2 else 0.3, reason=f"because {s}")
        for i, s in enumerate(FAILED)
    ]
    about = {"problem": {"m": 8}, "environment": {"torch": "2.13"}}
    return assemble(made, name="mm", device="NVIDIA H200", kernel="matmul", kind="measured", problem_size=[8, 64, 32], about=about)


CONTENTS = {
    "cache": cache(*ENTRIES).encode(),
    "ours": "".join(FORMATS["kernel-tuner"](recorded_space())).encode(),
    "t4": "".join(FORMATS["t4"](recorded_space())).encode(),
    "gzip": gzip.compress(cache(*ENTRIES).encode(), mtime=0),
}

NAMES = st.text(string.ascii_lowercase + ' _,"é', min_size=1, max_size=6).filter(lambda n: n not in ("time", "times", "reason", "status"))
VALUES = st.one_of(
    st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4), st.none(),
    st.lists(st.integers(0, 3), max_size=2),
)  # fmt: skip
MICROSECONDS = st.floats(1e-6, 1e12, exclude_min=True)
SECONDS = st.floats(0, 1e6)


@st.composite
def recorded_spaces(draw: st.DrawFn) -> RecordedSpace:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    points = draw(st.lists(st.dictionaries(st.sampled_from(names), VALUES, min_size=1), min_size=1, max_size=6, unique_by=repr))
    made = []
    for i, point in enumerate(points):
        samples = draw(st.lists(MICROSECONDS, max_size=3))
        clocks = draw(st.sampled_from([[], [1980.0] * len(samples), [math.nan] * len(samples)]))
        costs = [draw(SECONDS), draw(SECONDS), draw(st.one_of(st.none(), SECONDS))]
        found: list[float | None] = [draw(st.one_of(st.none(), st.floats(0, 1e4))) for _ in range(3)]
        status = Status.OK if i == 0 else draw(st.sampled_from(list(Status)))
        metrics = draw(st.dictionaries(st.sampled_from(["GFLOP/s", "error"]), st.floats(allow_nan=False, allow_infinity=False)))
        reason = draw(st.text(max_size=5)) if status is not Status.OK else ""
        made.append(
            Candidate(point, status, draw(MICROSECONDS), *costs, samples, clocks, *found, reason, draw(st.text(max_size=3)), metrics)
        )
    return assemble(made, name="n", device=draw(st.text(max_size=5)), kernel="k", kind="measured", problem_size=[1])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recorded_spaces())
def test_any_space_survives_every_format(tmp_path_factory: pytest.TempPathFactory, made: RecordedSpace) -> None:
    folder = tmp_path_factory.getbasetemp()
    for format in FORMATS:
        (folder / "round").write_text("".join(FORMATS[format](made)))
        found = read_space(folder / "round")
        assert found == made and found.notes == ()
        json.loads((folder / "round").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    write_space(found, folder / "back.gz", "kernel-tuner", force=True)
    assert read_space(folder / "back.gz").digest == made.digest


def test_a_difference_shows(tmp_path: Path) -> None:
    made = recorded_space()
    write_space(made, tmp_path / "a.json")
    content = (tmp_path / "a.json").read_text()
    for old, new in (
        ("0.0113", "0.01130000000000001"),
        ("650.5", "650.6"),
        ('"alpha": 0.5,', '"alpha": 0.25,'),
        ("because timeout", "because"),
    ):
        assert old in content
        assert read(tmp_path, content.replace(old, new, 1), "b.json") != made


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0), st.sampled_from([-3, 3, 0]))
def test_a_number_moves_between_units_without_loss(value: float, power: int) -> None:
    written = text(value, power)
    assert number(decoder.decode(f"[{written}]")[0], -power) == value
    if 1e-290 < value < 1e290:
        assert json.loads(written) == pytest.approx(value * 10.0**power, rel=1e-15)


@given(SECONDS, SECONDS)
def test_a_part_is_taken_off_so_that_it_can_be_added(a: float, b: float) -> None:
    assert without(a + b, a) + a == a + b


@pytest.mark.filterwarnings("ignore:None of the tunable parameters specify")
def test_kernel_tuner_replays_and_extends_what_klab_writes(tmp_path: Path) -> None:
    kernel_tuner = pytest.importorskip("kernel_tuner")
    from constraint import FunctionConstraint
    from kernel_tuner.util import read_cache

    points = [{"x": x, "flag": f} for x in (16, 32, 64) for f in (True, False)] + [{"mode": m} for m in ("a", "b")]
    made = assemble(
        [Candidate(p, Status.TIMEOUT if i == 0 else Status.OK, 30.3 - i, 0.5, 0.25, 0.1, [30.3 - i]) for i, p in enumerate(points)],
        name="mm", device="NVIDIA H200", kernel="matmul", kind="measured", problem_size=[8, 64],
    )  # fmt: skip
    path = tmp_path / "mm.json"
    write_space(made, path)
    known = read_cache(str(path), open_cache=False)
    keys = set(known["cache"])

    def recorded(*values: Any) -> bool:
        return ",".join(map(str, values)) in keys

    found, environment = kernel_tuner.tune_kernel(
        "matmul", "", (8, 64), [], known["tune_params"], cache=str(path), simulation_mode=True, lang="CUDA", quiet=True,
        restrictions=FunctionConstraint(recorded), block_size_names=None,
    )  # fmt: skip
    assert len(found) == 8 and environment["device_name"] == "NVIDIA H200"
    assert [repr(r["__error__"]) for r in found if "__error__" in r] == ["RuntimeFailedConfig"]
    best = min((r for r in found if "__error__" not in r), key=lambda r: r["time"])
    assert best["time"] == pytest.approx(made.optimum_us / 1e3) and (best["x"], best["mode"]) == ("-", "b")
    assert environment["simulated_time"] == pytest.approx(8 * 750.0)
    assert read_space(path) == made, "the simulation leaves the file as it was"
    read_cache(str(path), open_cache=True)
    opened = path.read_text()
    assert opened.endswith(",")
    assert read_space(path) == made
    path.write_text(opened + '\n"128,True,-": ' + json.dumps({"x": 128, "flag": True, "mode": "-", "time": 0.001}) + ",")
    longer = read_space(path)
    assert len(longer.space) == 9 and longer.optimum_us == 1.0 and longer.space.point(8) == {"x": 128, "flag": True}


def test_t4_is_as_its_schema_says(tmp_path: Path) -> None:
    kernel_tuner = pytest.importorskip("kernel_tuner.file_utils")
    jsonschema = pytest.importorskip("jsonschema")
    write_space(recorded_space(), tmp_path / "a.json", "t4")
    data = json.loads((tmp_path / "a.json").read_text())
    jsonschema.validate(data, kernel_tuner.output_file_schema("results")[1])
    jsonschema.validate(data, kernel_tuner.output_file_schema("metadata")[1])
    first, dropped = data["results"][0], data["results"][7]
    theirs = kernel_tuner.get_t4_results([entry(1)], {"x": [1], "flag": [True]})
    assert set(theirs["results"][0]) == set(first) and set(theirs["results"][0]["times"]) == set(first["times"])
    assert data["metadata"]["timeunit"] == theirs["metadata"]["timeunit"]
    units = {m["name"]: m["unit"] for m in first["measurements"]}
    assert units == {"time": "ms", "sm_clock_mhz": "MHz", "power_w": "W", "energy_j": "J", "clocks_mhz": "MHz"}
    assert dropped["invalidity"] == "constraints" and {"name": "status", "value": "screened", "unit": ""} in dropped["measurements"]
    assert "flag" not in dropped["configuration"]


def test_t4_as_kernel_tuner_writes_it(tmp_path: Path) -> None:
    file_utils = pytest.importorskip("kernel_tuner.file_utils")
    from kernel_tuner.util import CompilationFailedConfig

    failed = lacking(entry(4), "time", "times") | {"__error__": CompilationFailedConfig()}
    observed = entry(2, core_freq=1410.0, nvml_power=250.5, nvml_energy=0.13)
    file_utils.store_output_file(str(tmp_path / "t4.json"), [entry(1), observed, failed], {"x": [1, 2, 4], "flag": [True]})
    found, same = (
        read_space(tmp_path / "t4.json"),
        read(tmp_path, cache(entry(1), observed, lacking(failed, "__error__") | {"time": "CompilationFailedConfig"})),
    )
    assert found.time_us == pytest.approx(same.time_us) and found.status == same.status
    assert found.sm_clock_mhz is not None and found.sm_clock_mhz[1] == 1410.0 and math.isnan(found.sm_clock_mhz[0])
    assert found.power_w is not None and found.power_w[1] == 250.5 and found.energy_j is not None and found.energy_j[1] == 0.13
    for name in ("compile_s", "benchmark_s", "verification_s", "sm_clock_mhz", "power_w", "energy_j"):
        assert np.array_equal(getattr(found, name), getattr(same, name), equal_nan=True), name
    assert found.samples_us == same.samples_us and found.metrics.keys() == same.metrics.keys()


def test_t4_in_other_units_and_torn(tmp_path: Path) -> None:
    def result(x: int, **changes: Any) -> dict[str, Any]:
        times = {"compilation_time": 2.0, "runtimes": [30.0 * x, 31.0 * x]}
        return {"configuration": {"x": x}, "times": times, "invalidity": "correct", "correctness": 1} | changes

    words = ("timeout", "compile", "runtime", "correctness", "constraints")
    failures = [result(10 + i, invalidity=word) for i, word in enumerate(words)]
    data = {"results": [result(1), result(2, measurements=[{"name": "time", "value": 5.0, "unit": "us"}]), *failures]}
    found = read(tmp_path, json.dumps(data | {"metadata": {"timeunit": "nanoseconds"}}))
    assert found.time_us[:2] == pytest.approx([0.0305, 5.0]) and found.compile_s[0] == 2e-9
    assert found.status[2:] == (Status.TIMEOUT, Status.COMPILE_ERROR, Status.CRASHED, Status.INCORRECT, Status.UNSUPPORTED)
    unsaid = read(tmp_path, json.dumps(data))
    assert unsaid.time_us[0] == 30500.0 and "taken for milliseconds" in unsaid.notes[0]
    torn = read(tmp_path, json.dumps(data)[:-30])
    assert len(torn.space) == 6 and "6 results are whole" in torn.notes[-1]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_t4_file_that_lacks_its_last_brackets_says_so(tmp_path: Path, lost: int) -> None:
    whole = "".join(FORMATS["t4"](recorded_space())).rstrip()
    found = read(tmp_path, whole[:-lost])
    assert len(found.space) == len(recorded_space().space)
    assert found.notes[-1] == "the file was not closed by its writer; all its entries are whole"
    assert found.notes[:-1] == read(tmp_path, whole).notes


def test_what_contradicts_itself_is_refused() -> None:
    made = recorded_space()
    parts = {f: getattr(made, f) for f in made.__dataclass_fields__}
    for changes, told in (
        ({"compile_s": np.zeros(3)}, "compile_s has 3 values"),
        ({"time_us": np.zeros(len(made.space))}, "is ok and takes 0.0 us"),
        ({"time_us": np.ones(len(made.space))}, "failed .* and takes 1.0 us"),
        ({"status": [Status.OK] * len(made.space)}, "is ok and takes inf us"),
        ({"samples_us": Ragged.of([[1.0]] * len(made.space))}, "not as many clocks"),
        ({"metrics": {"error": np.zeros(1)}}, "metrics error has 1"),
        ({"reasons": ["a"]}, "reasons has 1"),
    ):
        with pytest.raises(UsageError, match=told):
            RecordedSpace(**parts | changes)


def test_names_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    made = assemble([Candidate({"times": 3}, Status.OK, 1.0)], name="n", device="d", kernel="k", kind="measured")
    with pytest.raises(UsageError, match="called times"):
        write_space(made, tmp_path / "a.json")
    write_space(made, tmp_path / "a.json", "t4")
    assert read_space(tmp_path / "a.json") == made


def test_a_file_is_replaced_only_when_asked_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded_space()
    path = tmp_path / "new" / "a.json"
    write_space(made, path)
    with pytest.raises(UsageError, match="exists; --force replaces it"):
        write_space(made, path)
    with pytest.raises(UsageError, match="is a folder"):
        write_space(made, tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        write_space(made, path / "b.json")
    with pytest.raises(UsageError, match="no format 'csv'; there are kernel-tuner, t4"):
        write_space(made, tmp_path / "b.json", "csv")

    def fails(recorded: RecordedSpace) -> Any:
        yield "{"
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setitem(FORMATS, "t4", fails)
    with pytest.raises(OSError, match="No space"):
        write_space(made, path, "t4", force=True)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.json"]
    write_space(made, tmp_path / "a.gz")
    write_space(made, tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_samples_are_one_array() -> None:
    rows = Ragged.of([[1.0, 2.0], [], [3.0]])
    assert [list(r) for r in rows] == [[1.0, 2.0], [], [3.0]] and rows[-1] == [3.0] and len(rows) == 3
    with pytest.raises(IndexError):
        rows[3]
    assert rows == Ragged.of([[1.0, 2.0], [], [3.0]]) and rows != Ragged.of([[1.0], [2.0], [3.0]])
