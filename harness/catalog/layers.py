"""Which token mixer and which feed-forward part each layer of a decoder has, from a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from klab.harness.catalog.architecture import (
    Attention,
    Experts,
    LatentAttention,
    LayerGroup,
    LinearAttention,
    Mixer,
    Mlp,
    UnknownMixer,
)
from klab.harness.catalog.families import (
    ACTIVATIONS,
    ENCODERS,
    FOUR_TIMES_WIDE,
    NOT_ROTARY,
    OUTPUT_GATE,
    QK_NORM,
    SHARED_GATE,
    SIGMOID_ROUTER,
    SINKS,
    SLIDING_PATTERN,
    UNGATED_MLP,
)
from klab.harness.catalog.fields import Fields
from klab.kernels.errors import UsageError

FULL = {"full_attention", "attention", "global", "global_attention", "full"}
SLIDING = {"sliding_attention", "local", "local_attention", "sliding", "sliding_window"}
CHUNKED = {"chunked_attention"}
MOST_LAYERS = 10_000
LINEAR = {"linear_attention", "gated_delta_net"}

# The fields by which families say which layer has which mixer; one that another overrules is understood all the same.
# fmt: off
PATTERN_FIELDS = frozenset({
    "layer_types", "layers_block_type", "attn_type_list", "linear_attn_config", "full_attention_interval", "attn_layer_period",
    "attn_layer_offset", "attention_chunk_size", "no_rope_layer_interval", "no_rope_layers", "sliding_window", "sliding_window_size",
    "sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "use_sliding_window", "max_window_layers",
})
# fmt: on


def layer_groups(f: Fields, model_type: str) -> tuple[LayerGroup, ...]:
    """The layers, those that are alike counted together. UsageError names a missing or malformed field."""
    if f.value("hybrid_override_pattern"):
        return _single_block_layers(f, model_type)
    count = f.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if count > MOST_LAYERS:
        raise UsageError(f"{f.where}: num_hidden_layers is {count}; klab takes at most {MOST_LAYERS}")
    mixer, mlp = mixer_of_layer(f, model_type, count), _mlp_of_layer(f, model_type, count)
    return grouped([((mixer(i),), mlp(i)) for i in range(count)])


def grouped(layers: list[tuple[tuple[Mixer, ...], Mlp | Experts | None]]) -> tuple[LayerGroup, ...]:
    """Equal layers become one group, in the order of first appearance."""
    counts: dict[tuple[tuple[Mixer, ...], Mlp | Experts | None], int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    return tuple(LayerGroup(count, mixers, mlp) for (mixers, mlp), count in counts.items())


def hidden_size(f: Fields) -> int:
    """Width of the residual stream."""
    hidden = f.integer("hidden_size", "d_model", "n_embd", "n_embed", "dim")
    if f.data.get("word_embed_proj_dim") == hidden:  # OPT: only its 350M has an embedding of another width
        f.understood.add("word_embed_proj_dim")
    return hidden


def attention_shape(f: Fields, model_type: str) -> Attention:
    """Heads and head dimension of the full attention, with the defaults that the model classes have."""
    heads = f.integer("num_attention_heads", "n_head", "n_heads", "num_heads")
    kv_heads = f.integer("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_query_groups", default=heads)
    f.understood.update({"new_decoder_architecture", "multi_query_attention"})
    if f.flag("multi_query") and not f.flag("new_decoder_architecture"):
        kv_heads = 1
    hidden = hidden_size(f)
    if not f.has("head_dim", "kv_channels", "attention_head_dim", "d_kv") and hidden % heads:
        raise UsageError(f"{f.where}: head_dim is missing and hidden_size {hidden} is not a multiple of {heads} attention heads")
    head_dim = f.integer("head_dim", "kv_channels", "attention_head_dim", "d_kv", default=hidden // heads)
    if heads % kv_heads:
        raise UsageError(f"{f.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return Attention(
        heads,
        kv_heads,
        head_dim,
        causal=model_type not in ENCODERS,
        rotary=model_type not in NOT_ROTARY,
        output_gate=f.flag("attn_output_gate", "attention_output_gate", default=model_type.startswith(OUTPUT_GATE)),
        qk_norm=f.flag("use_qk_norm", "qk_norm", "qk_layernorm", default=model_type.startswith(QK_NORM)),
        rotary_dim=_rotary_dim(f, head_dim),
        sinks=model_type in SINKS,
        softcap=number(f, "attn_logit_softcapping"),
    )


def number(f: Fields, *names: str, default: float = 0.0) -> float:
    """A number of 0 or more under any of these names; UsageError for anything else."""
    value = f.value(*names, default=default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise UsageError(f"{f.where}: {names[0]} is {value!r}; it must be a number of 0 or more")
    return float(value)


def _rotary_dim(f: Fields, head_dim: int) -> int:
    """Dimensions of each head that are turned, or 0 for all."""
    nested = f.value("rope_parameters", "rope_scaling")
    share = nested.get("partial_rotary_factor") if isinstance(nested, dict) else None
    if not isinstance(share, int | float):
        share = number(f, "partial_rotary_factor", "rotary_pct", "rope_pct", default=1.0)
    dim = f.integer("rotary_dim", default=int(share * head_dim), least=0)
    return dim if 0 < dim < head_dim else 0


def activation_kind(f: Fields, model_type: str) -> str:
    """The name that kernels/activation has for the MLP's activation; SiLU where the file does not say."""
    if model_type == "gpt_oss":
        return "swiglu_clamped"
    name = f.value("hidden_act", "hidden_activation", "activation_function", "ffn_activation", "mlp_activation", "dense_act_fn")
    return ACTIVATIONS.get(str(name).lower(), "gelu_tanh" if model_type.startswith("gemma") else "silu")


