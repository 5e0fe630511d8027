"""The nights that were: one JSON file per night and chip in a folder. Whatever is wrong with a file is reported, and stops nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from klab.harness.watch.night_json import read_night
from klab.harness.watch.series import Night, Point
from klab.kernels.contract import Json, Record
from klab.kernels.errors import CannotMeasure, KlabError

# A season of nights: more than any window of the rule looks back, and what the page draws.
READ_MOST = 120
# A night of a thousand series is about 2 MB; a file beyond this is none, and is not held in memory.
LARGEST_BYTES = 64 << 20


class History:
    """Nights in `folder`/CHIP/IDENTITY.json. `problems` collects one line per file that could not be read."""

    def __init__(self, folder: Path | str) -> None:
        """The folder need not exist yet."""
        self.folder = Path(folder)
        self.problems: list[str] = []
        # Parsing a night of 200 series takes some milliseconds, and one run asks for the nights several times.
        self._parsed: dict[tuple[str, int, int], Night] = {}

    def chips(self) -> list[str]:
        """The chips that have nights here."""
        try:
            return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            return []

    def nights(self, chip: str, last: int = READ_MOST) -> list[Night]:
        """The `last` nights of a chip, oldest first; what is no night is passed over and noted."""
        here = self.folder / _safe(chip)
        try:
            names = sorted(name for name in os.listdir(here) if name.endswith(".json") and not name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            self._note(here, error.strerror or str(error))
            return []
        found: list[Night] = []
        for name in reversed(names):
            if len(found) == last:
                break
            night = self._read(here / name)
            if night is None:
                continue
            if night.chip == chip:
                found.append(night)
            else:
                self._note(here / name, f"is of chip {night.chip}")
        return sorted(found, key=lambda night: (night.at, night.identity))

    def add(self, night: Night) -> Path:
        """Store a night and return its file. It appears whole or not at all, and never in the place of another one.

        CannotMeasure when the disk does not take it.
        """
        here = self.folder / _safe(night.chip)
        text = json.dumps(_plain(night), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        part = here / f".{_safe(night.identity)}.{secrets.token_hex(8)}.part"
        try:
            here.mkdir(parents=True, exist_ok=True)
            with part.open("xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            for n in range(1000):
                path = here / f"{_safe(night.identity)}{f'-{n}' if n else ''}.json"
                if _placed(part, path):
                    return path
                if path.read_bytes() == text:
                    return path  # the same night once more
            raise OSError(errno.EEXIST, "a thousand nights of this name exist")
        except OSError as error:
            raise CannotMeasure(
                f"cannot write the night to {here} ({error.strerror or error}): free space, or name another --history"
            ) from None
        finally:
            with suppress(OSError):
                part.unlink()

    def points_by_series(self, chip: str, last: int = READ_MOST) -> dict[str, list[Point]]:
        """The points of the last nights of a chip by the identity of their series, oldest first."""
        return points_by_series(self.nights(chip, last))

    def _read(self, path: Path) -> Night | None:
        try:
            seen = path.stat()
            if not stat.S_ISREG(seen.st_mode):  # a pipe would be waited for
                raise ValueError("is no regular file")
            if seen.st_size > LARGEST_BYTES:
                raise ValueError(f"larger than {LARGEST_BYTES >> 20} MiB")
            version = (str(path), seen.st_mtime_ns, seen.st_size)
            if version in self._parsed:
                return self._parsed[version]
            night = read_night(path.read_text(encoding="utf-8"))
            if not all(isinstance(text, str) for text in (night.identity, night.at, night.chip)):
                raise ValueError("its identity, time and chip are no texts")
            self._parsed[version] = night
            return night
        except FileNotFoundError:  # tidied away while we read
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, KlabError) as error:
            self._note(path, getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:200])
            return None

    def _note(self, path: Path, reason: str) -> None:
        line = f"{path}: left out of the history: {reason}"
        if line not in self.problems:
            self.problems.append(line)


def points_by_series(nights: Iterable[Night]) -> dict[str, list[Point]]:
    """The points of these nights (oldest first) by the identity of their series; each knows its night."""
    found: dict[str, list[Point]] = {}
    for night in nights:
        for identity, point in night.points().items():
            found.setdefault(identity, []).append(dataclasses.replace(point, night=night.identity))
    return found


def last_seen(nights: Sequence[Night]) -> dict[str, int]:
    """By series, the index of the last of these nights that has a value of it."""
    return {v.series.identity: at for at, night in enumerate(nights) for v in night.verdicts if v.point is not None and v.point.values}


def _placed(part: Path, path: Path) -> bool:
    """Give the finished file its name unless somebody has it; False then."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the name is taken first, and the file then put in its place
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        os.replace(part, path)
    return True


def _plain(value: Json) -> Json:
    """As JSON has it, fields at their default left out: a night of 200 series is a third of the size. An infinite number is null."""
    if isinstance(value, Record):
        return {n: _plain(getattr(value, n)) for n in value.to_json()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:120] or "night"
