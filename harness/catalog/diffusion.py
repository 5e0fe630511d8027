"""Diffusion transformers: Flux (double and single blocks) and Wan (self- and cross-attention)."""

from __future__ import annotations

from math import prod

from klab.harness.catalog.architecture import Attention, JointAttention, LayerGroup, Mlp, Model, Note, ParallelBlock, Projection, Stack
from klab.harness.catalog.checkpoint import left_over_notes, read_dtype, read_quantization
from klab.harness.catalog.fields import Fields
from klab.kernels.errors import UsageError

# Latent tokens of the usual picture: Flux 1024 x 1024 (8x smaller in the autoencoder, then 2 x 2 patches); Wan 81 frames of 832 x 480
# (21 latent frames of 60 x 104, 1 x 2 x 2 patches).
FLUX_TOKENS = 64 * 64
WAN_TOKENS = 21 * 30 * 52
# Flux's T5 prompt has 512 tokens at most; its configuration does not say so.
FLUX_TEXT_TOKENS = 512


def is_diffusion(f: Fields) -> bool:
    """Whether this is a diffusers transformer's configuration."""
    f.understood.update({"_class_name", "_diffusers_version"})
    return "_class_name" in f.data


def parse_diffusion(f: Fields, name: str) -> Model:
    """Read Flux's or Wan's fields. UsageError for another class, or naming a missing field."""
    kind = str(f.value("_class_name"))
    if kind.startswith("Flux"):
        stack, text_tokens, tokens = _flux(f), FLUX_TEXT_TOKENS, FLUX_TOKENS
    elif kind.startswith("Wan"):
        stack, text_tokens, tokens = _wan(f), f.integer("text_len", default=512), WAN_TOKENS
    else:
        raise UsageError(f"{f.where}: klab reads the diffusion transformers Flux and Wan, not {kind}")
    dtype, notes = read_dtype(f)
    notes.append(Note("denoising step", "one call of the transformer; text encoder and autoencoder are not planned"))
    return Model(
        name=name,
        kind="diffusion_transformer",
        stack=stack,
        dtype=dtype,
        text_tokens=text_tokens,
        default_tokens=tokens,
        model_type=kind,
        quantization=read_quantization(f),
        notes=(*notes, *left_over_notes(f)),
    )


def _flux(f: Fields) -> Stack:
    heads, head_dim = f.integer("num_attention_heads"), f.integer("attention_head_dim")
    hidden = heads * head_dim
    channels = f.integer("in_channels") * f.integer("patch_size", default=1) ** 2
    f.understood.add("out_channels")
    double = LayerGroup(f.integer("num_layers"), (JointAttention(heads, head_dim, 4 * hidden),), None)
    single = LayerGroup(f.integer("num_single_layers"), (ParallelBlock(heads, head_dim, 4 * hidden),), None)
    conditions = 2 if f.flag("guidance_embeds") else 1
    return Stack(
        "denoiser",
        hidden,
        (double, single),
        norm="layer",
        projections=(
            Projection("patch_embedding", hidden, channels),
            Projection("text_embedding", hidden, f.integer("joint_attention_dim"), "text"),
            # 256 sinusoids of the time (and of the guidance), then a second layer; the pooled prompt has two layers too.
            Projection("time_embedding_1", hidden, 256, "samples", conditions),
            Projection("time_embedding_2", hidden, hidden, "samples", conditions + 1),
            Projection("pooled_embedding", hidden, f.integer("pooled_projection_dim"), "samples"),
            Projection("final_modulation", 2 * hidden, hidden, "samples"),
            Projection("unpatch", channels, hidden),
        ),
    )


def _wan(f: Fields) -> Stack:
    heads = f.integer("num_heads", "num_attention_heads")
    head_dim = f.integer("attention_head_dim", default=f.integer("dim") // heads if f.has("dim") else None)
    hidden = f.integer("dim", default=heads * head_dim)
    patch = f.value("patch_size", default=[1, 2, 2])
    if not isinstance(patch, list | tuple) or not all(isinstance(size, int) for size in patch):
        raise UsageError(f"{f.where}: patch_size is {patch!r}; Wan's is a list of three numbers")
    text_len, text_dim = f.integer("text_len", default=512), f.integer("text_dim", default=4096)
    f.understood.update({"window_size", "rope_max_seq_len", "qk_norm"})
    own = Attention(heads, heads, head_dim, causal=False, qk_norm=True)
    cross = Attention(heads, heads, head_dim, causal=False, rotary=False, cross=True, qk_norm=True, source_tokens=text_len)
    layers = LayerGroup(f.integer("num_layers"), (own, cross), Mlp(f.integer("ffn_dim"), gated=False, activation="gelu_tanh"))
    return Stack(
        "denoiser",
        hidden,
        (layers,),
        norm="layer",
        projections=(
            Projection("patch_embedding", hidden, f.integer("in_dim", "in_channels") * prod(patch)),
            Projection("text_embedding_1", hidden, text_dim, "text"),
            Projection("text_embedding_2", hidden, hidden, "text"),
            Projection("time_embedding_1", hidden, f.integer("freq_dim", default=256), "samples"),
            Projection("time_embedding_2", hidden, hidden, "samples"),
            Projection("time_projection", 6 * hidden, hidden, "samples"),
            Projection("unpatch", f.integer("out_dim", "out_channels", default=16) * prod(patch), hidden),
        ),
    )
