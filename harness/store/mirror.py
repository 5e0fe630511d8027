"""A local mirror of a folder (or one file) in an object store: synced down before reading, up while writing. Nothing is lost on the way."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from klab.harness.store.read import SUFFIXES
from klab.harness.store.urls import Asking, Url
from klab.kernels.errors import CannotMeasure

VARIABLE = "KLAB_MIRROR"

# How often what was written is uploaded: what the loss of a node may cost. A guess between that and one request per file each time.
UPLOAD_EVERY_S = 15.0
LONGEST_PAUSE_S = 300.0

# What one upload holds in memory at most; larger files are read by the file system itself, in parts.
IN_MEMORY_BYTES = 64 << 20

# A file that vanished from the store may still have its writer here when it was written to within this time.
QUIET_S = 600.0

AT_ONCE = 64

# While many files are downloaded: what a kill may cost to be compared anew.
SAVE_EVERY_S = 5.0
S3 = ("s3", "s3a")
PROBE = ".klab-probe"
FILE_SUFFIXES = (*SUFFIXES, ".json", ".json.gz", ".html", ".xml", ".md", ".toml", ".csv", ".txt", ".png", ".svg")

# Of a file: size and mtime_ns here, and the store's token (ETag or the like), when the two were the same.
_Entry = tuple[int, int, str]


@dataclass
class Moved:
    """What syncing did so far: files and bytes each way, and what people must know."""

    down: int = 0
    down_bytes: int = 0
    up: int = 0
    up_bytes: int = 0
    notes: list[str] = field(default_factory=list)


class Mirror:
    """`path` is what to read and write instead of `url`. Any number of processes of this machine may use one mirror at once.

    Rules: a file that changed on one side follows to the other. One that changed on both is kept twice, the local one under a name of its
    own. One that vanished from the store is moved out of the mirror, into `gone/`, and not uploaded again. Nothing is deleted.
    """

    def __init__(self, url: Url, folder: Path, filesystem: Any) -> None:
        """`folder` holds this mirror alone: its files, its state and its lock."""
        self.url, self.folder, self.fs = url, folder, filesystem
        self.files = folder / "files"
        self.single = url.name.endswith(FILE_SUFFIXES) and "/" in url.root
        self.path = self.files / url.name if self.single else self.files
        self.moved = Moved()
        self.trouble = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handled = False

    def pull(self) -> None:
        """Make the mirror what the store has, but for what was not uploaded yet. CannotMeasure when the store does not answer."""
        with self._locked() as state, Asking(self.url, "read"):
            listing = self._listing()
            wanted = []
            for name, info in listing.items():
                entry, local = state.get(name), self._local(name)
                there = entry is None or entry[2] != _token(info)
                here = entry is None or local != entry[:2]
                if local is None or (there and (not here or self._differs(name, info, state))):
                    wanted.append(name)
            saved = time.monotonic()
            for start in range(0, len(wanted), AT_ONCE):
                self._download({name: listing[name] for name in wanted[start : start + AT_ONCE]}, state)
                if time.monotonic() - saved > SAVE_EVERY_S:  # of 100,000 files it is 10 MB
                    _save(self.folder, state)
                    saved = time.monotonic()
            for name in self._own(state) - listing.keys():
                self._gone(name, state)

    def push(self) -> None:
        """Upload what changed here. CannotMeasure when the store does not take it; it then stays here, and the next push takes it."""
        with self._locked() as state, Asking(self.url, "write"):
            for _ in range(3):  # what had to take another name on the way goes up under that
                for name in self._changed(state):
                    self._upload(name, state)

    def unsent(self) -> int:
        """How many files are not uploaded as they are here."""
        return len(self._changed(_load(self.folder)))

    def ready(self) -> None:
        """See that the store takes files, before a minute of a device is spent; CannotMeasure if not."""
        with Asking(self.url, "write"):
            probe = str(PurePosixPath(self.url.root).parent / PROBE) if self.single else f"{self.url.root}/{PROBE}"
            self.fs.pipe_file(probe, b"")
            # Who may write and not delete leaves one empty object.
            with contextlib.suppress(OSError):
                self.fs.rm_file(probe)

    def follow(self, every_s: float = UPLOAD_EVERY_S) -> None:
        """Upload what is written from now on, in the background, until `close`. Trouble is kept for `close` and tried again.

        From now on SIGTERM unwinds this process, so that whoever asked for the mirror can close it; a second one ends it at once.
        """
        if self._thread is None:
            self._handled = _unwind_on_sigterm()
            self._thread = threading.Thread(target=self._follow, args=(every_s,), name="klab-upload", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Upload the rest and stop following; CannotMeasure says where it is kept when that fails."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._stop.clear()
        if self._handled and signal.getsignal(signal.SIGTERM) is _unwind:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._handled = False
        try:
            if self.unsent():
                self.push()
        except CannotMeasure as error:
            again = "the next klab command with this URL on this machine uploads them"
            raise CannotMeasure(f"{error}; files kept in {self.files}: {self.unsent()}; {again}") from None

    def _follow(self, every_s: float) -> None:
        pause = every_s
        while not self._stop.wait(pause):
            began = time.monotonic()
            try:
                self.push()
                self.trouble = ""
                # A slow store is asked less often: a tenth of the time at most goes into uploads.
                pause = max(every_s, min(10 * (time.monotonic() - began), LONGEST_PAUSE_S))
            except CannotMeasure as error:
                self.trouble = str(error)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, _Entry]]:
        """The state, while no other thread or process syncs this mirror; written back at the end, also after an error. CannotMeasure where
        this machine's disk does not take it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for left in self.folder.glob("staging-*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                for part in self.folder.glob(".state-*"):
                    part.unlink(missing_ok=True)
                if not (self.folder / "url").exists():
                    (self.folder / "url").write_text(f"{self.url}\n")
                state = _load(self.folder)
                try:
                    yield state
                finally:
                    _save(self.folder, state)
        except OSError as error:
            why = f"cannot keep a mirror of {self.url} in {self.folder} ({error.strerror})"
            raise CannotMeasure(f"{why}: free space, or name another folder with {VARIABLE}") from None

    def _listing(self) -> dict[str, dict[str, Any]]:
        """What the store has, by name below the URL. Keys of others are data: one that is no plain relative path is left out, and told."""
        found = self.fs.find(self.url.root, detail=True)
        listing: dict[str, dict[str, Any]] = {}
        for key, info in sorted(found.items()):
            name = self.url.name if key == self.url.root else key.removeprefix(self.url.root + "/")
            parts = name.split("/")
            if self.single != (key == self.url.root):
                continue
            if name.endswith("/") or parts[-1] == PROBE or info.get("type") == "directory":
                continue
            plain = all(part not in ("", ".", "..") and len(part.encode()) <= 240 for part in parts) and name.isprintable()
            if not plain or any("/".join(parts[:n]) in listing for n in range(1, len(parts))):
                self._note(f"{self.url}: an object whose name is no file's is left out: {name[:80]!r}")
                continue
            listing[name] = info
        return listing

    def _local(self, name: str) -> tuple[int, int] | None:
        try:
            found = (self.files / name).lstat()
        except OSError:
            return None
        return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None

    def _changed(self, state: dict[str, _Entry]) -> list[str]:
        """Names of the files here that are not in the store as they are; hidden ones are somebody's temporary files."""
        if self.single:
            names = [self.url.name, *(p.name for p in self.files.glob("*") if p.name != self.url.name)]
        else:
            names = [str((Path(at) / n).relative_to(self.files)) for at, _, inside in os.walk(self.files) for n in inside]
        visible = sorted(name for name in names if not PurePosixPath(name).name.startswith("."))
        return [name for name in visible if (local := self._local(name)) and (name not in state or state[name][:2] != local)]

    def _key(self, name: str) -> str:
        if not self.single:
            return f"{self.url.root}/{name}"
        return self.url.root if name == self.url.name else str(PurePosixPath(self.url.root).parent / name)

    def _download(self, wanted: dict[str, dict[str, Any]], state: dict[str, _Entry]) -> None:
        staging = self.folder / f"staging-{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        try:
            parts = {name: staging / str(n) for n, name in enumerate(wanted)}
            self.fs.get([self._key(name) for name in wanted], [str(part) for part in parts.values()])
            for name, part in parts.items():
                target = self.files / name
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(part, target)
                except (FileExistsError, NotADirectoryError, IsADirectoryError):
                    self._note(f"{self.url}: {name} is left out: a file here is a folder there, or the other way round")
                    continue
                local = self._local(name)
                assert local is not None
                # An object that changed since it was listed, or a transfer that was cut short, is downloaded again next time.
                whole = local[0] == wanted[name].get("size", local[0])
                state[name] = (*local, _token(wanted[name]) if whole else "")
                self.moved.down += 1
                self.moved.down_bytes += local[0]
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _differs(self, name: str, info: dict[str, Any], state: dict[str, _Entry]) -> bool:
        """A file that changed on both sides. True when the store's is to be downloaded: ours then has another name, or is its beginning."""
        theirs, path = self.fs.cat_file(self._key(name)), self.files / name
        ours = path.read_bytes()
        if ours.startswith(theirs):  # ours grew, or a process died between an upload and its note of it
            done = ours == theirs
            size, mtime_ns = self._local(name) or (0, 0)
            state[name] = (size if done else -1, mtime_ns, _token(info))
            return False
        if not theirs.startswith(ours):
            aside = path.with_name(_other_name(path.name, ours))
            os.replace(path, aside)
            self._note(f"{name} differs here and in {self.url}: the one of this machine is now {aside.name}, and both are kept")
        state.pop(name, None)
        return True

    def _upload(self, name: str, state: dict[str, _Entry]) -> None:
        key, path = self._key(name), self.files / name
        entry = state.get(name)
        if entry is not None:
            try:
                info = self.fs.info(key)
            except FileNotFoundError:
                entry = None
            else:
                if _token(info) != entry[2] and self._differs(name, info, state):
                    return  # ours has its own name now: the next push takes it; the next pull brings theirs
                entry = state.get(name)
        try:
            with path.open("rb") as file:
                seen = os.fstat(file.fileno())
                # So much and no more: somebody may be appending.
                data = file.read(seen.st_size) if seen.st_size <= IN_MEMORY_BYTES else None
        except FileNotFoundError:  # compacted and deleted meanwhile
            return
        try:
            self._put(key, path, data, create=entry is None, instead_of=entry[2] if entry else "")
        except FileExistsError:
            info = self.fs.info(key)
            if self._differs(name, info, state) or state[name][0] != -1:
                return
            self._put(key, path, data, create=False, instead_of=_token(info))
        state[name] = (seen.st_size, seen.st_mtime_ns, _token(self.fs.info(key)))
        self.moved.up += 1
        self.moved.up_bytes += seen.st_size

    def _put(self, key: str, path: Path, data: bytes | None, *, create: bool, instead_of: str) -> None:
        """Write an object; FileExistsError with `create` where there is one, else where it is no longer `instead_of` (the store's token).
        Stores without these checks are asked beforehand.
        """
        if create and self.fs.exists(key):
            raise FileExistsError(key)
        checks: list[dict[str, Any]] = [{"mode": "overwrite"}]
        if create:
            checks.insert(0, {"mode": "create"})
        elif data is not None and self.url.scheme in S3:
            checks.insert(0, {"mode": "overwrite", "IfMatch": instead_of})
        for check in checks:
            try:
                if data is None:
                    self.fs.put_file(str(path), key, **check)
                else:
                    self.fs.pipe_file(key, data, **check)
                return
            except (NotImplementedError, OSError) as error:
                if "IfMatch" in check and _code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                    raise FileExistsError(key) from None
                if check is checks[-1] or not _unknown(error):
                    raise

    def _own(self, state: dict[str, _Entry]) -> set[str]:
        """The names that the URL stands for: of a file's URL that file alone, without what stands beside it."""
        return state.keys() & {self.url.name} if self.single else set(state)

    def _gone(self, name: str, state: dict[str, _Entry]) -> None:
        """What vanished from the store: a copy that was in sync is moved aside; one that changed here since is uploaded as a new one."""
        local = self._local(name)
        if local is not None and time.time() - local[1] / 1e9 < QUIET_S:
            return
        if local != state.pop(name)[:2]:
            return
        aside = self.folder / "gone" / f"{name}.{uuid.uuid4().hex[:8]}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.files / name, aside)
        self._note(f"{name} is no longer in {self.url}: the copy of this machine is now {aside}")

    def _note(self, text: str) -> None:
        if text not in self.moved.notes:
            self.moved.notes.append(text)


