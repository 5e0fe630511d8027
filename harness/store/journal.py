"""The journal: one append-only file of JSON lines per writer. A crash loses at most the line being written."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.remote import mirror_of
from klab.harness.store.result import Result
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure

__all__ = ["Journal", "ReadReport", "iter_results"]

# Below this much free space a run does not start: 8 MiB hold about 500 rows with their samples.
LEAST_FREE_BYTES = 8 << 20

# An object is replaced whole each time it grows: in the mirror of an object store the next part file begins at this size.
REMOTE_PART_BYTES = 4 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class Journal:
    """Appends Results to a part file of its own in `folder`, which appears with the first row.

    Each row is one write to a file opened for appending, followed by fsync: no locks, any number of writers, also over NFS. After a
    fork the child writes to another file. Errors of the disk are CannotMeasure; what was stored before stays whole. In the mirror of an
    object store the rows are uploaded while they are written.
    """

    def __init__(self, folder: Path | str, run_id: str) -> None:
        self.folder = Path(folder)
        self.run_id = run_id
        self.path: Path | None = None
        self.rows = 0
        self._fd = -1
        self._pid = 0
        self._torn = False
        self._mirror = mirror_of(self.folder)
        self._lock = threading.Lock()

    def ready(self) -> None:
        """Make the folder and see that it takes files, before a minute of the device is spent; CannotMeasure if not."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{_safe(self.run_id)}-{os.getpid()}.probe"
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
            probe.unlink()
            space = os.statvfs(self.folder)
        except OSError as error:
            raise self._cannot(error) from None
        # Some network and overlay file systems report no sizes at all.
        if space.f_blocks and space.f_bavail * space.f_frsize < LEAST_FREE_BYTES:
            raise self._cannot(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if self._mirror is not None:
            self._mirror.ready()
            self._mirror.follow()

    def append(self, result: Result) -> None:
        """Store one row and return when it is on disk. CannotMeasure on a full or read-only disk; the row is then not stored."""
        line = _line(result)
        with self._lock:
            try:
                if self._pid != os.getpid() or (self._mirror and os.fstat(self._fd).st_size > REMOTE_PART_BYTES):
                    self._open()
                try:
                    self._write(line)
                    gone = os.fstat(self._fd).st_nlink == 0
                except OSError as error:
                    gone = error.errno == errno.ESTALE
                    if not gone:
                        raise
                if gone:  # compacted and deleted under us, and the line with it. A row stored twice counts once on reading.
                    self._open()
                    self._write(line)
            except OSError as error:
                raise self._cannot(error) from None
            self.rows += 1

    def close(self) -> None:
        """Close the file; a later append opens a new one."""
        with self._lock:
            if self._fd >= 0 and self._pid == os.getpid():
                os.close(self._fd)
            self._fd, self._pid = -1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        """Create a part file that no other writer has: the host is in its name because a run may span machines with equal pids."""
        if self._pid != os.getpid():
            self.rows = 0
        elif self._fd >= 0:
            os.close(self._fd)
        self._fd, self._pid, self._torn = -1, 0, False
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{_safe(self.run_id)}-{_safe(socket.gethostname())}-{os.getpid()}"
        for n in range(10_000):
            path = self.folder / f"{stem}{f'-{n}' if n else ''}.jsonl"
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
            except FileExistsError:
                continue
            self._pid, self.path = os.getpid(), path
            _sync_folder(self.folder)
            return
        raise OSError(errno.EEXIST, "ten thousand part files of this name exist")

    def _write(self, line: bytes) -> None:
        start = os.fstat(self._fd).st_size
        data = b"\n" + line if self._torn else line
        written = 0
        try:
            while written < len(data):  # once, unless the disk fills up in the middle
                written += os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except OSError:
            self._undo(start)
            raise
        self._torn = False

    def _undo(self, start: int) -> None:
        """Take back a line that was written in part; if even that fails, the next line begins on a line of its own."""
        try:
            os.ftruncate(self._fd, start)
        except OSError:
            self._torn = True

    def _cannot(self, error: OSError) -> CannotMeasure:
        kept = f"; {self.rows} results of this run are kept in {self.path}" if self.rows else ""
        if error.errno in _FULL:
            why = f"no space for results in {self.folder}: free some, or name another folder with --results"
        elif error.errno in _FORBIDDEN:
            why = f"cannot write results to {self.folder} ({error.strerror}): name another folder with --results or KLAB_RESULTS"
        else:
            why = f"cannot write results to {self.folder}: {error.strerror or error}"
        return CannotMeasure(why + kept)


def _line(result: Result) -> bytes:
    row = result.to_json()
    try:
        text = json.dumps(row, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(row), separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def row_of(result: Result) -> dict[str, Json]:
    """The row as the journal would hold it: plain JSON, without infinities."""
    row: dict[str, Json] = json.loads(_line(result))
    return row


def _finite(value: Json) -> Json:
    """JSON knows no infinity (the error of an output with NaN in it, say): such a number is stored as null, `reason` says what it was."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", name)[:60] or "run"


def _sync_folder(folder: Path) -> None:
    """Make the new file's name durable; some network file systems do not know how, and then it is not needed."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)
