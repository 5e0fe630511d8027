"""What a folder of evidence keeps of the device tests: how each ended with which code, and of a failure the text that it is mended by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klab.harness.measure import check
from klab.harness.store.paths import checkout
from klab.harness.tune.device_tests import FAILED, DeviceTests
from klab.kernels.contract import Kernel, digest
from klab.kernels.errors import CannotMeasure

TESTED_FILE = "device_tests.json"
# A test that does not pass is tried once more by a later sitting, after the others; then only with other code.
TRIES = 2
NAMED = 40
WORDS = 200


@dataclass(frozen=True)
class Failed:
    """A test that did not pass with the present code: how it ended, and the first line of why."""

    name: str
    outcome: str
    words: str

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}: {self.words}"


@dataclass(frozen=True)
class Tally:
    """What is known of the tests with the present code: how many ended how, what failed, how many are to be run once more.

    earlier: how many have ended with other code alone. complete: there is nothing to run.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    failed: tuple[Failed, ...] = ()
    again: int = 0
    earlier: int = 0
    complete: bool = False


class KeptTests:
    """The file, with this checkout's code. One that is damaged costs the tests once more."""

    def __init__(self, folder: Path, kernels: Sequence[Kernel]) -> None:
        self.path = folder / TESTED_FILE
        self._kernels = {kernel.id: kernel.source_digest for kernel in sorted(kernels, key=lambda kernel: kernel.id)}
        self._files = _files_digest()
        self._all = digest([self._kernels, self._files])
        self._complete, self._kept = _read(self.path)
        # Of before this sitting: `save` gets all of its outcomes each time.
        self._before = dict(self._kept)

    @property
    def complete(self) -> bool:
        """True when there is nothing to run: every test has ended with this code, and what did not pass had its tries."""
        return self._complete == self._all

    @property
    def done(self) -> list[str]:
        """Tests that are not to be run."""
        standing = self._standing()
        # A skip stands where a device was seen: without one, all are skipped.
        seen = any(one["outcome"] == "passed" for one in standing.values())
        good = ("passed", "xfailed", "skipped") if seen else ("passed",)
        return [name for name, one in standing.items() if one["outcome"] in good or (_failed(one) and one["tries"] >= TRIES)]

    @property
    def again(self) -> list[str]:
        """Tests that are to be run after the others: they did not pass, or took too long."""
        done = set(self.done)
        return [name for name, one in self._standing().items() if name not in done and one["outcome"] != "skipped"]

    def failures(self) -> list[str]:
        """`failed: TEST: first words`, of all that failed with this code; NAMED of them, and how many more."""
        told = [f"failed: {one}" for one in self.tested().failed]
        return told if len(told) <= NAMED else [*told[:NAMED], f"failed: {len(told) - NAMED} more, in {TESTED_FILE}"]

    def tested(self) -> Tally:
        """Every test is counted once, by how it ended last."""
        standing = self._standing()
        failed = (Failed(name.partition("::")[2] or name, one["outcome"], _words(one)) for name, one in standing.items() if _failed(one))
        counts = dict(sorted(Counter(one["outcome"] for one in standing.values()).items()))
        return Tally(counts, tuple(failed), len(self.again), len(self._kept) - len(standing), self.complete)

    def save(self, found: DeviceTests) -> None:
        """What is known of a run, its end or not. CannotMeasure where the folder takes no files."""
        for name, one in found.tests.items():
            code, before = self._code_of(name), self._before.get(name, {})
            tries = before["tries"] if before.get("code") == code else 0
            self._kept[name] = {
                **dataclasses.asdict(one),
                "code": code,
                # What the end of the time cut off is no try.
                "tries": tries + (one.outcome != "unfinished"),
            }
        self._complete = self._all if not found.left and found.tests and not self.again and self.done else ""
        write_json(self.path, {"complete": self._complete, "tests": dict(sorted(self._kept.items()))})

    def _standing(self) -> dict[str, dict[str, Any]]:
        return {name: one for name, one in self._kept.items() if one["code"] == self._code_of(name)}

    def _code_of(self, name: str) -> str:
        """A test of one kernel depends on that kernel; the others on all of them."""
        told = name.partition("[")[2].removesuffix("]")
        of = [code for kernel, code in self._kernels.items() if told == kernel or told.endswith(f"-{kernel}")]
        return digest([of or self._kernels, self._files])


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all. CannotMeasure where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise CannotMeasure(f"cannot write {path}: {error.strerror or error}") from None


def _failed(one: Mapping[str, Any]) -> bool:
    return one["outcome"] in FAILED


def _words(one: Mapping[str, Any]) -> str:
    """What went wrong, in a line: pytest's first line of the error, or the last line that a process wrote."""
    lines = [line.strip() for line in str(one["text"]).splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith(("E  ", "Fatal"))]
    return (errors or lines[-1:] or ["without a word"])[0][:WORDS]


def _files_digest() -> str:
    """What the tests are made of, beside the kernels."""
    root = checkout()
    found = sorted((root / "tests" / "kernels").glob("*.py")) if root else []
    texts = [path.read_bytes() for path in found if path.stem == "contest" or b"mark.gpu" in path.read_bytes()]
    return hashlib.sha256(b"\0".join([*texts, Path(check.__file__).read_bytes()])).hexdigest()[:16]


def _read(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {
            str(name): {
                "outcome": str(one["outcome"]),
                "seconds": float(one["seconds"]),
                "text": str(one["text"]),
                "code": str(one["code"]),
                "tries": int(one["tries"]),
            }
            for name, one in found["tests"].items()
        }
        return str(found["complete"]), kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}
