"""The kernels of a model as a pytest-benchmark suite, timed by klab's own workers: device time of checked launches, not wall time.

pytest ci/benchmarks --benchmark-json=out.json --model qwen3-0.6b --chip auto [--phase decode] [--kernel torch] [--problem matmul] ...

Rounds, warm-up, cache state and launches per round are klab's (docs/benchmarks.md); --benchmark-min-rounds and its like change nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from klab.harness.choose.benchmark import ROWS, DeviceTime, Measured, names, why_no_time
from klab.harness.cli import _options
from klab.harness.cli._setup import Setup, look_up, matching
from klab.harness.store.journal import row_of
from klab.kernels.errors import KlabError

MEASURED = pytest.StashKey[Measured]()
SETUP = pytest.StashKey[Setup]()
PROBLEMS = pytest.StashKey[Collection[str]]()

# pytest-benchmark's own columns are for wall times; these are what a median over interleaved rounds is read with.
COLUMNS = ["median", "min", "max", "iqr", "rounds"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("klab", "klab: what to measure")
    group.addoption("--model", default="qwen3-0.6b", help="A model's name (klab models), or a path to a config.json.")
    group.addoption("--chip", default="auto", help="A chip's name, or auto: the one of this machine.")
    group.addoption("--phase", help="Only prefill, decode or denoise.")
    group.addoption("--kernel", action="append", help="Only this kernel (operator/name or name). Repeatable.")
    group.addoption("--problem", action="append", help="Only problems whose label has this text. Repeatable.")
    group.addoption("--kernels", action="append", help="A folder of kernel files of your own that compete too. Its files are run.")
    group.addoption("--candidates", default="default", help="default, sample:N or all configurations of each kernel.")
    group.addoption("--isl", type=int, help="Input length in tokens.")
    group.addoption("--osl", type=int, help="Output length in tokens.")
    group.addoption("--batch", help="Decode batch sizes, comma-separated: 1,8,32.")
    group.addoption("--tp", type=int, default=1, help="Tensor-parallel size.")
    group.addoption("--dtype", help="bf16, fp16 or fp32.")
    group.addoption("--with", action="append", dest="further", help="More of the scenario, as NAME=VALUE. Repeatable.")
    group.addoption("--budget", help="Time for all measuring: 90s, 8m, 1.5h. What is not reached is skipped, and says so.")
    group.addoption("--no-energy", action="store_true", help="On GPUs: no joules of each problem's winners.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption
    if given("model", None) is None:  # `pytest .` finds this folder too late for its options: nobody named it
        return
    # The checkout's settings switch benchmarks off for the tests; whoever names this folder wants them, unless he says otherwise.
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_enable = True
    if given("benchmark_columns") is None:
        config.option.benchmark_columns = COLUMNS
    try:
        _options.seconds(given("budget"))
        config.stash[SETUP] = look_up(
            given("model"), given("chip"), isl=given("isl"), osl=given("osl"), batch=given("batch"), tp=given("tp"), dtype=given("dtype"),
            further=given("further"), kernel_dirs=[Path(d) for d in given("kernels") or ()], only=given("kernel"),
            candidates=given("candidates"), phase=given("phase"),
        )  # fmt: skip
    except KlabError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" not in metafunc.fixturenames:
        return
    setup = metafunc.config.stash.get(SETUP, None)
    if setup is None:
        metafunc.parametrize(("trial", "timer"), [])
        return
    try:
        wanted = matching({t.problem.key: t.problem for t in setup.trials}, metafunc.config.getoption("problem"))
    except KlabError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.config.stash[PROBLEMS] = wanted
    trials = [t for t in setup.trials if t.problem.key in wanted]
    named = names(trials)
    params = []
    for trial in trials:
        timer = DeviceTime()
        # One group and one timer per benchmark: the table is grouped by problem.
        marks = (
            pytest.mark.benchmark(group=trial.problem.label(), timer=timer),
            pytest.mark.timeout(0),  # the lab has its own limits
            pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),  # by a kernel that failed
        )
        params.append(pytest.param(trial, timer, id=named[trial.key], marks=marks))
    metafunc.parametrize(("trial", "timer"), params)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    """What is measured: of the tests that were selected alone."""
    config = request.config
    setup = config.stash[SETUP]
    budget = _options.seconds(config.getoption("budget"))
    trials = [item.callspec.params["trial"] for item in request.session.items if "trial" in getattr(item, "fixturenames", ())]
    try:
        found = Measured(
            setup.chip,
            trials,
            kernel_dirs=setup.kernel_dirs,
            deadline=None if budget is None else time.monotonic() + budget,
            energy=not config.getoption("no_energy"),
        )
    except KlabError as error:
        pytest.exit(f"klab: {error}", returncode=error.exit_code)
    config.stash[MEASURED] = found
    with found:
        yield found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    """What must be alike for times to be compared; the driver and the device are in each benchmark's extra_info."""
    setup = config.stash.get(SETUP, None)
    machine_info["klab"] = {
        "chip": setup.chip.name if setup else "",
        **{name: _version(name) for name in ("kernel-lab", "torch", "triton")},
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[object], output_json: dict[str, object]) -> None:
    """A kernel that failed has no benchmark; its row is kept all the same."""
    found = config.stash.get(MEASURED, None)
    failed = [row_of(row) for row in found.all_rows() if why_no_time(row)] if found else []
    output_json[ROWS] = {"failed": failed}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    setup, found = config.stash.get(SETUP, None), config.stash.get(MEASURED, None)
    if setup is None:
        return
    lines = [f"{note.level}: {note.text}" for note in setup.plan.notes]
    absent: dict[str, dict[str, None]] = defaultdict(dict)
    for skipped in setup.skipped:
        if skipped.problem.key in config.stash.get(PROBLEMS, ()):
            absent[skipped.reason][skipped.kernel] = None
    lines += [f"not here ({reason}): {', '.join(kernels)}" for reason, kernels in absent.items()]
    lines += found.notes if found else []
    if lines:
        terminalreporter.section("klab")
        for line in lines:
            terminalreporter.write_line(line)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
