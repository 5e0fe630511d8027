"""Split-KV decoding on a CPU in torch operations: blocks of pages are gathered, multiplied in float32 and merged by online softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.triton_support import cdiv


@dataclass(frozen=True)
class CpuSplitKvConfig(Config):
    """A step takes `splits` blocks of about `block_n` keys (whole pages) and multiplies them as one batch, which the threads share.

    `pack_heads`: the query heads of a group are rows of one matrix product that reads their keys once; otherwise each head has its
    own product. `contiguous`: keys and values are copied per head before they are multiplied; otherwise they are read with strides.
    """

    block_n: int = 512
    splits: int = 1
    pack_heads: bool = True
    contiguous: bool = False


Partial = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Largest logit and sum of weights [.., rows, 1] and the weighted sum of values [.., rows, dim_v], in float32."""


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, cap: float) -> Partial:
    """q [.., rows, head_dim], k [.., n, head_dim], v [.., n, dim_v], hidden [rows, n]; logits and their cap (0: none) in units of log 2."""
    scores = q @ k.transpose(-1, -2)
    if cap:
        scores.div_(cap).tanh_().mul_(cap)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    # A row that sees nothing of this block: -inf - -inf would be NaN.
    weights = scores.sub_(largest.clamp(min=torch.finfo(torch.float32).min)).exp2_()
    return largest, weights.sum(dim=-1, keepdim=True), weights @ v


def _merge(a: Partial, b: Partial) -> Partial:
    """Two partial results as one."""
    largest = torch.maximum(a[0], b[0])
    shift = largest.clamp(min=torch.finfo(torch.float32).min)
    left, right = (a[0] - shift).exp2_(), (b[0] - shift).exp2_()
    return largest, a[1] * left + b[1] * right, a[2] * left + b[2] * right


def _fold(parts: Partial) -> Partial:
    """The leading dimension (splits) merged away."""
    largest = parts[0].amax(dim=0)
    weights = (parts[0] - largest.clamp(min=torch.finfo(torch.float32).min)).exp2_()
    return largest, (parts[1] * weights).sum(dim=0), (parts[2] * weights).sum(dim=0)


