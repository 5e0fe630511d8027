"""The journal of one search: a header that says which search it is, then one line per evaluation, each synced before the next begins."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klab.harness.store.result import Status
from klab.harness.tune.strategy import Evaluation
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure, UsageError

SCHEMA = 1


class SearchJournal:
    """`header` identifies the search: space digest, strategy, seed, objective, problem, chip. A file with another header is refused."""

    def __init__(self, path: Path, header: Mapping[str, Json]) -> None:
        self.path = path
        self._header = {"schema": SCHEMA, **header}
        try:
            self._found = self._read()
        except OSError as error:
            raise CannotMeasure(f"{self.path} cannot be read: {error.strerror}") from error

    def recorded(self) -> list[Evaluation]:
        """The evaluations of the file, in order."""
        return list(self._found)

    def append(self, evaluation: Evaluation) -> None:
        """Write one line and sync it. CannotMeasure when the disk takes no more."""
        row = {
            "candidate": evaluation.candidate,
            "value": evaluation.value if math.isfinite(evaluation.value) else None,
            "status": evaluation.status.value,
            "rounds": evaluation.rounds,
            "spent_s": evaluation.spent_s,
        }
        self._write(row)

    def _write(self, row: Mapping[str, Json], mode: str = "a") -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CannotMeasure(f"{self.path} cannot be written: {error.strerror}") from error

    def _read(self) -> list[Evaluation]:
        if not self.path.exists():
            self._write(self._header)
            return []
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if not end and json.dumps(self._header).encode().startswith(whole):
            self._write(self._header, mode="w")  # killed while it wrote the header, or before
            return []
        header, found = _parsed(self.path, whole[:end])
        different = [name for name, value in self._header.items() if header.get(name) != value]
        if different:
            raise UsageError(f"{self.path} is of another search (other {', '.join(different)}); name another file or remove it")
        if end < len(whole):
            # A line torn by a kill: its evaluation is made again. Cut only now: a file that is refused is left as it was.
            with self.path.open("r+b") as file:
                file.truncate(end)
        return found


def damage(path: Path) -> str:
    """What is wrong with a journal, in a line that names it; "" for one that can be gone on with, whatever search it is of."""
    try:
        whole = path.read_bytes()
        if end := whole.rfind(b"\n") + 1:  # without it: killed while it wrote the header, or no journal, which its search will tell
            _parsed(path, whole[:end])
    except UsageError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return ""


def _parsed(path: Path, whole: bytes) -> tuple[dict[str, Json], list[Evaluation]]:
    try:
        if not whole:
            raise ValueError("it has no header")
        header, *rows = [json.loads(line, parse_constant=_refuse) for line in whole.decode().split("\n")[:-1]]
        if not isinstance(header, dict):
            raise TypeError("its first line is no header")
        return header, [_evaluation(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a journal of a search ({error}); move it away") from error


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    value = math.inf if row["value"] is None else float(row["value"])
    found = Evaluation(int(row["candidate"]), value, Status(row["status"]), int(row["rounds"]), float(row["spent_s"]))
    if not (found.value >= 0 and found.spent_s >= 0 and found.rounds >= 0 and found.candidate >= 0):
        raise ValueError(f"candidate {found.candidate} has a value below 0")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"a value is {constant}")
