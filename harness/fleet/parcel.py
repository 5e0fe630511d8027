"""What travels between the driver of a cluster and its nodes: trials, rows and kernel files, as JSON text that nobody unpickles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import klab.harness
import klab.kernels
from klab.harness.fleet.run import Wish
from klab.harness.measure.quarantine import Quarantine
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Chip, Config, Json
from klab.kernels.discover import operators
from klab.kernels.errors import UsageError

# Of a folder of kernel files travels what a kernel is made of, and no more than this: a folder of weights was named by mistake.
KERNEL_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".hpp", ".inl")
MOST_BYTES = 8 << 20
# What must be equal at both ends for a row to mean the same: the kernels, and who measures them.
MEASURING = ("measure", "fleet", "plan", "store")


@dataclass(frozen=True)
class SentConfig(Config):
    """A configuration whose kernel need not be importable where it is read; its JSON is what the kernel's own class writes."""

    text: str

    def to_json_full(self) -> dict[str, Json]:
        """As it was sent."""
        return dict(json.loads(self.text))

    def to_json(self) -> dict[str, Json]:
        """The same."""
        return self.to_json_full()


def trial_of(data: Mapping[str, Json]) -> Trial:
    """The inverse of `Trial.to_json`, with the same key. UsageError where this klab does not know the operator or a field."""
    problem_type = operators().get(str(data["operator"]))
    if problem_type is None:
        raise UsageError(f"unknown operator {data['operator']!r}")
    return Trial(
        kernel=data["kernel"],
        source_digest=data["source_digest"],
        problem=problem_type.from_json(data["problem"]),
        config=SentConfig(json.dumps(data["config"])),
        chip=data["chip"],
        policy=Policy.from_json(data["policy"]),
    )


def order(group: Sequence[Trial], wish: Wish, left_s: float | None, skip: Mapping[str, tuple[Status, str]]) -> str:
    """A contest, for a node. `left_s` instead of a deadline: the clocks of two machines differ. `skip`: verdicts on some of them by key."""
    guest = wish.guest(group)
    return json.dumps(
        {
            "trials": [trial.to_json() for trial in group],
            "guest": None if guest is None else guest.to_json(),
            "left_s": left_s,
            "keep_data": wish.keep_data,
            "anchors": list(wish.anchors),
            "skip": {key: [status.value, reason] for key, (status, reason) in skip.items()},
        }
    )


class ToldQuarantine(Quarantine):
    """A node's quarantine: its own, and what the driver knows from the other nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, tuple[Status, str]] = {}

    def verdict(self, trial: Trial) -> tuple[Status, str] | None:
        """As Quarantine's."""
        return self.told.get(trial.key) or super().verdict(trial)


def pack_folders(folders: Sequence[Path | str]) -> list[dict[str, Json]]:
    """Per folder its path and the text of its files. UsageError where a folder is none or holds too much."""
    packed: list[dict[str, Json]] = []
    size = 0
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"--kernels: {folder} is not a folder")
        texts: dict[str, str] = {}
        for path in sorted(p for p in folder.rglob("*") if p.suffix in KERNEL_SUFFIXES and p.is_file() and "__pycache__" not in p.parts):
            try:
                texts[path.relative_to(folder).as_posix()] = text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--kernels: {path} cannot be sent to the nodes: {error}") from None
            size += len(text)
            if size > MOST_BYTES:
                raise UsageError(f"--kernels: {folder} holds more than {MOST_BYTES >> 20} MiB of source, too much to send to every node")
        packed.append({"path": str(folder.resolve()), "files": texts})
    return packed


def unpack_folders(packed: Sequence[Mapping[str, Json]], keep: ExitStack) -> list[Path]:
    """Folders with those files: the sender's own where this machine has it with the same content (a shared file system), else temporary
    ones that `keep` removes. UsageError for a name that leaves its folder."""
    found: list[Path] = []
    for folder in packed:
        here = Path(folder["path"])
        if _same(here, folder["files"]):
            found.append(here)
            continue
        made = Path(keep.enter_context(tempfile.TemporaryDirectory(prefix="klab-kernels-")))
        for name, text in folder["files"].items():
            path = (made / name).resolve()
            if not path.is_relative_to(made.resolve()) or path.suffix not in KERNEL_SUFFIXES:
                raise UsageError(f"{name!r} is no name for a kernel file")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        found.append(made)
    return found


def _same(folder: Path, files: Mapping[str, str]) -> bool:
    try:
        return folder.is_dir() and pack_folders([folder])[0]["files"] == dict(files)
    except (OSError, UsageError):
        return False


def chip_for_node(chip: Chip) -> Json:
    """What a node is told of its chip; null for "cpu", which is whatever CPU it has."""
    return None if chip.name == "cpu" else dataclasses.asdict(chip)


@cache
def klab_digest() -> str:
    """Hash of the sources that a measurement rests on (16 hex digits): of two machines with equal ones the rows are the same."""
    rooms = [Path(klab.kernels.__file__).parent, *(Path(klab.harness.__file__).parent / room for room in MEASURING)]
    found = hashlib.sha256()
    for room in rooms:
        for path in sorted(p for p in room.rglob("*") if p.suffix in KERNEL_SUFFIXES):
            found.update(f"{room.name}/{path.relative_to(room).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
