"""Recorded spaces as files: reading by content, writing whole or not at all."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from klab.harness.tune.replay import kernel_tuner, t4
from klab.harness.tune.replay.document import read_document
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.kernels.errors import UsageError

ENDING = {"kernel-tuner": ".json.gz", "t4": ".t4.json.gz"}
"""How files of each format are named where klab names them."""
FORMATS: dict[str, Callable[[RecordedSpace], Iterator[str]]] = {"kernel-tuner": kernel_tuner.write, "t4": t4.write}


def read_space(path: Path | str) -> RecordedSpace:
    """A Kernel Tuner cache or a T4 file, gzipped or not, whichever its content says. UsageError in one line where it is neither."""
    try:
        return _read(Path(path))
    except RecursionError as error:
        raise UsageError(f"{path} is no recorded space: it is nested too deeply") from error


def _read(path: Path) -> RecordedSpace:
    document = read_document(path)
    if not document.container:
        if document.dropped_bytes and not document.fields:
            raise UsageError(f"{path} is no recorded space: it is not JSON, or damaged before its first candidate")
        known = ", ".join(list(document.fields)[:6]) or "nothing"
        raise UsageError(f"{path} is no recorded space: a Kernel Tuner cache has `cache`, a T4 file `results`; this has {known}")
    reader = t4.read if document.container == "results" else kernel_tuner.read
    return reader(document)


def write_space(recorded: RecordedSpace, path: Path | str, format: str = "kernel-tuner", *, force: bool = False) -> None:
    """Write; gzipped where the name ends in .gz. The file appears whole or not at all. UsageError where it exists, unless `force`."""
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    _put(Path(path), FORMATS[format](recorded), force)


def _put(path: Path, pieces: Iterable[str], force: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path} cannot be made: {error.filename} is not a folder") from error
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as raw:
            if path.suffix == ".gz":
                # No name and no time inside: equal spaces make equal files.
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0, compresslevel=6) as file:
                    file.writelines(piece.encode() for piece in pieces)
            else:
                raw.writelines(piece.encode() for piece in pieces)
            raw.flush()
            os.fsync(raw.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
