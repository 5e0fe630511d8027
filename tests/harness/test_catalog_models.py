"""The catalog reads configurations as the model cards describe the models."""

import json
from pathlib import Path

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


# Families that are not in the catalog: config.json as on the hub (without what changes no shape) and the published size in billions.
HUB = json.loads(Path(__file__).with_name("published_sizes.json").read_text())


@pytest.mark.parametrize("name", HUB)
def test_other_families_are_read_to_their_published_size(name):
    model = parse_config(HUB[name]["config"], where="config.json", name=name)
    assert parameters(model).total / 1e9 == pytest.approx(HUB[name]["billions"], rel=0.015)
    assert model.covered_share == 1.0, [note.text for note in model.notes]
    assert not [note for note in model.notes if note.field == "model_type"]


def layers(name):
    return {
        (type(g.mixers[0]), getattr(g.mixers[0], "window", 0), getattr(g.mixers[0], "chunk", 0)): g.count
        for g in find_model(name).stack.groups
    }


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
    assert rest.mlp == Experts(
        experts=256, top_k=8, intermediate=2048, shared_intermediate=2048, scoring="sigmoid", groups=8, topk_groups=4
    )
    assert first.mixers == (LatentAttention(128, 1536, 512, 128, 64, 128),)


def test_pattern_fields_without_a_list_of_layer_types():
    base = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }

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


def test_a_nested_language_model():
    text = {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "sliding_window": None}  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = {"model_type": "mistral3", "dtype": "bfloat16", "spatial_merge_size": 2, "vision_feature_layer": -1,
              "projector_hidden_act": "gelu", "multimodal_projector_bias": False, "image_token_index": 10,
              "text_config": text, "vision_config": vision}  # fmt: skip
    model = parse_config(config, where="x", name="x")
    assert parameters(model).total / 1e9 == pytest.approx(23.57, rel=1e-3)
    assert [note.field for note in model.notes if note.level == "warning"] == ["vision_config"]
    assert model.covered_share == pytest.approx(0.987, abs=0.002)
    with pytest.raises(UsageError, match=r"x \(text_config\): the field hidden_size"):
        parse_config(config | {"text_config": {"model_type": "mistral"}}, where="x", name="x")


def test_values_listed_per_layer():
    config = dict(find_model("mixtral-8x7b").config)
    same = parse_config(config | {"num_experts_per_tok": [2] * 32}, where="x", name="x")
    assert same.stack == find_model("mixtral-8x7b").stack
    with pytest.raises(UsageError, match="num_experts_per_tok"):
        parse_config(config | {"num_experts_per_tok": [2] * 31 + [1]}, where="x", name="x")


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
