"""vLLM's fused experts: its Triton kernel with vLLM's own configuration, where it has a tuned one for the chip and shape.

Written for vllm 0.11 to 0.19 (vllm.model_executor.layers.fused_moe: fused_experts, config.fp8_w8a8_moe_quant_config).
"""

from __future__ import annotations

from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.outside import VLLM, PerDevice


def fits(problem: FusedMoe, config: Config, chip: Chip) -> str | None:
    """SwiGLU without a limit, in 16 bits or fp8 with block scales."""
    p = problem
    if not p.gated or p.swiglu_limit:
        return "vLLM's fused experts compute silu(gate) * up"
    if p.dtype == "float32":
        return "vLLM's fused experts take 16-bit activations"
    if p.format and (p.hidden % BLOCK or p.intermediate % BLOCK):
        return f"takes whole blocks of {BLOCK}"
    return None


@kernel(FusedMoe, backend="torch", fits=fits, library=True, requires=VLLM)
def vllm_fused_experts(problem: FusedMoe, config: Config, chip: Chip) -> Launch:
    """vLLM's fused_experts with the configuration that vLLM chooses; its output is copied, and padded rows of x too."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    p = problem

    def mapped(device: torch.device) -> torch.Tensor:
        numbers = torch.arange(p.experts, dtype=torch.int32, device=device)
        return torch.where(numbers < p.local, numbers, -1)

    maps = PerDevice(mapped)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        options: dict[str, Any] = {}
        if p.local < p.experts:
            # Which of the local experts each is; -1 where it is elsewhere.
            options |= {"global_num_experts": p.experts, "expert_map": maps.on(inputs["x"].device)}
        if p.format:
            scales = {"w1_scale": inputs["w_gate_up_scale"], "w2_scale": inputs["w_down_scale"]}
            options["quant_config"] = fp8_w8a8_moe_quant_config(**scales, block_shape=[BLOCK, BLOCK])
        found = fused_experts(
            inputs["x"].contiguous(),
            inputs["w_gate_up"],
            inputs["w_down"],
            inputs["topk_weights"].contiguous(),
            inputs["topk_ids"],
            **options,
        )
        outputs["out"].copy_(found)

    return launch