class _Sequence:
    """One sequence of the batch: its steps and the arithmetic of one step. All sizes come from the Problem."""

    def __init__(self, problem: DecodeAttention, config: CpuSplitKvConfig, index: int) -> None:
        self.problem, self.config, self.index = problem, config, index
        self.length = problem.kv_lens[index]
        self.group = problem.heads // problem.kv_heads
        span = min(self.length, problem.window + problem.q_len - 1) if problem.window else self.length
        self.first = (self.length - span) // problem.page_size * problem.page_size

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(first key, keys, splits) of each step; what is left at the end is one step without splits."""
        page, block = self.problem.page_size, cdiv(self.config.block_n, self.problem.page_size) * self.problem.page_size
        at = self.first
        while at < self.length:
            left = self.length - at
            splits = min(self.config.splits, left // block)
            keys = splits * block if splits else min(left, block)
            yield at, keys, max(1, splits)
            at += keys
            assert at % page == 0 or at == self.length

    def hidden(self, at: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """[rows, keys], true where a query does not see the key, or None where all see all. Rows are tokens by heads of a group."""
        last = self.length - self.problem.q_len  # of the first query
        before = self.length - self.problem.window if self.problem.window else 0  # from where the last query sees
        if at + keys - 1 <= last and at >= before:
            return None
        position = last + torch.arange(self.problem.q_len, device=device).repeat_interleave(self.group if self.config.pack_heads else 1)
        key = torch.arange(at, at + keys, device=device)
        hidden = key > position[:, None]
        return hidden | (key <= position[:, None] - self.problem.window) if self.problem.window else hidden

    def load(self, cache: torch.Tensor, pages: torch.Tensor, keys: int, splits: int) -> torch.Tensor:
        """[splits, kv_heads or heads, keys of a split, dim] in float32."""
        if self.problem.kv_dtype:  # fp8 cannot be indexed
            found = cache.view(torch.uint8).index_select(0, pages).view(cache.dtype).flatten(0, 1)[:keys].float()
        else:
            found = cache.index_select(0, pages).flatten(0, 1)[:keys].float()
        found = found.view(splits, keys // splits, *found.shape[1:]).transpose(1, 2)
        if self.config.contiguous:
            found = found.contiguous()
        return found if self.config.pack_heads else found.repeat_interleave(self.group, dim=1)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[q_len, heads, dim] as [kv_heads, rows of a group, dim], or where heads are not packed as [heads, q_len, dim]."""
        if not self.config.pack_heads:
            return x.transpose(0, 1)
        return x.reshape(x.shape[0], self.problem.kv_heads, self.group, x.shape[2]).transpose(0, 1).flatten(1, 2)

    def run(self, inputs: Tensors, out: torch.Tensor) -> None:
        """Write this sequence's output [q_len, heads, dim_v]."""
        p = self.problem
        if self.length == 0:
            out.zero_()
            return
        q = inputs["q"][self.index].float() * (p.scale / math.log(2.0))
        if p.kv_dtype:
            q = q * inputs["k_scale"].repeat_interleave(self.group)[:, None]
        q = self.rows(q)
        state: Partial | None = None
        if p.sinks:
            # As if the sink had been a key with a value of zero.
            sinks = self.rows((inputs["sinks"] / math.log(2.0))[None, :, None].expand(p.q_len, -1, 1))
            state = sinks, torch.ones_like(sinks), torch.zeros((*sinks.shape[:-1], p.dim_v), device=q.device)
        for at, keys, splits in self.steps():
            pages = inputs["block_table"][self.index, at // p.page_size : cdiv(at + keys, p.page_size)]
            k, v = (self.load(inputs[name], pages, keys, splits) for name in ("k_cache", "v_cache"))
            hidden = self.hidden(at, keys, q.device)
            if hidden is not None:
                # [splits, 1, rows, keys of a split]
                hidden = hidden.view(hidden.shape[0], splits, 1, keys // splits).permute(1, 2, 0, 3)
            part = _fold(_attend(q, k, v, hidden, p.softcap / math.log(2.0)))
            state = part if state is None else _merge(state, part)
        assert state is not None
        values = state[2] / state[1]
        if self.config.pack_heads:
            values = values.view(p.kv_heads, p.q_len, self.group, p.dim_v).transpose(0, 1).flatten(1, 2)
        else:
            values = values.transpose(0, 1)
        if p.kv_dtype:
            values = values * inputs["v_scale"].repeat_interleave(self.group)[:, None]
        out.copy_(values)


def fits(problem: DecodeAttention, config: CpuSplitKvConfig, chip: Chip) -> str | None:
    """Blocks of at least a page, no longer than the context; no more splits than blocks."""
    if config.block_n < 1 or config.splits < 1:
        return "block_n and splits must be at least 1"
    if config.block_n > max(64, problem.max_kv_len):
        return "block_n is larger than the context"
    block = cdiv(config.block_n, problem.page_size) * problem.page_size
    if config.splits > max(1, problem.max_kv_len // block):
        return "more splits than blocks"
    if not config.pack_heads and problem.heads == problem.kv_heads:
        return "there are no groups of heads to pack"
    return None


def default(problem: DecodeAttention, chip: Chip) -> CpuSplitKvConfig:
    """512 keys of 8 heads of 128 are 2 MiB in float32, which stay in the L2 and L3 caches between gather and product."""
    return CpuSplitKvConfig(block_n=min(512, max(64, problem.max_kv_len)), pack_heads=True)


def space(problem: DecodeAttention, chip: Chip) -> Iterator[CpuSplitKvConfig]:
    """Blocks of 64 to 4096 keys, up to 16 at once, heads packed or not, keys copied or not."""
    for values in product((64, 128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16), (True, False), (False, True)):
        yield CpuSplitKvConfig(*values)


@kernel(DecodeAttention, backend="cpu", config=CpuSplitKvConfig, space=space, default=default, fits=fits, kinds=("cpu",))
def cpu_split_kv(problem: DecodeAttention, config: CpuSplitKvConfig, chip: Chip) -> Launch:
    """CPU flash decoding in torch: gathered blocks of pages, grouped heads packed, float32 online softmax."""
    sequences = [_Sequence(problem, config, i) for i in range(problem.batch)]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        for sequence in sequences:
            sequence.run(inputs, outputs["out"][sequence.index])

    return launch
