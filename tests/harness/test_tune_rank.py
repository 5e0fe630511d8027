"""The analytic rank is modelled, and nothing here says that it is right: these are the properties that any such model must have."""

import dataclasses
import itertools
import math

import pytest
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.tune.rank import expected_us
from klab.kernels.contract import Config, NoConfig, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention


@dataclasses.dataclass(frozen=True)
class Tile(Config):
    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    split_k: int = 1
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 4


@dataclasses.dataclass(frozen=True)
class Streams(Config):
    block_m: int = 128
    block_n: int = 64
    num_splits: int = 0
    num_warps: int = 4
    num_stages: int = 3
    pack_gqa: bool = False
    warp_specialize: bool = False


def of(problem_type, config, **options):
    @kernel(problem_type, backend=options.pop("backend", "triton"), config=config, **options)
    def it(problem, config, chip):
        """Never built."""
        raise AssertionError

    return it


MATMUL, PREFILL, DECODE = of(Matmul, Tile), of(PrefillAttention, Streams), of(DecodeAttention, Streams)


def row(grid, unit="wgmma", *, registers=128, smem=128 << 10, threads=256, stack=0, tmem=0):
    return {"matrix_unit": unit, "registers": registers, "smem_bytes": smem, "threads": threads, "stack_bytes": stack, "tmem_columns": tmem,
            "grid": grid}  # fmt: skip


def matmul(m, n, k, chip=HOPPER, functions=(), **config):
    return expected_us(Matmul(m, n, k), MATMUL, Tile(**config), chip, functions)


def test_never_below_the_roofline_nor_absurdly_above_it():
    for chip in (HOPPER, BLACKWELL):
        for m in (1, 16, 100, 2048, 8192):
            problem = Matmul(m, 8192, 8192)
            bound = 1e6 * max(problem.flops() / chip.peak_flops("bfloat16"), problem.bytes_moved() / (chip.memory_gb_per_s * 1e9))
            best = min(matmul(m, 8192, 8192, chip, block_m=bm, block_n=bn) for bm in (16, 64, 128, 256) for bn in (64, 128, 256))
            assert bound < best < 3 * bound


def test_more_bytes_and_more_work_never_take_less():
    times = [matmul(16, 4096, k, block_m=16, block_n=64) for k in (512, 1024, 4096, 8192, 16384, 65536)]
    assert times == sorted(times) and times[-1] > 8 * times[2]
    # Where a wave fills up, what its tiles share of one matrix may outweigh the rest of the next by a little.
    times = [matmul(m, 4096, 4096) for m in range(64, 4096, 64)]
    assert all(more > 0.99 * less for less, more in itertools.pairwise(times)) and times[-1] > 10 * times[0]
    contexts = [(512,), (4096,), (4096,) * 8, (32768,) * 8]
    times = [expected_us(DecodeAttention(lens, 32, 8, 128), DECODE, Streams(), HOPPER) for lens in contexts]
    assert times == sorted(times) and times[0] < times[-1] / 40


def test_whole_waves():
    """132 SMs do 132 tiles in the time of one, and 133 in that of two."""
    one, most, over, two, third = (
        matmul(128 * high, 256 * wide, 8192, block_n=256, functions=[row([high * wide])])
        for high, wide in ((6, 11), (11, 12), (7, 19), (12, 22), (15, 18))
    )
    assert one <= most < 1.3 * one and over > 1.6 * most and over <= two < 1.3 * over and third > 1.3 * two


def test_splitting_k_fills_the_chip():
    def skinny(splits):
        return matmul(16, 1024, 16384, block_m=16, block_n=64, split_k=splits)

    assert skinny(8) < 0.5 * skinny(1) and skinny(4) < skinny(2) < skinny(1)
    # 16 tiles x 512: merging costs more than it brings; and where the chip is full anyway, splitting costs.
    assert matmul(256, 1024, 16384, split_k=128) > matmul(256, 1024, 16384, split_k=8)
    assert matmul(8192, 8192, 8192, split_k=4) > matmul(8192, 8192, 8192)


def test_splitting_keys_fills_the_chip():
    problem = DecodeAttention((32768,), 32, 8, 128)

    def split(n):
        return expected_us(problem, DECODE, Streams(num_splits=n), HOPPER)

    assert split(16) < 0.3 * split(1) and split(0) < 1.3 * min(split(n) for n in (1, 2, 4, 8, 16, 32, 64))


