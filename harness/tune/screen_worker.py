"""The process that compiles candidates: one JSON object per line in, one per line out. It may crash; its parent starts another."""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

from klab.harness.store.result import Status
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.offline import compile_launch
from klab.kernels.contract import Chip, Json
from klab.kernels.discover import Catalogue, discover
from klab.kernels.errors import KlabError


def _private_stdout() -> TextIO:
    """The pipe to the parent; file descriptor 1 becomes stderr, so that a compiler that prints cannot break a line."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]


def answer(trial: dict[str, Json], catalogue: Catalogue, chip: Chip) -> dict[str, Json]:
    """Compile one trial's launch and describe it."""
    kernel = catalogue.kernels.get(trial["kernel"])
    if kernel is None:
        return {"status": Status.UNSUPPORTED.value, "reason": f"{trial['kernel']} cannot be imported here"}
    problem = catalogue.operators[trial["operator"]].from_json(trial["problem"])
    config = kernel.config_type.from_json(trial["config"])
    try:
        unfit = kernel.fits(problem, config, chip)
    except Exception as error:  # noqa: BLE001  whatever a kernel's author did wrong is that candidate's row
        unfit = f"its fits raised {_first_line(error)}"
    if unfit is not None:
        return {"status": Status.UNSUPPORTED.value, "reason": unfit}
    if kernel.backend not in ("triton", "cuda"):
        return {"status": Status.OK.value, "functions": []}
    try:
        artifacts, seconds = compile_launch(kernel, problem, config, chip)
        functions = [inspect_artifact(a).to_json() for a in artifacts]
    except Exception as error:  # noqa: BLE001  whatever a kernel's author did wrong is that candidate's row
        return {"status": Status.COMPILE_ERROR.value, "reason": _first_line(error)}
    return {"status": Status.OK.value, "functions": functions, "compile_s": round(seconds, 4)}


def main() -> None:
    """Serve until the parent closes the pipe."""
    pipe = _private_stdout()
    hello = json.loads(sys.stdin.readline())
    chip_fields = hello["chip"]
    chip_fields["compute_capability"] = tuple(chip_fields["compute_capability"])
    chip = Chip(**chip_fields)
    catalogue = discover(hello["kernel_dirs"])
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), catalogue, chip)
        except KlabError as error:
            reply = {"status": Status.UNSUPPORTED.value, "reason": str(error)}
        pipe.write(json.dumps(reply) + "\n")
        pipe.flush()


if __name__ == "__main__":
    main()
