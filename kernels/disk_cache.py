"""Small files kept between runs, shared by processes: what was compiled, and what was found out about it. Losing them costs time alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"klab1 "
_HEADER_BYTES = len(_MAGIC) + 32


def cache_root() -> Path:
    """$KLAB_CACHE, or klab/ in $XDG_CACHE_HOME or ~/.cache. It need not exist."""
    named = os.environ.get("KLAB_CACHE")
    if named:
        return Path(named)
    with contextlib.suppress(RuntimeError):  # a container's user may have no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klab"
    return Path(tempfile.gettempdir()) / f"klab-{os.getuid()}"


@dataclass(frozen=True)
class DiskCache:
    """Entries by key (16 hex digits and more), one file each, in 256 folders by the key's first two digits.

    Writing is atomic (a file appears whole or not at all), so any number of processes may read and write at once. An entry whose checksum
    is wrong is as good as absent. Of each folder only the `most_per_folder` files used last are kept. A disk that is full or read-only
    makes it a cache that remembers nothing.
    """

    folder: Path
    most_per_folder: int = 256

    def get(self, key: str) -> bytes | None:
        """What was put under this key, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body = data[_HEADER_BYTES:]
        if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : _HEADER_BYTES] != hashlib.sha256(body).digest():
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used last
        return body

    def put(self, key: str, body: bytes) -> None:
        """Keep it; nothing is raised where that is not possible."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_MAGIC + hashlib.sha256(body).digest() + body)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
            self._trim(path.parent)

    def has(self, key: str) -> bool:
        """Whether there is a file for this key, whole or not: one look at the directory."""
        return self._path(key).exists()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _trim(self, folder: Path) -> None:
        """Remove the files used longest ago. Those that were being written when their process died count too, and go the same way."""
        files = [entry.path for entry in os.scandir(folder)]
        if len(files) <= self.most_per_folder:
            return

        def used(path: str) -> float:
            try:
                return os.stat(path).st_mtime
            except OSError:  # another process removed it
                return 0.0

        for path in sorted(files, key=used)[: len(files) - self.most_per_folder]:
            with contextlib.suppress(OSError):
                os.unlink(path)