def norm_kind(f: Fields, model_type: str) -> str:
    """ "rms" or "layer", told by the name of the field for epsilon."""
    if f.has("rms_norm_eps", "rms_norm_epsilon", "rms_eps") or model_type in ("t5", "mt5", "umt5"):
        return "rms"
    return (
        "layer"
        if f.has("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon", "layer_norm_elementwise_affine")
        else "rms"
    )


def mixer_of_layer(f: Fields, model_type: str, count: int) -> Callable[[int], Mixer]:
    """A function from a layer's number to its token mixer."""
    kind = _type_of_layer(f, model_type, count)
    made: dict[str, Mixer] = {}
    for name in {kind(i) for i in range(count)}:
        if name in LINEAR and f.has("linear_num_value_heads"):
            made[name] = _linear_attention(f)
        elif f.has("kv_lora_rank"):
            made[name] = _latent_attention(f) if name in FULL else UnknownMixer(name)
        elif name in FULL | SLIDING | CHUNKED:
            shape = attention_shape(f, model_type)
            window = f.integer("sliding_window", "sliding_window_size", "local_attention") if name in SLIDING else 0
            chunk = f.integer("attention_chunk_size") if name in CHUNKED else 0
            made[name] = replace(shape, window=window if shape.causal else 0, chunk=chunk)
        else:
            made[name] = UnknownMixer(name)
    return lambda i: made[kind(i)]


