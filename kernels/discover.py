"""Find everything that competes: no list of kernels is kept anywhere."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from klab.kernels.contract import Kernel, Problem
from klab.kernels.errors import UsageError
from klab.kernels.user_files import load, rejected

ROOT = Path(__file__).parent

# What to install when a kernel's file cannot import one of these. Anything else that is missing is the file's own fault.
INSTALL = {"torch": "torch", "triton": "triton", "cupy": "cupy-cuda13x", "cupy_backends": "cupy-cuda13x"}


@dataclass(frozen=True)
class Unavailable:
    """A kernel file that gave no kernel here: `reason` is one line; `install` is the remedy where a package is missing.

    `kernel` is the id of an outside contestant whose package is absent, which is nobody's fault.
    """

    path: Path
    reason: str
    install: str | None = None
    kernel: str = ""

    @property
    def outside(self) -> bool:
        """Whether all that is missing is an outside contestant's package."""
        return bool(self.kernel)


@dataclass(frozen=True)
class Catalogue:
    """What `discover` found: operators by name, kernels by id, and the files that gave none."""

    operators: dict[str, type[Problem]] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    unavailable: list[Unavailable] = field(default_factory=list)

    def of(self, operator: str) -> list[Kernel]:
        """The kernels of one operator, libraries first, then by name."""
        found = [k for k in self.kernels.values() if k.problem_type.operator == operator]
        return sorted(found, key=lambda k: (not k.library, k.name))

    def select(self, names: Iterable[str]) -> list[Kernel]:
        """Kernels by `operator/name` or by bare `name`; UsageError for an unknown one."""
        chosen = []
        for name in names:
            found = [k for k in self.kernels.values() if name in (k.id, k.name)]
            if not found:
                for absent in self.unavailable:
                    if absent.kernel and name in (absent.kernel, absent.kernel.split("/")[-1]):
                        raise UsageError(f"{absent.reason}; {absent.install}")
                raise UsageError(f"unknown kernel {name!r}; known: {', '.join(sorted(self.kernels))}")
            chosen += found
        return chosen


def discover(extra: Iterable[Path | str] = (), only: Collection[str] | None = None) -> Catalogue:
    """Import every operator folder beside this file (or those of the operators in `only`), then every kernel file in the `extra` folders
    (searched recursively).

    A file that fails to import becomes an Unavailable and stops nothing; those of the `extra` folders may also end or hang the process
    that imports them (see user_files), or take a name that is taken. UsageError if an extra folder does not exist.
    """
    found = Catalogue(dict(operators()))
    for folder in _folders():
        for path in _kernel_files(folder) if only is None or folder.name in only else ():
            _add(found, path, f"klab.kernels.{folder.name}.{path.stem}")
    extra_files: dict[Path, None] = {}
    for extra_folder in map(Path, extra):
        if not extra_folder.is_dir():
            raise UsageError(f"--kernels: {extra_folder} is not a folder")
        extra_files |= dict.fromkeys(path.resolve() for path in _kernel_files(extra_folder, recursive=True))
    refused = rejected(list(extra_files))
    for path in extra_files:
        if path in refused:
            found.unavailable.append(Unavailable(path, refused[path]))
        else:
            _add(found, path, None)
    return found


@cache
def operators() -> dict[str, type[Problem]]:
    """Every operator's Problem by its name, from the problem files alone (no toolkit, milliseconds). One shared dict: not to be changed."""
    found: dict[str, type[Problem]] = {}
    for folder in _folders():
        module = importlib.import_module(f"klab.kernels.{folder.name}.problem")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Problem) and value.__module__ == module.__name__:
                found[value.operator] = value
    return found


def approximations_of(wide: Problem) -> list[Problem]:
    """The problems of any operator that approximate `wide` in narrower formats."""
    return [problem for problem_type in operators().values() for problem in problem_type.approximations(wide)]


def _folders() -> list[Path]:
    return sorted(p.parent for p in ROOT.glob("*/problem.py"))


def _kernel_files(folder: Path, recursive: bool = False) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py") if recursive else folder.glob("*.py")):
        if path.name != "problem.py" and not path.name.startswith("_"):
            yield path


def _add(found: Catalogue, path: Path, module_name: str | None) -> None:
    try:
        module = importlib.import_module(module_name) if module_name else load(path)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001  a user's file may raise anything, SystemExit included
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        install = f"pip install {INSTALL[missing]}" if missing in INSTALL else None
        reason = f"needs {missing}" if install else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found.unavailable.append(Unavailable(path, reason, install))
        return
    kernels = [v for v in vars(module).values() if isinstance(v, Kernel) and v.path.resolve() == path.resolve()]
    if not kernels:
        found.unavailable.append(Unavailable(path, "defines no kernel (nothing decorated with @kernel)"))
    for kernel in kernels:
        if kernel.requires is not None and not _installed(kernel.requires.module):
            reason = f"{kernel.id} needs {kernel.requires.module}"
            found.unavailable.append(Unavailable(path, reason, kernel.requires.install, kernel.id))
            continue
        taken = found.kernels.get(kernel.id)
        if taken is None:
            found.kernels[kernel.id] = kernel
        elif module_name:
            raise UsageError(f"kernel {kernel.id} is defined twice: in {taken.path} and in {kernel.path}")
        else:
            found.unavailable.append(Unavailable(path, f"{kernel.id} is the name of a kernel in {taken.path}: give it another"))


def _installed(module: str) -> bool:
    """Whether a module can be found, without importing it (a broken install is found out by the kernel that needs it)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
