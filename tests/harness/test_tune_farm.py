"""The farm compiles in processes that may die, hang or eat memory, in the order in which somebody waits, and nothing twice.

The process here speaks the real one's protocol and compiles nothing, so that it starts in 50 ms; test_tune_screen.py has the real one.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from contest import HOPPER

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.harness.tune import farm as farm_module
from klab.harness.tune import farm_compiler
from klab.harness.tune.farm import Farm, default_jobs
from klab.harness.tune.screen import screen
from klab.harness.tune.screen_rules import Limits, drop_duplicates
from klab.kernels.contract import Config, kernel
from klab.kernels.matmul.problem import Matmul

WORKER = """
import json, os, subprocess, sys, time
log = open(os.environ["KLAB_TEST_LOG"], "a")
def note(text):
    log.write(text + chr(10)); log.flush()
note(f"start {os.getpid()}")
hello = json.loads(sys.stdin.readline())
if os.environ.get("KLAB_TEST_BROKEN"):
    sys.exit("fatal: libnothing.so is missing")
print(json.dumps({"ready": True}), flush=True)
served, held = 0, []
for line in sys.stdin:
    trial = json.loads(line)
    do = trial["config"]["do"]
    note(f"compile {do}{trial['config']['n'] or ''}")
    if do == "abort":
        os.abort()
    if do == "complain":
        sys.exit("LLVM ERROR: no such register")
    if do == "linger":
        os.close(1)
        time.sleep(1.0)
        os._exit(3)
    if do == "hang":
        child = subprocess.Popen(["sleep", "600"])
        note(f"start {child.pid}")
        time.sleep(600)
    if do == "eat" or (do == "eat after others" and served):
        while True:
            held.append(bytearray(32 << 20))
            time.sleep(0.01)
    if do == "grow":
        held.append(b"x" * (200 << 20))
    if do == "babble":
        print("what?", flush=True)
        continue
    if do == "slow":
        time.sleep(0.4)
    served += 1
    row = {"name": do, "registers": 32, "stack_bytes": 0, "smem_bytes": 0, "threads": 128, "tmem_columns": 0, "matrix_unit": "none"}
    row |= {"tma": False, "warp_specialised": False, "sass_hash": trial["config"]["code"], "launch": "", "grid": [1]}
    print(json.dumps({"status": "ok", "functions": [row], "compile_s": 0.1, "source_digest": trial["source_digest"],
                      "from_default": trial["config"]["n"], "kept": []}), flush=True)
