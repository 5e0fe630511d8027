"""URLs of object stores wherever a verb takes a folder or a file: it gets the path of the local mirror; main uploads at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from klab.kernels.errors import UsageError

# Kernel files are code: they run only from a folder of this machine that the user named.
LOCAL_ONLY = ("kernels", "kernel_dirs")

# What a verb writes whenever it is named: that the store takes it is seen before the verb begins.
WRITTEN = ("out", "out_dir", "out_file", "report")


def accept_urls(app: typer.Typer) -> None:
    """Wrap every verb of `app`, once, so that a Path that is really a URL ("s3:/bucket/x": a Path keeps one slash) is replaced."""
    for registered in app.registered_commands:
        if registered.callback is not None:
            registered.callback = _with_mirrors(registered.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            accept_urls(group.typer_instance)


def _with_mirrors(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    def run(*args: Any, **given: Any) -> Any:
        return verb(*args, **{name: _local(name, value) for name, value in given.items()})

    return run


def _local(name: str, value: Any) -> Any:
    from klab.harness.store.remote import is_url, local_of, writable

    if isinstance(value, list):
        return [_local(name, one) for one in value]
    if not isinstance(value, Path) or not is_url(value):
        return value
    if name in LOCAL_ONLY:
        raise UsageError(
            f"--{name.replace('_', '-')}: kernel files are code, and run only from a folder of this machine; copy them here first"
        )
    path = local_of(value)
    if name in WRITTEN:
        writable(path)
    return path
