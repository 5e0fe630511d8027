"""The gated delta rule in torch operations, float32, as klab wrote it: what a model runs where no fused kernel is installed.

No library: the operations are torch's, but torch has no function for the rule, so that these are no yardstick from outside.

Both forms work on all sequences at once, padded to the longest. A padding token has g = 0 and beta = 0, so that it changes no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.gated_delta_rule.problem import NORM_EPSILON, GatedDeltaRule
from klab.kernels.triton_support import cdiv

# The recurrent form takes eight launches per token; a CUDA graph of more would take seconds to capture.
MAX_RECURRENT_TOKENS = 1024


class _Padding:
    """Packed tokens to [batch, length, ..] and back, with index tensors made at the first call on a device."""

    def __init__(self, problem: GatedDeltaRule, length: int) -> None:
        self.problem, self.length = problem, length
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(packed token of each padded one, 1.0 where it exists [batch, length, 1], padded token of each packed one)."""
        if device not in self._on:
            p, length = self.problem, self.length
            lens = torch.tensor(p.seq_lens)[:, None]
            position = torch.arange(length)[None, :]
            token = (torch.tensor(p.offsets[:-1])[:, None] + torch.minimum(position, lens - 1)).clamp_(0, p.tokens - 1)
            exists = position < lens
            back = (torch.arange(p.batch)[:, None] * length + position)[exists]
            self._on[device] = (token.flatten().to(device), exists[:, :, None].float().to(device), back.to(device))
        return self._on[device]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, ..] in float32, heads before tokens; a padding token repeats its sequence's last."""
        token, _, _ = self.on(packed.device)
        padded = packed.index_select(0, token).view(self.problem.batch, self.length, *packed.shape[1:])
        return padded.transpose(1, 2).float()

    def gates(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """g and beta as [batch, heads, length], zero for padding tokens."""
        _, exists, _ = self.on(inputs["g"].device)
        g, beta = (self.pad(inputs[name]) * exists.transpose(1, 2) for name in ("g", "beta"))
        return g, beta

    def keys(self, packed: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Queries or keys [batch, value heads, length, key_dim], normalised and repeated for the value heads that share them."""
        p = self.problem
        x = self.pad(packed)
        if p.qk_norm:
            x = x * (x.square().sum(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        return (x * scale).repeat_interleave(p.value_heads // p.key_heads, dim=1)

    def unpad(self, out: torch.Tensor, to: torch.Tensor) -> None:
        """Write [batch, heads, length, value_dim] to the packed `to`."""
        _, _, back = self.on(to.device)
        to.copy_(out.transpose(1, 2).flatten(0, 1).index_select(0, back))


def fits_recurrent(problem: GatedDeltaRule, config: Config, chip: Chip) -> str | None:
    """Only short sequences."""
    longest = max(problem.seq_lens)
    return f"one step per token: {longest} of {MAX_RECURRENT_TOKENS} allowed" if longest > MAX_RECURRENT_TOKENS else None


@kernel(GatedDeltaRule, backend="torch", fits=fits_recurrent, kinds=("cuda", "cpu"))
def torch_recurrent(problem: GatedDeltaRule, config: Config, chip: Chip) -> Launch:
    """klab's own, in torch operations token by token (the definition, in float32): for decoding; slow for anything longer."""
    padding = _Padding(problem, max(problem.seq_lens))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k = padding.keys(inputs["q"], problem.scale), padding.keys(inputs["k"])
        v = padding.pad(inputs["v"])
        g, beta = padding.gates(inputs)
        decay, state, out = g.exp(), inputs["initial_state"].float(), torch.empty_like(v)
        for t in range(padding.length):
            state = state * decay[:, :, t, None, None]
            remembered = (k[:, :, t, None, :] @ state).squeeze(-2)
            correction = (v[:, :, t] - remembered) * beta[:, :, t, None]
            state = state + k[:, :, t, :, None] * correction[:, :, None, :]
            out[:, :, t] = (q[:, :, t, None, :] @ state).squeeze(-2)
        padding.unpad(out, outputs["out"])
        outputs["final_state"].copy_(state)

    return launch


@dataclass(frozen=True)
class ChunkConfig(Config):
    """Tokens that are worked on at once."""

    chunk: int = 64


def fits_chunked(problem: GatedDeltaRule, config: ChunkConfig, chip: Chip) -> str | None:
    """A chunk is no longer than it must be, and the padded copies fit the memory."""
    longest = max(problem.seq_lens)
    if problem.is_decode:
        return "one token is no chunk"
    if config.chunk < 2 or config.chunk >= 2 * max(16, longest):
        return "a chunk has 2 tokens or more, and at most about as many as the longest sequence"
    padded = problem.batch * cdiv(longest, config.chunk) * config.chunk * problem.value_heads
    needed = 4 * padded * (8 * (problem.key_dim + problem.value_dim) + 6 * config.chunk)
    return f"the padded copies take {needed / 1e9:.0f} GB" if needed > chip.memory_bytes // 2 else None


def default_chunked(problem: GatedDeltaRule, chip: Chip) -> ChunkConfig:
    """64, as flash-linear-attention has it; fewer for shorter sequences."""
    return ChunkConfig(next((chunk for chunk in (16, 32) if max(problem.seq_lens) <= chunk), 64))


def space_chunked(problem: GatedDeltaRule, chip: Chip) -> Iterator[ChunkConfig]:
    """Powers of two: short ones do less work in all, long ones have fewer steps one behind the other."""
    yield from (ChunkConfig(chunk) for chunk in (16, 32, 64, 128, 256))


@kernel(
    GatedDeltaRule, backend="torch", config=ChunkConfig, fits=fits_chunked, default=default_chunked, space=space_chunked,
    kinds=("cuda", "cpu"),
)  # fmt: skip
def torch_chunked(problem: GatedDeltaRule, config: ChunkConfig, chip: Chip) -> Launch:
    """klab's own, in torch: float32 matrix products on all chunks at once (WY form), then one step per chunk for the state."""
    p, size = problem, config.chunk
    count = cdiv(max(p.seq_lens), size)
    padding = _Padding(p, count * size)
    # TF32 is a process-wide switch; the products here are float32, as the definition is.
    torch.set_float32_matmul_precision("highest")

    def in_chunks(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], count, size, *x.shape[3:])

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k = (in_chunks(padding.keys(inputs[name], scale)) for name, scale in (("q", p.scale), ("k", 1.0)))
        v = in_chunks(padding.pad(inputs["v"]))
        g, beta = (in_chunks(x) for x in padding.gates(inputs))
        # Log decay from the chunk's beginning to each token, its own included. In float64: one g of -100 would cost all later differences
        # their last bits.
        exact = g.double().cumsum(-1)
        total, left = exact.float(), (exact[..., -1:] - exact).float()
        earlier = torch.ones((size, size), dtype=torch.bool, device=g.device).tril_()
        # Differences first: exp(-total) alone would overflow. Where j is later than i they are positive, and hidden.
        between = (exact[..., :, None] - exact[..., None, :]).float().masked_fill_(~earlier, float("-inf")).exp_()
        # (I + A) correction = beta (v - exp(total) k S) for the state S at the chunk's beginning, A strictly lower triangular.
        a = (k @ k.mT) * between * beta[..., None]
        right = torch.cat([v * beta[..., None], k * (beta * total.exp())[..., None]], -1)
        solved = torch.linalg.solve_triangular(a, right, upper=False, unitriangular=True)  # reads A below its diagonal only
        values, keys = solved.split([p.value_dim, p.key_dim], -1)
        weights = (q @ k.mT) * between
        q_decayed = q * total.exp()[..., None]
        k_decayed = k * left.exp()[..., None]
        chunk_decay = total[..., -1].exp()

        state, out = inputs["initial_state"].float(), torch.empty_like(v)
        for c in range(count):
            correction = values[:, :, c] - keys[:, :, c] @ state
            out[:, :, c] = q_decayed[:, :, c] @ state + weights[:, :, c] @ correction
            state = state * chunk_decay[:, :, c, None, None] + k_decayed[:, :, c].mT @ correction
        padding.unpad(out.flatten(2, 3), outputs["out"])
        outputs["final_state"].copy_(state)

    return launch
