"""The catalog reads configurations as the model cards describe the models."""

import json

import pytest

from klab.harness.catalog import find_model, load_models
from klab.harness.catalog.architecture import Attention, Experts, JointAttention, LatentAttention, LinearAttention, Mlp, ParallelBlock
from klab.harness.catalog.huggingface import parse_config
from klab.harness.catalog.matrices import parameters
from klab.kernels.errors import UsageError

# (total, active) in billions as the model cards and papers print them.
CARDS = {
    "qwen3-0.6b": (0.6, 0.6),
    "qwen3-8b": (8.2, 8.2),
    "qwen3-32b": (32.8, 32.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-coder-480b-a35b": (480, 35),
    "qwen3-next-80b-a3b": (80, 3.9),
    "qwen3.5-35b-a3b": (35, 3.4),
    "llama-3.1-8b": (8.03, 8.03),
    "llama-3.1-70b": (70.6, 70.6),
    "llama-3.1-405b": (405.9, 405.9),
    "llama-4-maverick": (400, 17),
    "deepseek-v3": (671, 37),
    "deepseek-r1": (671, 37),
    "deepseek-v3.2": (671, 37.5),
    "kimi-k2": (1026, 32),
    "gpt-oss-20b": (20.9, 4.2),  # the card's 3.6 B active leave the embedding out: + 0.58 B
    "gpt-oss-120b": (116.8, 5.7),  # likewise 5.1 + 0.58
    "mixtral-8x7b": (46.7, 12.9),
    "glm-4.5": (355, 32),
    "gemma-3-27b": (27.0, 27.0),
    "flux.1-dev": (11.9, 11.9),
    "wan2.1-t2v-14b": (14.3, 14.3),
    "whisper-large-v3": (1.54, 1.54),
}


def test_every_profile_has_a_card():
    assert {model.name for model in load_models()} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_weights_agree_with_the_model_card(name):
    total, active = CARDS[name]
    counted = parameters(find_model(name))
    assert counted.total / 1e9 == pytest.approx(total, rel=0.02)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.055)


def test_llama_8b_to_the_last_weight():
    # By hand: per layer q 4096x4096, k and v 1024x4096 each, o 4096x4096, three of 14336x4096; embedding and head 128256x4096.
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert parameters(find_model("llama-3.1-8b")).total == 32 * layer + 2 * 128256 * 4096 == 8_029_995_008


