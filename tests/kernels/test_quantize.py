"""Narrow formats against their definitions, computed here by search over all values."""

import itertools
import math

import pytest
import torch

from klab.kernels import quantize as q


def test_fp4_rounds_to_nearest_even_code():
    values = torch.tensor([0.0, 0.24, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 9.0, -0.25, -0.3, -5.0])
    want = [0, 0, 0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0, -0.5, -4.0]
    assert q.fp4_values(q.encode_fp4(values)).tolist() == want


def test_fp4_is_the_nearest_of_all_values():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3
    got = q.fp4_values(q.encode_fp4(x))
    grid = torch.tensor([*q.FP4_VALUES, *(-v for v in q.FP4_VALUES)])
    nearest = (x[:, None].clamp(-6, 6) - grid).abs().amin(dim=1)
    torch.testing.assert_close((x.clamp(-6, 6) - got).abs(), nearest)


def test_fp4_codes_have_the_specifications_values_and_signs(monkeypatch):
    codes = torch.arange(16, dtype=torch.uint8)
    monkeypatch.delattr(torch, "tensor")  # a table from the host may not be copied while a CUDA graph is captured
    values = q.fp4_values(codes)
    assert values.dtype == torch.float32 and values.tolist() == [*q.FP4_VALUES, *(-v for v in q.FP4_VALUES)]
    assert bool(values[8].signbit()) and q.fp4_values(torch.empty(3, dtype=torch.uint8, device="meta")).shape == (3,)


def test_packing_puts_the_even_index_low():
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    assert q.pack4(codes)[0, 0].item() == 0x10
    assert torch.equal(q.unpack4(q.pack4(codes)), codes)
    signed = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    assert torch.equal(q.int4_values(q.pack4(signed)), signed)


@pytest.mark.parametrize("block", [(0, 0), (1, 0), (1, 128), (128, 128), (1, 32)])
@pytest.mark.parametrize("shape", [(3, 100), (130, 257), (2, 5, 128)])
def test_fp8_fills_its_range_and_comes_back(block, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    codes, scale = q.quantize_fp8(x, block)
    rows, columns = shape[-2:]
    assert scale.shape[-2:] == (-(-rows // (block[0] or rows)), -(-columns // (block[1] or columns)))
    assert codes.float().abs().max() == q.FP8_MAX
    back = q.dequantize(codes, scale, block)
    # Half a step of 3 mantissa bits, and half the least denormal where numbers are small.
    spread = q._spread(scale, block, rows, columns)
    assert bool(((back - x).abs() <= x.abs() / 16 * 1.0001 + spread * 2**-10).all())


def test_int4_and_int8_are_half_a_step_off_at_most():
    x = torch.randn((5, 256), generator=torch.Generator().manual_seed(2))
    packed, scale = q.quantize_int4(x, 128)
    assert packed.shape == (5, 128) and scale.shape == (5, 2)
    back = q.dequantize(q.int4_values(packed), scale, (1, 128))
    assert bool(((back - x).abs() <= q._spread(scale, (1, 128), 5, 256) * 0.5001).all())
    codes, scale = q.quantize_int8(x, (1, 0))
    assert bool(((q.dequantize(codes, scale, (1, 0)) - x).abs() <= scale * 0.5001).all())


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_mx_scales_are_the_specifications(element):
    x = torch.randn((4, 96), generator=torch.Generator().manual_seed(3)) * 5
    codes, biased = q.quantize_mx(x, element)
    for row, block in itertools.product(range(4), range(3)):
        amax = x[row, block * 32 : block * 32 + 32].abs().max().item()
        shared = math.floor(math.log2(amax)) - {"e4m3": 8, "e2m1": 2}[element]
        assert biased[row, block].item() - 127 == shared
    values = codes.float() if element == "e4m3" else q.fp4_values(q.unpack4(codes))
    back = values * q.mx_scales(biased).repeat_interleave(32, dim=-1)
    # Numbers between the largest element and the next power of two saturate.
    assert torch.linalg.vector_norm(back - x) / torch.linalg.vector_norm(x) < {"e4m3": 0.04, "e2m1": 0.2}[element]


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_mx_scales_change_at_powers_of_two_and_not_before(element):
    powers = torch.tensor([2.0**e for e in range(-100, 120)])
    for amax, below in ((powers, 0), (powers.nextafter(torch.tensor(0.0)), 1), (powers.nextafter(torch.tensor(torch.inf)), 0)):
        x = torch.zeros((len(powers), q.MX_BLOCK))
        x[:, 5] = -amax
        biased = q.quantize_mx(x, element)[1][:, 0]
        assert biased.tolist() == [max(0, e - below - q.EMAX[element] + 127) for e in range(-100, 120)]


def test_nvfp4_loses_less_than_mxfp4():
    x = q.activations((64, 512), "float32", seed=4, device="cpu")
    packed, scale, whole = q.quantize_nvfp4(x)
    back = q.fp4_values(q.unpack4(packed)) * scale.float().repeat_interleave(16, dim=-1) * whole
    mx_codes, biased = q.quantize_mx(x, "e2m1")
    mx = q.fp4_values(q.unpack4(mx_codes)) * q.mx_scales(biased).repeat_interleave(32, dim=-1)
    lost, mx_lost = (torch.linalg.vector_norm(b - x) / torch.linalg.vector_norm(x) for b in (back, mx))
    assert lost < mx_lost < 0.2


def test_outliers_are_the_same_channels_in_every_row():
    x = q.activations((200, 512), "float32", seed=5, device="cpu")
    rms = x.square().mean(dim=0).sqrt()
    loud = rms > 8
    assert loud.sum() == 4 and rms[~loud].max() < 1.5
