"""What screening found out, kept on disk: a space that was screened once is not compiled again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import klab.kernels
from klab.harness.measure.client import scrubbed
from klab.harness.measure.environment import CUPY, version
from klab.harness.measure.probes import find_nvrtc
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.harness.tune.inspect_cubin import identity
from klab.kernels import cuda_module, disk_cache
from klab.kernels.contract import Chip, Json, digest
from klab.kernels.errors import CannotMeasure

SCHEMA = 1
# An answer of these kinds is the same every time. What crashed, hung or ran out of memory is tried again: it may have been the machine.
_LASTING = (Status.OK, Status.COMPILE_ERROR, Status.UNSUPPORTED)
# Where things are kept or how they are told, and not what the compiler makes.
_NO_MATTER = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_PRINT_AUTOTUNING")


class ScreenCache:
    """Answers of compiling processes, by kernel source, problem, configuration, chip and the versions of everything that compiles.

    The answer is kept and not the verdict, so that other limits need no other compilation. An answer counts only while the binaries that
    it speaks of are still where a measurement on this machine will look for them (Triton's cache, klab's cubins): when those were
    cleared, the candidate is compiled again here, on the CPU, and not while a GPU waits. (Should they vanish after that, the measuring
    process compiles: it costs its time, and is never wrong.)
    """

    def __init__(self, chip: Chip, folder: Path | None = None) -> None:
        """`folder`: default $KLAB_CACHE or ~/.cache/klab. At most about 130,000 answers of 1 to 2 KB each are kept."""
        self._disk = disk_cache.DiskCache((folder or disk_cache.cache_root()) / "screen", most_per_folder=512)
        self._base = {"schema": SCHEMA, "code": _code_digest(), "chip": _limits_of(chip), "versions": _versions()}

    def key(self, trial: Trial) -> str:
        """Identity of what would be compiled; the policy of measuring is no part of it."""
        facts = {"kernel": trial.kernel, "source": trial.source_digest, "operator": trial.problem.operator}
        return digest(self._base | facts | {"problem": trial.problem.to_json(), "config": trial.config.to_json_full()})

    def get(self, trial: Trial) -> dict[str, Json] | None:
        """The answer, or None where none is known or its binaries are gone."""
        body = self._disk.get(self.key(trial))
        try:
            answer = json.loads(body) if body else None
            if answer is None or Status(answer["status"]) not in _LASTING or not isinstance(answer.get("functions", []), list):
                return None
            return answer if all(_still_there(name) for name in answer.get("kept", [])) else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, trial: Trial, answer: Mapping[str, Json]) -> None:
        """Keep an answer that would be the same again, if it is of the source that the trial names (the file may have been edited)."""
        if Status(answer["status"]) in _LASTING and answer.get("source_digest") == trial.source_digest:
            self._disk.put(self.key(trial), json.dumps(answer).encode())


def _still_there(name: str) -> bool:
    """Whether a binary that an artifact called `kept` is where its toolkit looks: "triton:<folder>" or "cubin:<key>"."""
    kind, _, where = name.partition(":")
    if kind == "cubin":
        return cuda_module.cubins().has(where)
    return bool(where) and (_triton_cache() / where).is_dir() and any((_triton_cache() / where).glob("*.cubin"))


def _triton_cache() -> Path:
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _limits_of(chip: Chip) -> dict[str, Json]:
    """What a kernel can see of the chip; where its figures come from is for people."""
    facts = dataclasses.asdict(chip)
    return {name: value for name, value in facts.items() if name not in ("title", "provenance")}


@lru_cache(maxsize=1)
def _versions() -> dict[str, Json]:
    """Of everything that takes part in compiling, and the settings that reach it."""
    found: dict[str, Json] = {name: version(name) for name in ("triton", "torch", "nvidia-cuda-nvrtc")}
    found |= {"cupy": version(*CUPY), "nvrtc": _file(find_nvrtc()), "settings": {}}
    for name in ("ptxas", "ptxas-blackwell", "nvdisasm", "cuobjdump"):
        try:
            found[name] = identity(name)
        except (CannotMeasure, OSError):
            found[name] = None
    for name, value in scrubbed(os.environ).items():
        if name.startswith("TRITON_") and name not in _NO_MATTER:
            found["settings"][name] = f"{value} {_file(value)}"
    return found


def _file(path: str | None) -> str:
    """Path, size and time of a file; empty where it is none."""
    try:
        status = os.stat(path or "")
    except (OSError, ValueError):
        return ""
    return f"{path} {status.st_size} {status.st_mtime_ns}"


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of klab's own code that makes the launch compile and reads the result, beside what a kernel's source digest covers."""
    kernels = Path(klab.kernels.__file__).parent
    names = [kernels / f"{name}.py" for name in ("artifact", "contract", "dtypes")]
    names += [Path(__file__).with_name(f"{name}.py") for name in ("offline", "inspect_cubin", "sass", "screen_worker")]
    names += sorted(kernels.glob("*/problem.py"))
    return digest([file.read_text() for file in names])
