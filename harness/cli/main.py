"""The command `klab`: finds one verb per file beside this one, and turns klab's errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pkgutil
import sys
import time
from pathlib import Path

import typer

from klab.harness.cli._console import talk
from klab.harness.cli._urls import accept_urls
from klab.kernels.errors import CannotMeasure, KlabError


def _process_start_s() -> float:
    """When this process began, in seconds of time.monotonic(): a budget counts from there, imports included."""
    now = time.monotonic()
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return now


START_S = _process_start_s()


def build_app() -> typer.Typer:
    """The typer application with every verb registered."""
    app = typer.Typer(
        name="klab",
        help="Measure inference kernels, choose the best configuration per model and chip: in time, joules and dollars.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "main" and not module.name.startswith("_"):
            importlib.import_module(f"klab.harness.cli.{module.name}").command(app)
    accept_urls(app)
    return app


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 usage, 4 cannot measure, 130 interrupted, 1 anything else."""
    code: int | str | None = 0
    try:
        _run()
    except SystemExit as ended:
        code = ended.code
    finally:
        left = _upload()
    sys.exit(left if code in (0, None) and left else code)


def _upload() -> int:
    """What was written behind URLs goes up, however the verb ended; returns an exit code."""
    from klab.harness.store.remote import settle

    code, style, lines = 0, "", list[str]()
    try:
        lines = settle()
    except CannotMeasure as error:
        code, style, lines = CannotMeasure.exit_code, "red", [f"klab: {error}"]
    except KeyboardInterrupt:  # whoever has no time for an upload loses nothing by it
        code, style, lines = (
            130,
            "yellow",
            ["klab: interrupted; what is not uploaded stays here, and the next verb with this URL uploads it"],
        )
    with contextlib.suppress(ValueError, BrokenPipeError):  # nobody reads any more
        for line in lines:
            talk.print(line, style=style, markup=False, soft_wrap=True)
    return code


def _run() -> None:
    try:
        build_app()(standalone_mode=True)
    except KlabError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        talk.print("klab: interrupted", style="yellow")
        sys.exit(130)
    except BrokenPipeError:  # `klab results | head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            _fail(
                f"{error.strerror}: {error.filename or ''}; free space or name another folder (--results, --out)", CannotMeasure.exit_code
            )
        raise


def _fail(message: str, code: int) -> None:
    talk.print(f"klab: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
