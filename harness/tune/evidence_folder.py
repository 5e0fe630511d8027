"""A folder of evidence on the disk: one sitting at a time, and its rows packed into one file at the end of each."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from klab.harness.tune.campaign import pack
from klab.kernels.errors import CannotMeasure

# Measured: 10,000 rows, 32 MB as text and 6.7 MB packed, take 8 s on one core.
PACK_S, PACK_S_PER_GZ_MB, PACK_S_PER_TEXT_MB = 6.0, 1.3, 0.3


def tuner_folder(folder: Path) -> Path:
    """Beside the evidence: the tuner's searches begin as if nothing were known, so their rows and journals are apart."""
    return folder.with_name(f"{folder.name}-tuner")


def pack_s(folder: Path) -> float:
    """Seconds that packing the rows takes, with those of a sitting."""
    megabytes = {".gz": 0.0, ".jsonl": 0.0}
    for one in (folder, tuner_folder(folder)):
        for path in one.glob("*.jsonl*"):
            with suppress(OSError, KeyError):
                megabytes[path.suffix] += path.stat().st_size / 1e6
    return PACK_S + PACK_S_PER_GZ_MB * megabytes[".gz"] + PACK_S_PER_TEXT_MB * megabytes[".jsonl"]


def pack_all(folder: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The packed rows of the folder, those of the tuner's beside it too; None where there are none.

    `say` hears of a file that is damaged. CannotMeasure where the disk takes no file: the rows stay as they are.
    """
    try:
        if tuner_folder(folder).is_dir():
            pack(tuner_folder(folder), say)
        return pack(folder, say)
    except OSError as error:
        for one in (folder, tuner_folder(folder)):
            for left in one.glob(f".*.{os.getpid()}"):
                with suppress(OSError):
                    left.unlink()
        told = error.strerror or str(error)
        raise CannotMeasure(f"cannot pack the rows in {folder}: {told}; they are safe as they are, the next sitting packs them") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one sitting at a time works on a folder: of two that pack its rows, one would lose the other's. CannotMeasure for the second."""
    try:
        found = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotMeasure(f"cannot write to {folder}: {error.strerror or error}; name another folder (--out)") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise CannotMeasure(f"another klab evidence is at work on {folder}; it ends first, or takes another folder") from None
            # A file system without locks: whoever shares it must look to it.
        yield
    finally:
        os.close(handle)
        if not found:  # one in which nothing came to be is no folder of evidence
            with suppress(OSError):
                folder.rmdir()
