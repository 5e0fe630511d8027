"""Scenarios, dtypes and memory: defaults per kind of chip, and what a reader is told."""

import dataclasses

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.huggingface import parse_config
from klab.harness.plan import Scenario, plan, scenario_for
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

H200 = find_chip("h200")
CPU = Chip("cpu", "a CPU", "cpu", 2, 2600, 2600, {"float32": 0.17, "bfloat16": 0.33}, 24 << 30, 20.0, 32 << 20)
OLD_CPU = dataclasses.replace(CPU, peak_tflops={"float32": 0.17})


def notes(made, field):
    return [note.message for note in made.notes if note.field == field]


def test_defaults_by_kind_of_chip():
    model = find_model("qwen3-0.6b")
    assert scenario_for(model, H200) == Scenario(8192, 1024, (1, 8, 32, 128))
    assert scenario_for(model, CPU) == Scenario(512, 128, (1, 8))
    assert scenario_for(model, CPU, isl=7, batches=None) == Scenario(7, 128, (1, 8))
    assert scenario_for(find_model("flux.1-dev"), H200).isl == 4096
    assert scenario_for(find_model("flux.1-dev"), CPU).isl == 1024
    whisper = scenario_for(find_model("whisper-large-v3"), H200)
    assert (whisper.isl, whisper.osl) == (4, 444)
    short = parse_config(
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "vocab_size": 100}, where="x", name="x"
    )
    fitted = scenario_for(short, H200)
    assert fitted.isl + fitted.osl <= 1024


def test_a_cpu_demo_is_small():
    """What a CPU measures by default: few problems of at most tens of GFLOP."""
    made = plan(find_model("qwen3-0.6b"), CPU)
    assert len(made.problems()) <= 36
    assert max(problem.flops() for problem in made.problems()) < 30e9


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"isl": 0}, "--isl"), ({"osl": -1}, "--osl"), ({"batches": (0,)}, "--batch"), ({"tp": 0}, "--tp"), ({"prefix_len": 8192}, "--prefix"),
     ({"page_size": 0}, "--page-size"),
     ({"dtype": "fp8"}, "quantization=fp8_block"), ({"dtype": "bf15"}, "unknown dtype"), ({"colour": 1}, "no colour")],
)  # fmt: skip
def test_impossible_scenarios(changes, says):
    with pytest.raises(UsageError, match=says):
        scenario_for(find_model("qwen3-0.6b"), H200, **changes)


def test_no_output_no_decode():
    made = plan(find_model("qwen3-0.6b"), H200, scenario_for(find_model("qwen3-0.6b"), H200, osl=0))
    assert made.steps == [("prefill", 1)]


def test_the_prefix_is_not_computed_again():
    model = find_model("qwen3-0.6b")
    made = plan(model, H200, scenario_for(model, H200, isl=4096, prefix_len=4000, prefill_batch=2))
    rows = {row.role: row for row in made.step("prefill", 2)}
    assert rows["qkv_proj"].problem.m == 2 * 96
    assert rows["attention"].problem.q_lens == (96, 96) and rows["attention"].problem.prefix_lens == (4000, 4000)


def test_dtypes_on_a_cpu():
    model, whisper = find_model("qwen3-0.6b"), find_model("whisper-large-v3")
    assert plan(model, CPU).dtype == "bfloat16" and not notes(plan(model, CPU), "dtype")
    for chip, which in ((OLD_CPU, model), (CPU, whisper)):
        made = plan(which, chip)
        assert made.dtype == "float32"
        assert "planned as float32" in notes(made, "dtype")[0]
        assert {problem.dtype for problem in made.problems()} == {"float32"}
    asked = plan(model, OLD_CPU, scenario_for(model, OLD_CPU, dtype="bf16"))
    assert asked.dtype == "bfloat16" and "no instructions for bf16" in notes(asked, "dtype")[0]
    (qkv,) = [row for row in asked.step("prefill", 1) if row.role == "qkv_proj"]
    assert qkv.bound_us == pytest.approx(qkv.flops / 0.17e12 * 1e6)


def test_a_gpu_without_a_peak_is_refused():
    chip = dataclasses.replace(H200, peak_tflops={"float16": 900.0})
    with pytest.raises(UsageError, match="no peak for bfloat16"):
        plan(find_model("qwen3-0.6b"), chip)


def test_quantised_checkpoints_are_planned_as_bf16_and_say_so():
    made = plan(find_model("deepseek-v3"), H200)
    assert made.dtype == "bfloat16"
    assert "planned as bf16 unless asked: --with quantization=fp8_block" in notes(made, "quantization_config")[0]


def test_memory_and_context_warnings():
    big = plan(find_model("llama-3.1-405b"), H200)
    assert "812 GB of weights per chip exceed its 141 GB" in notes(big, "memory")[0]
    llama = find_model("llama-3.1-8b")
    full = plan(llama, H200)  # 16 GB of weights; 8704 x 131072 B = 1.14 GB a sequence: 32 fit beside them, 128 do not
    assert notes(full, "memory") == ["a cache of 1.14 GB per sequence does not fit beside the weights at batch 128"]
    assert not notes(plan(llama, H200, scenario_for(llama, H200, batches=(32,))), "memory")
    long = plan(llama, H200, scenario_for(llama, H200, isl=200_000, batches=(1,)))
    assert "exceeds the model's 131072" in notes(long, "max_position_embeddings")[0]


def test_a_cpu_has_no_link():
    model = find_model("qwen3-0.6b")
    with pytest.raises(UsageError, match="--tp 1"):
        plan(model, CPU, scenario_for(model, CPU, tp=2))