def test_what_the_binary_shows_counts():
    def shown(**changes):
        return matmul(8192, 8192, 8192, block_n=256, functions=[row([2048], **changes)])

    best = shown()
    assert shown(unit="mma.sync") > 1.4 * best
    assert shown(unit="none") > 5 * best
    assert shown(stack=792) > 1.4 * best > shown(stack=8)
    tcgen05, legacy = (matmul(8192, 8192, 8192, BLACKWELL, [row([2048], unit)], block_n=256) for unit in ("tcgen05", "mma.sync"))
    assert tcgen05 < best and legacy > 1.5 * tcgen05
    # Two blocks of an SM hide each other's latency where one cannot.
    alone, two = (matmul(4096, 4096, 512, functions=[row([1024], smem=kib << 10)]) for kib in (200, 60))
    assert alone > two


def test_padding_is_work():
    assert matmul(129, 16384, 8192, block_m=128) > 1.2 * matmul(128, 16384, 8192, block_m=128)
    # Tiles of 64 rows use half of Blackwell's unit, and small ones read too much from L2.
    assert matmul(8192, 8192, 8192, BLACKWELL, block_m=64) > 1.3 * matmul(8192, 8192, 8192, BLACKWELL)
    assert matmul(8192, 8192, 8192, block_m=32, block_n=32) > 3 * matmul(8192, 8192, 8192)


def test_a_deeper_pipeline_hides_latency_until_memory_is_the_limit():
    times = [matmul(16, 8192, 8192, block_m=16, block_n=64, num_stages=stages) for stages in (1, 2, 3, 4, 6)]
    assert times == sorted(times, reverse=True) and times[0] > 2 * times[3]


def test_attention_counts_the_mask_the_softmax_and_their_overlap():
    causal = PrefillAttention((8192,), 32, 8, 128)

    def prefill(problem, chip=HOPPER, **config):
        return expected_us(problem, PREFILL, Streams(**config), chip)

    whole, windowed = dataclasses.replace(causal, causal=False), dataclasses.replace(causal, window=1024)
    assert 1.7 < prefill(whole) / prefill(causal) < 2.1 and prefill(windowed) < 0.4 * prefill(causal)
    assert prefill(causal, num_warps=8, warp_specialize=True) <= prefill(causal, num_warps=8)
    # Few new tokens behind a long prefix fill a tile only when the heads of a group share it.
    chunk = PrefillAttention((16,) * 32, 32, 8, 128, prefix_lens=(8192,) * 32)
    assert prefill(chunk, pack_gqa=True) < prefill(chunk)


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda c: c.name)
def test_every_kernel_gets_a_time_or_none(chip):
    problems = [
        Matmul(16, 4096, 4096),
        Matmul(2048, 4096, 4096),
        DecodeAttention((4096, 100), 32, 8, 128),
        PrefillAttention((700, 3), 32, 8, 128),
    ]
    said = set()
    for it in discover().kernels.values():
        for problem in problems:
            if it.unfit(problem, chip) is not None:
                continue
            configs = [it.default(problem, chip), *list(it.space(problem, chip))[1:2000:97]]
            times = [expected_us(problem, it, config, chip) for config in configs]
            assert all(t is None for t in times) or all(t is not None and 2 < t < 1e5 and math.isfinite(t) for t in times), it.id
            if times[0] is not None:
                said.add(it.name)
            if it.library or it.backend == "cpu":
                assert times[0] is None
            else:
                assert expected_us(problem, it, configs[0], chip, [row([64], "mma.sync")]) is not None
    assert {"cuda_mma", "triton_tiled", "triton_persistent", "triton_flash", "cuda_flash", "triton_split_kv", "cuda_split_kv"} <= said


def test_says_nothing_of_libraries_cpus_and_unknown_fields():
    problem = Matmul(64, 64, 64)
    assert expected_us(problem, of(Matmul, NoConfig, backend="torch", library=True), NoConfig(), HOPPER) is None
    assert expected_us(problem, MATMUL, Tile(), CPU) is None
    unknown = of(Matmul, NoConfig, backend="cuda")
    assert expected_us(problem, unknown, NoConfig(), HOPPER) is None
    assert expected_us(problem, unknown, NoConfig(), HOPPER, [row([8])]) > 2
