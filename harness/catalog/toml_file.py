"""Reading a TOML file that a person may have written."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from klab.kernels.errors import UsageError


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; a byte-order mark is skipped. UsageError for what cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not TOML: it is no UTF-8 text") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
