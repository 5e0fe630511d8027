"""The planned shapes against numbers worked out by hand from the models' papers and cards."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.catalog import find_chip, find_model, load_chips, load_models
from klab.harness.catalog.huggingface import parse_config
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.attention import _chunks
from klab.harness.plan.memory import cache_bytes, kv_bytes_per_token
from klab.harness.plan.quantization import format_of, formats
from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.errors import UsageError
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.gated_delta_rule.problem import GatedDeltaRule
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.rope_cache.problem import RopeCache
from klab.kernels.topk_routing.problem import TopkRouting

H200 = find_chip("h200")


def planned(name, **given):
    model = find_model(name)
    return plan(model, H200, scenario_for(model, H200, **given))


def by_role(made, phase, batch=1):
    return {row.role: row for row in made.step(phase, batch)}


def weights_per_token(made, phase="prefill"):
    """Weights that a token is multiplied with, as the rows of a step of batch 1 say."""
    total = 0
    for row in made.step(phase, 1):
        shape = row.shape
        if row.operator == "matmul":
            total += row.count * shape["n"] * shape["k"]
        elif row.operator == "fused_moe":
            total += row.count * shape["top_k"] * 3 * shape["intermediate"] * shape["hidden"]
    return total


def test_llama_8b_prefill_and_decode():
    made = planned("llama-3.1-8b", batches=(8,))
    prefill, decode = by_role(made, "prefill"), by_role(made, "decode", 8)
    for rows, m in ((prefill, 8192), (decode, 8)):
        assert rows["qkv_proj"].problem == Matmul(m, 4096 + 2 * 1024, 4096)
        assert rows["o_proj"].problem == Matmul(m, 4096, 4096)
        assert rows["gate_up_proj"].problem == Matmul(m, 2 * 14336, 4096)
        assert rows["down_proj"].problem == Matmul(m, 4096, 14336)
        assert (rows["qkv_proj"].count, rows["qkv_proj"].layers) == (32, 32)
    # Only the last token of a sequence goes through the head; 128256 is a multiple of 64 already.
    assert prefill["lm_head"].problem == Matmul(1, 128256, 4096)
    assert decode["lm_head"].problem == Matmul(8, 128256, 4096)
    assert prefill["attention"].problem == PrefillAttention((8192,), 32, 8, 128)
    kv_lens = decode["attention"].problem.kv_lens
    assert kv_lens == (8192 + 512,) * 8 and decode["attention"].problem.page_size == 16


def test_weights_from_the_plan_are_the_published_ones():
    # The embedding table is looked up, not multiplied, so it is added by hand.
    assert weights_per_token(planned("llama-3.1-8b")) + 128256 * 4096 == pytest.approx(8.03e9, rel=1e-3)
    assert weights_per_token(planned("llama-3.1-70b")) + 128256 * 8192 == pytest.approx(70.55e9, rel=1e-3)
    assert weights_per_token(planned("deepseek-v3")) + 129280 * 7168 == pytest.approx(37.5e9, rel=5e-3)
    assert weights_per_token(planned("qwen3-30b-a3b")) + 151936 * 2048 == pytest.approx(3.35e9, rel=5e-3)
    assert weights_per_token(planned("gpt-oss-120b")) == pytest.approx(5.13e9, rel=5e-3)
    assert weights_per_token(planned("mixtral-8x7b")) + 32000 * 4096 == pytest.approx(12.88e9, rel=5e-3)
    assert weights_per_token(planned("flux.1-dev"), "denoise") == pytest.approx(11.9e9, rel=5e-3)


def test_whole_step_flops_of_llama_8b():
    # 2 flops per weight and token (the head: one token), and 4 h d per visible pair of tokens: n (n + 1) / 2 pairs.
    made = planned("llama-3.1-8b", isl=2048, osl=0)
    (totals,) = made.totals
    layers = 8_029_995_008 - 2 * 128256 * 4096
    expected = 2 * layers * 2048 + 2 * 128256 * 4096 + 32 * 4 * 32 * 128 * (2048 * 2049 / 2)
    assert totals.flops == pytest.approx(expected, rel=2e-3)  # norms, rope and activations are the rest
    assert totals.covered_flops_share > 0.998


def test_cache_bytes_per_token():
    assert kv_bytes_per_token(find_model("llama-3.1-70b"), "bfloat16") == 327_680
    assert kv_bytes_per_token(find_model("deepseek-v3"), "bfloat16") == 70_272
    # 2 x 10 full layers x 2 heads x 256; the state of the other 30 does not grow.
    assert kv_bytes_per_token(find_model("qwen3.5-35b-a3b"), "bfloat16") == 2 * 2 * 10 * 2 * 256
    oss, per_layer = find_model("gpt-oss-120b"), 2 * 2 * 8 * 64
    assert cache_bytes(oss, "bfloat16", 100) == 36 * per_layer * 100
    assert cache_bytes(oss, "bfloat16", 10_000) == 18 * per_layer * (10_000 + 128)
    # Four GPUs have two of the eight heads each; sixteen hold one, twice over.
    llama = find_model("llama-3.1-70b")
    assert cache_bytes(llama, "bfloat16", 1, tp=4) == 327_680 / 4
    assert cache_bytes(llama, "bfloat16", 1, tp=16) == 327_680 / 8
    assert cache_bytes(find_model("deepseek-v3"), "bfloat16", 1, tp=8) == 70_272  # latents are on every GPU


def test_latent_attention():
    made = planned("deepseek-v3", batches=(16,), tp=8, prefix_len=1024)
    prefill, decode = by_role(made, "prefill"), by_role(made, "decode", 16)
    assert prefill["qkv_a_proj"].problem == Matmul(7168, 1536 + 512 + 64, 7168)
    assert prefill["q_b_proj"].problem == Matmul(7168, 128 // 8 * 192, 1536)
    assert prefill["kv_b_proj"].problem == Matmul(8192, 128 // 8 * 256, 512)  # the cached prefix is spread out again
    assert prefill["o_proj"].problem == Matmul(7168, 7168, 128 // 8 * 128)
    assert prefill["attention"].problem == PrefillAttention((7168,), 16, 16, 192, prefix_lens=(1024,), head_dim_v=128)
    assert "kv_b_proj" not in decode
    latent = decode["attention"]
    assert latent.problem == LatentAttention((8704,) * 16, 16, 512, 64, page_size=64, qk_dim=192)
    assert latent.flops == 2 * 16 * 8704 * 16 * (576 + 512)
    assert latent.bytes_moved == 2 * (16 * 8704 * 576 + 16 * 16 * (576 + 512))
    assert decode["q_absorb"].problem == BatchedMatmul(16, 16, 512, 128)
    assert decode["v_absorb"].problem == BatchedMatmul(16, 16, 128, 512)


def test_sparse_latent_attention_reads_only_what_the_indexer_picks():
    made = planned("deepseek-v3.2", batches=(1,))
    decode = by_role(made, "decode")
    sparse = decode["attention"]
    assert sparse.operator == "sparse_latent_attention"
    assert sparse.flops == 2 * 2048 * 128 * (576 + 512)
    assert decode["index_scores"].flops == pytest.approx(2 * 8704 * 64 * 128, rel=0.01)
    short = by_role(planned("deepseek-v3.2", isl=2048, osl=0), "prefill")
    assert short["attention"].problem == PrefillAttention((2048,), 128, 128, 192, head_dim_v=128)


def test_mixture_of_experts():
    made = planned("qwen3-30b-a3b", batches=(8,), isl=1024)
    decode = by_role(made, "decode", 8)
    experts = decode["experts"]
    assert experts.problem == FusedMoe(8, 2048, 768, 128, 8)
    # 64 visits, each through gate and up, and down (2 flops per weight).
    assert experts.flops == pytest.approx(2 * 64 * 3 * 768 * 2048, rel=0.01)
    hit = 128 * (1 - (1 - 8 / 128) ** 8)
    assert experts.bytes_moved == pytest.approx(2 * hit * 3 * 768 * 2048, rel=0.02)
    assert decode["routing"].problem == TopkRouting(8, 128, 8, "softmax", renormalize=True)
    assert decode["router"].problem == Matmul(8, 128, 2048)
    sliced, spread = (by_role(planned("qwen3-30b-a3b", batches=(8,), tp=4, expert_parallel=ep), "decode", 8) for ep in (False, True))
    assert sliced["experts"].problem == FusedMoe(8, 2048, 192, 128, 8)
    assert spread["experts"].problem == FusedMoe(8, 2048, 768, 128, 8, local_experts=32)
    assert sliced["experts"].flops == pytest.approx(spread["experts"].flops, rel=0.01)
    shared = by_role(planned("qwen3.5-35b-a3b", batches=(8,)), "decode", 8)
    assert shared["shared_gate_up_proj"].problem == Matmul(8, 1024, 2048)
    assert any("shared_gate" in role for role in shared)


def test_gates_windows_and_linear_layers():
    qwen = by_role(planned("qwen3-next-80b-a3b", batches=(1,)), "decode")
    assert qwen["qkv_proj"].problem == Matmul(1, 2 * 16 * 256 + 2 * 2 * 256, 2048)  # the gate doubles q
    # q and k of 16 x 128 each, v and z of 32 x 128 each.
    assert qwen["linear_qkvz_proj"].problem == Matmul(1, 2 * 2048 + 2 * 4096, 2048)
    assert (qwen["linear_attention"].count, qwen["attention"].count) == (36, 12)
    assert qwen["linear_attention"].problem == GatedDeltaRule((1,), 16, 32, 128, 128)
    assert qwen["short_conv"].problem == CausalConv1d((1,), 2 * 2048 + 4096, 4)
    attentions = [row.problem for row in planned("gpt-oss-120b", batches=(2,)).step("decode", 2) if row.role == "attention"]
    assert sorted(p.window for p in attentions) == [0, 128]
    # A window that no sequence reaches is no window, so that both kinds of layer are one problem.
    attentions = [row for row in planned("gpt-oss-120b", batches=(2,), isl=64, osl=64).step("decode", 2) if row.role == "attention"]
    assert [row.count for row in attentions] == [36]


def test_chunked_attention_is_several_sequences():
    made = planned("llama-4-maverick", isl=20_000, osl=1000, batches=(4,))
    counts = {row.problem.q_lens: row.count for row in made.step("prefill", 1) if row.role == "attention"}
    assert counts == {(8192, 8192, 3616): 36, (20_000,): 12}
    lens = {row.problem.kv_lens[0]: row.count for row in made.step("decode", 4) if row.role == "attention"}
    assert lens == {20_500 - 2 * 8192: 36, 20_500: 12}


@given(prefix=st.integers(0, 50), new=st.integers(1, 60), chunk=st.integers(1, 20))
def test_chunks_see_what_the_definition_says(prefix, new, chunk):
    pieces = _chunks(prefix, new, chunk)
    problem = PrefillAttention(tuple(q for q, _ in pieces), 1, 1, 1, prefix_lens=tuple(p for _, p in pieces))
    visible = sum(1 for q in range(prefix, prefix + new) for k in range(q + 1) if k // chunk == q // chunk)
    assert problem.visible_pairs() == visible


def test_diffusion_and_whisper():
    flux = by_role(planned("flux.1-dev"), "denoise")
    assert flux["image_qkv_proj"].problem == Matmul(4096, 3 * 3072, 3072)
    assert flux["text_up_proj"].problem == Matmul(512, 12288, 3072)
    assert flux["qkv_mlp_proj"].problem == Matmul(4608, 3 * 3072 + 12288, 3072)
    assert flux["attention"].problem == PrefillAttention((4608,), 24, 24, 128, causal=False)
    assert flux["attention"].count == 19 + 38
    assert flux["rope"].problem == RopeCache(4608, 24, 24, 128, cache=False, interleaved=True)
    wan = planned("wan2.1-t2v-14b").step("denoise", 1)
    (cross,) = [row for row in wan if row.role == "cross_attention"]
    (rope,) = [row for row in wan if row.operator == "rope_cache"]
    assert rope.problem == RopeCache(32_760, 40, 40, 128, cache=False)
    assert cross.flops == 4 * 32_760 * 512 * 40 * 128 and cross.problem.kv_lens == (512,)
    whisper = planned("whisper-large-v3", batches=(8,))
    prefill, decode = by_role(whisper, "prefill"), by_role(whisper, "decode", 8)
    assert prefill["encoder_attention"].problem == PrefillAttention((1500,), 20, 20, 64, causal=False, dtype="float16")
    assert prefill["cross_kv_proj"].problem == Matmul(1500, 2 * 1280, 1280, "float16") and "cross_kv_proj" not in decode
    assert prefill["cross_attention"].problem.kv_lens == (1500,)
    assert decode["cross_attention"].problem.kv_lens == (1500,) * 8
    joined = decode["o_proj + cross_q_proj + cross_o_proj"]  # three equal matrices are one problem
    assert (joined.count, joined.layers, joined.per_layer) == (96, 32, 3)


def test_speculated_tokens_are_verified_together():
    decode = by_role(planned("llama-3.1-8b", batches=(4,), q_len=3), "decode", 4)
    assert decode["qkv_proj"].problem.m == 12 and decode["lm_head"].problem.m == 12
    assert (decode["attention"].problem.q_len, decode["attention"].problem.kv_lens) == (3, (8704,) * 4)


# --- tensor parallelism


def test_tensor_parallel_shapes():
    rows = by_role(planned("llama-3.1-8b", tp=4, batches=(1,)), "decode")
    assert rows["qkv_proj"].problem == Matmul(1, (4096 + 2 * 1024) // 4, 4096)
    assert rows["o_proj"].problem == Matmul(1, 4096, 1024)
    assert rows["gate_up_proj"].problem == Matmul(1, 2 * 14336 // 4, 4096)
    assert rows["down_proj"].problem == Matmul(1, 4096, 14336 // 4)
    assert (rows["attention"].problem.heads, rows["attention"].problem.kv_heads) == (8, 2)
    assert rows["lm_head"].problem == Matmul(1, 128256 // 4, 4096)
    reduce = rows["all_reduce"]
    assert reduce.count == 2 * 32 + 1 and reduce.limit == "link"
    assert reduce.link_bytes == 2 * 3 / 4 * 4096 * 2
    assert reduce.bound_us == pytest.approx(reduce.link_bytes / 450e9 * 1e6)


def test_heads_are_replicated_beyond_their_number_and_the_vocabulary_is_padded():
    rows = by_role(planned("qwen3-30b-a3b", tp=8, batches=(1,)), "decode")  # 32 query heads, 4 key/value heads
    assert (rows["attention"].problem.heads, rows["attention"].problem.kv_heads) == (4, 1)
    assert rows["qkv_proj"].problem.n == (4 + 2) * 128
    # 151936 = 64 x 2374, and 2374 is no multiple of 8: padded to 64 x 2376.
    assert rows["lm_head"].problem.n == 64 * 2376 // 8


@pytest.mark.parametrize(
    ("name", "tp", "says"),
    [
        ("llama-3.1-8b", 3, "3 does not divide 32 attention heads"),
        ("whisper-large-v3", 8, "20 attention heads"),
        ("qwen3-next-80b-a3b", 32, "16 linear-attention key heads"),
        ("llama-4-maverick", 5, "8 key/value heads"),
        ("llama-4-maverick", 20, "not a multiple of 8 key/value heads"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(name, tp, says):
    with pytest.raises(UsageError, match=says):
        planned(name, tp=tp)


def test_an_intermediate_size_that_does_not_divide_is_refused():
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 99}
    model = parse_config(config | {"intermediate_size": 100}, where="x", name="x")
    with pytest.raises(UsageError, match="8 does not divide 100 intermediate features"):
        plan(model, H200, scenario_for(model, H200, tp=8))


@settings(max_examples=25, deadline=None)
@given(
    tp=st.sampled_from([2, 4, 8]),
    isl=st.integers(1, 4000),
    batch=st.integers(1, 64),
    name=st.sampled_from(["llama-3.1-8b", "llama-3.1-70b", "glm-4.5"]),
)
def test_ranks_together_do_the_work_of_one(tp, isl, batch, name):
    """While there are key/value heads to split, tp ranks do together what one GPU does; only routers and padding are done more often."""
    whole, split = (planned(name, tp=t, isl=isl, osl=2, batches=(batch,)) for t in (1, tp))
    for step in whole.steps:
        one, many = (
            sum(r.count * r.flops for r in made.step(*step) if r.role not in ("router", "lm_head") and r.operator == "matmul")
            for made in (whole, split)
        )
        assert many * tp == pytest.approx(one, rel=1e-9)
        attention = [sum(r.count * r.flops for r in made.step(*step) if r.role == "attention") for made in (whole, split)]
        assert attention[1] * tp == pytest.approx(attention[0], rel=1e-9)


# --- the whole catalog


@pytest.mark.parametrize("chip", load_chips(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("model", load_models(), ids=lambda model: model.name)
def test_every_model_plans_on_every_chip(model, chip):
    made = plan(model, chip)
    assert made.problems()
    keys = [row.problem.key for phase, batch in made.steps for row in made.step(phase, batch) if row.problem]
    assert set(keys) == {problem.key for problem in made.problems()}
    for phase, batch in made.steps:
        seen = [(row.problem.key, row.problem.operator) for row in made.step(phase, batch) if row.problem]
        assert len(seen) == len(set(seen)), "a problem appears in two rows of a step"
    for row in made.rows:
        assert row.bound_us > 0 and row.count >= row.layers >= 1
        assert (row.problem is None) == bool(row.why)
        if row.problem:
            assert (row.flops, row.bytes_moved) == (row.problem.flops(), row.problem.bytes_moved())
            assert row.bound_us == pytest.approx(
                max(row.flops / chip.peak_flops(row.problem.math_dtype), row.bytes_moved / chip.memory_gb_per_s / 1e9) * 1e6
            )
        else:  # every operator has kernels; only what takes several GPUs is no problem of one
            assert row.operator in ("all_reduce", "all_gather")
    for totals in made.totals:
        assert 0 < totals.covered_flops_share <= 1 and 0 < totals.covered_time_share <= 1


def test_features_reach_the_problems():
    oss = by_role(planned("gpt-oss-120b", batches=(2,), kv_dtype="fp8"), "decode", 2)
    assert oss["attention"].problem.sinks and oss["attention"].problem.kv_dtype == "float8_e4m3fn"
    made = planned("llama-3.1-8b", batches=(4,), prefix_len=4096, shared_prefix=1000, q_len=2)
    decode, prefill = by_role(made, "decode", 4), by_role(made, "prefill")
    assert decode["attention"].problem.shared_prefix == 992
    assert (prefill["attention"].problem.prefix_lens, prefill["attention"].problem.page_size) == ((4096,), 16)
    assert made.kv_bytes_per_token == 2 * planned("llama-3.1-8b", kv_dtype="fp8").kv_bytes_per_token


def test_a_format_replaces_the_layers_weights_and_leaves_the_head():
    made = planned("qwen3-30b-a3b", batches=(4,), quantization="fp8_block")
    decode = by_role(made, "decode", 4)
    assert decode["qkv_proj"].problem.format == "fp8_block" and decode["qkv_proj"].operator == "scaled_matmul"
    assert decode["experts"].problem.format == "fp8_block"
    assert decode["lm_head"].operator == decode["router"].operator == "matmul"
    wide = by_role(planned("qwen3-30b-a3b", batches=(4,)), "decode", 4)
    assert decode["experts"].bound_us < 0.6 * wide["experts"].bound_us
    assert made.weight_bytes < 0.6 * planned("qwen3-30b-a3b").weight_bytes
    with pytest.raises(UsageError, match="not 'fp5'"):
        planned("llama-3.1-8b", quantization="fp5")


def test_every_format_has_a_plan():
    of_layers = {"fp8_tensor", "fp8_row", "fp8_block", "int8_row", "mxfp8", "mxfp4", "nvfp4", "w4a16", "w8a16"}
    assert set(formats()) == of_layers | {"w4a16_mxfp4"}
    for name in of_layers:
        made = planned("llama-3.1-8b", batches=(4,), quantization=name)
        assert format_of(by_role(made, "decode", 4)["qkv_proj"].problem) == name
        assert not [note for note in made.notes if note.field == "quantization"]


def test_a_format_that_experts_do_not_have_is_told():
    made = planned("gpt-oss-20b", batches=(4,), quantization="mxfp4")
    (note,) = [note for note in made.notes if note.field == "quantization"]
    assert "fused_moe" in note.message and note.level == "warning"
    assert not [note for note in planned("qwen3-30b-a3b", quantization="fp8_block").notes if note.field == "quantization"]


def test_a_format_of_experts_alone():
    """gpt-oss as it is published: experts in mxfp4, all else in 16 bits. Its model card says 12.8 GiB for the 20b checkpoint."""
    made = planned("gpt-oss-20b", batches=(4,), quantization="w4a16_mxfp4")
    decode = by_role(made, "decode", 4)
    assert (decode["experts"].operator, decode["qkv_proj"].operator) == ("weight_only_moe", "matmul")
    assert [note.level for note in made.notes if note.field == "quantization"] == ["info"]
    assert made.weight_bytes == pytest.approx(12.8 * 2**30, rel=0.02)
    assert planned("gpt-oss-20b", quantization="mxfp4").weight_bytes > 2.5 * made.weight_bytes
    kimi = by_role(planned("kimi-k2", tp=8, batches=(4,), quantization="w4a16"), "decode", 4)
    assert (kimi["experts"].operator, kimi["q_b_proj"].operator) == ("weight_only_moe", "weight_only_matmul")


def test_weights_that_every_gpu_holds_whole():
    """DeepSeek V3: the first projection (2112 x 7168) and the router (256 x 7168). Llama: keys and values of 8 heads on 16 GPUs."""
    whole, eighth = (planned("deepseek-v3", tp=tp, quantization="fp8_block").weight_bytes for tp in (1, 8))
    latent, router = 61 * 2112 * 7168, 58 * 256 * 7168
    assert eighth - whole / 8 == pytest.approx(7 / 8 * (latent + router), rel=0.01)
    plain, sixteenth = (planned("llama-3.1-70b", tp=tp).weight_bytes for tp in (1, 16))
    assert sixteenth - plain / 16 == pytest.approx(80 * 2 * 128 * 8192 * 2 / 2, rel=0.01)  # half of one head's, in 2 bytes


def test_occurrences():
    made = planned("llama-3.1-8b", batches=(1, 8))
    for problem in made.problems():
        assert made.occurrences(problem)
        assert all(row.problem == problem for row in made.occurrences(problem))
