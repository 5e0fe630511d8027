"""The two sides of a comparison: a commit, a checkout as it is, an environment or stored results; and what a side would measure.

A side's processes run the side's own klab: its packages come first on the search path, and side_main.py refuses to run anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from klab.harness.measure.client import scrubbed
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.read import SUFFIXES
from klab.harness.store.remote import is_url
from klab.harness.watch import side_main
from klab.harness.watch.worktree import Repository, is_checkout, temporary_folder
from klab.kernels.contract import Config, Json, Problem, canonical_json, digest
from klab.kernels.discover import operators
from klab.kernels.errors import CannotMeasure, KlabError, UsageError

PACKAGES = ("kernels", "harness", "profiles")
# Importing torch and triton from a cold disk takes 10 s, a kernel folder of the user's is tried in a process of its own for up to 60 s.
PLAN_LIMIT_S = 300.0


class Kind(StrEnum):
    """What a side is."""

    COMMIT = "commit"
    TREE = "tree"
    ENVIRONMENT = "env"
    RESULTS = "results"

    @property
    def live(self) -> bool:
        """Does it run, or was it measured before?"""
        return self is not Kind.RESULTS


@dataclass(frozen=True)
class Given:
    """A side as the user named it. `text` is a commit's full hash, a folder, a Python or a place of results."""

    kind: Kind
    text: str
    said: str


def understand(said: str, repository: Callable[[], Repository]) -> Given:
    """What a word means: "KIND:..." says it; else what is there by that name. UsageError when nothing is, or two things are."""
    if not said:
        raise UsageError("a side is empty: write . for the checkout as it is")
    kind, colon, rest = said.partition(":")
    if colon and kind in set(Kind):
        return Given(Kind(kind), _settled(Kind(kind), rest, repository), said)
    path = Path(said)
    there = Kind.RESULTS if is_url(said) else _kind_of(path) if path.exists() else None
    commit = None
    if not is_url(said):
        with contextlib.suppress(UsageError):
            commit = repository().resolve(said)
    if commit and there:
        raise UsageError(f"{said!r} is both a commit and a path: write commit:{said} or {there}:{said}")
    if there is not None:
        return Given(there, _settled(there, said, repository), said)
    if commit is None:
        raise UsageError(f"{said!r} is no path here and {_no_commit(said, repository)}; a side is a commit, a checkout, a venv or results")
    return Given(Kind.COMMIT, commit, said)


def _no_commit(said: str, repository: Callable[[], Repository]) -> str:
    try:
        return f"no commit of {repository().root}"
    except UsageError as error:
        return f"no commit: {error}"


def _kind_of(path: Path) -> Kind:
    if path.is_dir():
        return Kind.TREE if is_checkout(path) else Kind.ENVIRONMENT if (path / "bin" / "python").exists() else Kind.RESULTS
    return Kind.ENVIRONMENT if os.access(path, os.X_OK) and not path.name.endswith(SUFFIXES) else Kind.RESULTS


def _settled(kind: Kind, text: str, repository: Callable[[], Repository]) -> str:
    if kind is Kind.COMMIT:
        return repository().commit(text)
    if kind is Kind.RESULTS and is_url(text):
        return text
    path = Path(text)
    if not path.exists():
        raise UsageError(f"{kind}:{text} does not exist")
    if kind is Kind.TREE and not is_checkout(path):
        raise UsageError(f"{text} is no checkout of klab")
    if kind is Kind.ENVIRONMENT and path.is_dir():
        path = path / "bin" / "python"
        if not path.exists():
            raise UsageError(f"{text} has no bin/python")
    # Not resolved where it is a Python: a venv's python is a link, and what the link is called decides which packages it finds.
    return str(Path(os.path.abspath(path)) if kind is Kind.ENVIRONMENT else path.resolve())


@dataclass(frozen=True)
class Side:
    """One side that runs. `root`: the checkout that its klab comes from, None for an environment that has a klab of its own.

    `shim` is a folder that maps the package names to that checkout.
    """

    name: str
    kind: Kind
    title: str
    python: str
    root: Path | None = None
    shim: Path | None = None
    commit: str = ""

    def variables(self) -> dict[str, str]:
        """The environment of its processes: what a worker inherits, and where its packages are."""
        found = scrubbed(os.environ)
        if self.kind is Kind.ENVIRONMENT:
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                found.pop(name, None)
        if self.shim is not None:
            found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.shim), found.get("PYTHONPATH", ""))))
        return found

    def command(self, module: str, *words: str) -> list[str]:
        """The command line that runs a module of its klab."""
        # -P: the folder that side_main.py lies in is no place to import from.
        return [self.python, "-P", side_main.__file__, str(self.root or "-"), module, *words]

    def kernel_dirs(self, given: Sequence[Path], repository: Path | None) -> list[Path]:
        """Folders of kernels beside klab's: one that lies in the repository is the side's own version of it, where it has one."""
        own = [d.resolve() for d in given]
        if self.kind is Kind.COMMIT and repository is not None and self.root is not None:
            own = [self.root / d.relative_to(repository) if d.is_relative_to(repository) else d for d in own]
        return [d for d in own if d.is_dir()]


