"""A git repository that holds this klab with two planted kernels of one operator, and commits that change what they do."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from tiny_model import CONFIG

ROOT = Path(__file__).resolve().parents[2]

# UNITS pieces of the same work, then the right answer. Each piece is also counted, for repositories whose clock counts work.
KERNEL = '''
import torch

import klab.kernels
from klab.kernels.contract import kernel
from klab.kernels.norm._eager import norm as rms
from klab.kernels.norm.problem import Norm

UNITS = {units}


@kernel(Norm, backend="cpu", kinds=("cpu",))
def {name}(problem, config, chip):
    """The norm, after some work for nothing."""
    work = torch.ones({size}, {size})

    def launch(inputs, outputs):
        for _ in range(UNITS):
            torch.matmul(work, work)
        klab.kernels.WORK = getattr(klab.kernels, "WORK", 0) + UNITS
        right(problem, inputs, outputs)

    return launch


def right(problem, inputs, outputs):
    {right}
'''

# 100 us a piece, and up to 0.1% that differs from process to process as real ones do.
CLOCK = """

_OWN = 1.0 + 0.001 * int.from_bytes(os.urandom(2), "big") / 65536


def _work_ns():
    import klab.kernels

    return int(getattr(klab.kernels, "WORK", 0) * 1e5 * _OWN)
"""


def git(folder, *words, check=True):
    identity = ("-c", "user.name=klab", "-c", "user.email=klab@example.org", "-c", "commit.gpgsign=false", "-c", "gc.auto=0")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *identity, *words], cwd=folder, env=variables, capture_output=True, text=True, check=check)
    return done.stdout.strip()


class Planted:
    """`commit` writes files and commits them; `head` is the last commit."""

    def __init__(self, folder, *, real_clock=False, size=8):
        self.folder, self._size = folder, size
        for part in ("harness", "profiles", "kernels"):
            shutil.copytree(ROOT / part, folder / part, ignore=_leave_out)
        (folder / ".gitignore").write_text("__pycache__/\n")
        if not real_clock:
            timer = folder / "harness" / "measure" / "timer.py"
            timer.write_text(timer.read_text().replace("time.perf_counter_ns()", "_work_ns()") + CLOCK)
        git(folder, "init", "--quiet", "--initial-branch", "main", ".")

    def kernel(self, name, units, right="rms(problem, inputs, outputs)"):
        path = f"kernels/norm/{name}.py"
        return {path: KERNEL.format(name=name, units=units, size=self._size, right=right)}

    def commit(self, message, files):
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git(self.folder, "add", "--all")
        git(self.folder, "commit", "--quiet", "--message", message)
        return git(self.folder, "rev-parse", "HEAD")


def _leave_out(folder, names):
    """Kernel files and caches: what is left is every problem and every helper."""
    path = Path(folder)
    operator = path.parent.name == "kernels" and (path / "problem.py").exists()
    kernels = {n for n in names if operator and n.endswith(".py") and n != "problem.py" and not n.startswith("_")}
    return kernels | {n for n in names if n in ("__pycache__", "tuned")}


def config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path