def _type_of_layer(f: Fields, model_type: str, count: int) -> Callable[[int], str]:
    """The name of each layer's type: from `layer_types`, or from the fields by which families say the same."""
    f.understood.update(PATTERN_FIELDS)
    listed = f.sequence("layer_types", count) or f.sequence("layers_block_type", count)
    if listed:
        return lambda i: str(listed[i])
    minimax = f.sequence("attn_type_list", count)
    if minimax:
        return lambda i: "full_attention" if minimax[i] else "lightning_attention"
    linear = f.value("linear_attn_config")
    if isinstance(linear, dict):  # Kimi-Linear counts layers from 1
        full_layers = set(linear.get("full_attn_layers") or [])
        return lambda i: "full_attention" if i + 1 in full_layers else "kimi_delta_attention"
    if f.has("full_attention_interval"):
        every = f.integer("full_attention_interval")
        return lambda i: "linear_attention" if (i + 1) % every else "full_attention"
    if f.has("attn_layer_period"):  # Jamba
        period, offset = f.integer("attn_layer_period"), f.integer("attn_layer_offset", default=0, least=0)
        return lambda i: "full_attention" if i % period == offset else "mamba"
    if f.has("attention_chunk_size"):  # Llama 4: layers with rotary positions are chunked
        interval = f.integer("no_rope_layer_interval", default=4)
        with_rope = f.sequence("no_rope_layers", count) or [(i + 1) % interval for i in range(count)]
        return lambda i: "chunked_attention" if with_rope[i] else "full_attention"
    return _sliding_pattern(f, model_type)


def _sliding_pattern(f: Fields, model_type: str) -> Callable[[int], str]:
    pattern: Any = f.value("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
    if not f.value("sliding_window", "sliding_window_size") or not f.flag("use_sliding_window", default=True):
        return lambda i: "full_attention"
    if isinstance(pattern, str) and pattern:  # EXAONE writes "LLLG"
        return lambda i: "full_attention" if pattern[i % len(pattern)] == "G" else "sliding_attention"
    if pattern is not None or model_type in SLIDING_PATTERN:
        every = f.integer(
            "sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", default=SLIDING_PATTERN.get(model_type)
        )
        return lambda i: "sliding_attention" if (i + 1) % every else "full_attention"
    if f.has("use_sliding_window"):  # Qwen2: the layers from max_window_layers on
        first = f.integer("max_window_layers", default=0, least=0)
        return lambda i: "sliding_attention" if i >= first else "full_attention"
    return lambda i: "sliding_attention"


def _latent_attention(f: Fields) -> LatentAttention:
    f.understood.update({"head_dim", "num_key_value_heads", "qk_head_dim"})
    topk = f.integer("index_topk", default=0, least=0)
    return LatentAttention(
        heads=f.integer("num_attention_heads"),
        q_lora_rank=f.integer("q_lora_rank", default=0, least=0),
        kv_lora_rank=f.integer("kv_lora_rank"),
        nope_dim=f.integer("qk_nope_head_dim"),
        rope_dim=f.integer("qk_rope_head_dim"),
        v_dim=f.integer("v_head_dim"),
        index_heads=f.integer("index_n_heads") if topk else 0,
        index_dim=f.integer("index_head_dim") if topk else 0,
        index_topk=topk,
    )


def _linear_attention(f: Fields) -> LinearAttention:
    return LinearAttention(
        key_heads=f.integer("linear_num_key_heads"),
        value_heads=f.integer("linear_num_value_heads"),
        key_dim=f.integer("linear_key_head_dim"),
        value_dim=f.integer("linear_value_head_dim"),
        conv_width=f.integer("linear_conv_kernel_dim", default=4),
        state_dtype=str(f.value("mamba_ssm_dtype", default="float32")),
    )


def _mlp_of_layer(f: Fields, model_type: str, count: int) -> Callable[[int], Mlp | Experts | None]:
    gated = model_type not in UNGATED_MLP
    experts = f.integer("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", default=0, least=0)
    if experts < 2:
        dense = Mlp(_dense_intermediate(f, model_type), gated, activation_kind(f, model_type))
        return lambda i: dense
    is_moe = _moe_layers(f, count)
    routed = _experts(f, model_type, experts, gated)
    dense_layers = [i for i in range(count) if not is_moe(i)]
    f.understood.update({"intermediate_size", "intermediate_size_mlp"})
    plain = None
    if dense_layers:
        plain = Mlp(
            f.integer("intermediate_size_mlp", "dense_intermediate_size", default=0, least=0) or _dense_intermediate(f, model_type),
            gated,
            activation_kind(f, model_type),
        )
    return lambda i: routed if is_moe(i) else plain


def _dense_intermediate(f: Fields, model_type: str) -> int:
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "encoder_ffn_dim", "n_inner")
    if not f.has(*names) and model_type in FOUR_TIMES_WIDE:
        return f.integer("expansion_ratio", default=4) * hidden_size(f)
    return f.integer(*names)


