"""The short causal convolution in torch: its depthwise convolution, and the same as a sum of shifted products."""

from __future__ import annotations

import torch
from torch.nn.functional import conv1d, silu

from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel

Pieces = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _pieces(problem: CausalConv1d, inputs: Tensors, outputs: Tensors) -> Pieces:
    """(inputs with the state in front [n, width - 1 + length, channels], their outputs, their final states): one piece for all
    sequences where they are equally long, else one for each; a sequence of no tokens has its state copied here.
    """
    x, state, out, final = inputs["x"], inputs["conv_state"], outputs["out"], outputs["final_state"]
    if len(set(problem.seq_lens)) == 1:
        shape = (problem.batch, problem.seq_lens[0], problem.channels)
        return [(torch.cat([state, x.view(shape)], 1), out.view(shape), final)]
    found: Pieces = []
    for i, (first, length) in enumerate(zip(problem.offsets, problem.seq_lens, strict=False)):
        if length == 0:
            final[i].copy_(state[i])
            continue
        tokens = slice(first, first + length)
        found.append((torch.cat([state[i], x[tokens]])[None], out[tokens][None], final[i : i + 1]))
    return found


@kernel(CausalConv1d, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_conv1d(problem: CausalConv1d, config: Config, chip: Chip) -> Launch:
    """torch conv1d with a group per channel (cuDNN, oneDNN), state put in front by a copy; one call per sequence unless all are alike."""
    activate = silu if problem.activation else None

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        weight = inputs["weight"][:, None, :]
        for seen, out, final in _pieces(problem, inputs, outputs):
            summed = conv1d(seen.transpose(1, 2), weight, groups=problem.channels).transpose(1, 2)
            out.copy_(activate(summed) if activate else summed)
            final.copy_(seen[:, out.shape[1] :])

    return launch


@kernel(CausalConv1d, backend="torch", kinds=("cuda", "cpu"))
def torch_shifted(problem: CausalConv1d, config: Config, chip: Chip) -> Launch:
    """Torch: the inputs shifted by 0 to width - 1 tokens, times a weight per channel, added up in float32."""
    activate = silu if problem.activation else None

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        weight = inputs["weight"].float().t().contiguous()
        for seen, out, final in _pieces(problem, inputs, outputs):
            length, wide = out.shape[1], seen.float()
            summed = wide[:, :length] * weight[0]
            for j in range(1, problem.width):
                summed.addcmul_(wide[:, j : j + length], weight[j])
            out.copy_(activate(summed) if activate else summed)
            final.copy_(seen[:, length:])

    return launch
