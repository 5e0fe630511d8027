"""Where results are: in the checkout, or where --results or KLAB_RESULTS say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import klab.kernels.contract
from klab.harness.store.remote import local_of, mirror_of, shown
from klab.kernels.errors import UsageError

VARIABLE = "KLAB_RESULTS"


def checkout() -> Path | None:
    """The root of the checkout that klab runs from, or None when it is installed as a package of its own."""
    root = Path(klab.kernels.contract.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "results").is_dir() else None


def folder_to_read(given: Path | str | None = None) -> Path:
    """The folder with all results: `given`, else KLAB_RESULTS, else the checkout's results/, else ./klab-results (which may not exist).

    Of a URL it is the local mirror, synced. UsageError when a folder was named and is not there.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        folder = local_of(named)
        if not folder.exists():
            source = "--results" if given else VARIABLE
            absent = "does not exist" if mirror_of(folder) is None else "holds nothing"
            raise UsageError(f"{source}: {shown(folder)} {absent}; `klab run` makes results, or name the folder or file that has them")
        return folder
    root = checkout()
    return root / "results" if root else Path("klab-results")


def folders_to_read(given: Sequence[Path | str] | None = None) -> list[Path]:
    """`folder_to_read` for any number of named folders and files."""
    return [folder_to_read(one) for one in given] if given else [folder_to_read()]


def folder_to_write(given: Path | str | None = None) -> Path:
    """The folder for new rows: `given`, else KLAB_RESULTS, else results/local of the checkout (ignored by git), else ./klab-results.

    It need not exist yet; of a URL it is the local mirror, synced. UsageError when it is a file.
    """
    named = given or os.environ.get(VARIABLE)
    root = checkout()
    folder = local_of(named) if named else root / "results" / "local" if root else Path("klab-results")
    mirror = mirror_of(folder)
    if (folder.exists() and not folder.is_dir()) or (mirror is not None and folder == mirror.path and mirror.single):
        raise UsageError(f"{'--results' if given else VARIABLE}: {shown(folder)} is a file; new results need a folder")
    return folder