def _unwind_on_sigterm() -> bool:
    """A node that is taken back gets SIGTERM and some seconds, enough for the last rows. A handler that somebody else has set stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    signal.signal(signal.SIGTERM, _unwind)
    return True


def _unwind(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _unknown(error: Exception) -> bool:
    """Does the store not know this check?"""
    return isinstance(error, NotImplementedError) or _code(error) == "NotImplemented"


def _code(error: Exception) -> str:
    """What an S3 service called it."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _other_name(name: str, content: bytes) -> str:
    suffix = next((s for s in sorted(FILE_SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")
    return f"{name.removesuffix(suffix)}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"


def _token(info: dict[str, Any]) -> str:
    """What changes with an object's content: the store's own checksum where the listing has one."""
    for name in ("ETag", "etag", "md5Hash", "content_md5", "crc32c"):
        if info.get(name):
            return str(info[name])
    when = next((info[name] for name in ("LastModified", "last_modified", "updated", "mtime", "created") if info.get(name)), "")
    return f"{info.get('size')} {when}"


def _load(folder: Path) -> dict[str, _Entry]:
    """The state; one that is damaged is as good as none: everything is compared anew."""
    try:
        rows = json.loads((folder / "state.json").read_text())
        return {str(name): (int(size), int(mtime_ns), str(token)) for name, (size, mtime_ns, token) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(folder: Path, state: dict[str, _Entry]) -> None:
    part = folder / f".state-{uuid.uuid4().hex[:8]}"
    part.write_text(json.dumps(state))
    os.replace(part, folder / "state.json")
