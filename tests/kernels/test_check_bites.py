"""The check fails kernels whose mask, border or scale is off, at the context lengths of serving and in bf16, and passes right ones.

One key of thousands moves the output by less than bf16's tolerance, unless the data give the borders a weight: these tests hold the
inputs to that.
"""

from dataclasses import replace

import pytest
import torch

from klab.harness.measure.check import check
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.prefill_attention.problem import PrefillAttention, offsets


def decode(problem, *, first=0, last=0, causal=0, scale=1.0, overrun=0, lost=-1):
    """Right in float32, but for: keys dropped at the ends, a causal mask shifted, a scale off, slots read past the end, one key lost."""

    def launch(inputs, outputs):
        group = problem.heads // problem.kv_heads
        for i, length in enumerate(problem.kv_lens):
            rows = inputs["block_table"][i, : -(-length // problem.page_size)].long()
            k, v = (inputs[n][rows].flatten(0, 1)[: length + overrun].float().repeat_interleave(group, 1) for n in ("k_cache", "v_cache"))
            scores = torch.einsum("qhd,khd->hqk", inputs["q"][i].float(), k) * problem.scale * scale
            position = torch.arange(problem.q_len)[:, None] + length - problem.q_len
            key = torch.arange(k.shape[0])[None, :]
            hidden = (key > position + causal + overrun) | (key < first) | (key >= length - last + overrun) | (key == lost)
            if problem.window:
                hidden |= key <= position - problem.window
            outputs["out"][i] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)

    return launch


DECODE = [
    DecodeAttention((8704,), 4, 2, 128),
    DecodeAttention((8704, 600), 4, 1, 64, q_len=4),
    DecodeAttention((32768,), 2, 1, 64),
    DecodeAttention((9001,), 2, 1, 64, window=4096),
]
WRONG_DECODE = [{"last": 1}, {"scale": 1.02}, {"causal": -1}, {"overrun": 1}]


@pytest.mark.parametrize("problem", DECODE, ids=lambda p: p.label())
def test_a_right_decode_passes_and_a_wrong_one_does_not(problem):
    right = check(problem, decode(problem), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance
    wrong = [*WRONG_DECODE, *([] if problem.window else [{"first": 1}])]
    for fault in wrong:
        if "overrun" in fault and problem.kv_lens[0] % problem.page_size == 0:
            continue
        for seed in (2, 3, 4):
            assert not check(problem, decode(problem, **fault), seed=seed).passed, fault


F8 = {"kv_dtype": "float8_e4m3fn"}
FEATURES = [
    # (problem, what a faulty kernel takes the problem for, what it does with an input)
    (
        DecodeAttention((8704, 3000), 8, 2, 64, sinks=True),
        [{"sinks": False}],
        [("sinks", lambda x: x.roll(1)), ("sinks", lambda x: x * 1.1)],
    ),
    (DecodeAttention((8704,), 8, 2, 64, sinks=True, window=128), [{"sinks": False}, {"window": 127}, {"window": 129}], []),
    (DecodeAttention((8704,), 8, 2, 64, softcap=50.0), [{"softcap": 0.0}, {"softcap": 30.0}], []),
    (
        DecodeAttention((8704, 600), 8, 4, 64, q_len=2, **F8),
        [],
        [(name, change) for name in ("k_scale", "v_scale") for change in (torch.ones_like, lambda x: x.roll(1), lambda x: x * 1.05)],
    ),
]


def altered(problem, believed, changes):
    """The reference of another problem, or of other inputs, as a launch."""

    def launch(inputs, outputs):
        given = inputs | {name: change(inputs[name]) for name, change in changes}
        outputs["out"].copy_(replace(problem, **believed).reference(given)["out"])

    return launch


@pytest.mark.parametrize(("problem", "believed", "changes"), FEATURES, ids=lambda p: p.label() if isinstance(p, DecodeAttention) else "")
def test_a_decode_that_misses_a_feature_fails(problem, believed, changes):
    right = check(problem, altered(problem, {}, []), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance
    for seed in (2, 3):
        for fault in believed:
            assert not check(problem, altered(problem, fault, []), seed=seed).passed, fault
        for name, change in changes:
            assert not check(problem, altered(problem, {}, [(name, change)]), seed=seed).passed, name


@pytest.mark.parametrize("lost", [0, 8191, 8192, 8703])
def test_a_cascade_that_loses_a_key_where_its_passes_meet_fails(lost):
    problem = DecodeAttention((8704, 8704, 8250), 4, 2, 64, shared_prefix=8192)
    assert check(problem, decode(problem), seed=1).passed
    assert not check(problem, decode(problem, lost=lost), seed=2).passed


def prefill(problem, *, causal=0, scale=1.0, window=0, last=0, sink=1.0, sinks_of=0, cap=1.0, scales="kv", scales_of=0, overrun=0):
    """A right prefill in float32, but for: a causal mask or a window that is shifted, a scale or cap that is off, keys dropped at the end,
    sinks weighed wrong or taken from the next head, scales of keys and values swapped or taken from the next head, slots read past the end.
    """

    def launch(inputs, outputs):
        q_at, kv_at = offsets(problem.q_lens), offsets(problem.kv_lens)
        group = problem.heads // problem.kv_heads
        for i, q_len in enumerate(problem.q_lens):
            q = inputs["q"][q_at[i] : q_at[i + 1]].float()
            k, v = keys_of(inputs, i, kv_at, group)
            position = torch.arange(q_len)[:, None] + problem.prefixes[i]
            key = torch.arange(k.shape[0])[None, :]
            hidden = (key > position + causal + overrun) if problem.causal else (key >= problem.kv_lens[i] - last).expand(q_len, -1)
            if problem.window:
                hidden = hidden | (key <= position - problem.window - window)
            scores = torch.einsum("qhd,khd->hqk", q, k) * problem.scale * scale
            if problem.softcap:
                scores = torch.tanh(scores / problem.softcap / cap) * problem.softcap * cap
            scores = scores.masked_fill(hidden, float("-inf"))
            if problem.sinks:
                extra = inputs["sinks"].roll(sinks_of) + torch.tensor(max(sink, 1e-30)).log()
                scores = torch.cat((scores, extra[:, None, None].expand(-1, q_len, 1)), dim=-1)
            weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[0]]
            outputs["out"][q_at[i] : q_at[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v)

    def keys_of(inputs, i, kv_at, group):
        for name, other in zip("kv", scales, strict=True):
            if problem.page_size:
                pages = inputs["block_table"][i, : -(-problem.kv_lens[i] // problem.page_size)].long()
                x = inputs[f"{name}_cache"].float()[pages].flatten(0, 1)[: problem.kv_lens[i] + overrun]
            else:
                x = inputs[name][kv_at[i] : kv_at[i + 1]].float()
            if problem.kv_dtype:
                x = x * inputs[f"{other}_scale"].roll(scales_of)[:, None]
            yield x.repeat_interleave(group, 1)

    return launch


MASKS = [{"causal": -1}, {"causal": 1}, {"scale": 1.03}]
WINDOWS = [*MASKS, {"window": 1}, {"window": -1}]
PREFILL = [
    (PrefillAttention((2048,), 1, 1, 64), MASKS),
    (PrefillAttention((512,), 1, 1, 64, prefix_lens=(8192,)), MASKS),
    (PrefillAttention((4, 100), 1, 1, 64, prefix_lens=(16384, 3000)), MASKS),
    (PrefillAttention((600,), 1, 1, 64, logit_gain=6.0), MASKS),
    (PrefillAttention((500,), 1, 1, 64, window=128), WINDOWS),
    (PrefillAttention((100,), 1, 1, 64, prefix_lens=(7000,), window=4096), WINDOWS),
    (PrefillAttention((300,), 1, 1, 64, causal=False, kv_tokens=(4608,)), [{"last": 1}, {"scale": 1.03}]),
    (PrefillAttention((400,), 2, 1, 64, window=64, sinks=True), [*WINDOWS, {"sink": 0.0}, {"sink": 1.3}, {"sinks_of": 1}]),
    (PrefillAttention((800,), 1, 1, 64, softcap=50.0), [*MASKS, {"cap": 1.5}, {"cap": 100.0}]),
    (PrefillAttention((400,), 2, 2, 64, softcap=30.0, sinks=True), [{"cap": 100.0}, {"sink": 0.0}, {"sinks_of": 1}]),
    (PrefillAttention((200,), 4, 2, 64, kv_dtype="float8_e4m3fn"), [*MASKS, {"scales": "vk"}, {"scales": "kk"}, {"scales_of": 1}]),
    (PrefillAttention((300, 70), 2, 1, 64, prefix_lens=(4000, 35), page_size=16), [*MASKS, {"overrun": 1}]),
    (PrefillAttention((64,), 2, 1, 64, prefix_lens=(16000,), page_size=64), MASKS),
]


@pytest.mark.parametrize(("problem", "faults"), PREFILL, ids=lambda p: p.label() if isinstance(p, PrefillAttention) else "")
def test_a_right_prefill_passes_and_a_wrong_one_does_not(problem, faults):
    right = check(problem, prefill(problem), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance
    for fault in faults:
        for seed in (2, 3):
            assert not check(problem, prefill(problem, **fault), seed=seed).passed, fault
