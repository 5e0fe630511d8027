"""A model's parts in a few words each, for tables."""

from __future__ import annotations

from klab.harness.catalog.architecture import (
    Attention,
    Experts,
    JointAttention,
    LatentAttention,
    LayerGroup,
    LinearAttention,
    Mixer,
    Mlp,
    Model,
    ParallelBlock,
    UnknownMixer,
)


def describe_mixer(mixer: Mixer) -> str:
    """`GQA 32/8 d128`, `sliding 128 GQA 64/8 d64`, `MLA h128 kv 512+64` ..."""
    match mixer:
        case Attention():
            kind = "MHA" if mixer.heads == mixer.kv_heads else "MQA" if mixer.kv_heads == 1 else "GQA"
            heads = str(mixer.heads) if kind == "MHA" else f"{mixer.heads}/{mixer.kv_heads}"
            before = f"sliding {mixer.window} " if mixer.window else f"chunked {mixer.chunk} " if mixer.chunk else ""
            before += "cross " if mixer.cross else "" if mixer.causal else "bidirectional "
            return f"{before}{kind} {heads} d{mixer.head_dim}" + (" gated" if mixer.output_gate else "")
        case LatentAttention():
            sparse = f", best {mixer.index_topk} keys" if mixer.index_topk else ""
            q = f"q {mixer.q_lora_rank}, " if mixer.q_lora_rank else ""
            return f"MLA h{mixer.heads} {q}kv {mixer.kv_lora_rank}+{mixer.rope_dim}{sparse}"
        case LinearAttention():
            return f"gated delta net {mixer.key_heads}/{mixer.value_heads} heads, state {mixer.key_dim}x{mixer.value_dim}"
        case JointAttention():
            return f"double block: joint MHA {mixer.heads} d{mixer.head_dim}, MLP {mixer.intermediate}"
        case ParallelBlock():
            return f"single block: MHA {mixer.heads} d{mixer.head_dim} beside MLP {mixer.intermediate}"
        case UnknownMixer():
            return f"not understood: {mixer.layer_type}"


def describe_mlp(mlp: Mlp | Experts | None) -> str:
    """`gated MLP 14336`, `8 of 128 experts of 768`, or an empty string."""
    if mlp is None:
        return ""
    if isinstance(mlp, Mlp):
        return f"{'gated ' if mlp.gated else ''}MLP {mlp.intermediate}"
    shared = f" + shared {mlp.shared_intermediate}" if mlp.shared_intermediate else ""
    return f"{mlp.top_k} of {mlp.experts} experts of {mlp.intermediate}{shared}"


def describe_group(group: LayerGroup) -> str:
    """The parts of a layer, joined."""
    return ", ".join(part for part in (*map(describe_mixer, group.mixers), describe_mlp(group.mlp)) if part)


def describe_layers(model: Model) -> list[tuple[str, int, str]]:
    """(stack, number of layers, parts) of every group, the encoder first."""
    stacks = [*([model.encoder] if model.encoder else []), model.stack]
    return [(stack.name, group.count, describe_group(group)) for stack in stacks for group in stack.groups]


def attention_kinds(model: Model) -> str:
    """The kinds of mixers with their number of layers, for a table's column: `30 linear, 10 GQA`."""
    counts: dict[str, int] = {}
    for group in model.stack.groups:
        for mixer in group.mixers:
            kind = _kind(mixer)
            counts[kind] = counts.get(kind, 0) + group.count
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _kind(mixer: Mixer) -> str:
    match mixer:
        case Attention():
            if mixer.cross:
                return "cross"
            return "sliding" if mixer.window else "chunked" if mixer.chunk else "MHA" if mixer.heads == mixer.kv_heads else "GQA"
        case LatentAttention():
            return "sparse MLA" if mixer.index_topk else "MLA"
        case LinearAttention():
            return "linear"
        case JointAttention():
            return "joint"
        case ParallelBlock():
            return "parallel"
        case UnknownMixer():
            return f"{mixer.layer_type} (?)"
