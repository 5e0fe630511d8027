"""A process of one side, run by its path with the side's own Python: sees that klab comes from the side's folder, then runs a module of it.

    python -P side_main.py ROOT MODULE [ARGUMENT...]

ROOT is the checkout that klab must come from, or "-" where the environment's own is meant. For klab's command line, the first line on
standard output says what the side is. Standard library alone, and nothing of this klab: what is imported here is the side's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import runpy
import sys
from pathlib import Path
from typing import Any

COMMAND_LINE = "klab.harness.cli"
PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x")


def places() -> dict[str, str]:
    """Where the parts of klab come from in this process."""
    return {name: str(Path(next(iter(importlib.import_module(f"klab.{name}").__path__))).resolve()) for name in ("kernels", "harness")}


def facts(chip: str) -> dict[str, Any]:
    """What the side says of itself: places, versions, checkout, and the chip as its own profile has it."""
    found: dict[str, Any] = {"type": "side", **places(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        environment = importlib.import_module("klab.harness.measure.environment")
        found |= environment.checkout()
        chips = importlib.import_module("klab.harness.catalog.chips")
        dataclasses = importlib.import_module("dataclasses")
        find = getattr(chips, "find_real_chip", None) or chips.find_chip
        found["chip"] = dataclasses.asdict(find(chip))
    except (ImportError, AttributeError):  # a commit from before these were there
        pass
    return found


def kernel_files(folders: list[str]) -> dict[str, Any]:
    """`files`: where each kernel is written, and `unavailable`: {"reason", "install"} of each file that gave none, by its path within klab
    or within the folder of kernels; empty where this klab cannot say.
    """
    try:
        catalogue = importlib.import_module("klab.kernels.discover").discover(folders)
        roots = [Path(place).parent for place in places().values()] + [Path(folder).resolve() for folder in folders]

        def within(path: Path) -> str:
            resolved = path.resolve()
            return next((str(resolved.relative_to(root)) for root in roots if resolved.is_relative_to(root)), str(resolved))

        return {
            "files": {name: within(kernel.path) for name, kernel in catalogue.kernels.items()},
            "unavailable": {within(one.path): {"reason": one.reason, "install": one.install} for one in catalogue.unavailable},
        }
    except Exception:  # noqa: BLE001  another commit may have it otherwise; what its own command line says of it comes next
        return {}


def main() -> None:
    """Check, tell, run."""
    root, module, *arguments = sys.argv[1:]
    try:
        found = places()
    except ImportError as error:
        sys.exit(f"klab cannot be imported: {error}")
    strangers = [place for place in found.values() if root != "-" and not Path(place).is_relative_to(Path(root).resolve())]
    if strangers:
        sys.exit(f"cannot run: klab would come from {strangers[0]} and not from {root}")
    if module == COMMAND_LINE:
        if importlib.util.find_spec(f"{module}.__main__") is None:
            sys.exit("this klab is from before it had a command line")
        chip = arguments[arguments.index("--chip") + 1]
        folders = [value for word, value in itertools.pairwise(arguments) if word == "--kernels"]
        print(json.dumps(facts(chip) | kernel_files(folders)), flush=True)
    sys.argv = ["klab", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
