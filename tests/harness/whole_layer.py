"""A decoder layer by definition, in float64 and written apart from the plan's wiring: what a composed layer is held against."""

import math

import torch


def rms(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(v, cos, sin, interleaved):
    """[tokens, heads, dim] with pairs turned by tables [tokens, pairs]."""
    n, out = cos.shape[1], v.clone()
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    a, b, c, s = v[..., first], v[..., second], cos[:, None], sin[:, None]
    out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    return out


def attended(q, k, v, scale, seen):
    """[queries, heads, dim] over [keys, heads, dim]; `seen` [queries, keys]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def paged(cache, table, length):
    return torch.stack([cache[table[t // cache.shape[1]], t % cache.shape[1]] for t in range(length)])


def layer(own, mixer, step, routed=None):
    """(output, residual) of one layer with the inputs `own` of its parts (by role), as they were before the layer ran."""
    o = {role: {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()} for role, tensors in own.items()}
    residual = o["input_norm"]["x"] + o["input_norm"]["residual"]
    h = rms(residual, o["input_norm"]["weight"])
    positions = o["rope_and_cache"]["positions"].long()
    tables = o["rope_and_cache"]["cos"][positions], o["rope_and_cache"]["sin"][positions]
    mix = _latent if hasattr(mixer, "kv_lora_rank") else _grouped
    residual = residual + mix(o, h, mixer, step, tables).flatten(1) @ o["o_proj"]["w"].T
    h = rms(residual, o["post_norm"]["weight"])
    return _feed_forward(o, h, routed), residual


def _each_sequence(step, cached):
    """Per sequence: its tokens, and which of its keys each sees."""
    n, length = step.new, step.context if cached else step.new
    seen = torch.arange(length)[None] <= torch.arange(n)[:, None] + length - n
    return [(slice(b * n, (b + 1) * n), length, seen) for b in range(step.batch)]


def _grouped(o, h, a, step, tables):
    heads, kv, d = a.heads, a.kv_heads, a.head_dim
    q, k, v = (t.view(step.tokens, -1, d) for t in (h @ o["qkv_proj"]["w"].T).split([heads * d, kv * d, kv * d], -1))
    if a.qk_norm:
        q, k = rms(q, o["qk_norm"]["weight"]), rms(k, o["qk_norm"]["weight"])
    q, k = turned(q, *tables, False), turned(k, *tables, False)
    out = torch.zeros(step.tokens, heads, d, dtype=torch.float64)
    for b, (mine, length, seen) in enumerate(_each_sequence(step, step.decodes)):
        keys, values = k[mine], v[mine]
        if step.decodes:
            cache = o["attention"]
            keys, values = (paged(cache[name], cache["block_table"][b], length) for name in ("k_cache", "v_cache"))
            keys[-step.new :], values[-step.new :] = k[mine], v[mine]
        keys, values = (t.repeat_interleave(heads // kv, 1) for t in (keys, values))
        out[mine] = attended(q[mine], keys, values, d**-0.5, seen)
    return out


def _latent(o, h, a, step, tables):
    """Unabsorbed, in decode too: the latents are spread out to full heads."""
    lora, nope = a.kv_lora_rank, a.nope_dim
    q, latent, k_rope = (h @ o["qkv_a_proj"]["w"].T).split([a.q_lora_rank, lora, a.rope_dim], -1)
    q = (rms(q, o["q_norm"]["weight"]) @ o["q_proj"]["w"].T).view(step.tokens, a.heads, -1)
    q = torch.cat((q[..., :nope], turned(q[..., nope:], *tables, True)), -1)
    rows = torch.cat((rms(latent, o["kv_norm"]["weight"]), turned(k_rope[:, None], *tables, True)[:, 0]), -1)
    if step.decodes:
        spread_k, spread_v = o["q_absorb"]["w"].transpose(1, 2), o["v_absorb"]["w"]
    else:
        both = o["kv_b_proj"]["w"].view(a.heads, nope + a.v_dim, lora)
        spread_k, spread_v = both[:, :nope], both[:, nope:]
    out = torch.zeros(step.tokens, a.heads, a.v_dim, dtype=torch.float64)
    for b, (mine, length, seen) in enumerate(_each_sequence(step, step.decodes)):
        cached = rows[mine]
        if step.decodes:
            cached = paged(o["attention"]["kv_cache"], o["attention"]["block_table"][b], length)
            cached[-step.new :] = rows[mine]
        k = torch.einsum("kl,hnl->khn", cached[:, :lora], spread_k)
        k = torch.cat((k, cached[:, None, lora:].expand(-1, a.heads, -1)), -1)
        out[mine] = attended(q[mine], k, torch.einsum("kl,hvl->khv", cached[:, :lora], spread_v), (nope + a.rope_dim) ** -0.5, seen)
    return out


def _feed_forward(o, h, routed):
    def gated(x, up, down):
        gate, value = (x @ up.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * value) @ down.T

    if "gate_up_proj" in o:
        return gated(h, o["gate_up_proj"]["w"], o["down_proj"]["w"])
    up, down, out = o["experts"]["w_gate_up"], o["experts"]["w_down"], torch.zeros_like(h)
    for token, (ids, weights) in enumerate(zip(routed["ids"].tolist(), routed["weights"].tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            out[token] += weight * gated(h[token], up[expert], down[expert])
    if "shared_gate_up_proj" in o:
        out += gated(h, o["shared_gate_up_proj"]["w"], o["shared_down_proj"]["w"])
    return out
