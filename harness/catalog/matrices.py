"""The weight matrices of each part of a model, whole or as one rank of a tensor-parallel group holds them.

Serving engines fuse the projections that read the same activations, so q, k and v are one matrix here, and so are gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    Stack,
    UnknownMixer,
)
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Matrix:
    """A weight [n, k] of one rank, applied to the tokens of `stream` ("tokens", "source", "text", "all", "samples").

    `when` "prefill": a decode step does not apply it. `row_parallel`: its outputs are partial sums until an all-reduce.
    """

    role: str
    n: int
    k: int
    stream: str = "tokens"
    when: str = "always"
    row_parallel: bool = False

    @property
    def weights(self) -> int:
        """Elements."""
        return self.n * self.k


def shard(size: int, tp: int, what: str) -> int:
    """`size` / `tp`; UsageError when tensor parallelism does not divide it."""
    if size % tp:
        raise UsageError(f"tensor parallelism of {tp} does not divide {size} {what}; choose a --tp that does")
    return size // tp


def kv_shard(kv_heads: int, tp: int) -> int:
    """Key/value heads of one rank: split while there are enough, replicated beyond (as vLLM, SGLang and TensorRT-LLM do)."""
    if tp <= kv_heads:
        return shard(kv_heads, tp, "key/value heads")
    if tp % kv_heads:
        raise UsageError(f"tensor parallelism of {tp} is not a multiple of {kv_heads} key/value heads; choose a --tp that is")
    return 1


def mixer_matrices(mixer: Mixer, hidden: int, tp: int = 1) -> list[Matrix]:
    """The matrices of a token mixer on one of `tp` ranks. An UnknownMixer has none that are known."""
    match mixer:
        case Attention():
            return _attention(mixer, hidden, tp)
        case LatentAttention():
            return _latent(mixer, hidden, tp)
        case LinearAttention():
            return _linear(mixer, hidden, tp)
        case JointAttention():
            return _joint(mixer, hidden, tp)
        case ParallelBlock():
            inner = shard(mixer.heads, tp, "attention heads") * mixer.head_dim
            intermediate = shard(mixer.intermediate, tp, "intermediate features")
            return [
                Matrix("modulation", 3 * hidden, hidden, "samples"),
                Matrix("qkv_mlp_proj", 3 * inner + intermediate, hidden, "all"),
                Matrix("out_proj", hidden, inner + intermediate, "all", row_parallel=True),
            ]
        case UnknownMixer():
            return []


def _attention(a: Attention, hidden: int, tp: int) -> list[Matrix]:
    heads, kv_heads = shard(a.heads, tp, "attention heads"), kv_shard(a.kv_heads, tp)
    q, kv = heads * a.head_dim * (2 if a.output_gate else 1), 2 * kv_heads * a.head_dim
    out = Matrix("cross_o_proj" if a.cross else "o_proj", hidden, heads * a.head_dim, row_parallel=True)
    if a.cross:
        return [Matrix("cross_q_proj", q, hidden), Matrix("cross_kv_proj", kv, hidden, "source", when="prefill"), out]
    return [Matrix("qkv_proj", q + kv, hidden), out]


def _latent(a: LatentAttention, hidden: int, tp: int) -> list[Matrix]:
    heads, latent = shard(a.heads, tp, "attention heads"), a.kv_lora_rank + a.rope_dim
    if a.q_lora_rank:  # the two down-projections read the same activations; the ranks hold them whole
        first = [Matrix("qkv_a_proj", a.q_lora_rank + latent, hidden), Matrix("q_b_proj", heads * a.qk_dim, a.q_lora_rank)]
    else:
        first = [Matrix("q_proj", heads * a.qk_dim, hidden), Matrix("kv_a_proj", latent, hidden)]
    index = []
    if a.index_topk:
        index = [
            Matrix("index_q_proj", a.index_heads * a.index_dim, a.q_lora_rank or hidden),
            Matrix("index_k_proj", a.index_dim, hidden),
            Matrix("index_weights_proj", a.index_heads, hidden),
        ]
    return [
        *first,
        *index,
        # A decode step multiplies by the two halves of this matrix head by head instead (see the plan's latent attention).
        Matrix("kv_b_proj", heads * (a.nope_dim + a.v_dim), a.kv_lora_rank, "source", when="prefill"),
        Matrix("o_proj", hidden, heads * a.v_dim, row_parallel=True),
    ]


def _linear(a: LinearAttention, hidden: int, tp: int) -> list[Matrix]:
    keys = shard(a.key_heads, tp, "linear-attention key heads") * a.key_dim
    heads = shard(a.value_heads, tp, "linear-attention value heads")
    values = heads * a.value_dim
    return [
        Matrix("linear_qkvz_proj", 2 * keys + 2 * values, hidden),
        Matrix("linear_ba_proj", 2 * heads, hidden),
        Matrix("linear_out_proj", hidden, values, row_parallel=True),
    ]


def _joint(a: JointAttention, hidden: int, tp: int) -> list[Matrix]:
    inner = shard(a.heads, tp, "attention heads") * a.head_dim
    intermediate = shard(a.intermediate, tp, "intermediate features")
    return [
        Matrix(prefix + role, n, k, "samples" if role == "modulation" else stream, row_parallel=role in ("o_proj", "down_proj"))
        for stream, prefix in (("tokens", "image_"), ("text", "text_"))
        for role, n, k in (
            ("modulation", 6 * hidden, hidden),
            ("qkv_proj", 3 * inner, hidden),
            ("o_proj", hidden, inner),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        )
    ]


def mlp_matrices(mlp: Mlp | Experts | None, hidden: int, tp: int = 1) -> list[Matrix]:
    """The matrices that every token goes through: the dense MLP, or router and shared experts."""
    if mlp is None:
        return []
    if isinstance(mlp, Mlp):
        return _up_down("", mlp.intermediate, mlp.gated, hidden, tp)
    shared = _up_down("shared_", mlp.shared_intermediate, mlp.gated, hidden, tp) if mlp.shared_intermediate else []
    gate = [Matrix("shared_gate", 1, hidden)] if mlp.shared_gate else []
    return [Matrix("router", mlp.experts, hidden), *shared, *gate]


def expert_matrices(experts: Experts, hidden: int, tp: int = 1) -> list[Matrix]:
    """The matrices of ONE routed expert, its intermediate size split over `tp` ranks."""
    return _up_down("experts_", experts.intermediate, experts.gated, hidden, tp)


def _up_down(prefix: str, intermediate: int, gated: bool, hidden: int, tp: int) -> list[Matrix]:
    size = shard(intermediate, tp, "intermediate features")
    up = Matrix(prefix + "gate_up_proj", 2 * size, hidden) if gated else Matrix(prefix + "up_proj", size, hidden)
    return [up, Matrix(prefix + "down_proj", hidden, size, row_parallel=True)]


@dataclass(frozen=True)
class Parameters:
    """Weights of a model (biases and norms, below 0.1%, are left out).

    `active` leaves out the experts a token does not visit, the way most model cards count; `per_token` are the weights that a token
    is multiplied with on its way through the model (active, without the embedding table and without an encoder); `routed` those of all
    routed experts.
    """

    total: int
    active: int
    per_token: int
    routed: int = 0


def parameters(model: Model, tp: int = 1) -> Parameters:
    """Count the weights of every part that klab understands; with `tp` those of one GPU of a group, which holds some matrices whole (latent
    projections, routers, keys and values of heads that GPUs share). UsageError when tp divides the heads or features of a layer unevenly.
    """
    always = _stack_weights(model.stack, tp)
    encoder = _stack_weights(model.encoder, tp) if model.encoder else 0
    visited = idle = 0
    for group in model.stack.groups:
        if isinstance(group.mlp, Experts):
            # Slices of every expert, or whole experts of a share: as many weights.
            one = group.count * sum(m.weights for m in expert_matrices(group.mlp, model.stack.hidden)) // tp
            visited += one * group.mlp.top_k
            idle += one * (group.mlp.experts - group.mlp.top_k)
    table = model.vocab * model.stack.hidden // tp
    head = 0 if model.kind in ("encoder", "diffusion_transformer") else table
    embedding = 0 if model.tied and head else table
    active = always + encoder + visited + head + embedding
    return Parameters(total=active + idle, active=active, per_token=always + visited + head, routed=visited + idle)


def _stack_weights(stack: Stack, tp: int) -> int:
    """Weights of a stack without its routed experts."""
    layers = sum(group.count * _group_weights(group, stack.hidden, tp) for group in stack.groups)
    return layers + sum(p.n * p.k * p.count for p in stack.projections)


def _group_weights(group: LayerGroup, hidden: int, tp: int) -> int:
    mixers = sum(m.weights for mixer in group.mixers for m in mixer_matrices(mixer, hidden, tp))
    return mixers + sum(m.weights for m in mlp_matrices(group.mlp, hidden, tp))