# Published sizes (billions) of families that are not in the catalog: config.json as on the hub, without what changes no shape.
HUB = {
    "gpt2": (0.124, {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257, "n_inner": None}),
    "mistral-7b": (7.24, {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                          "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096, "tie_word_embeddings": False}),
    "qwen2-7b": (7.62, {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                        "num_key_value_heads": 4, "vocab_size": 152064, "use_sliding_window": False, "sliding_window": 131072,
                        "max_window_layers": 28, "tie_word_embeddings": False}),
    "gemma-2-9b": (9.24, {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
                          "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "sliding_window": 4096, "attn_logit_softcapping": 50.0}),
    "phi-2": (2.78, {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
                     "vocab_size": 51200, "tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "phi-3-mini": (3.82, {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                          "num_key_value_heads": 32, "vocab_size": 32064, "sliding_window": 2047, "tie_word_embeddings": False}),
    "falcon-7b": (6.92, {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "multi_query": True,
                         "new_decoder_architecture": False, "parallel_attn": True, "alibi": False, "bias": False, "vocab_size": 65024}),
    "pythia-6.9b": (6.86, {"model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "vocab_size": 50432, "tie_word_embeddings": False, "use_parallel_residual": True}),
    "opt-125m": (0.125, {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                         "vocab_size": 50272, "word_embed_proj_dim": 768, "do_layer_norm_before": True}),
    "bloom-560m": (0.559, {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880}),
    "starcoder2-7b": (7.17, {"model_type": "starcoder2", "hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32,
                             "num_attention_heads": 36, "num_key_value_heads": 4, "vocab_size": 49152, "sliding_window": 4096}),
    "glm-4-9b": (9.4, {"model_type": "glm", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
                       "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "tie_word_embeddings": False}),
    "command-r": (35.0, {"model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
                         "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 256000, "logit_scale": 0.0625}),
    "stablelm-2-1.6b": (1.64, {"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
                               "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352, "tie_word_embeddings": False}),
    "smollm3-3b": (3.08, {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                          "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256}),
    "granite-3.1-8b": (8.17, {"model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40,
                              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155, "tie_word_embeddings": True}),
    "deepseek-v2-lite": (15.7, {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                                "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 27,
                                "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
                                "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
                                "vocab_size": 102400, "tie_word_embeddings": False}),
    "qwen1.5-moe-a2.7b": (14.3, {"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
                                 "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
                                 "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "decoder_sparse_step": 1,
                                 "use_sliding_window": False, "tie_word_embeddings": False}),
    "olmoe-1b-7b": (6.92, {"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
                           "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
                           "tie_word_embeddings": False}),
    "bert-base": (0.109, {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                          "vocab_size": 30522, "type_vocab_size": 2}),
    "t5-base": (0.223, {"model_type": "t5", "is_encoder_decoder": True, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
                        "num_decoder_layers": 12, "num_heads": 12, "vocab_size": 32128, "feed_forward_proj": "relu"}),
    "bart-large": (0.406, {"model_type": "bart", "is_encoder_decoder": True, "d_model": 1024, "encoder_layers": 12, "encoder_attention_heads": 16,
                           "encoder_ffn_dim": 4096, "decoder_layers": 12, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096,
                           "vocab_size": 50265}),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_other_families_are_read_to_their_published_size(name):
    billions, config = HUB[name]
    model = parse_config(config, where="config.json", name=name)
    assert parameters(model).total / 1e9 == pytest.approx(billions, rel=0.015)
    assert model.covered_share == 1.0, [note.text for note in model.notes]
    assert not [note for note in model.notes if note.field == "model_type"]


def layers(name):
    return {(type(g.mixers[0]), getattr(g.mixers[0], "window", 0), getattr(g.mixers[0], "chunk", 0)): g.count for g in find_model(name).stack.groups}


def test_layer_patterns():
    assert layers("gemma-3-27b") == {(Attention, 1024, 0): 52, (Attention, 0, 0): 10}
    assert layers("gpt-oss-120b") == {(Attention, 128, 0): 18, (Attention, 0, 0): 18}
    assert layers("qwen3.5-35b-a3b") == {(LinearAttention, 0, 0): 30, (Attention, 0, 0): 10}
    assert layers("qwen3-next-80b-a3b") == {(LinearAttention, 0, 0): 36, (Attention, 0, 0): 12}
    dense, chunked, full = find_model("llama-4-maverick").stack.groups
    assert [(g.count, type(g.mlp)) for g in (dense, chunked, full)] == [(24, Mlp), (12, Experts), (12, Experts)]
    assert [g.mixers[0].chunk for g in (dense, chunked, full)] == [8192, 8192, 0]
    first, rest = find_model("deepseek-v3").stack.groups
    assert (first.count, first.mlp, rest.count) == (3, Mlp(18432), 58)
    assert rest.mlp == Experts(experts=256, top_k=8, intermediate=2048, shared_intermediate=2048)
    assert first.mixers == (LatentAttention(128, 1536, 512, 128, 64, 128),)


def test_pattern_fields_without_a_list_of_layer_types():
    base = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 100}

    def windows(**more):
        groups = parse_config(base | more, where="x", name="x").stack.groups
        return {group.mixers[0].window: group.count for group in groups}

    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=6) == {0: 6, 16: 2}
    assert windows(use_sliding_window=False, sliding_window=16, max_window_layers=6) == {0: 8}
    assert windows(sliding_window=16, sliding_window_pattern="LLLG") == {16: 6, 0: 2}
    assert windows(sliding_window=16, sliding_window_pattern=4) == {16: 6, 0: 2}
    assert windows(sliding_window=None) == {0: 8}
    jamba = parse_config(base | {"attn_layer_period": 8, "attn_layer_offset": 4, "tie_word_embeddings": False}, where="x", name="x")
    assert sorted(group.count for group in jamba.stack.groups) == [1, 7]


def test_output_gate_doubles_the_query_projection_even_where_the_file_does_not_say():
    for name in ("qwen3-next-80b-a3b", "qwen3.5-35b-a3b"):
        full = [g.mixers[0] for g in find_model(name).stack.groups if isinstance(g.mixers[0], Attention)]
        assert all(attention.output_gate for attention in full)


def test_flux_and_whisper_parts():
    double, single = find_model("flux.1-dev").stack.groups
    assert (double.count, double.mixers) == (19, (JointAttention(24, 128, 12288),))
    assert (single.count, single.mixers) == (38, (ParallelBlock(24, 128, 12288),))
    whisper = find_model("whisper-large-v3")
    assert whisper.encoder is not None
    assert (whisper.encoder.tokens, whisper.encoder.layers, whisper.stack.layers) == (1500, 32, 32)
    own, cross = whisper.stack.groups[0].mixers
    assert isinstance(own, Attention) and own.causal and not own.cross
    assert isinstance(cross, Attention) and cross.cross and not cross.causal


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "qwen/qwen3-0.6b", "Qwen/Qwen3-0.6B", " qwen3-0.6b "])
def test_names_in_any_case(name):
    assert find_model(name).name == "qwen3-0.6b"


def test_a_config_by_path_equals_the_profile(tmp_path):
    profile = find_model("deepseek-v3")
    folder = tmp_path / "DeepSeek-V3-Mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(profile.config))
    for path in (folder, folder / "config.json"):
        model = find_model(str(path))
        assert model.stack == profile.stack
        assert model.name == "deepseek-v3-mine"
    diffusers = tmp_path / "Flux"
    (diffusers / "transformer").mkdir(parents=True)
    (diffusers / "transformer" / "config.json").write_text(json.dumps(find_model("flux.1-dev").config))
    assert find_model(str(diffusers)).name == "flux"


def test_an_unknown_layer_type_is_named_and_not_planned():
    config = dict(find_model("llama-3.1-8b").config) | {"layer_types": ["mamba", "full_attention"] * 16}
    model = parse_config(config, where="x", name="x")
    (note,) = [note for note in model.notes if note.field == "layer_types"]
    assert "'mamba' in 16 of 32 layers" in note.message
    # By hand: 16 unknown mixers weighed as q, k, v, o of 4096 x (4096 + 2048 + 4096) beside everything else but the embedding.
    mixer = 4096 * (4096 + 2048 + 4096)
    known = 16 * mixer + 32 * 3 * 14336 * 4096 + 128256 * 4096
    assert f"about {known / (known + 16 * mixer):.0%} of the flops" in note.message
    assert note.covered_share is None and note.level == "warning" and model.covered_share is None


def test_a_vision_tower_is_weighed():
    model = find_model("qwen3.5-35b-a3b")
    (note,) = [note for note in model.notes if note.field == "vision_config"]
    tower = 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    text = parameters(model).per_token
    assert note.covered_share == pytest.approx(text / (text + tower))
    assert model.covered_share == note.covered_share


def test_quantization_and_dtype():
    assert find_model("deepseek-v3").quantization == "fp8 128x128 blocks"
    assert find_model("gpt-oss-120b").quantization == "mxfp4"
    assert find_model("whisper-large-v3").dtype == "float16"
    base = dict(find_model("llama-3.1-8b").config)
    del base["torch_dtype"]
    assert parse_config(base | {"dtype": "float32"}, where="x", name="x").dtype == "float32"
    assert parse_config(base | {"torch_dtype": "torch.float16"}, where="x", name="x").dtype == "float16"
    with pytest.raises(UsageError, match="unknown dtype"):
        parse_config(base | {"dtype": "float12"}, where="x", name="x")


def test_every_profile_states_its_source():
    for model in load_models():
        assert model.source and model.confidence and model.hf_id
        # Nothing in a shipped profile is left over as not understood.
        assert not [note.text for note in model.notes if "not understood" in note.message]
