"""The device tests of a sitting: processes side by side that take turns, what fails and why, and what a folder keeps of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klab.harness.fleet.devices import Device
from klab.harness.measure.lock import exclusive
from klab.harness.tune import device_tests, device_tests_kept
from klab.harness.tune import device_tests_turns as turns
from klab.harness.tune.device_tests import DeviceTests, Ended, free_device, run_device_tests
from klab.harness.tune.device_tests_kept import NAMED, Failed, KeptTests, Tally
from klab.kernels.errors import CannotMeasure

HEAD = "import os, sys, time, types\nimport pytest\npytestmark = pytest.mark.gpu\n"
# Every file here is `tests/kernels/test_it.py`.
NAME = "tests/kernels/test_it.py::test_"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the tests of a made checkout; `made(text, processes)`."""

    def write(text: str, processes: int = 1, name: str = "test_it.py") -> Path:
        folder = tmp_path / "made" / "tests" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a device\n")
        (folder / name).write_text(HEAD + text)
        monkeypatch.setattr(device_tests, "processes", lambda: processes)
        return folder

    root = tmp_path / "made"
    monkeypatch.setattr(device_tests, "checkout", lambda: root)
    monkeypatch.setattr(device_tests_kept, "checkout", lambda: root)
    return write


def outcomes(found: DeviceTests) -> dict[str, str]:
    return {name.removeprefix(NAME): one.outcome for name, one in found.tests.items()}


def test_every_end_has_its_words_and_none_takes_others_with_it(made: Any) -> None:
    made(
        """
@pytest.mark.parametrize("n", ["a b", "c"])
def test_x(n):
    assert n != "c", "off by 3.1e-02 at [5, 7]"
def test_aborts():
    print("the device says no", file=sys.stderr)
    os.abort()
@pytest.fixture
def broken():
    raise RuntimeError("no stream")
def test_setup(broken):
    pass
def test_skips():
    pytest.skip("fits no float16 example")
def test_after():
    pass
"""
    )
    made("import no_such_module", name="test_other.py")
    saved: list[DeviceTests] = []
    found = run_device_tests(None, save=saved.append)
    assert outcomes(found) == {
        "x[a b]": "passed", "x[c]": "failed", "aborts": "crashed", "setup": "error", "skips": "skipped", "after": "passed",
        "tests/kernels/test_other.py": "error",
    }  # fmt: skip
    assert found.left == 0 and not found.stopped and saved[-1] == found
    said = {name.removeprefix(NAME): one.text for name, one in found.tests.items()}
    assert "off by 3.1e-02 at [5, 7]" in said["x[c]"] and "no stream" in said["setup"] and "no float16 example" in said["skips"]
    assert "Fatal Python error: Aborted" in said["aborts"] and "test_it.py" in said["aborts"], "where it was"
    assert "no_such_module" in said["tests/kernels/test_other.py"] and not said["after"]
    assert found.counts == {"crashed": 1, "error": 2, "failed": 1, "passed": 2, "skipped": 1}


def test_a_lost_context_costs_one_test(made: Any) -> None:
    """After an illegal access every call of the process fails: with one process for all, so would every later test."""
    made(
        """
def fails():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_a_loses():
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=fails))
    fails()
def test_b():
    assert "torch" not in sys.modules
"""
    )
    found = run_device_tests(None)
    assert outcomes(found) == {"a_loses": "failed", "b": "passed"}
    assert "illegal memory access" in found.tests[f"{NAME}a_loses"].text


def test_a_test_that_hangs_is_ended_and_says_where(made: Any) -> None:
    """Deterministic: the test notes its own begin as long ago."""
    made(
        """
def test_a_hangs():
    import json
    from klab.harness.tune import device_tests_turns as turns
    with open(os.path.join(os.environ[turns.FOLDER], f"{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps({"at": 0.0, "test": "tests/kernels/test_it.py::test_a_hangs", "outcome": "begun"}) + "\\n")
    waits_for_the_device()
def waits_for_the_device():
    while True:
        time.sleep(60)
def test_b():
    pass
"""
    )
    found = run_device_tests(None)
    assert outcomes(found) == {"a_hangs": "hung", "b": "passed"} and "waits_for_the_device" in found.tests[f"{NAME}a_hangs"].text