"""

PROBLEM = Matmul(64, 64, 64)


@dataclass(frozen=True)
class Choice(Config):
    do: str = "well"
    n: int = 0
    code: str = ""


@kernel(Matmul, backend="triton", config=Choice)
def choice(problem, config, chip):
    """Never built."""
    raise AssertionError


def trial(do="well", n=0, code=None, **policy):
    return Trial.of(choice, PROBLEM, Choice(do, n, f"{do}{n}" if code is None else code), "h200", Policy(**policy))


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The file in which the processes note what they do; the cache is the test's own."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(farm_compiler, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setenv("KLAB_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "log"


def starts(log):
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("start")] if log.exists() else []


def compiled(log):
    return [line[8:] for line in log.read_text().splitlines() if line.startswith("compile")] if log.exists() else []


def gone(pids):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_what_is_waited_for_comes_first_then_the_urgent(log):
    told = []
    with Farm(HOPPER, jobs=1, on_done=lambda s: told.append(s.trial.config.n)) as farm:
        assert starts(log) == []  # lazily
        farm.submit([trial("slow", 1), *(trial(n=n) for n in (2, 3, 4))])
        while compiled(log) != ["slow1"]:
            time.sleep(0.01)
        farm.submit([trial(n=4), trial(n=5)], urgent=True)
        farm.submit([trial(n=3)])
        assert farm.done(trial(n=3)) is None
        assert farm.wait(trial(n=6)).status is Status.OK
        assert farm.finish()
        farm.submit([trial(n=6)])
    assert compiled(log) == ["slow1", "well6", "well4", "well5", "well2", "well3"]
    assert told == [1, 6, 4, 5, 2, 3] and len(starts(log)) == 1


def test_every_death_is_its_candidates_row_and_the_rest_goes_on(log):
    memory_bytes = 300 << 20
    wanted = [
        ("well", Status.OK, ""),
        ("abort", Status.CRASHED, "the compiler died with signal 6"),
        ("hang", Status.TIMEOUT, "compiling took more than 1 s"),
        ("complain", Status.CRASHED, "the compiler died with exit code 1: LLVM ERROR: no such register"),
        ("linger", Status.CRASHED, "the compiler died with exit code 3"),
        ("eat", Status.OUT_OF_MEMORY, "compiling took more than 0.3 GiB of memory"),
        ("babble", Status.CRASHED, "the compiler wrote something else than an answer"),
        ("slow", Status.OK, ""),
    ]

    class Patient(farm_module.Compiler):
        """On a busy machine those that do end may take longer than is waited for the one that does not."""

        def ask(self, trial, timeout_s):
            return super().ask(trial, 1.0 if trial.config.do == "hang" else timeout_s)

    with Farm(HOPPER, compilers=[lambda: Patient(HOPPER, [], memory_bytes)]) as farm:
        found = [farm.wait(trial(do)) for do, _, _ in wanted]
    assert [(s.status, s.reason) for s in found] == [(status, reason) for _, status, reason in wanted]
    assert gone(starts(log))


def test_a_candidate_is_blamed_for_memory_in_a_process_of_its_own_only(log):
    with Farm(HOPPER, jobs=1, limits=Limits(memory_bytes=300 << 20)) as farm:
        assert farm.wait(trial("well")).status is Status.OK
        assert farm.wait(trial("eat after others")).status is Status.OK
        assert len(starts(log)) == 2
        assert farm.wait(trial("grow")).status is Status.OK  # 200 of 300 MB: it is worn
        assert farm.wait(trial("well", 1)).status is Status.OK
        assert len(starts(log)) == 3


def test_closing_ends_everything_at_once(log):
    farm = Farm(HOPPER, jobs=2)
    farm.submit([trial("hang", 1), trial("hang", 2), trial("well")])
    while len(starts(log)) < 4:
        time.sleep(0.02)
    began = time.monotonic()
    assert farm.wait(trial("well"), deadline=began + 0.1).rule == "not screened"
    farm.close()
    farm.close()
    assert time.monotonic() - began < Limits().timeout_s and gone(starts(log))
    assert farm.wait(trial("well", 9)).rule == "not screened"


def test_an_interrupted_parent_leaves_nobody(log, tmp_path):
    code = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]}
        import test_tune_farm as t
        t.farm_compiler.WORKER = [sys.executable, {str(tmp_path / "worker.py")!r}]
        with t.Farm(t.HOPPER, jobs=1) as farm:
            farm.wait(t.trial("hang"))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)
    while len(starts(log)) < 2:
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.02)
    began = time.monotonic()
    parent.send_signal(signal.SIGINT)
    _, error = parent.communicate(timeout=120)
    assert "KeyboardInterrupt" in error and time.monotonic() - began < Limits().timeout_s
    assert gone(starts(log))


def test_a_compiling_process_ends_with_a_parent_that_was_killed():
    """With what it started, though it hangs."""
    child = (
        "import os, subprocess, threading, time; from klab.harness.tune.screen_worker import _end_with; parent = os.getppid(); "
        "sleeper = subprocess.Popen(['sleep', '600']); print(os.getpid(), sleeper.pid, flush=True); "
        "threading.Thread(target=_end_with, args=(parent,), daemon=True).start(); time.sleep(600)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_nothing_is_compiled_twice_and_nothing_lost_is_believed(log, tmp_path):
    all_of = [trial(n=n) for n in range(4)]

    def again(**limits):
        log.write_text("")
        found = screen([*all_of, trial("abort")], HOPPER, jobs=2, limits=Limits(**limits))
        return found, sorted(compiled(log))

    _, first = again()
    assert first == ["abort", "well", "well1", "well2", "well3"]
    found, second = again()
    # A crash may have been the machine's: it is tried again.
    assert second == ["abort"] and [s.cached for s in found] == [True] * 4 + [False]
    assert [s.compile_s for s in found[:4]] == [0.1] * 4
    # Limits are applied to what is known.
    found, third = again(stack_bytes=-1)
    assert third == ["abort"] and {s.rule for s in found[:4]} == {"spills"}
    entries = sorted(p for p in (tmp_path / "cache" / "screen").rglob("*") if p.is_file())
    assert len(entries) == 4
    for path, garbage in zip(entries, (b"", b"{}", b"klab1 " + bytes(32) + b"{}", path_cut(entries[3])), strict=True):
        path.write_bytes(garbage)
    assert again()[1] == first and again()[1] == ["abort"]
    edited = dataclasses.replace(all_of[0], source_digest="0" * 16)
    log.write_text("")
    screen([edited], HOPPER, jobs=1)
    assert compiled(log) == ["well"]
    screen([all_of[0]], dataclasses.replace(HOPPER, sm_count=131), jobs=1)
    assert compiled(log) == ["well", "well"]


def path_cut(path):
    return path.read_bytes()[:-7]


def test_a_known_answer_counts_only_while_its_binaries_are_there(log, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.replace('"kept": []', '"kept": ["triton:ABC", "cubin:0123"]'))
    folder, cubin = tmp_path / "triton" / "ABC", tmp_path / "cache" / "cubin" / "01" / "0123"

    def compiles():
        log.write_text("")
        screen([trial()], HOPPER, jobs=1)
        return len(compiled(log))

    assert (compiles(), compiles()) == (1, 1)
    folder.mkdir(parents=True)
    (folder / "_tile.cubin").write_bytes(b"ELF")
    assert compiles() == 1
    cubin.parent.mkdir(parents=True)
    cubin.write_bytes(b"ELF")
    assert compiles() == 0


def test_two_policies_compile_once(log):
    told = []
    trials = [trial(), trial(energy=True), trial(n=1)]
    found = screen(trials, HOPPER, jobs=1, on_done=told.append)
    assert compiled(log) == ["well", "well1"]
    assert [s.trial for s in found] == trials and [s.status for s in found] == [Status.OK] * 3
    assert sorted(s.trial.key for s in told) == sorted(t.key for t in trials)


def test_of_equal_code_the_one_waited_for_first_stays_but_never_instead_of_a_default(log):
    with Farm(HOPPER, jobs=1) as farm:
        farm.submit([trial(n=3, code="same")])
        farm.finish()
        assert farm.wait(trial(n=2, code="same")).status is Status.OK
        twin = farm.wait(trial(n=3, code="same"))
        assert (twin.rule, twin.twin) == ("duplicate", trial(n=2, code="same").key)
        assert twin.reason.startswith("n=3 changes nothing: the same machine code")
        assert farm.wait(trial(n=0, code="same")).status is Status.OK
        assert farm.wait(trial(n=2, code="same")).status is Status.OK


def test_of_equal_code_the_plainest_stays(log):
    trials = [trial(n=2, code="same"), trial(n=1, code="same"), trial(n=1, code="other"), trial(n=0, code="other"), trial(n=2)]
    found = screen(trials, HOPPER, jobs=1)
    assert [s.rule for s in found] == ["duplicate", "", "duplicate", "", ""]
    assert found[2].twin == trials[3].key
    assert [s.rule for s in drop_duplicates(found)] == [s.rule for s in found]


def test_processes_that_do_not_come_up_are_not_started_for_ever(log, monkeypatch):
    monkeypatch.setenv("KLAB_TEST_BROKEN", "1")
    found = screen([trial(n=n) for n in range(9)], HOPPER, jobs=1)
    assert {s.status for s in found} == {Status.CRASHED} and len(starts(log)) == 3
    assert found[8].reason == "the compiling process ended at its start with exit code 1: fatal: libnothing.so is missing"


def test_an_error_of_the_listener_reaches_who_waits(log):
    def broken(found):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        screen([trial(), trial(n=1)], HOPPER, jobs=1, on_done=broken)


def test_withdrawn_work_is_not_begun(log):
    with Farm(HOPPER, jobs=1) as farm:
        farm.submit([trial("slow", 1), trial(n=2)])
        while compiled(log) != ["slow1"]:
            time.sleep(0.01)
        farm.withdraw()
        assert farm.finish() and farm.done(trial(n=2)) is None
        assert farm.wait(trial(n=2)).status is Status.OK


def test_no_more_processes_than_memory_has_room_for(monkeypatch):
    monkeypatch.setattr(farm_module, "available_memory_bytes", lambda: 5 << 30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert default_jobs(Limits()) == 2
    assert default_jobs(Limits(memory_bytes=1 << 30)) == 5
    monkeypatch.setattr(farm_module, "available_memory_bytes", lambda: 1 << 20)
    assert default_jobs(Limits()) == 1
    monkeypatch.setattr(farm_module, "available_memory_bytes", lambda: None)
    assert default_jobs(Limits()) == 64
