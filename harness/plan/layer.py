"""A whole decoder layer as the engine runs it: which problem reads what which other one wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.catalog.architecture import Attention, Experts, LatentAttention, LayerGroup, Mlp, Model
from klab.harness.catalog.matrices import kv_shard, mixer_matrices, mlp_matrices, shard
from klab.harness.plan.attention import LATENT_PAGE
from klab.harness.plan.feed_forward import feed_forward_rows
from klab.harness.plan.step import Step
from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.contract import Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.errors import UsageError
from klab.kernels.latent_attention.problem import LatentAttention as LatentProblem
from klab.kernels.matmul.problem import Matmul
from klab.kernels.norm.problem import Norm
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.rope_cache.problem import RopeCache

if TYPE_CHECKING:
    import torch

Flow = Mapping[str, Mapping[str, "torch.Tensor"]]
"""What the parts before have written, by role and output; "hidden" is what comes into the layer (x, residual)."""


@dataclass(frozen=True)
class Part:
    """One launch of a problem. `feed` gives the inputs that come from earlier parts; the others are the layer's own (weights, cache)."""

    role: str
    problem: Problem
    feed: Callable[[Flow], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Glue:
    """A copy that an engine does not need (its kernels write where the next one reads) or a small addition: torch's own operations.

    `make(flow, own)` returns the outputs; `own` are the inputs of the part named `of`, for a write into its cache.
    """

    role: str
    make: Callable[[Flow, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    of: str = ""


Parts = Sequence[Part | Glue]


def layer_of(group: LayerGroup, hidden: int, step: Step) -> list[Part | Glue]:
    """The launches of one layer of this group, in order. UsageError for a mixer that is none of grouped and latent attention, and for parts
    of a scenario that are not composed.
    """
    asked = [name for name in ("kv_dtype", "shared_prefix") if getattr(step, name)]
    if step.tp > 1:
        asked.append("tp (a part of a layer needs the all-reduces of the other GPUs)")
    if step.prefix and not step.decodes:
        asked.append("prefix_len in prefill")
    if asked:
        raise UsageError(f"a whole layer is not composed with {', '.join(asked)}: leave it out")
    (mixer,) = group.mixers if len(group.mixers) == 1 else (None,)
    if isinstance(mixer, Attention) and mixer.causal and not mixer.cross and not mixer.chunk:
        parts = _grouped(mixer, hidden, step)
    elif isinstance(mixer, LatentAttention) and not mixer.index_topk:
        parts = _latent(mixer, hidden, step)
    else:
        raise UsageError("a whole layer is composed for grouped and latent attention over their own tokens, not for this model's layers")
    return [*parts, *_feed_forward(group.mlp, hidden, step)]


def groups_of(model: Model) -> list[LayerGroup]:
    """The kinds of layers of a model that can be composed, those that occur most often first."""
    return sorted(model.stack.groups, key=lambda group: -group.count)


def _x(role: str) -> Callable[[Flow], dict[str, torch.Tensor]]:
    """Reads another part's `out` as its `x`, flattened to a row per token (a decode's output is [batch, q_len, heads, dim])."""

    def feed(flow: Flow) -> dict[str, torch.Tensor]:
        found = flow[role]["out"]
        return {"x": (found.flatten(0, 1) if found.dim() == 4 else found).flatten(1)}

    return feed


def _norm_in(step: Step, hidden: int) -> Part:
    return Part("input_norm", Norm(step.tokens, hidden, step.norm, residual=True, dtype=step.dtype), lambda flow: dict(flow["hidden"]))


def _linear(role: str, after: str, n: int, k: int, step: Step) -> Part:
    return Part(role, Matmul(step.tokens, n, k, step.dtype), _x(after))


def _grouped(a: Attention, hidden: int, step: Step) -> list[Part | Glue]:
    heads, kv_heads, d = shard(a.heads, step.tp, "attention heads"), kv_shard(a.kv_heads, step.tp), a.head_dim
    if a.output_gate:
        raise UsageError("a whole layer with a gated attention output is not composed yet")
    (qkv, out) = mixer_matrices(a, hidden, step.tp)
    parts: list[Part | Glue] = [_norm_in(step, hidden), _linear("qkv_proj", "input_norm", qkv.n, qkv.k, step)]
    split = {"q": (0, heads), "k": (heads, heads + kv_heads), "v": (heads + kv_heads, heads + 2 * kv_heads)}

    def of_projection(name: str) -> Callable[[Flow], torch.Tensor]:
        first, last = split[name]
        return lambda flow: flow["qkv_proj"]["out"][:, first * d : last * d].unflatten(1, (last - first, d))  # type: ignore[no-untyped-call]

    sources = {name: of_projection(name) for name in split}
    if a.qk_norm:
        rows = step.tokens * (heads + kv_heads)

        def gather(flow: Flow, own: object) -> dict[str, torch.Tensor]:
            return {"x": flow["qkv_proj"]["out"][:, : (heads + kv_heads) * d].reshape(rows, d)}

        parts.append(Glue("qk_gather", gather))
        parts.append(Part("qk_norm", Norm(rows, d, dtype=step.dtype), lambda flow: {"x": flow["qk_gather"]["x"]}))

        def normed(first: int, last: int) -> Callable[[Flow], torch.Tensor]:
            return lambda flow: flow["qk_norm"]["out"].view(step.tokens, heads + kv_heads, d)[:, first:last]

        sources |= {"q": normed(0, heads), "k": normed(heads, heads + kv_heads)}
    rope = RopeCache(step.tokens, heads, kv_heads, d, rotary_dim=a.rotary_dim, page_size=step.page_size, rotary=a.rotary, dtype=step.dtype)
    if not a.rotary:
        raise UsageError("a whole layer without rotary positions is not composed yet")
    parts.append(Part("rope_and_cache", rope, lambda flow: {name: source(flow) for name, source in sources.items()}))
    features: dict[str, Any] = {"dtype": step.dtype, "sinks": a.sinks, "softcap": a.softcap}
    window = a.window if a.window < step.context else 0
    if step.decodes:
        attention: Problem = DecodeAttention(
            (step.context,) * step.batch, heads, kv_heads, d, q_len=step.new, page_size=step.page_size, window=window, **features
        )
        parts.append(Glue("cache_insert", _insert({"k_cache": "k_cache", "v_cache": "v_cache"}, step), of="attention"))
        parts.append(Part("attention", attention, _decode_feed(step, ("k_cache", "v_cache"))))
    else:
        attention = PrefillAttention((step.new,) * step.batch, heads, kv_heads, d, window=window, **features)
        parts.append(Part("attention", attention, _prefill_feed))
    return [*parts, _linear("o_proj", "attention", out.n, out.k, step)]


def _prefill_feed(flow: Flow) -> dict[str, torch.Tensor]:
    rope = flow["rope_and_cache"]
    return {"q": rope["q"], "k": rope["k_cache"], "v": rope["v_cache"]}


def _decode_feed(step: Step, caches: tuple[str, ...]) -> Callable[[Flow], dict[str, torch.Tensor]]:
    def feed(flow: Flow) -> dict[str, torch.Tensor]:
        q = flow["rope_and_cache"]["q"] if "q" in flow["rope_and_cache"] else flow["q_joined"]["q"]
        found = {"q": q.view(step.batch, step.new, *q.shape[1:])}
        return found | {name: flow["cache_insert"][name] for name in caches}

    return feed


def _insert(names: Mapping[str, str], step: Step) -> Callable[[Flow, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Write the new tokens' rows to the end of each sequence in the paged cache of the attention; the cache is the output.

    An engine's rotary kernel writes there itself: klab's problem has an output of its own, so that no input is ever changed.
    """

    def make(flow: Flow, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for cache, source in names.items():
            paged = own[cache]
            size = paged.shape[1]
            token = step.context - step.new
            rows = flow["rope_and_cache"][source].view(step.batch, step.new, *paged.shape[2:])
            for new in range(step.new):
                pages = own["block_table"][:, (token + new) // size].long()
                paged[pages, (token + new) % size] = rows[:, new].to(paged.dtype)
            found[cache] = paged
        return found

    return make


def _latent(a: LatentAttention, hidden: int, step: Step) -> list[Part | Glue]:
    heads, latent, rope_dim, nope = shard(a.heads, step.tp, "attention heads"), a.kv_lora_rank, a.rope_dim, a.nope_dim
    by_role = {matrix.role: matrix for matrix in mixer_matrices(a, hidden, step.tp)}
    first = "qkv_a_proj" if a.q_lora_rank else "kv_a_proj"
    at = a.q_lora_rank  # where the latents begin in the first projection
    parts: list[Part | Glue] = [_norm_in(step, hidden), _linear(first, "input_norm", by_role[first].n, hidden, step)]
    if a.q_lora_rank:
        q_norm = Norm(step.tokens, a.q_lora_rank, dtype=step.dtype)
        parts.append(Part("q_norm", q_norm, lambda flow: {"x": flow[first]["out"][:, :at]}))
        parts.append(_linear("q_proj", "q_norm", by_role["q_b_proj"].n, a.q_lora_rank, step))
    else:
        parts.append(_linear("q_proj", "input_norm", by_role["q_proj"].n, hidden, step))
    parts.append(Part("kv_norm", Norm(step.tokens, latent, dtype=step.dtype), lambda flow: {"x": flow[first]["out"][:, at : at + latent]}))

    def q_of(flow: Flow) -> torch.Tensor:
        return flow["q_proj"]["out"].view(step.tokens, heads, nope + rope_dim)

    rope = RopeCache(step.tokens, heads, 1, rope_dim, latent=latent, interleaved=True, page_size=LATENT_PAGE, dtype=step.dtype)
    parts.append(
        Part(
            "rope_and_cache",
            rope,
            lambda flow: {
                "q_rope": q_of(flow)[..., nope:],
                "latent": flow["kv_norm"]["out"],
                "k_rope": flow[first]["out"][:, at + latent :],
            },
        )
    )
    if step.decodes:
        absorb = BatchedMatmul(heads, step.tokens, latent, nope, step.dtype)
        parts.append(Part("q_absorb", absorb, lambda flow: {"x": q_of(flow)[..., :nope]}))
        parts.append(Glue("q_joined", lambda flow, own: {"q": _join(flow["q_absorb"]["out"], flow["rope_and_cache"]["q_rope"])}))
        parts.append(Glue("cache_insert", _insert({"kv_cache": "cache"}, step), of="attention"))
        problem: Problem = LatentProblem(
            (step.context,) * step.batch, heads, latent, rope_dim, q_len=step.new, page_size=LATENT_PAGE, dtype=step.dtype, qk_dim=a.qk_dim
        )
        parts.append(Part("attention", problem, _decode_feed(step, ("kv_cache",))))
        back = BatchedMatmul(heads, step.tokens, a.v_dim, latent, step.dtype)
        parts.append(Part("v_absorb", back, lambda flow: {"x": flow["attention"]["out"].flatten(0, 1)}))
        return [*parts, _linear("o_proj", "v_absorb", hidden, heads * a.v_dim, step)]
    parts.append(_linear("kv_b_proj", "kv_norm", by_role["kv_b_proj"].n, latent, step))

    def spread(flow: Flow, own: object) -> dict[str, torch.Tensor]:
        both = flow["kv_b_proj"]["out"].view(step.tokens, heads, nope + a.v_dim)
        turned = flow["rope_and_cache"]["cache"][:, None, latent:].expand(-1, heads, -1)
        q = _join(q_of(flow)[..., :nope], flow["rope_and_cache"]["q_rope"])
        return {"q": q, "k": _join(both[..., :nope], turned), "v": both[..., nope:].contiguous()}

    parts.append(Glue("spread", spread))
    attention = PrefillAttention((step.new,) * step.batch, heads, heads, a.qk_dim, head_dim_v=a.v_dim, dtype=step.dtype)
    parts.append(Part("attention", attention, lambda flow: {name: flow["spread"][name] for name in "qkv"}))
    return [*parts, _linear("o_proj", "attention", hidden, heads * a.v_dim, step)]


def _join(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat((left, right), dim=-1)


def _feed_forward(mlp: Mlp | Experts | None, hidden: int, step: Step) -> list[Part | Glue]:
    norm = Norm(step.tokens, hidden, step.norm, residual=True, dtype=step.dtype)
    parts: list[Part | Glue] = [
        Part("post_norm", norm, lambda flow: {"x": flow["o_proj"]["out"], "residual": flow["input_norm"]["residual"]})
    ]
    if mlp is None:
        return parts
    # The problems are those of the plan, so that what is checked here is what the roll-up adds up.
    planned = {draft.role: draft.problem for draft in feed_forward_rows(mlp, hidden, step) if draft.problem}
    if isinstance(mlp, Mlp):
        up, down = mlp_matrices(mlp, hidden, step.tp)
        return [*parts, *_chain(planned, "post_norm", (up.role, "activation", down.role))]
    parts += _chain(planned, "post_norm", ("router",))
    parts.append(Part("routing", planned["routing"], lambda flow: {"logits": flow["router"]["out"]}))
    parts.append(
        Part(
            "experts",
            planned["experts"],
            lambda flow: {"x": flow["post_norm"]["out"], "topk_ids": flow["routing"]["ids"], "topk_weights": flow["routing"]["weights"]},
        )
    )
    if mlp.shared_gate:
        raise UsageError("a whole layer with a gate on its shared expert is not composed yet")
    if mlp.shared_intermediate:
        shared = [m.role for m in mlp_matrices(mlp, hidden, step.tp) if m.role.startswith("shared_") and m.role != "shared_gate"]
        parts += _chain(planned, "post_norm", (shared[0], "activation", shared[1]))
        parts.append(Glue("experts_sum", lambda flow, own: {"out": flow["experts"]["out"] + flow[shared[1]]["out"]}))
    return parts


def _chain(planned: Mapping[str, Problem], after: str, roles: Sequence[str]) -> list[Part]:
    """Parts that each read the one before."""
    return [Part(role, planned[role], _x(before)) for before, role in zip((after, *roles), roles, strict=False)]