def _experts(f: Fields, model_type: str, experts: int, gated: bool) -> Experts:
    size = f.integer("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
    top_k = f.integer(
        "num_experts_per_tok", "experts_per_token", "num_selected_experts", "moe_topk", "moe_k", "moe_router_topk", "top_k_experts"
    )
    f.understood.update({"experts_per_token", "num_experts_per_tok"})
    if top_k > experts:
        raise UsageError(f"{f.where}: {top_k} experts per token of {experts}")
    each = f.integer(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", default=0, least=0
    )
    shared = each or size * f.integer(
        "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts", default=0, least=0
    )
    if model_type.startswith("llama4"):
        shared = size  # one shared expert as large as a routed one, in every mixture layer
    has_gate = bool(each) and model_type.startswith(SHARED_GATE)
    sigmoid = model_type.startswith(SIGMOID_ROUTER) or str(f.value("scoring_func", default="")) == "sigmoid"
    groups = f.integer("n_group", default=1)
    return Experts(
        experts,
        top_k,
        size,
        shared,
        has_gate,
        gated,
        activation_kind(f, model_type),
        scoring="sigmoid" if sigmoid else "softmax",
        groups=groups,
        topk_groups=f.integer("topk_group", default=1) if groups > 1 else 1,
        renormalize=f.flag("norm_topk_prob", default=not model_type.startswith("llama4")),
    )


def _moe_layers(f: Fields, count: int) -> Callable[[int], bool]:
    """Whether a layer is a mixture of experts."""
    listed = f.value("moe_layers")
    if isinstance(listed, list) and listed:
        return lambda i: i in listed
    if isinstance(f.value("moe_layer_freq"), list):
        flags = f.sequence("moe_layer_freq", count) or []
        return lambda i: bool(flags[i])
    if f.has("expert_layer_period"):  # Jamba
        period, offset = f.integer("expert_layer_period"), f.integer("expert_layer_offset", default=0, least=0)
        return lambda i: i % period == offset
    first = f.integer("first_k_dense_replace", "moe_layer_start_index", default=0, least=0)
    last = f.integer("moe_layer_end_index", default=count - 1, least=-1)
    last = count - 1 if last < 0 else last
    every = f.integer("moe_layer_freq", default=1)
    step = f.integer("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", default=1)
    dense = f.value("mlp_only_layers", default=[])
    if not isinstance(dense, list):
        raise UsageError(f"{f.where}: mlp_only_layers is {dense!r}; it must be a list of layers")
    return lambda i: first <= i <= last and i % every == 0 and (i + 1) % step == 0 and i not in dense


def _single_block_layers(f: Fields, model_type: str) -> tuple[LayerGroup, ...]:
    """Nemotron-H: each layer is one block, an M (Mamba-2), * (attention) or - (MLP)."""
    pattern = str(f.value("hybrid_override_pattern"))
    f.understood.add("num_hidden_layers")
    blocks: list[tuple[tuple[Mixer, ...], Mlp | Experts | None]] = []
    for letter in pattern:
        match letter:
            case "*":
                blocks.append(((attention_shape(f, model_type),), None))
            case "-":
                blocks.append(((), Mlp(_dense_intermediate(f, model_type), model_type not in UNGATED_MLP, activation_kind(f, model_type))))
            case _:
                blocks.append(((UnknownMixer({"M": "mamba2", "E": "experts"}.get(letter, letter)),), None))
    return grouped(blocks)
