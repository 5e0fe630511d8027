"""Family: one kind of published table, and which of klab's problems each of its rows is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

from klab.harness.plan.feed_forward import SWIGLU_LIMIT
from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.contract import Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.gated_delta_rule.problem import GatedDeltaRule
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.quantize import MX_BLOCK
from klab.kernels.scaled_matmul.problem import MICRO, ScaledMatmul
from klab.kernels.weight_only_moe.problem import WeightOnlyMoe

FP8 = "float8_e4m3fn"
# DeepSeek's latent attention, which alone is measured: a head is 128 wide and 64 more with positions, the latent 512.
NOPE, ROPE, LATENT = 128, 64, 512

Row = Mapping[str, Any]
# Columns of every table that say where a row is from.
PROVENANCE = ("framework", "version", "device", "kernel_source")


@dataclass(frozen=True, slots=True)
class Mapped:
    """A problem of one sequence (or of no sequences at all) that is in the row `times` times, and in what the row differs from it."""

    one: Problem
    note: str = ""
    times: int = 1


def batched(one: Problem, times: int) -> Problem:
    """The problem of so many sequences that are like the one of `one`."""
    if times == 1:
        return one
    lens = {f.name: getattr(one, f.name) * times for f in fields(one) if type(getattr(one, f.name)) is tuple}  # type: ignore[arg-type]
    return replace(one, **lens)  # type: ignore[type-var]


@dataclass(frozen=True)
class Unmapped:
    """Why klab has no problem for a row."""

    why: str


@dataclass(frozen=True)
class Family:
    """One kind of table: `folder`/.../`file`, of one or two of klab's `operators`.

    `form` are the columns that say what is done, `sizes` those that say how much; `mapped` reads a row of both (and of `PROVENANCE`).
    `form_of` is its inverse for the form: the values that rows of a problem's kind have, or None where this table cannot hold it. `axes`
    give the sizes of the problems, by their names, from whole columns; `more` is the column of which more is more work. `by_kernel`: the
    name of the kernel tells which of the operators a row is. `launch_floor_us`: a graph's launch of this kind takes less, so that a table
    that never goes below was not replayed from one (None: its launches are several, and nothing is said of them).
    """

    name: str
    folder: str
    file: str
    operators: tuple[str, ...]
    form: tuple[str, ...]
    sizes: tuple[str, ...]
    mapped: Callable[[Row], Mapped | Unmapped]
    form_of: Callable[[Any], Mapping[str, object] | None]
    axes: Mapping[str, Callable[[Any], Any]]
    more: str = "batch_size"
    by_kernel: bool = False
    launch_floor_us: float | None = None


# The format of klab's scaled_matmul that each name of the tables stands for, and in what those rows differ.
_QUANTISES = "with the quantisation of x"
GEMM_FORMATS = {"fp8": "fp8_tensor", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}
# SGLang's fp8 has a scale per token and per output channel, the others' one per tensor.
PER_ROW = "SGLang"


def _gemm(row: Row) -> Mapped | Unmapped:
    m, n, k, name = row["m"], row["n"], row["k"], row["gemm_dtype"]
    if name == "bfloat16":
        return Mapped(Matmul(m, n, k))
    if name not in GEMM_FORMATS:
        return Unmapped(f"klab measures no GEMM in {name}")
    form = "fp8_row" if name == "fp8" and row["framework"] == PER_ROW else GEMM_FORMATS[name]
    if k % MICRO.get(form, 1):
        return Unmapped(f"{form} needs whole blocks of k")
    return Mapped(ScaledMatmul(m, n, k, format=form), _QUANTISES)


def _gemm_form(problem: Problem) -> Mapping[str, object] | None:
    if isinstance(problem, Matmul):
        return {"gemm_dtype": "bfloat16"} if problem.dtype != "float32" else None
    names = {form: name for name, form in GEMM_FORMATS.items()} | {"fp8_row": "fp8"}
    return {"gemm_dtype": names[problem.format]} if isinstance(problem, ScaledMatmul) and problem.format in names else None


def _kv_dtype(row: Row) -> str:
    return FP8 if row["kv_cache_dtype"] == "fp8" else ""


def _heads(row: Row) -> dict[str, int]:
    heads = row["num_heads"]
    return {"heads": heads, "kv_heads": row["num_key_value_heads"] or heads, "head_dim": row["head_dim"]}


def _odd_attention(row: Row) -> Unmapped | None:
    if (row["beam_width"] or 1) != 1:
        return Unmapped("klab has no beams")
    if row["attn_dtype"] != "bfloat16":
        return Unmapped(f"klab has no attention with queries in {row['attn_dtype']}")
    heads = _heads(row)
    return Unmapped("its heads are no multiple of its key heads") if heads["heads"] % heads["kv_heads"] else None


# TensorRT-LLM turns the positions in its attention; all of them write the cache there.
TURNS = "TRTLLM"


def _writes(row: Row) -> str:
    return "with the rotary positions and the write to the cache" if row["framework"] == TURNS else "with the write to the cache"


def _context(row: Row) -> Mapped | Unmapped:
    if odd := _odd_attention(row):
        return odd
    new, prefix = row["isl"], row["step"] or 0
    window = row["window_size"] or 0
    shape: dict[str, Any] = {**_heads(row), "kv_dtype": _kv_dtype(row), "window": window if window < new + prefix else 0}
    if prefix:  # as a plan has them: keys behind a cached prefix lie in pages
        shape |= {"page_size": 16}

    return Mapped(PrefillAttention((new,), prefix_lens=(prefix,) if prefix else (), **shape), _writes(row), row["batch_size"])


def _context_form(p: Problem) -> Mapping[str, object] | None:
    if not isinstance(p, PrefillAttention) or not p.causal or p.dim_v != p.head_dim or p.dtype == "float32":
        return None
    return {
        "head_dim": p.head_dim, "window_size": p.window, "attn_dtype": "bfloat16", "kv_cache_dtype": "fp8" if p.kv_dtype else "bfloat16"
    }  # fmt: skip


def _generation(row: Row) -> Mapped | Unmapped:
    if odd := _odd_attention(row):
        return odd
    new, keys = row["isl"], row["step"] + row["isl"]
    window = row["window_size"] or 0
    shape: dict[str, Any] = {**_heads(row), "kv_dtype": _kv_dtype(row), "window": window if window < keys else 0, "q_len": new}
    return Mapped(DecodeAttention((keys,), **shape), _writes(row), row["batch_size"])


def _generation_form(p: Problem) -> Mapping[str, object] | None:
    if not isinstance(p, DecodeAttention) or p.dim_v != p.head_dim or p.dtype == "float32":
        return None
    return {
        "head_dim": p.head_dim, "window_size": p.window, "attn_dtype": "bfloat16", "kv_cache_dtype": "fp8" if p.kv_dtype else "bfloat16"
    }  # fmt: skip


def _encoder(row: Row) -> Mapped | Unmapped:
    if row["attn_dtype"] != "bfloat16":
        return Unmapped(f"klab has no attention with queries in {row['attn_dtype']}")
    shape: dict[str, Any] = {"heads": row["num_heads"], "kv_heads": row["num_heads"], "head_dim": row["head_dim"], "causal": False}
    return Mapped(PrefillAttention((row["isl"],), **shape), "", row["batch_size"])


def _encoder_form(p: Problem) -> Mapping[str, object] | None:
    plain = isinstance(p, PrefillAttention) and not p.causal and p.heads == p.kv_heads and p.dim_v == p.head_dim
    return {"head_dim": p.head_dim, "attn_dtype": "bfloat16"} if plain and p.dtype != "float32" and not p.kv_dtype else None  # type: ignore[attr-defined]


def _latent_context(row: Row) -> Mapped | Unmapped:
    if row["mla_dtype"] != "bfloat16" or row["step"]:
        return Unmapped(f"klab has no such latent prefill ({row['mla_dtype']}, {row['step']} cached tokens)")
    if row["kv_cache_dtype"] != "bfloat16":
        return Unmapped("a plan's latent prefill reads keys in 16 bits, whatever the cache")
    heads = row["num_heads"]
    return Mapped(PrefillAttention((row["isl"],), heads, heads, NOPE + ROPE, head_dim_v=NOPE), _writes(row), row["batch_size"])


def _latent_context_form(p: Problem) -> Mapping[str, object] | None:
    if not isinstance(p, PrefillAttention) or (p.head_dim, p.dim_v, p.kv_dtype) != (NOPE + ROPE, NOPE, "") or p.dtype == "float32":
        return None
    return {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "step": 0} if p.causal else None


def _latent_generation(row: Row) -> Mapped | Unmapped:
    if row["mla_dtype"] != "bfloat16":
        return Unmapped(f"klab has no latent decode in {row['mla_dtype']}")
    new, heads = row["isl"], row["num_heads"]
    one = LatentAttention((row["step"] + new,), heads, LATENT, ROPE, q_len=new, kv_dtype=_kv_dtype(row), qk_dim=NOPE + ROPE)
    # On a B200 some fp8 rows are faster than its 16-bit peak: the queries are narrow too.
    note = f"{_writes(row)}; the queries may be fp8 too" if one.kv_dtype else _writes(row)
    return Mapped(one, note, row["batch_size"])


def _latent_generation_form(p: Problem) -> Mapping[str, object] | None:
    if not isinstance(p, LatentAttention) or (p.kv_lora_rank, p.rope_dim) != (LATENT, ROPE) or p.dtype == "float32":
        return None
    return {"mla_dtype": "bfloat16", "kv_cache_dtype": "fp8" if p.kv_dtype else "bfloat16"}


def _per_head(row: Row) -> Mapped | Unmapped:
    if row["bmm_dtype"] != "bfloat16":
        return Unmapped(f"klab measures no matrices per head in {row['bmm_dtype']}")
    n, k = (LATENT, NOPE) if row["op_name"] == "mla_gen_pre" else (NOPE, LATENT)
    return Mapped(BatchedMatmul(row["num_heads"], row["num_tokens"], n, k))


def _per_head_n(columns: Any) -> Any:
    """n of either matrix, of whole columns: the operations that come before the attention widen, those behind it narrow."""
    before = columns["op_name"] == "mla_gen_pre"
    return before * LATENT + (1 - before) * NOPE


def _per_head_form(p: Problem) -> Mapping[str, object] | None:
    names = {(LATENT, NOPE): "mla_gen_pre", (NOPE, LATENT): "mla_gen_post"}
    name = names.get((p.n, p.k)) if isinstance(p, BatchedMatmul) else None
    return {"bmm_dtype": "bfloat16", "op_name": name} if name and p.dtype != "float32" else None


MOE_FORMATS = {"bfloat16": "", "fp8_block": "fp8_block"}
# Weights alone are narrow. How many int4 weights share a scale is not said: 32, as Kimi K2's.
PACKED_FORMATS = {"w4a16_mxfp4": "mxfp4", "int4_wo": "int4"}
# gpt-oss (hidden size, experts chosen) clamps gate and up.
CLAMPED = (2880, 4)
# By this law few tokens visit as many experts as by even chance, or up to a tenth fewer: of 256 experts, 8 each, 32 tokens 131 (chance:
# 163), 64 tokens 204 (222), 128 tokens 243 (252), as the times of TensorRT-LLM's rows on an H200 tell. The tables' other way deals experts
# out in turn: 32 tokens visit all 256, and a decode step takes up to 1.7 times as long as it would.
BY_CHANCE = "power_law_1.01"
_ROUTES = "with the choice of experts and the sort of their tokens; chosen by a power law of 1.01"
_BUSIEST = "the GPU with the most of them"
# Experts without a gate, which the tables do not always say: Nemotron 3 (hidden, intermediate, chosen, of so many).
UNGATED = frozenset({(2688, 1856, 6, 128), (1024, 2688, 22, 512), (4096, 2688, 22, 512), (2048, 5120, 22, 512), (8192, 5120, 22, 512)})


def _experts(row: Row) -> Mapped | Unmapped:
    if row["moe_dtype"] not in MOE_FORMATS | PACKED_FORMATS:
        return Unmapped(f"klab has no experts in {row['moe_dtype']}")
    if row["distribution"] != BY_CHANCE:
        return Unmapped(f"klab draws experts by chance, not {row['distribution']}")
    tp, ep, experts = row["moe_tp_size"], row["moe_ep_size"], row["num_experts"]
    if row["inter_size"] % tp or experts % ep:
        return Unmapped("its experts or their features are not divided evenly")
    hidden, intermediate, top_k = row["hidden_size"], row["inter_size"], row["topk"]
    gated = "nongated" not in (row["kernel_source"] or "") and (hidden, intermediate, top_k, experts) not in UNGATED
    local, limit = experts // ep if ep > 1 else 0, SWIGLU_LIMIT if (hidden, top_k) == CLAMPED else 0.0
    shape = (row["num_tokens"], hidden, intermediate // tp, experts, top_k)
    rest: dict[str, Any] = {"local_experts": local, "gated": gated, "swiglu_limit": limit}
    if row["moe_dtype"] in PACKED_FORMATS:
        if hidden % 2 or intermediate // tp % 2:
            return Unmapped("two weights share a byte, and a row has an odd number")
        one: Problem = WeightOnlyMoe(*shape, format=PACKED_FORMATS[row["moe_dtype"]], **rest)
    else:
        one = FusedMoe(*shape, format=MOE_FORMATS[row["moe_dtype"]], **rest)
    return Mapped(one, f"{_ROUTES}; {_BUSIEST}" if local else _ROUTES)


def _experts_form(p: Problem) -> Mapping[str, object] | None:
    if not isinstance(p, FusedMoe | WeightOnlyMoe) or p.dtype == "float32" or (isinstance(p, WeightOnlyMoe) and p.group != MX_BLOCK):
        return None
    names = {form: name for name, form in (PACKED_FORMATS if isinstance(p, WeightOnlyMoe) else MOE_FORMATS).items()}
    if p.format not in names:
        return None
    return {"moe_dtype": names[p.format], "distribution": BY_CHANCE}


# Which of the kernels of one linear-attention layer a row is.
_RULES = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "fused_sigmoid_gating_delta_rule_update")


def _linear(row: Row) -> Mapped | Unmapped:
    source = row["kernel_source"] or ""
    new = row["seq_len"] if row["phase"] == "context" else 1
    batch, keys, values = row["batch_size"], row["num_k_heads"], row["num_v_heads"]
    key_dim, value_dim = row["head_k_dim"], row["head_v_dim"]
    if source.startswith("causal_conv1d"):
        channels, width = 2 * keys * key_dim + values * value_dim, row["d_conv"]
        return Mapped(CausalConv1d((new,), channels, width), "", batch)
    if not source.startswith(_RULES):
        return Unmapped(f"klab has no {source}")
    if values % keys:
        return Unmapped("its value heads are no multiple of its key heads")
    return Mapped(GatedDeltaRule((new,), keys, values, key_dim, value_dim), "", batch)


def _linear_form(p: Problem) -> Mapping[str, object] | None:
    if isinstance(p, GatedDeltaRule | CausalConv1d) and p.dtype != "float32":
        return {"phase": "generation" if set(p.seq_lens) == {1} else "context"}
    return None


_KEYS: dict[str, Callable[[Any], Any]] = {
    "sequences": itemgetter("batch_size"), "queries": itemgetter("isl"), "keys": lambda c: c["isl"] + c["step"],
}  # fmt: skip
_HEADS: dict[str, Callable[[Any], Any]] = {"heads": itemgetter("num_heads"), "kv_heads": itemgetter("num_key_value_heads")}
_SELF: dict[str, Callable[[Any], Any]] = {**_KEYS, "keys": itemgetter("isl"), "heads": _HEADS["heads"], "kv_heads": _HEADS["heads"]}
_ATTENTION = ("head_dim", "window_size", "attn_dtype", "kv_cache_dtype")
_ATTENTION_SIZES = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "beam_width")
_LATENT_SIZES = ("batch_size", "isl", "num_heads")

FAMILIES = (
    Family(
        "gemm", "gemm", "gemm_perf", ("matmul", "scaled_matmul"), ("gemm_dtype",), ("m", "n", "k"), _gemm, _gemm_form,
        {name: itemgetter(name) for name in ("m", "n", "k")}, more="m", launch_floor_us=20.0,
    ),
    Family(
        "context attention", "attention", "context_attention_perf", ("prefill_attention",), _ATTENTION, _ATTENTION_SIZES,
        _context, _context_form, _KEYS | _HEADS,
    ),
    Family(
        "generation attention", "attention", "generation_attention_perf", ("decode_attention",), _ATTENTION, _ATTENTION_SIZES,
        _generation, _generation_form, _KEYS | _HEADS,
    ),
    Family(
        "encoder attention", "encoder_attention", "encoder_attention_perf", ("prefill_attention",), ("head_dim", "attn_dtype"),
        ("batch_size", "isl", "num_heads"), _encoder, _encoder_form, _SELF,
    ),
    Family(
        "context MLA", "mla", "context_mla_perf", ("prefill_attention",), ("mla_dtype", "kv_cache_dtype", "step"), _LATENT_SIZES,
        _latent_context, _latent_context_form, _SELF,
    ),
    Family(
        "generation MLA", "mla", "generation_mla_perf", ("latent_attention",), ("mla_dtype", "kv_cache_dtype"), (*_LATENT_SIZES, "step"),
        _latent_generation, _latent_generation_form, _KEYS | {"heads": itemgetter("num_heads")},
    ),
    Family(
        "MLA matrices per head", "mla_bmm", "mla_bmm_perf", ("batched_matmul",), ("bmm_dtype", "op_name"), ("num_tokens", "num_heads"),
        _per_head, _per_head_form,
        {"batch": itemgetter("num_heads"), "m": itemgetter("num_tokens"), "n": _per_head_n, "k": lambda c: NOPE + LATENT - _per_head_n(c)},
        more="num_tokens",
    ),
    Family(
        "mixture of experts", "moe", "moe_perf", ("fused_moe", "weight_only_moe"), ("moe_dtype", "distribution"),
        ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"), _experts, _experts_form,
        {
            "tokens": itemgetter("num_tokens"), "hidden": itemgetter("hidden_size"), "experts": itemgetter("num_experts"),
            "intermediate": lambda c: c["inter_size"] / c["moe_tp_size"], "top_k": itemgetter("topk"),
            "local_experts": lambda c: c["num_experts"] / c["moe_ep_size"],
        },
        more="num_tokens",
    ),
    Family(
        "linear attention", "linear_attention", "gdn_perf", ("gated_delta_rule", "causal_conv1d"), ("phase",),
        ("batch_size", "seq_len", "d_conv", "num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim"), _linear, _linear_form,
        {
            "sequences": itemgetter("batch_size"), "keys": itemgetter("seq_len"),
            "key_heads": itemgetter("num_k_heads"), "value_heads": itemgetter("num_v_heads"),
            "channels": lambda c: 2 * c["num_k_heads"] * c["head_k_dim"] + c["num_v_heads"] * c["head_v_dim"],
        },
        by_kernel=True,
    ),
)  # fmt: skip
"""Every kind of table that klab reads."""
