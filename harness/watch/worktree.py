"""Commits of a git repository, each in a worktree of its own in a temporary folder: the user's checkout is never touched."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.store import paths
from klab.kernels.errors import CannotMeasure, UsageError

# The process that made a temporary folder and its host are in its name, so that the next one finds what a killed one left, and leaves
# alone what runs on another node (or in another container) from the same repository.
PREFIX = "klab-sides-"
_HOST = re.sub(r"\W", "_", platform.node()) or "here"
_LEFT = re.compile(rf"{PREFIX}(\d+)-{_HOST}-")
# What makes a folder a checkout of klab, at every commit that klab can compare.
MARKS = ("kernels/contract.py", "harness/measure/worker.py")
# Checking out a repository with large files over a network file system; git itself never gives up.
LIMIT_S = 600.0


def is_checkout(folder: Path) -> bool:
    """Does this folder hold klab's source?"""
    return all((folder / mark).is_file() for mark in MARKS)


@dataclass(frozen=True)
class Repository:
    """The git repository whose top folder is `root`. Every method but `worktree` only reads."""

    root: Path

    @classmethod
    def at(cls, given: Path | None = None) -> Repository:
        """The repository of `given`; else that of the current folder if it holds klab; else the one that klab runs from.

        UsageError where there is none.
        """
        for folder in (given,) if given else (Path.cwd(), paths.checkout()):
            found = folder and _git(folder, "rev-parse", "--show-toplevel", check=False)
            if found and (given or is_checkout(Path(found))):
                return cls(Path(found))
        raise UsageError(f"{given or Path.cwd()} is no git checkout of klab: name one with --repo")

    def resolve(self, revision: str) -> str | None:
        """The full hash of a commit, or None where there is none of that name."""
        return _git(self.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", check=False) or None

    def commit(self, revision: str) -> str:
        """As `resolve`; UsageError where there is none."""
        found = self.resolve(revision)
        if found is None:
            shallow = self.git("rev-parse", "--is-shallow-repository") == "true"
            raise UsageError(
                f"{self.root} has no commit {revision!r}" + (" (it is a shallow clone: git fetch --unshallow)" if shallow else "")
            )
        return found

    def title(self, commit: str) -> str:
        """`1a2b3c4d5e The commit's subject`."""
        return self.git("show", "--no-patch", "--format=%h %s", "--abbrev=10", commit)

    def git(self, *words: str) -> str:
        """The output of a git command; CannotMeasure with git's own last line when it fails."""
        return _git(self.root, *words) or ""

    def succeeds(self, *words: str) -> bool:
        """Does a git command end with 0?"""
        return _git(self.root, *words, check=False) is not None

    @contextlib.contextmanager
    def worktree(self, commit: str, folder: Path) -> Iterator[Path]:
        """`commit` checked out in `folder` (which must not exist) for as long as the block lasts. The repository's hooks do not run."""
        self.git("worktree", "add", "--quiet", "--detach", "--force", str(folder), commit)
        try:
            yield folder
        finally:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        if not self.succeeds("worktree", "remove", "--force", "--force", str(folder)):
            shutil.rmtree(folder, ignore_errors=True)
            self.succeeds("worktree", "remove", "--force", "--force", str(folder))

    def sweep(self) -> list[Path]:
        """Remove the worktrees that a killed process left in temporary folders of this machine; returns where they were."""
        left: dict[Path, None] = {}
        for line in self.git("worktree", "list", "--porcelain").splitlines():
            folder = Path(line.removeprefix("worktree "))
            made = [(parent, found) for parent in folder.parents if (found := _LEFT.match(parent.name))]
            if line.startswith("worktree ") and made and not _alive(int(made[0][1].group(1))):
                self._remove(folder)
                left[made[0][0]] = None
        for parent in left:
            shutil.rmtree(parent, ignore_errors=True)
        return list(left)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for worktrees, under $TMPDIR, that goes with the block."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-{_HOST}-")).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _git(folder: Path, *words: str, check: bool = True) -> str | None:
    """Standard output without its end; None on failure without `check`."""
    # A hook or an alias of git that calls klab hands down which repository and index git is at: here another one is meant.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}
    command: Sequence[str] = ("git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False, env=variables)
    except OSError as error:
        raise CannotMeasure(f"git does not start: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CannotMeasure(f"git {words[0]} has not ended after {LIMIT_S:.0f} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    if check:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise CannotMeasure(f"git {' '.join(words[:2])}: {said[-1]}")
    return None