def test_the_end_of_the_time_leaves_the_others(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to come when the second test has begun."""
    made("def test_a():\n    pass\ndef test_b():\n    time.sleep(600)\ndef test_c():\n    pass\n")
    live = device_tests._Run._look

    def look(self: Any) -> None:
        live(self)
        if any(event["test"] == f"{NAME}b" for pid in self.live for event in self._events(pid)):
            monkeypatch.setattr(time, "monotonic", lambda: 1e12)

    monkeypatch.setattr(device_tests._Run, "_look", look)
    found = run_device_tests(1000.0)
    assert outcomes(found) == {"a": "passed", "b": "unfinished"} and found.left == 2 and "share of the time" in found.stopped
    assert "time.sleep(600)" in found.tests[f"{NAME}b"].text or "test_b" in found.tests[f"{NAME}b"].text


def test_what_is_done_is_not_run_and_the_doubtful_come_last(made: Any, tmp_path: Path) -> None:
    made(f"ran = {str(tmp_path / 'ran')!r}\n" + "".join(f"def test_{n}():\n    open(ran, 'a').write('{n}')\n" for n in "abcd"))
    found = run_device_tests(None, [f"{NAME}b"], [f"{NAME}a"])
    assert (tmp_path / "ran").read_text() == "cda" and set(outcomes(found)) == {"a", "c", "d"} and found.left == 0


def test_several_processes_share_the_tests_of_a_module(made: Any) -> None:
    """Also those with a fixture of their module, which a distribution by groups keeps in one process."""
    made(
        """
@pytest.fixture(scope="module")
def chip():
    return os.getpid()
@pytest.mark.parametrize("n", range(12))
def test_x(chip, n):
    meeting = os.path.join(os.environ["KLAB_DEVICE_TESTS"], "meeting")
    os.makedirs(meeting, exist_ok=True)
    open(os.path.join(meeting, str(chip)), "w").close()
    while len(os.listdir(meeting)) < 2:  # until another process has one too
        time.sleep(0.01)
""",
        2,
    )
    found = run_device_tests(None)
    assert found.counts == {"passed": 12}


def test_compiled_binaries_are_looked_for_where_the_user_keeps_them(made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("KLAB_TEST_SECRET", "x")
    monkeypatch.setenv("A_TOKEN", "x")
    made(
        f"""
@pytest.fixture(scope="session", autouse=True)
def own_cache():
    os.environ["KLAB_CACHE"] = "elsewhere"
def test_x():
    assert os.environ["KLAB_CACHE"] == {str(tmp_path / "mine")!r} and "A_TOKEN" not in os.environ
"""
    )
    assert run_device_tests(None).counts == {"passed": 1}


@pytest.mark.parametrize("visible", ["GPU-a", "", None])
def test_they_see_the_device_that_is_locked_for_them(visible: str | None, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    made(f"def test_x():\n    assert os.environ['CUDA_VISIBLE_DEVICES'] == {'GPU-b' if visible is None else visible!r}\n")
    assert run_device_tests(None, visible=visible).counts == {"passed": 1}


def test_the_first_device_that_nobody_measures_on_is_locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))
    here = [Device(f"GPU-{n}", "made", "cuda", n) for n in range(2)]
    monkeypatch.setattr(device_tests, "devices", lambda chip: here)
    chip: Any = None
    with free_device(chip) as first, free_device(chip) as second:
        assert [first, second] == here
        with pytest.raises(CannotMeasure, match=r"GPU-0 is being measured by .*; GPU-1 is being measured by"), free_device(chip):
            pass
    with free_device(chip) as again, pytest.raises(CannotMeasure, match="GPU-0 is being measured"), exclusive("GPU-0"):
        assert again == here[0]
    with exclusive("GPU-0"), exclusive("GPU-1"):
        pass


def test_processes_that_never_begin_a_test_are_given_up(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("def test_x():\n    pass\n", 3)
    (folder / "conftest.py").write_text("import no_such_module\n")
    with pytest.raises(CannotMeasure, match=r"the tests did not run: .*no_such_module"):
        run_device_tests(None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CannotMeasure, match="without a word"):
        run_device_tests(None)


def test_device_tests_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_tests, "checkout", lambda: None)
    with pytest.raises(CannotMeasure, match="not of an installed klab"):
        run_device_tests(1.0)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(device_tests, "checkout", lambda: tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotMeasure, match="need pytest"):
        run_device_tests(1.0)


def test_an_interrupt_keeps_what_has_ended(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("def test_a():\n    pass\ndef test_b():\n    time.sleep(600)\n")
    live, saved = device_tests._Run._look, list[DeviceTests]()
    pids = list[int]()

    def look(self: Any) -> None:
        live(self)
        if any(event["test"] == f"{NAME}b" for pid in self.live for event in self._events(pid)):
            pids.extend(self.live)
            raise KeyboardInterrupt

    monkeypatch.setattr(device_tests._Run, "_look", look)
    with pytest.raises(KeyboardInterrupt):
        run_device_tests(None, save=saved.append)
    assert outcomes(saved[-1]) == {"a": "passed", "b": "unfinished"}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_whose_parent_was_killed_takes_no_further_test(tmp_path: Path) -> None:
    items: Any = [SimpleNamespace(nodeid=name) for name in "abc"]
    program = (
        "import os, signal, sys, time\nfrom types import SimpleNamespace\nfrom klab.harness.tune.device_tests_turns import _turns\n"
        "parent = os.getpid()\n"
        "if os.fork():\n    time.sleep(600)\n"
        "taken = _turns([SimpleNamespace(nodeid=name) for name in 'abc'])\nnext(taken)\nos.kill(parent, signal.SIGKILL)\n"
        "while os.getppid() == parent:\n    time.sleep(0.01)\n"
        "print(len(list(taken)), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {turns.FOLDER: str(tmp_path)}, stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL and done.stdout.split() == [b"0"] and len(items) == 3


def test_long_texts_keep_both_ends() -> None:
    long = "begin" + "x" * 20_000 + "end"
    short = turns.shortened(long)
    assert short.startswith("begin") and short.endswith("end") and "[... " in short and len(short) < turns.HEAD + turns.TAIL + 50
    assert turns.shortened(" a\n") == "a"


# ------------------------------------------------------------------------------------------------ what a folder keeps


def kernels(**digests: str) -> Any:
    return [SimpleNamespace(id=f"matmul/{name}", source_digest=code) for name, code in digests.items()]


def of(kernel: str) -> str:
    return f"{NAME}x[bfloat16-matmul/{kernel}]"


FAILED = Ended("failed", 3.0, "t.py:3: in test_x\n    assert not wrong\nE   AssertionError: out is off by 2e-02\nE   more")


def test_one_changed_kernel_costs_its_own_tests(tmp_path: Path) -> None:
    kept = KeptTests(tmp_path, kernels(a="1", b="1"))
    assert not kept.done and not kept.again and not kept.complete
    kept.save(DeviceTests({of("a"): Ended("passed"), of("b"): Ended("passed"), f"{NAME}y": Ended("passed")}))
    assert KeptTests(tmp_path, kernels(a="1", b="1")).complete
    other = KeptTests(tmp_path, kernels(a="1", b="2"))
    assert other.done == [of("a")] and not other.complete, "a test of no kernel is of all of them"
    (tmp_path / "device_tests.json").write_text("{torn")
    assert KeptTests(tmp_path, kernels(a="1", b="1")).done == []


def test_a_failure_is_tried_once_more_and_kept_with_its_words(tmp_path: Path) -> None:
    ran = {of("a"): FAILED, of("b"): Ended("passed"), of("c"): Ended("unfinished", 90.0, "File x.py"), of("d"): Ended("skipped", 0.0, "no")}
    first = KeptTests(tmp_path, kernels(a="1", b="1", c="1", d="1"))
    first.save(DeviceTests(ran, 1, "stopped"))
    first.save(DeviceTests(ran, 1, "stopped"))
    second = KeptTests(tmp_path, kernels(a="1", b="1", c="1", d="1"))
    assert second.done == [of("b"), of("d")] and second.again == [of("a"), of("c")] and not second.complete
    second.save(DeviceTests({of("a"): FAILED, of("c"): Ended("passed")}))
    third = KeptTests(tmp_path, kernels(a="1", b="1", c="1", d="1"))
    assert third.complete and third.again == [] and set(third.done) == set(ran)
    told = Failed("test_x[bfloat16-matmul/a]", "failed", "AssertionError: out is off by 2e-02")
    # The one that failed twice, and the one that was cut off before it passed, are one each.
    assert third.tested() == Tally({"failed": 1, "passed": 2, "skipped": 1}, (told,), complete=True)
    assert second.tested().again == 0 and first.tested().again == 2, "what is saved is told"
    assert third.failures() == ["failed: test_x[bfloat16-matmul/a]: failed: AssertionError: out is off by 2e-02"]
    assert json.loads((tmp_path / "device_tests.json").read_text())["tests"][of("a")]["text"] == FAILED.text
    mended = KeptTests(tmp_path, kernels(d="1", c="1", b="1", a="2"))
    assert mended.tested() == Tally({"passed": 2, "skipped": 1}, earlier=1)
    assert of("a") not in mended.done and mended.failures() == [] and mended.again == []


def test_without_a_device_nothing_stands(tmp_path: Path) -> None:
    kept = KeptTests(tmp_path, kernels(a="1"))
    kept.save(DeviceTests({of("a"): Ended("skipped", 0.0, "no CUDA device")}))
    again = KeptTests(tmp_path, kernels(a="1"))
    assert not again.complete and again.done == [] == again.again


def test_many_failures_are_named_in_part(tmp_path: Path) -> None:
    kept = KeptTests(tmp_path, kernels())
    kept.save(DeviceTests({f"{NAME}{n:03}": Ended("crashed", 0.0, "Fatal Python error: Aborted\n\nFile x") for n in range(NAMED + 5)}))
    told = kept.failures()
    assert len(told) == NAMED + 1 and told[-1] == "failed: 5 more, in device_tests.json"
    assert told[0] == "failed: test_000: crashed: Fatal Python error: Aborted"
