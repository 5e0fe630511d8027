"""One measurement at a time per device: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klab.kernels.errors import CannotMeasure


def lock_path(device: str) -> Path:
    """Where the lock of a device lies: one folder for all users of a machine, so not $TMPDIR, which may differ from job to job.

    KLAB_LOCK_DIR names another folder.
    """
    shared = Path(os.environ.get("KLAB_LOCK_DIR") or "/tmp")
    folder = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"klab-{re.sub(r'[^A-Za-z0-9_.-]', '_', device)}.lock"


@contextmanager
def exclusive(device: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of `device` (a GPU's UUID, or "cpu") within the block.

    CannotMeasure, naming the holder, when another process holds it for longer than `wait_s`. The file stays behind; the lock itself
    is the kernel's (flock) and cannot outlive the process, however that ends.
    """
    path = lock_path(device)
    handle = _open(path)
    try:
        give_up = time.monotonic() + wait_s
        while not _taken(handle):
            if time.monotonic() >= give_up:
                raise CannotMeasure(f"{device} is being measured by {_holder(handle)}; wait until it ends, or choose another device")
            time.sleep(0.05)
        _sign(handle)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """Open an existing file without O_CREAT: in a sticky folder Linux refuses O_CREAT on another user's file (fs.protected_regular)."""
    try:
        for flags in (os.O_RDWR, os.O_RDONLY):
            try:
                return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
            except PermissionError:
                continue
            except FileNotFoundError:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                os.fchmod(handle, 0o666)  # whatever the umask: the next user must be able to lock it
                return handle
    except OSError as error:
        raise CannotMeasure(f"cannot lock {path}: {error.strerror}; set KLAB_LOCK_DIR to a folder all users can write") from error
    raise CannotMeasure(f"cannot open {path}: permission denied; remove it or set KLAB_LOCK_DIR")


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(handle: int) -> None:
    """Write who holds the lock; a read-only handle (another user's file) locks as well, unsigned."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "since": time.strftime("%H:%M:%S")}).encode(), 0)
    except OSError:
        return


def _holder(handle: int) -> str:
    try:
        signed = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(signed['pid'])} (since {signed['since']})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
