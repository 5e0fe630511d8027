"""Models by name, Hugging Face id or path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from klab.harness.catalog.architecture import Model
from klab.harness.catalog.huggingface import parse_config
from klab.harness.catalog.names import plain_name
from klab.kernels.errors import UsageError

# The same relative place in a checkout and in an installed package.
PROFILES = Path(__file__).resolve().parents[2] / "profiles"


@cache
def load_models() -> tuple[Model, ...]:
    """Every model under profiles/models, by name. UsageError when one of those files is broken."""
    return tuple(_from_file(path) for path in sorted((PROFILES / "models").glob("*.json")))


def find_model(name_or_path: str) -> Model:
    """A model of the catalog by name, Hugging Face id or alias (in any case), or any config.json, or a folder that holds one.

    UsageError for an unknown name (with the nearest ones), a file that is not JSON (with the line) or lacks a field (named).
    """
    models = load_models()
    wanted = name_or_path.strip().lower()
    for model in models:
        if wanted in _names(model):
            return model
    path = Path(name_or_path).expanduser()
    if wanted and path.exists():
        return _from_file(_config_in(path))
    if wanted.endswith(".json") or name_or_path.startswith((".", "/", "~")):
        raise UsageError(f"--model: {name_or_path} does not exist")
    near = get_close_matches(wanted, [name for model in models for name in _names(model)], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(model.name for model in models)};"
    raise UsageError(f"unknown model {name_or_path!r}; {hint} A path to a config.json works too")


def _names(model: Model) -> list[str]:
    """All that find_model accepts, lower-case: name, ids, and ids without their owner."""
    ids = [name.lower() for name in (model.hf_id, *model.aliases) if name]
    return list(dict.fromkeys([model.name, *ids, *(name.split("/")[-1] for name in ids)]))


def _config_in(path: Path) -> Path:
    """The configuration that a path means: itself, or config.json inside it (diffusers keeps it under transformer/)."""
    if not path.is_dir():
        return path
    for inside in ("config.json", "transformer/config.json"):
        if (path / inside).is_file():
            return path / inside
    raise UsageError(f"--model: the folder {path} holds no config.json")


def _from_file(path: Path) -> Model:
    """A profile of the catalog (it has a `config`), or a bare config.json."""
    data = read_json(path)
    if not isinstance(data, Mapping):
        raise UsageError(f"{path} holds no JSON object; a model's config.json is one")
    config = data.get("config")
    if not isinstance(config, Mapping):
        return replace(parse_config(data, where=str(path), name=_name_of(path)), source=str(path), confidence="your file")
    return replace(
        parse_config(config, where=str(path), name=plain_name(str(data.get("name") or _name_of(path)), str(path))),
        hf_id=str(data.get("hf_id", "")),
        aliases=tuple(map(str, data.get("aliases", ()))),
        source=str(data.get("source", path)),
        confidence=str(data.get("confidence", "")),
    )


def _name_of(path: Path) -> str:
    """A short name for a file: the folder of a config.json, else the file's own."""
    path = path.resolve()
    folder = path.parent.parent if path.parent.name == "transformer" else path.parent
    return (folder.name if path.stem == "config" else path.stem).lower() or "model"


def read_json(path: Path) -> Any:
    """The content of a JSON file; UsageError names the line where it breaks."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not JSON: it is no UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not a model's config.json: it is nested too deeply") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
