"""The short causal convolution in CUDA C++: a thread walks along the tokens of 16 bytes of channels, its inputs in registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.causal_conv1d._tiles import Tiles, count_tiles
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError
from klab.kernels.triton_support import next_power_of_2

SOURCE = r"""
#include "device.cuh"
using namespace klab;

constexpr int CHUNK = 16 / sizeof(ELEMENT);  // channels of a thread
constexpr int BEFORE = WIDTH - 1;            // inputs before a token that it depends on
constexpr float LOG2_E = 1.4426950408889634f;

template <class T>
KLAB_DEVICE void unpack(float (&to)[CHUNK], const Vec16& v) {
    if constexpr (sizeof(T) == 2) {
        KLAB_UNROLL
        for (int i = 0; i < CHUNK / 2; ++i) {
            Pair pair = unpack2<T>(v.word[i]);
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        }
    } else {
        KLAB_UNROLL
        for (int i = 0; i < CHUNK; ++i) to[i] = bits_float(v.word[i]);
    }
}

template <class T>
KLAB_DEVICE Vec16 pack(const float (&from)[CHUNK]) {
    Vec16 v;
    if constexpr (sizeof(T) == 2) {
        KLAB_UNROLL
        for (int i = 0; i < CHUNK / 2; ++i) v.word[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
    } else {
        KLAB_UNROLL
        for (int i = 0; i < CHUNK; ++i) v.word[i] = float_bits(from[i]);
    }
    return v;
}

KLAB_KERNEL(causal_conv, THREADS)(
    const ELEMENT* x, const ELEMENT* weight, const ELEMENT* conv_state, const int* runs, ELEMENT* out, ELEMENT* final_state, int channels,
    int64_t x_token, int64_t weight_row, int64_t state_sequence, int64_t state_row, int dense_weight, int silu) {
    int channel = (block_idx_y() * THREADS + thread_idx()) * CHUNK;
    if (channel >= channels) return;
    const int* run = runs + 4 * block_idx_x();
    int sequence = run[0], first = run[1], place = run[2], length = run[3];
    int count = min_of(TOKENS, length - place);
    x += static_cast<int64_t>(first) * x_token + channel;
    conv_state += sequence * state_sequence + channel;
    // The input at `at` tokens from the run's first; what is before the sequence stands at the end of the state.
    auto input = [&](int at) {
        return load_16(place + at < 0 ? conv_state + (BEFORE + place + at) * state_row : x + static_cast<int64_t>(at) * x_token);
    };

    // All loads are under way before the first is used.
    Vec16 seen[BEFORE + TOKENS];
    KLAB_UNROLL
    for (int i = 0; i < BEFORE + TOKENS; ++i) seen[i] = i < BEFORE + count ? input(i - BEFORE) : Vec16{};
    float factor[WIDTH][CHUNK];
    if (dense_weight) {
        KLAB_UNROLL
        for (int part = 0; part < WIDTH; ++part) {
            float values[CHUNK];
            unpack<ELEMENT>(values, load_16(weight + channel * WIDTH + part * CHUNK));
            KLAB_UNROLL
            for (int i = 0; i < CHUNK; ++i) factor[(part * CHUNK + i) % WIDTH][(part * CHUNK + i) / WIDTH] = values[i];
        }
    } else {
        KLAB_UNROLL
        for (int j = 0; j < WIDTH; ++j)
            KLAB_UNROLL
            for (int i = 0; i < CHUNK; ++i) factor[j][i] = to_float(weight[(channel + i) * weight_row + j]);
    }

    float window[WIDTH][CHUNK];
    KLAB_UNROLL
    for (int j = 0; j < BEFORE; ++j) unpack<ELEMENT>(window[j], seen[j]);
    out += static_cast<int64_t>(first) * channels + channel;
    KLAB_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        unpack<ELEMENT>(window[(t + BEFORE) % WIDTH], seen[t + BEFORE]);
        float total[CHUNK];
        KLAB_UNROLL
        for (int i = 0; i < CHUNK; ++i) {
            total[i] = window[t % WIDTH][i] * factor[0][i];
            KLAB_UNROLL
            for (int j = 1; j < WIDTH; ++j) total[i] = fused_multiply_add(window[(t + j) % WIDTH][i], factor[j][i], total[i]);
            if (silu) total[i] /= 1.0f + exp2f_fast(-LOG2_E * total[i]);
        }
        if (t < count) store_16(out + static_cast<int64_t>(t) * channels, pack<ELEMENT>(total));
    }
    if (place + TOKENS >= length) {
        final_state += static_cast<int64_t>(sequence) * BEFORE * channels + channel;
        KLAB_UNROLL
        for (int j = 0; j < BEFORE; ++j) store_16(final_state + static_cast<int64_t>(j) * channels, input(count - BEFORE + j));
    }
}
"""


@dataclass(frozen=True)
class RunConfig(Config):
    """Tokens that a thread computes one after the other, and threads of a block, side by side along the channels."""

    tokens: int = 8
    threads: int = 128


def fits(problem: CausalConv1d, config: RunConfig, chip: Chip) -> str | None:
    """Rows of whole 16-byte chunks, and inputs and weights that fit a thread's registers."""
    chunk = 16 // SIZE_BYTES[problem.dtype]
    if chip.target < 80:
        return "needs compute capability 8.0"
    if problem.channels % chunk:
        return f"the channels are not a multiple of {chunk}, 16 bytes"
    if not 1 <= config.tokens <= 32 or config.threads % 32 or not 32 <= config.threads <= 1024:
        return "tokens are 1 to 32, threads a multiple of 32 up to 1024"
    # The inputs as they were read, the weights and the window in float32, 30 for addresses.
    registers = 4 * (config.tokens + problem.width - 1) + 2 * problem.width * chunk + 30
    if registers > min(255, 65536 // config.threads):
        return f"about {registers} registers, {min(255, 65536 // config.threads)} allowed"
    if config.tokens > 1 and config.tokens >= 2 * max(problem.seq_lens):
        return "more than twice as many tokens as the longest sequence"
    return None


def default(problem: CausalConv1d, chip: Chip) -> RunConfig:
    """Eight tokens for one read of the weights and of the inputs before them; smaller blocks where there are few, to use the whole chip."""
    tokens, threads = min(8, next_power_of_2(max(problem.seq_lens))), 128
    chunks = count_tiles(problem, tokens) * problem.channels * SIZE_BYTES[problem.dtype] // 16
    while threads > 32 and chunks < 4 * threads * chip.sm_count:
        threads //= 2
    return RunConfig(tokens, threads)


def space(problem: CausalConv1d, chip: Chip) -> Iterator[RunConfig]:
    """1 to 16 tokens, 32 to 256 threads."""
    for tokens, threads in product((8, 4, 2, 1, 12, 16), (32, 64, 128, 256)):
        yield RunConfig(tokens, threads)


def _rows(name: str, tensor: torch.Tensor) -> list[Int64]:
    """Elements from one index to the next, for all dimensions but the last; UsageError unless rows are dense and start at 16 bytes."""
    *outer, dense = tensor.stride()
    if dense != 1 or any(stride * tensor.element_size() % 16 for stride in outer) or tensor.data_ptr() % 16:
        raise UsageError(f"cuda_conv loads 16 bytes at a time: make rows of {name} dense and 16-byte aligned (strides {tensor.stride()})")
    return [Int64(stride) for stride in outer]


@kernel(CausalConv1d, backend="cuda", config=RunConfig, fits=fits, default=default, space=space)
def cuda_conv(problem: CausalConv1d, config: RunConfig, chip: Chip) -> Launch:
    """CUDA C++: each thread slides over tokens of 16 bytes of channels, so that an input is loaded about once."""
    p, c = problem, config
    tiles = Tiles(p, c.tokens)
    conv = CudaKernel(
        SOURCE, "causal_conv", chip, {"ELEMENT": ELEMENT[p.dtype], "WIDTH": p.width, "TOKENS": c.tokens, "THREADS": c.threads}
    )
    per_block = c.threads * 16 // SIZE_BYTES[p.dtype]
    grid = (len(tiles), -(-p.channels // per_block), 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, weight, state = inputs["x"], inputs["weight"], inputs["conv_state"]
        strides = [*_rows("x", x), Int64(weight.stride(0)), *_rows("conv_state", state)]
        tensors = [x, weight, state, tiles.on(x.device), outputs["out"], outputs["final_state"]]
        dense_weight = weight.is_contiguous() and weight.data_ptr() % 16 == 0
        conv.launch(grid, c.threads, [*tensors, p.channels, *strides, int(dense_weight), int(p.activation == "silu")])

    return launch
