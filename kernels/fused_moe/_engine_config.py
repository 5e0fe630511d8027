"""What vLLM and SGLang tune of their Triton fused MoE, under the names of their files, and what they run without a file."""

from __future__ import annotations

from dataclasses import dataclass

from klab.kernels.contract import Config
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe


@dataclass(frozen=True)
class EngineConfig(Config):
    """One entry of a tuned table, for both matrix products of a layer.

    A CTA computes BLOCK_SIZE_M rows of one expert by BLOCK_SIZE_N columns, BLOCK_SIZE_K at a time (at most 128 with fp8 blocks, whatever is
    asked); GROUP_SIZE_M blocks of rows are walked column by column. SPLIT_K is a field of the engines' files that their 16-bit and fp8
    kernels run as 1 in any case.
    """

    BLOCK_SIZE_M: int = 64
    BLOCK_SIZE_N: int = 64
    BLOCK_SIZE_K: int = 32
    GROUP_SIZE_M: int = 8
    num_warps: int = 4
    num_stages: int = 3
    SPLIT_K: int = 1


def vllm_default(problem: FusedMoe) -> EngineConfig:
    """What vLLM runs where no tuned file matches: `get_default_config` in model_executor/layers/fused_moe/fused_moe.py, 2026."""
    m = problem.tokens
    if problem.format:
        return EngineConfig(16 if m <= 64 else 64, BLOCK, BLOCK, 1 if m <= 16 else 32, 4, 3)
    return EngineConfig(
        BLOCK_SIZE_M=16 if m <= 32 else 32 if m <= 96 else 64 if m <= 512 else 128,
        BLOCK_SIZE_N=64 if m <= 64 else 128,
        BLOCK_SIZE_K=128 if m <= 64 else 64,
        GROUP_SIZE_M=16 if m // problem.local > 128 else 1,
        num_warps=4 if m <= 128 else 8,
        num_stages=4 if m <= 32 else 3,
    )


def sglang_default(problem: FusedMoe) -> EngineConfig:
    """What SGLang runs where no tuned file matches, and vLLM until 2025: `get_default_config` in srt/layers/moe/fused_moe_triton.

    Its 16-bit defaults name no warps and stages: Triton's own are 4 and 3.
    """
    if problem.format:
        return EngineConfig(64, BLOCK, BLOCK, 32, 4, 3)
    return EngineConfig(16, 32, 64, 1, 4, 3) if problem.tokens <= problem.local else EngineConfig(64, 64, 32, 8, 4, 3)
