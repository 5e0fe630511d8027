"""What a device was set to before klab changed it: a note on disk, locked while the process that changed it lives."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from klab.harness.measure.lock import lock_path
from klab.kernels.errors import CannotMeasure


@dataclass(frozen=True)
class Before:
    """What was, as far as it was changed: the power limit in milliwatts (None: not touched) and whether the SM clock was locked by klab."""

    device: str
    power_limit_mw: int | None = None
    clocks_locked: bool = False

    @property
    def said(self) -> str:
        """In words."""
        limit = [] if self.power_limit_mw is None else [f"power limit {self.power_limit_mw / 1000:g} W"]
        return f"{self.device}: {', '.join([*limit, *(['SM clock not locked'] if self.clocks_locked else [])])}"

    @property
    def remedy(self) -> str:
        """What an owner types to put it back by hand."""
        limit = [] if self.power_limit_mw is None else [f"nvidia-smi -i {self.device} -pl {self.power_limit_mw / 1000:g}"]
        return " && ".join([*limit, *([f"nvidia-smi -i {self.device} -rgc"] if self.clocks_locked else [])])


def state_path(device: str) -> Path:
    """Where it is noted what a device was set to before; beside the device's lock."""
    path = lock_path(device)
    return path.with_name(f"{path.stem}.clocks.json")


class StateFile:
    """The note of one device, locked while this process lives. It is empty or absent where nothing is changed."""

    def __init__(self, path: Path) -> None:
        """CannotMeasure when another process holds it or it cannot be made."""
        self.path = path
        while True:
            try:
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise CannotMeasure(f"cannot open {path}: {error.strerror}; set KLAB_LOCK_DIR to a folder you can write") from None
            if os.fstat(self._handle).st_uid != os.getuid():
                os.close(self._handle)
                raise CannotMeasure(f"{path} is another user's: its owner lets klab put the clocks back, or removes it")
            if not _lock(self._handle):
                os.close(self._handle)
                raise CannotMeasure(f"another process controls the clocks of this device (it holds {path}); wait until it ends")
            if _is_there(path, self._handle):
                return
            os.close(self._handle)  # its last holder removed it between our opening and our locking

    def read(self) -> Before | None:
        """What a process that is gone has left; None for an empty file. CannotMeasure for one that cannot be understood."""
        return _parsed(os.pread(self._handle, 1 << 16, 0), self.path)

    def write(self, before: Before) -> None:
        """On disk when this returns."""
        text = json.dumps({"device": before.device, "power_limit_mw": before.power_limit_mw, "clocks_locked": before.clocks_locked})
        try:
            os.pwrite(self._handle, text.encode(), 0)
            os.ftruncate(self._handle, len(text.encode()))
            os.fsync(self._handle)
        except OSError as error:
            raise CannotMeasure(f"cannot write {self.path} ({error.strerror}), so nothing was changed") from None

    def clear(self) -> None:
        """Nothing is changed any more."""
        if self._handle >= 0:
            os.ftruncate(self._handle, 0)

    def close(self) -> None:
        """Unlock; an empty file goes."""
        if self._handle >= 0:
            if not os.fstat(self._handle).st_size:
                with suppress(OSError):
                    self.path.unlink()
            os.close(self._handle)
            self._handle = -1


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _parsed(text: bytes, path: Path) -> Before | None:
    if not text.strip():
        return None
    try:
        data = json.loads(text)
        limit, locked = data["power_limit_mw"], data["clocks_locked"]
        if not (limit is None or (type(limit) is int and limit > 0)) or type(locked) is not bool:
            raise ValueError
        return Before(str(data["device"]), limit, locked)
    except (ValueError, KeyError, TypeError):
        raise CannotMeasure(f"{path} does not tell what clocks were before: see `nvidia-smi -q -d CLOCK,POWER`, then remove it") from None


def left_changed() -> list[Before]:
    """What processes that are gone have left changed on this machine's devices (notes of this user's own; a foreign one is no order)."""
    found: list[Before] = []
    for path in sorted(lock_path("x").parent.glob("klab-*.clocks.json")):
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(handle).st_uid == os.getuid() and _lock(handle) and (before := _parsed(os.pread(handle, 1 << 16, 0), path)):
                found.append(before)
        except CannotMeasure:
            continue
        finally:
            os.close(handle)
    return found
