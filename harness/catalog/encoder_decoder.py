"""Encoder-decoder transformers: Whisper, BART, T5."""

from __future__ import annotations

from klab.harness.catalog.architecture import Attention, LayerGroup, Mlp, Model, Note, Projection, Stack
from klab.harness.catalog.checkpoint import left_over_notes, read_dtype, read_quantization
from klab.harness.catalog.fields import Fields
from klab.harness.catalog.layers import activation_kind


def is_encoder_decoder(f: Fields) -> bool:
    """Whether the fields describe an encoder and a decoder with cross-attention."""
    return ("encoder_layers" in f.data and "decoder_layers" in f.data) or bool(f.data.get("is_encoder_decoder") and "d_model" in f.data)


def parse_encoder_decoder(f: Fields, name: str) -> Model:
    """Read Whisper's, BART's or T5's fields. UsageError names a missing one."""
    hidden = f.integer("d_model", "hidden_size")
    layers = f.integer("encoder_layers", "num_layers", "num_hidden_layers")
    decoder_layers = f.integer("decoder_layers", "num_decoder_layers", default=layers)
    heads = f.integer("encoder_attention_heads", "num_heads", "num_attention_heads")
    decoder_heads = f.integer("decoder_attention_heads", default=heads)
    head_dim = f.integer("d_kv", "head_dim", default=hidden // heads)
    gated = "gated" in str(f.value("feed_forward_proj", default="")) or f.flag("is_gated_act")
    encoder_ffn = f.integer("encoder_ffn_dim", "d_ff", "intermediate_size")
    decoder_ffn = f.integer("decoder_ffn_dim", default=encoder_ffn)
    f.understood.update(
        {"num_hidden_layers", "num_layers", "num_attention_heads", "relative_attention_num_buckets", "relative_attention_max_distance"}
    )

    frames = f.integer("max_source_positions", default=0, least=0)
    mel_bins = f.integer("num_mel_bins", default=0, least=0)
    convolutions: tuple[Projection, ...] = ()
    if mel_bins:  # two convolutions of width 3, the second of stride 2: 3000 frames of 10 ms become 1500 tokens
        convolutions = (
            Projection("conv1", hidden, 3 * mel_bins, "frames", operator="conv1d"),
            Projection("conv2", hidden, 3 * hidden, operator="conv1d"),
        )
    attention = Attention(heads, heads, head_dim, causal=False, rotary=False)
    # T5 divides by the root mean square, whatever its field is called.
    norm, act = ("rms" if f.has("feed_forward_proj") else "layer"), activation_kind(f, str(f.value("model_type", default="")))
    encoder = Stack(
        "encoder", hidden, (LayerGroup(layers, (attention,), Mlp(encoder_ffn, gated, act)),), frames if mel_bins else 0, convolutions, norm
    )
    own = Attention(decoder_heads, decoder_heads, head_dim, rotary=False)
    cross = Attention(decoder_heads, decoder_heads, head_dim, causal=False, rotary=False, cross=True)
    decoder = Stack("decoder", hidden, (LayerGroup(decoder_layers, (own, cross), Mlp(decoder_ffn, gated, act)),), norm=norm)
    dtype, notes = read_dtype(f)
    if f.has("feed_forward_proj"):
        notes.append(Note("relative_attention", "T5 adds a learned bias by distance to the logits; planned and measured without it"))
    return Model(
        name=name,
        kind="encoder_decoder",
        stack=decoder,
        encoder=encoder,
        dtype=dtype,
        vocab=f.integer("vocab_size"),
        tied=f.flag("tie_word_embeddings", default=True),
        max_tokens=f.integer("max_target_positions", "max_position_embeddings", "n_positions", default=0, least=0),
        model_type=str(f.value("model_type", default="")),
        quantization=read_quantization(f),
        notes=(*notes, *left_over_notes(f)),
    )
