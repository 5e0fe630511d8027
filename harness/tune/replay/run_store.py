"""Runs on disk: one folder per space, one file per strategy, one line per run. What is there is not run again."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from klab.harness.tune.replay.contestants import Contestant
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.simulate import Run
from klab.kernels.errors import CannotMeasure

SCHEMA = 1
# JSON lines, under a name of their own: the store of results reads every .jsonl below results/.
SUFFIX = ".runs"


class RunStore:
    """A folder of runs. Lines of another strategy digest or budget, and lines torn by a kill, are left and not read."""

    def __init__(self, folder: Path, evaluations: int) -> None:
        self.folder = folder
        self.evaluations = evaluations

    def runs(self, recorded: RecordedSpace, contestant: Contestant) -> dict[int, Run]:
        """The runs of this strategy, as it is now, on this space, by seed."""
        path = self._path(recorded, contestant)
        found = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                if (row["schema"], row["digest"], row["budget"]) == (SCHEMA, contestant.digest, self.evaluations):
                    found[row["seed"]] = Run.from_json(row)
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, recorded: RecordedSpace, contestant: Contestant, run: Run) -> None:
        """Add one line. CannotMeasure when the disk takes no more."""
        path = self._path(recorded, contestant)
        head = {"schema": SCHEMA, "space": recorded.digest, "strategy": contestant.name, "digest": contestant.digest}
        line = json.dumps({**head, "budget": self.evaluations, **run.to_json()}, separators=(",", ":")) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell() and not _ends_whole(file.fileno(), file.tell()):
                    line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise CannotMeasure(f"{path} cannot be written: {error.strerror}") from error

    def _path(self, recorded: RecordedSpace, contestant: Contestant) -> Path:
        name = re.sub(r"[^\w.-]", "_", recorded.name)
        return self.folder / f"{name}-{recorded.digest}" / f"{contestant.name}{SUFFIX}"


def _ends_whole(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
