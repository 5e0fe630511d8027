"""The faults of the campaign, each with what is to come of it. The tests inject them and hold the outcome against these declarations;
docs/faults.md is printed from the same ones: `python tests/harness/fault_table.py` writes it.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
COMMAND = "python tests/harness/fault_table.py"


@dataclass(frozen=True)
class Fault:
    """`row`: the status of the trial's row, "" where it gets none. `says`: a part of the row's reason, or of what klab says.

    `verdict`: what a night calls the series, "" where no night judges it. `exit_code`: of the verb that met it.
    """

    name: str
    what: str
    how: str
    row: str
    says: str
    verdict: str
    exit_code: int
    kept: str


OTHERS = "the other contestants of the problem, in a fresh worker"
BESIDE = "the other contestants of the problem, in the same worker"
ROWS = "every row whose writing had returned"


def _kernel(name: str, what: str, how: str, row: str, says: str, kept: str = BESIDE) -> Fault:
    return Fault(name, what, how, row, says, "broken", 1, kept)


KERNELS = (
    _kernel("hangs", "hangs", "sleeps for an hour in its first launch", "timeout", "no answer to prepare within", OTHERS),
    _kernel("segfaults", "crashes", "reads address 8", "crashed", "SIGSEGV", OTHERS),
    _kernel("dies_late", "crashes in the midst of the rounds", "ends the process at its 61st launch", "crashed", "exit code 7", OTHERS),
    _kernel("tears_the_heap", "corrupts memory, and the allocator notices", "frees a block of the heap twice", "crashed",
            "SIGABRT", OTHERS),
    _kernel("changes_inputs", "corrupts memory: its inputs", "scales an input in place", "incorrect", "changed its input"),
    _kernel("spoils_late", "corrupts memory: the inputs that all share", "writes to a weight from its 4th launch on", "incorrect",
            "changed its inputs in the timed launches", OTHERS),
    _kernel("out_of_bounds", "writes outside its output", "writes one element behind it", "incorrect", "wrote outside out"),
    _kernel("leaves_a_gap", "leaves a part of its output unwritten", "skips the first row", "incorrect", "not finite (unwritten"),
    _kernel("waits_for_nan", "writes only where it finds NaN", "keeps what is finite", "incorrect", "off by"),
    _kernel("stale", "returns a stale output", "gives its first answer ever after", "incorrect", "off by"),
    _kernel("keeps_weights_by_address", "returns a stale output: keeps weights by their address", "packs each weight that it sees once",
            "incorrect", "off by"),
    _kernel("wrong", "returns wrong numbers", "adds 1 to one element", "incorrect", "off by"),
    _kernel("not_a_number", "returns NaN", "writes NaN to one element", "incorrect", "not finite"),
    _kernel("fades", "returns nothing once the rounds are under way", "writes nothing after 600 launches", "incorrect", "after the rounds"),
    _kernel("errs_now_and_then", "returns wrong numbers once in a while", "is wrong in every third launch", "incorrect", "off by"),
    _kernel("raises", "raises", "raises ValueError in its first launch", "crashed", "ValueError: no such tile"),
    _kernel("out_of_memory", "asks for too much memory", "asks for a petabyte", "out_of_memory", "memory"),
    _kernel("does_not_compile", "does not compile", "raises what a compiler raises", "compile_error", "unexpected type"),
)  # fmt: skip

PROCESSES = (
    Fault(
        "worker-killed",
        "worker killed (`kill -9`, or the system is short of memory)",
        "SIGKILL between two rounds",
        "ok",
        "",
        "ok",
        0,
        "all complete laps; the trial goes on in a fresh worker",
    ),
    Fault(
        "worker-killed-twice",
        "worker killed whenever this trial runs",
        "SIGKILL in both tries",
        "crashed",
        "killed by SIGKILL",
        "broken",
        1,
        OTHERS,
    ),
    Fault(
        "main-killed",
        "main process killed (`kill -9`)",
        "SIGKILL to `klab measure` after its first row",
        "",
        "",
        "",
        0,
        ROWS + "; its worker ends by itself, the device is free, the same command continues",
    ),
    Fault(
        "night-killed",
        "night killed (`kill -9`)",
        "SIGKILL to `klab nightly` between two passes",
        "",
        "",
        "",
        0,
        ROWS + ", in --out; the history, which gets a night whole or not at all",
    ),
    Fault(
        "ray-worker",
        "worker of a fleet killed",
        "SIGKILL in the midst of a contest on a node of Ray",
        "ok",
        "",
        "",
        0,
        "everything; the trial is measured again",
    ),
    Fault(
        "ray-actor",
        "actor of a fleet killed",
        "SIGKILL in the midst of a contest",
        "ok",
        "its 1 running trial is measured again",
        "",
        0,
        "everything; it is started again on its node",
    ),
    Fault(
        "ray-node",
        "node of a fleet killed",
        "a node of a Ray cluster of five is killed in the midst of a contest",
        "ok",
        "running trial is measured again",
        "",
        0,
        "everything; its trial is measured on another node, no row is doubled",
    ),
    Fault(
        "two-runs",
        "two runs on one device",
        "another process holds the device",
        "",
        "is being measured by process",
        "",
        4,
        "the rows of the run that has it",
    ),
)

STORE = (
    Fault(
        "disk-full-at-start",
        "full disk at the start",
        "a file system of 256 KiB (a limit on free space where mounting is not allowed)",
        "",
        "no space for results",
        "",
        4,
        "what was stored; nothing is measured",
    ),
    Fault(
        "disk-fills",
        "disk that fills up in the midst of a night",
        "a file system of 9 MiB is filled between two passes (else a limit on the size of files)",
        "",
        "no space for results",
        "unknown",
        4,
        ROWS + "; the history on another disk gets the night, with what stands",
    ),
    Fault(
        "read-only",
        "read-only store",
        "a file system that is mounted read-only (else a folder without permission)",
        "",
        "cannot write results",
        "",
        4,
        "what was stored; nothing is measured",
    ),
    Fault(
        "torn-line",
        "torn line (power cut while it was written)",
        "the last 40 bytes of a part file are cut off",
        "ok",
        "is torn",
        "",
        0,
        "all other rows; the torn one is told and measured again",
    ),
    Fault(
        "torn-night",
        "torn night in the history",
        "a night's file is cut in half",
        "",
        "left out of the history",
        "ok",
        0,
        "all other nights; the file stays where it is",
    ),
)

DEVICE = (
    Fault(
        "nvml-disappears",
        "NVML disappears in the midst",
        "NVML_ERROR_UNINITIALIZED from the 30th reading on",
        "ok",
        "NVML: Uninitialized",
        "ok",
        0,
        "times and correctness; clocks are null from then on, the energy is null with this reason",
    ),
    Fault(
        "off-the-bus",
        "the only GPU falls off the bus",
        "a CUDA error (unspecified launch failure) in the worker, and no worker comes up any more",
        "",
        "the device is lost",
        "unknown",
        4,
        ROWS + "; the trial that ran is not blamed and has no row",
    ),
    Fault(
        "one-of-two-off-the-bus",
        "one of two GPUs falls off the bus",
        "the same on one of two devices",
        "ok",
        "its 1 running trial is measured again",
        "",
        0,
        "everything; the other device measures the trial",
    ),
    Fault(
        "takes-devices-along",
        "a kernel with which one device after another is lost",
        "three devices, each lost under the same trial",
        "crashed",
        "lost with its device 3 times",
        "",
        0,
        "all other rows, from the devices that are left",
    ),
    Fault(
        "clock-back",
        "clock that jumps back ten years",
        "`time.time` of klab and its worker, and the date of a night in which a kernel is 20% slower",
        "ok",
        "",
        "slower",
        1,
        "everything; labels (`recorded_at`, names of runs, the date of a night, waivers' expiry) follow the clock",
    ),
    Fault("clock-forward", "clock that jumps ten years ahead", "the same", "ok", "", "slower", 1, "everything; the same labels"),
)

GROUPS = {"A kernel that ...": KERNELS, "Processes and nodes": PROCESSES, "Disk": STORE, "Device and clock": DEVICE}
FAULTS = {one.name: one for group in GROUPS.values() for one in group}

# Launches that are judged per row: two on fresh data, two as they are timed, two after the rounds (measure/session.py).
JUDGED = 6
# Fresh processes of a series per night (watch/policy.py).
PROCESSES_A_NIGHT = 5
RATES = (0.5, 0.1, 0.01, 0.001, 0.0001)


def fault(name: str) -> Fault:
    """The declaration of this name."""
    return FAULTS[name]


def noticed(rate: float, launches: int) -> float:
    """The probability that at least one of so many judged launches is wrong, where each is wrong with this probability by itself."""
    return float(1.0 - (1.0 - rate) ** launches)


def page() -> str:
    """docs/faults.md."""
    lines = [
        "# Faults and what comes of them",
        "",
        f"Printed by `{COMMAND}` from the declarations that the campaign injects (tests/harness/test_fault_*.py);",
        "a test fails when this page is older than they are. `row`: the status of the trial's row. `night`: what a night calls the series",
        "when it meets the fault in every process. `exit`: of the verb (`klab nightly` where a night judges, else `klab measure`; where it",
        "was killed, of the next one).",
    ]
    for title, faults in GROUPS.items():
        lines += ["", f"## {title}", "", "| fault | injected | row | klab says | night | exit | kept |", "|---|---|---|---|---|---|---|"]
        for one in faults:
            says = f"`{one.says}`" if one.says else ""
            cells = (one.what, one.how, one.row or "none", says, one.verdict or "-", str(one.exit_code), one.kept)
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *ODDS.strip().splitlines(), "", "| wrong launches | noticed by one row | by a series in one night | in 30 nights |"]
    lines.append("|---|---|---|---|")
    nightly = JUDGED * PROCESSES_A_NIGHT
    for rate in RATES:
        found = (noticed(rate, n) for n in (JUDGED, nightly, 30 * nightly))
        lines.append(f"| {rate:.4g} | {' | '.join(f'{p:.2%}' for p in found)} |")
    return "\n".join([*lines, "", *LIMITS.strip().splitlines(), ""])


ODDS = f"""
## Wrong once in a while

A row rests on {JUDGED} launches that are judged: two on fresh data into poisoned outputs, two in the form in which it is timed, and two
after the rounds. The thousands of launches in the rounds are timed and not judged. A kernel that is wrong by chance is noticed with
these probabilities (computed; a test simulates the first two rates on the real checks):
"""

LIMITS = """
So an error in one launch of a thousand mostly passes a single row, and is met within weeks by nights. Once met, it stays met: a standing
`incorrect` row keeps that code from being chosen. Who must exclude rarer errors has to run the kernel's own tests for longer.

## What is not noticed

- A kernel that writes beyond the guard bands (4096 bytes on each side of an output), or outside its outputs in some launches only, to
  memory that nobody checks: data of klab's own, or of another contestant, which may then be called wrong. Inputs are fingerprinted, the
  answers that klab compares with are not.
- A process that pretends: a kernel is code that runs in the worker (docs/security.md) and could forge its samples on purpose.
- A disk that says it has stored what it has not (klab calls fsync and believes it).
"""

if __name__ == "__main__":
    PAGE.write_text(page())
    print(textwrap.shorten(str(PAGE), 200))
