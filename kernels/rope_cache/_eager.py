"""Rotation and cache write in torch's operators: what Inductor is given to fuse, and the eager baseline."""

from __future__ import annotations

import torch

from klab.kernels.contract import Tensors
from klab.kernels.quantize import FP8_MAX
from klab.kernels.rope_cache.problem import RopeCache


def turn(problem: RopeCache, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` [tokens, heads, head_dim] turned, in float32; cos, sin [tokens, 1, rotary_dim / 2]."""
    wide, half = x.float(), problem.turned // 2
    part, rest = wide[..., : problem.turned], wide[..., problem.turned :]
    a, b = (part[..., 0::2], part[..., 1::2]) if problem.interleaved else (part[..., :half], part[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if problem.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1) if problem.turned < problem.head_dim else turned


def narrow(value: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What the cache holds of it; scale [heads, 1] or [1], or None."""
    return value.to(dtype) if scale is None else (value.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(dtype)


def put(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Rows to their slots. torch has no indexed write of fp8: it moves its bytes."""
    if values.dtype == torch.float8_e4m3fn:
        cache, values = cache.view(torch.uint8), values.view(torch.uint8)
    cache.index_copy_(0, slots, values)


def rope_cache(problem: RopeCache, inputs: Tensors, outputs: Tensors) -> None:
    """All outputs, one operator after the other."""
    keys = inputs["k_rope"][:, None] if problem.latent else inputs["k"]
    if problem.rotary:
        cos, sin = (inputs[name][inputs["positions"]][:, None] for name in ("cos", "sin"))
        queries = "q_rope" if problem.latent else "q"
        outputs[queries].copy_(turn(problem, inputs[queries], cos, sin))
        keys = turn(problem, keys, cos, sin)
    if not problem.cache:
        outputs["k"].copy_(keys)
        return
    slots = inputs["slot_mapping"].long()
    if problem.latent:
        cache, scale = outputs["cache"], inputs.get("kv_scale")
        whole = torch.cat([inputs["latent"].to(keys.dtype), keys[:, 0]], dim=-1)
        put(cache, slots, narrow(whole, scale, cache.dtype))
        return
    for name, value in (("k", keys), ("v", inputs["v"])):
        cache = outputs[f"{name}_cache"]
        put(cache, slots, narrow(value, inputs[f"{name}_scale"][:, None] if problem.kv_dtype else None, cache.dtype))