@contextlib.contextmanager
def opened(given: Mapping[str, Given], repository: Callable[[], Repository]) -> Iterator[list[Side]]:
    """The sides by name ("A", "B"), ready to run; worktrees and shims are removed with the block."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        if any(one.kind is Kind.COMMIT for one in given.values()):
            repository().sweep()
        yield [stack.enter_context(_opened(name, one, folder, repository)) for name, one in given.items()]


@contextlib.contextmanager
def _opened(name: str, given: Given, folder: Path, repository: Callable[[], Repository]) -> Iterator[Side]:
    with contextlib.ExitStack() as stack:
        if given.kind is Kind.COMMIT:
            repo = repository()
            root = stack.enter_context(repo.worktree(given.text, folder / name))
            if not is_checkout(root):
                raise CannotMeasure(f"{name}: commit {given.said} holds no klab")
            yield Side(name, given.kind, repo.title(given.text), sys.executable, root, shim_for(root, folder, name), given.text)
        elif given.kind is Kind.TREE:
            root = Path(given.text)
            yield Side(name, given.kind, f"{given.said} as it is", sys.executable, root, shim_for(root, folder, name))
        else:
            yield Side(name, given.kind, given.said, given.text)


def shim_for(root: Path, folder: Path, name: str) -> Path:
    """A folder for the search path in which klab is this checkout and nothing else.

    With an __init__.py of its own klab is no namespace that an installed klab could be part of. An editable install still offers what the
    checkout lacks: side_main.py refuses that.
    """
    shim = folder / f"{name}-path"
    package = shim / "klab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for part in PACKAGES:
        if (root / part).is_dir():
            (package / part).symlink_to(root / part, target_is_directory=True)
    return shim


@dataclass(frozen=True)
class AsWritten(Config):
    """A configuration of a side's kernel, as that side wrote it: the class that it belongs to is the side's own."""

    fields: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        """The fields as they were given."""
        return dict(self.fields)

    def to_json_full(self) -> dict[str, Json]:
        """The fields as they were given."""
        return dict(self.fields)


@dataclass(frozen=True)
class SideTrial(Trial):
    """A trial of one side; equal trials of two sides have two keys."""

    side: str = ""

    @property
    def key(self) -> str:
        """Hash of the trial and its side."""
        return digest({**self.to_json(), "side": self.side})

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass
class Planned:
    """What a side says of itself, and the trials that it would run. `not_understood`: those that this klab cannot read, and why."""

    side: Side
    facts: dict[str, Json] = field(default_factory=dict)
    trials: list[SideTrial] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)


def plan(side: Side, chip: str, words: Sequence[str], policy: Policy) -> Planned:
    """Ask the side's own `klab measure --dry-run` what it would measure with these options.

    UsageError for what its command line refuses, CannotMeasure where it does not run; both name the side.
    """
    command = side.command(side_main.COMMAND_LINE, "measure", "--chip", chip, *words, "--dry-run", "--json")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PLAN_LIMIT_S, check=False, env=side.variables()
        )
    except OSError as error:
        raise CannotMeasure(f"{side.name} ({side.title}): {side.python} does not start: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CannotMeasure(f"{side.name} ({side.title}): planning has not ended after {PLAN_LIMIT_S:.0f} s") from None
    if done.returncode:
        kind = UsageError if done.returncode == UsageError.exit_code else CannotMeasure
        raise kind(f"{side.name} ({side.title}): {_last_words(done.stderr) or f'exit code {done.returncode}'}")
    return _read(side, done.stdout, policy)


def _read(side: Side, text: str, policy: Policy) -> Planned:
    planned = Planned(side)
    known: dict[str, Problem] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
            kind = row["type"]
        except (ValueError, TypeError, KeyError):
            continue
        if kind == "side":
            planned.facts = row
        elif kind == "trial":
            try:
                problem = known.setdefault(
                    canonical_json([row["operator"], row["problem"]]), operators()[row["operator"]].from_json(row["problem"])
                )
                planned.trials.append(
                    SideTrial(row["kernel"], row["source_digest"], problem, AsWritten(row["config"]), row["chip"], policy, side.name)
                )
            except KeyError as error:
                planned.not_understood.append(f"{row.get('kernel', '?')}: this klab does not know {error}")
            except (KlabError, TypeError, ValueError) as error:
                planned.not_understood.append(f"{row.get('kernel', '?')}: {error}")
    if not planned.facts or (not planned.trials and not planned.not_understood):
        raise CannotMeasure(f"{side.name} ({side.title}): its `klab measure --dry-run --json` is not understood by this klab")
    return planned


def _last_words(text: str) -> str:
    """The last line that says something; rich draws boxes around errors."""
    lines = [line.strip("│╭╮╰╯─ ").removeprefix("klab: ") for line in text.splitlines()]
    said = [line for line in lines if any(c.isalpha() for c in line) and not line.startswith(("Usage:", "Try "))]
    return said[-1][:300] if said else ""
