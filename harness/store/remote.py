"""Folders and files behind URLs (s3://, gs://): whoever reads or writes one works on its local mirror; here is which mirrors are open."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Any

from klab.harness.store.mirror import VARIABLE, Mirror
from klab.harness.store.urls import Asking, Url, is_url
from klab.kernels.errors import CannotMeasure

__all__ = ["Mirror", "is_url", "local_of", "mirror_of", "settle", "shown", "writable"]

_open: dict[str, Mirror] = {}
_lock = threading.Lock()


def mirror_root() -> Path:
    """$KLAB_MIRROR, or klab/mirror in $XDG_DATA_HOME or ~/.local/share: not a cache, because it may hold what is not uploaded yet."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).resolve()
    with contextlib.suppress(RuntimeError):  # a container's user may have no home
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share").resolve() / "klab" / "mirror"
    return Path(tempfile.gettempdir()).resolve() / f"klab-mirror-{os.getuid()}"


def local_of(given: Path | str) -> Path:
    """Where to read and write what `given` names: itself, or for a URL its mirror's path, synced down when it is first asked for.

    What an earlier run left behind is uploaded at once. `settle` uploads what is written from now on. The path need not exist.
    UsageError for a URL that is none; CannotMeasure where the store does not answer or no mirror can be kept.
    """
    if not is_url(given):
        return Path(given)
    url = Url.parse(given)
    with _lock:
        mirror = _open.get(str(url))
        if mirror is None:
            mirror = open_mirror(url)
            mirror.pull()
            if mirror.unsent():
                mirror.push()
            _open[str(url)] = mirror
        return mirror.path


def open_mirror(url: Url) -> Mirror:
    """The mirror of this URL on this machine, not synced yet. Buckets of the same name behind different endpoints are not mixed."""
    filesystem = url.filesystem()
    with Asking(url, "reach"):
        endpoint = _endpoint(filesystem)
    digest = hashlib.sha256(f"{endpoint} {url}".encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", str(url)).strip("-.")[:80]
    return Mirror(url, mirror_root() / f"{slug}-{digest}", filesystem)


def mirror_of(path: Path | str) -> Mirror | None:
    """The open mirror that this path lies in, or None."""
    with _lock:
        return next((m for m in _open.values() if Path(path).is_relative_to(m.files)), None)


def shown(path: Path | str) -> str:
    """How to name a path to people: the URL that it mirrors, else itself."""
    mirror = mirror_of(path)
    if mirror is None:
        return str(path)
    inside = Path(path).relative_to(mirror.files)
    return str(mirror.url) if mirror.single or not inside.parts else f"{mirror.url}/{inside.as_posix()}"


def writable(path: Path | str) -> None:
    """CannotMeasure, before anything is spent, where a URL's store does not take files; of a folder of this machine nothing is asked."""
    mirror = mirror_of(path)
    if mirror is not None:
        mirror.ready()


def settle() -> list[str]:
    """Upload what was written to all open mirrors and forget them. Returns lines for people.

    CannotMeasure, when all were tried, says what could not be uploaded and where it is kept.
    """
    with _lock:
        mirrors = list(_open.values())
        _open.clear()
    lines: list[str] = []
    failed: list[str] = []
    for mirror in mirrors:
        try:
            mirror.close()
        except CannotMeasure as error:
            failed.append(str(error))
        lines += mirror.moved.notes
        moved = mirror.moved
        ways = ((moved.down_bytes, "downloaded"), (moved.up_bytes, "uploaded"))
        sizes = [f"{size / 1e6:,.1f} MB {way}" if size >= 1e5 else f"{size / 1e3:,.1f} kB {way}" for size, way in ways if size]
        if sizes:
            lines.append(f"{mirror.url}: {', '.join(sizes)}")
    if failed:
        raise CannotMeasure("; ".join([*lines, *failed]))
    return lines


def _endpoint(filesystem: Any) -> str:
    """Whose buckets these are: empty for the cloud's own, whatever the region."""
    client = getattr(filesystem, "s3", None)
    address = str(getattr(getattr(client, "meta", None), "endpoint_url", ""))
    return "" if re.search(r"\.amazonaws\.com(\.cn)?/?$", address) else address
