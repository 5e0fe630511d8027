"""URLs of object stores: what is one, which file system serves it, and its errors as one line without secrets."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from klab.kernels.errors import CannotMeasure, UsageError

# A Path made of "s3://bucket/x" reads "s3:/bucket/x": one slash is enough, and two letters keep drive letters out.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)

# What to install for each kind of URL. fsspec knows more kinds, but not all of them can list, replace and create objects.
PACKAGES = {
    "s3": "'kernel-lab[s3]'",
    "s3a": "'kernel-lab[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
NO_ACCOUNT = ("s3", "s3a", "gs", "gcs")

# A bucket that does not answer is an error within about half a minute, not after botocore's five tries of 60 s each.
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3, "mode": "standard"}}}

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

CREDENTIALS = "credentials come from the usual places: the environment, the profile of the cloud's own tools, or the machine's role"


def is_url(given: Path | str) -> bool:
    """Is it the URL of a folder or file in an object store, also after it went through a Path?"""
    return _URL.fullmatch(str(given)) is not None


@dataclass(frozen=True)
class Url:
    """A checked URL: `scheme`, and `root` as fsspec writes paths of that scheme (bucket/key, no slash at the end)."""

    scheme: str
    root: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.root}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.root.rpartition("/")[2]

    @classmethod
    def parse(cls, given: Path | str) -> Url:
        """UsageError for what is no URL, a scheme that klab does not write to, and a URL with credentials, which are not repeated."""
        found = _URL.fullmatch(str(given))
        if found is None:
            raise UsageError(f"{given} is no URL; write s3://bucket/folder")
        scheme, rest = found.group(1).lower(), found.group(2)
        if scheme not in PACKAGES:
            raise UsageError(f"{scheme}:// is no object store that klab knows; there are {', '.join(f'{s}://' for s in PACKAGES)}")
        parts = [part for part in rest.split("/") if part]
        account, at, _ = parts[0].rpartition("@") if parts else ("", "", "")
        if at and (scheme in NO_ACCOUNT or ":" in account):
            raise UsageError(f"{scheme}://...: a URL with credentials is not read; {CREDENTIALS}")
        if "?" in rest or "*" in rest or "#" in rest:
            raise UsageError(f"{scheme}://{rest.partition('?')[0]}: a URL names one folder or file; ?, * and # are not read")
        if not parts or ".." in parts or "." in parts or not rest.isprintable():
            raise UsageError(f"{scheme}://{rest!r} names no bucket and folder; write {scheme}://bucket/folder")
        return cls(scheme, "/".join(parts))

    def filesystem(self) -> Any:
        """fsspec's file system for it, of its own (no listings from a cache). UsageError where a package is missing."""
        try:
            import fsspec
        except ModuleNotFoundError:
            raise UsageError(f"{self.scheme}:// needs fsspec: pip install {PACKAGES[self.scheme]}") from None
        options: dict[str, Any] = S3_OPTIONS if self.scheme in ("s3", "s3a") else {}
        try:
            return fsspec.filesystem(self.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
        except (ImportError, ValueError):
            raise UsageError(f"{self.scheme}:// needs a package of its own: pip install {PACKAGES[self.scheme]}") from None


class Asking:
    """Within the block, whatever the file system raises becomes CannotMeasure with one line; `doing` says what was asked for. That a disk
    of this machine is full is not the store's fault and stays an OSError.
    """

    def __init__(self, url: Url, doing: str) -> None:
        self.url, self.doing = url, doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        own = isinstance(error, CannotMeasure | UsageError) or (isinstance(error, OSError) and error.errno in FULL)
        if isinstance(error, Exception) and not own:
            raise CannotMeasure(f"cannot {self.doing} {self.url}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """Why, without the text of the error: a service's messages may repeat key ids, tokens and signed URLs."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    names = {kind.__name__ for kind in type(cause).__mro__}
    if names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
        "DefaultCredentialsError",
    }:
        return f"no credentials were found; {CREDENTIALS}"
    if "ProfileNotFound" in names:
        return "the profile named in AWS_PROFILE is in no configuration file"
    if names & {"ConnectionError", "HTTPClientError", "ClientConnectionError", "TimeoutError", "EndpointConnectionError"}:
        return f"no connection to {_host(getattr(cause, 'kwargs', {}).get('endpoint_url', '')) or 'its service'} ({type(cause).__name__})"
    if code == "NoSuchBucket":
        return "the bucket does not exist"
    if isinstance(error, PermissionError) or code in ("403", "AccessDenied"):
        return f"access was denied ({code or 'PermissionError'})"
    if code:
        return f"the service answered {code}"
    local = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}{f': {local}' if local else ''}"


def _host(address: str) -> str:
    """Host and port of an address, without a user's name, a path or a query."""
    found = urlsplit(address)
    return f"{found.hostname}{f':{found.port}' if found.port else ''}" if found.hostname else ""
