"""`klab models`: the models of the catalog, or one in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli._console import emit, out, table
from klab.harness.cli._options import AsJson

if TYPE_CHECKING:
    from klab.harness.catalog.architecture import Model

Name = Annotated[str | None, typer.Argument(help="A model's name, Hugging Face id, or the path of a config.json: show it in detail.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def models(name: Name = None, as_json: AsJson = False) -> None:
        """List the models that klab knows, or show one: its layers, its weights, and what of it is not understood."""
        from klab.harness.catalog.models import find_model, load_models

        if name is not None:
            model = find_model(name)
            if as_json:
                emit(_row(model) | {"layers_in_detail": _layers(model), "notes": _notes(model), "config": model.config})
            else:
                _show(model)
            return
        if as_json:
            for model in load_models():
                emit(_row(model) | {"notes": _notes(model)})
            return
        # A narrow terminal goes without the two columns that the name tells best.
        shown = [i for i, name in enumerate(_COLUMNS) if not (out.is_terminal and out.width < WIDE and name in ("kind", "Hugging Face"))]
        rows = [[_cells(model)[i] for i in shown] for model in load_models()]
        table("Models", [_COLUMNS[i] for i in shown], rows, right=_COLUMNS[2:7])
        out.print(
            "klab models NAME shows one in detail. Any Hugging Face config.json works: klab plan --model path/to/config.json",
            soft_wrap=True,
        )


WIDE = 180
_COLUMNS = ("name", "kind", "layers", "weights", "active", "KV B/token", "covered", "attention", "MLP", "Hugging Face")


def _row(model: Model) -> dict[str, Any]:
    from klab.harness.catalog.matrices import parameters
    from klab.harness.plan.memory import kv_bytes_per_token

    count = parameters(model)
    generates = model.kind in ("llm", "encoder_decoder")
    dtype = model.dtype if model.dtype in ("bfloat16", "float16", "float32") else "bfloat16"
    return {
        "name": model.name,
        "hf_id": model.hf_id,
        "aliases": list(model.aliases),
        "kind": model.kind,
        "model_type": model.model_type,
        "layers": model.stack.layers,
        "hidden": model.stack.hidden,
        "vocab": model.vocab,
        "parameters": count.total,
        "active_parameters": count.active,
        "kv_bytes_per_token": kv_bytes_per_token(model, dtype) if generates else None,
        "dtype": model.dtype,
        "quantization": model.quantization or None,
        "max_tokens": model.max_tokens or None,
        "covered_share": model.covered_share,
        "source": model.source,
        "confidence": model.confidence,
    }


def _layers(model: Model) -> list[dict[str, Any]]:
    from klab.harness.catalog.describe import describe_layers

    return [{"stack": stack, "count": count, "parts": parts} for stack, count, parts in describe_layers(model)]


def _notes(model: Model) -> list[dict[str, Any]]:
    return [{"level": n.level, "field": n.field, "message": n.message, "covered_share": n.covered_share} for n in model.notes]


def _cells(model: Model) -> tuple[object, ...]:
    from klab.harness.catalog.architecture import Experts
    from klab.harness.catalog.describe import attention_kinds, describe_mlp

    row = _row(model)
    active = row["active_parameters"]
    share = row["covered_share"]
    # The larger part of a mixture is its experts, so a model with any shows those.
    mlps = [group.mlp for group in model.stack.groups if group.mlp is not None]
    main = next((mlp for mlp in mlps if isinstance(mlp, Experts)), mlps[0] if mlps else None)
    return (
        model.name,
        model.kind.replace("_", " "),
        row["layers"],
        _billions(row["parameters"]),
        _billions(active) if active != row["parameters"] else "",
        f"{row['kv_bytes_per_token']:,.0f}" if row["kv_bytes_per_token"] else "",
        "unknown" if share is None else f"{share:.0%}",
        attention_kinds(model),
        describe_mlp(main),
        model.hf_id,
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count < 100e9 else f"{count / 1e9:.0f} B"


def _show(model: Model) -> None:
    from klab.harness.catalog.describe import describe_layers

    row = _row(model)
    lines = [
        ("Hugging Face", ", ".join(x for x in (model.hf_id, *model.aliases) if x)),
        ("kind", f"{model.kind.replace('_', ' ')} ({model.model_type})"),
        ("weights", f"{_billions(row['parameters'])}, of which a token uses {_billions(row['active_parameters'])}"),
        ("hidden size", f"{model.stack.hidden:,}"),
        ("vocabulary", f"{model.vocab:,}, {'tied to the embedding' if model.tied else 'a head of its own'}" if model.vocab else ""),
        ("KV cache", f"{row['kv_bytes_per_token']:,.0f} bytes per token" if row["kv_bytes_per_token"] else ""),
        ("longest context", f"{model.max_tokens:,} tokens" if model.max_tokens else ""),
        (
            "prompt and latents",
            f"{model.text_tokens} text tokens, usually {model.default_tokens:,} latent tokens" if model.default_tokens else "",
        ),
        ("dtype", model.dtype + (f", quantised: {model.quantization}" if model.quantization else "")),
        ("source", f"{model.source} ({model.confidence})"),
        ("covered", "unknown" if model.covered_share is None else f"{model.covered_share:.1%} of the flops of a token through every part"),
    ]
    table(model.name, ("what", "value"), [line for line in lines if line[1]])
    table("Layers", ("stack", "layers", "parts"), describe_layers(model), right=("layers",))
    for note in model.notes:
        out.print(f"{note.level}: {note.text}", style="yellow" if note.level == "warning" else None, markup=False, soft_wrap=True)
