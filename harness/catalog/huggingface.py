"""From a configuration file to a Model: what was understood, and notes about what was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from klab.harness.catalog.architecture import Model, Note, Stack, UnknownMixer
from klab.harness.catalog.checkpoint import left_over_notes, read_dtype, read_quantization
from klab.harness.catalog.diffusion import is_diffusion, parse_diffusion
from klab.harness.catalog.encoder_decoder import is_encoder_decoder, parse_encoder_decoder
from klab.harness.catalog.families import ALIBI, ENCODERS, KNOWN_TYPES, UNTIED
from klab.harness.catalog.fields import Fields
from klab.harness.catalog.layers import hidden_size, layer_groups, norm_kind
from klab.harness.catalog.matrices import mixer_matrices, parameters
from klab.kernels.errors import UsageError

# Where families keep the language model inside a larger configuration.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "text_model_config")
# Parts beside the language model, which klab does not plan.
TOWERS = ("vision_config", "vision_tower_config", "audio_config", "speech_config", "talker_config", "code2wav_config", "vit_config")


def parse_config(data: Mapping[str, Any], *, where: str, name: str) -> Model:
    """Read a Hugging Face (or diffusers) configuration. `where` names the file in messages; UsageError names a missing field."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} holds no JSON object; a model's config.json is one")
    f = Fields(data, where)
    if is_diffusion(f):
        model = parse_diffusion(f, name)
    elif is_encoder_decoder(f):
        model = parse_encoder_decoder(f, name)
    else:
        model = _parse_decoder(f, name)
    return replace(model, config=dict(data))


def _parse_decoder(outer: Fields, name: str) -> Model:
    f = _language_part(outer)
    model_type = str(f.value("model_type") or outer.value("model_type", default=""))
    hidden = hidden_size(f)
    encoder_only = model_type in ENCODERS
    stack = Stack("encoder" if encoder_only else "decoder", hidden, layer_groups(f, model_type), norm=norm_kind(f, model_type))
    dtype, dtype_notes = read_dtype(f, outer)
    tied = next((bool(x.data["tie_word_embeddings"]) for x in (f, outer) if x.data.get("tie_word_embeddings") is not None), None)
    f.understood.add("tie_word_embeddings")
    outer.understood.add("tie_word_embeddings")
    model = Model(
        name=name,
        kind="encoder" if encoder_only else "llm",
        stack=stack,
        dtype=dtype,
        vocab=f.integer("vocab_size", "padded_vocab_size", "n_vocab"),
        tied=not model_type.startswith(UNTIED) if tied is None else tied,
        max_tokens=f.integer(
            "max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "max_seq_len", default=0, least=0
        ),
        model_type=model_type,
        quantization=read_quantization(f, outer),
    )
    notes = [
        *_type_notes(f, model_type),
        *_mixer_notes(model),
        *_mathematics_notes(f, model_type),
        *_speculation_notes(f),
        *dtype_notes,
        *_tower_notes(outer, model),
    ]
    if tied is None and not encoder_only:
        notes.append(Note("tie_word_embeddings", f"missing; the head is taken as {'tied' if model.tied else 'its own matrix'}"))
    notes += left_over_notes(f)
    if outer is not f:
        notes += left_over_notes(outer)
    return replace(model, notes=tuple(notes))


def _language_part(outer: Fields) -> Fields:
    """The configuration of the language model inside a multimodal one, or the whole."""
    for key in NESTED:
        inner = outer.value(key)
        if isinstance(inner, Mapping):
            return _language_part(Fields(inner, f"{outer.where} ({key})"))
    return outer


def _type_notes(f: Fields, model_type: str) -> list[Note]:
    if model_type in KNOWN_TYPES:
        return []
    what = f"{model_type!r} is not a type klab was checked with" if model_type else "missing"
    return [Note("model_type", f"{what}; it is read by its fields, as a pre-norm decoder with gated MLPs")]


def _mixer_notes(model: Model) -> list[Note]:
    """Layer types that are not understood, with a guess at their weight: that of the heaviest mixer that is, or of plain attention."""
    unknown: dict[str, int] = {}
    heaviest = 0
    for group in model.stack.groups:
        for mixer in group.mixers:
            if isinstance(mixer, UnknownMixer):
                unknown[mixer.layer_type] = unknown.get(mixer.layer_type, 0) + group.count
            else:
                heaviest = max(heaviest, sum(matrix.weights for matrix in mixer_matrices(mixer, model.stack.hidden)))
    known = parameters(model).per_token
    guess = known / (known + sum(unknown.values()) * (heaviest or 4 * model.stack.hidden**2))
    message = (
        "{!r} in {} of {} layers is not understood and not planned; everything else is, "
        f"about {guess:.0%} of the flops if such a layer mixes tokens at the cost of attention"
    )
    return [
        Note("layer_types", message.format(kind, count, model.stack.layers), None, "warning") for kind, count in sorted(unknown.items())
    ]


def _mathematics_notes(f: Fields, model_type: str) -> list[Note]:
    """What attention has that klab's problems lack: the work is the same, the mathematics that is measured is without it."""
    notes = []
    if f.flag("alibi") or model_type in ALIBI:
        notes.append(Note("alibi", "a bias by distance is added to the logits; planned and measured without it"))
    return notes


def _speculation_notes(f: Fields) -> list[Note]:
    fields = [name for name in f.data if "mtp" in name.lower() or "nextn" in name]
    f.understood.update(fields)
    used = [name for name in fields if f.data[name]]
    words = "extra layers for speculative decoding are not planned: a step without speculation does not run them"
    return [Note(used[0], words)] if used else []


def _tower_notes(outer: Fields, model: Model) -> list[Note]:
    """Vision and audio towers are not planned; their weights against the language model's say how much of an image token that is."""
    notes = []
    text = parameters(model).per_token
    unknown = any(isinstance(mixer, UnknownMixer) for group in model.stack.groups for mixer in group.mixers)
    for key in TOWERS:
        tower = outer.value(key)
        if not isinstance(tower, Mapping):
            continue
        weights = _tower_weights(tower)
        share = None if weights is None or unknown else text / (text + weights)
        message = (
            "not covered; steps of text alone do not run it, and for the tokens of an image or sound the plan covers the language model"
        )
        notes.append(Note(key, message, share, "warning"))
    return notes


def _tower_weights(tower: Mapping[str, Any]) -> int | None:
    """Weights of a plain transformer tower (4 h^2 + 2 h i per layer), or None where its sizes are not stated."""

    def first(*names: str) -> Any:
        return next((tower[n] for n in names if isinstance(tower.get(n), int | float)), None)

    layers, hidden = first("depth", "num_hidden_layers", "layers", "encoder_layers"), first("hidden_size", "embed_dim", "width", "d_model")
    if not layers or not hidden:
        return None
    inner = first("intermediate_size", "encoder_ffn_dim") or hidden * (first("mlp_ratio") or 4)
    return int(layers * (4 * hidden**2 + 2 * hidden * inner))
