"""A composed layer is right, says so when it is not, and is timed as a whole and in parts."""

import dataclasses

import pytest
import torch
import whole_layer

from klab.harness.catalog.huggingface import parse_config
from klab.harness.measure.layer import CheckFailed, Chosen, LayerSet, layer_check, measure_layer
from klab.harness.measure.power import NullMeter
from klab.harness.measure.timer import CpuTimer
from klab.harness.plan.layer import Glue, Part, groups_of, layer_of
from klab.harness.plan.step import Step
from klab.harness.plan.trials import default_policy
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError

CPU = Chip("cpu", "CPU", "cpu", 1, 2600, 2600, {"float32": 0.3, "bfloat16": 0.6}, 24 << 30, 40.0, 1 << 20)
BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}
QWEN_MOE = {
    **BASE, "model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
}  # fmt: skip
DEEPSEEK = {
    **BASE, "model_type": "deepseek_v3", "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "intermediate_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid",
}  # fmt: skip
MODELS = {"dense": LLAMA, "experts": QWEN_MOE, "latent": DEEPSEEK}
STEPS = {
    "decode": Step("decode", 3, 1, 40, "float32"),
    "verify": Step("decode", 2, 3, 21, "float32"),
    "prefill": Step("prefill", 2, 19, 0, "float32"),
}


def composed(config, step):
    model = parse_config(config, where="x", name="x")
    return layer_of(groups_of(model)[0], model.stack.hidden, step)


def picked(parts):
    """For each part the first kernel that takes it on a CPU."""
    found, catalogue = {}, discover()
    for part in parts:
        if isinstance(part, Part):
            kernel = next(k for k in catalogue.of(part.problem.operator) if k.unfit(part.problem, CPU) is None)
            found[part.role] = Chosen(kernel, kernel.default(part.problem, CPU), "library")
    return found


def checked(parts, chosen):
    problems = {part.role: part.problem for part in parts if isinstance(part, Part)}
    launches = {role: one.kernel.build(problems[role], one.config, CPU) for role, one in chosen.items()}
    return layer_check(parts, LayerSet(parts, launches, seed=3, device="cpu"))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_layer_is_right(config, step):
    parts = composed(config, step)
    found = checked(parts, picked(parts))
    assert found.passed, found.reason
    assert found.error < 1e-4


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_composition_is_the_definition(config, step):
    """The run and its check share their wiring; this layer is written apart from it."""
    parts = composed(config, step)
    problems = {part.role: part.problem for part in parts if isinstance(part, Part)}
    launches = {role: one.kernel.build(problems[role], one.config, CPU) for role, one in picked(parts).items()}
    one = LayerSet(parts, launches, seed=5, device="cpu")
    before = {role: {name: tensor.clone() for name, tensor in tensors.items()} for role, tensors in one.own.items()}
    one.run()
    mixer = groups_of(parse_config(config, where="x", name="x"))[0].mixers[0]
    out, residual = whole_layer.layer(before, mixer, step, one.flow.get("routing"))
    for got, want in ((one.flow[parts[-1].role]["out"], out), (one.flow["post_norm"]["residual"], residual)):
        assert (got.double() - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("role", ["rope_and_cache", "attention", "post_norm", "o_proj"])
@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK], ids=["dense", "latent"])
def test_a_lost_part_is_found_in_sixteen_bits_behind_a_long_context(config, role):
    """Attention over thousands of keys adds a hundredth of the residual's size: less than the whole's tolerance."""
    parts = composed(config, Step("decode", 1, 1, 8191, "bfloat16"))
    assert checked(parts, picked(parts)).passed
    found = checked(parts, wrong(picked(parts), role, lambda outputs: [tensor.zero_() for tensor in outputs.values()]))
    assert not found.passed and found.reason.startswith(role)


def test_a_lost_router_is_found():
    parts = composed(QWEN_MOE, Step("decode", 3, 1, 40, "bfloat16"))
    found = checked(parts, wrong(picked(parts), "router", lambda outputs: outputs["out"].zero_()))
    assert not found.passed and found.reason.startswith("router")


def test_sixteen_bits_stay_within_the_tolerance():
    parts = composed(LLAMA, Step("decode", 3, 1, 40, "bfloat16"))
    found = checked(parts, picked(parts))
    assert found.passed and found.tolerance < 0.1


def wrong(chosen, role, spoil):
    """The same choice with one kernel whose launch is spoiled."""
    one = chosen[role]

    def build(problem, config, chip):
        launch = one.kernel.build(problem, config, chip)

        def spoiled(inputs, outputs):
            launch(inputs, outputs)
            spoil(outputs)

        return spoiled

    return chosen | {role: dataclasses.replace(one, kernel=dataclasses.replace(one.kernel, build=build))}


@pytest.mark.parametrize("role", ["rope_and_cache", "attention", "post_norm", "down_proj"])
def test_a_wrong_part_is_found_in_the_whole(role):
    parts = composed(LLAMA, STEPS["decode"])
    chosen = wrong(picked(parts), role, lambda outputs: next(iter(outputs.values())).mul_(1.05))
    assert not checked(parts, chosen).passed


def test_a_wrong_choice_of_experts_is_judged_by_itself():
    parts = composed(QWEN_MOE, STEPS["decode"])
    chosen = wrong(picked(parts), "routing", lambda outputs: outputs["ids"].copy_(torch.zeros_like(outputs["ids"])))
    found = checked(parts, chosen)
    assert not found.passed and found.reason.startswith("routing:")


def test_the_new_tokens_reach_the_cache_that_is_attended_to():
    """Without the insertion the attention reads what the cache held before, and the output is another."""
    parts = composed(LLAMA, STEPS["decode"])
    old = {"make": lambda flow, own: {name: own[name] for name in ("k_cache", "v_cache")}}
    lame = [dataclasses.replace(part, **old) if isinstance(part, Glue) else part for part in parts]
    problems = {part.role: part.problem for part in parts if isinstance(part, Part)}
    launches = {role: one.kernel.build(problems[role], one.config, CPU) for role, one in picked(parts).items()}
    outs = []
    for which in (parts, lame):
        one = LayerSet(which, launches, seed=3, device="cpu")
        one.run()
        outs.append(one.flow["attention"]["out"].clone())
    assert (outs[0] - outs[1]).norm() > 0.05 * outs[0].norm()


def test_whole_and_parts_are_timed_in_the_same_laps():
    parts = composed(LLAMA, STEPS["decode"])
    policy = dataclasses.replace(default_policy(CPU), warmup_ms=1.0, round_ms=0.5)
    found = measure_layer(parts, picked(parts), CPU, CpuTimer(CPU, NullMeter("none")), policy, laps=5)
    assert [p.role for p in found.parts] == [p.role for p in parts]
    assert all(p.time.median > 0 for p in found.parts) and found.whole.median > max(p.time.median for p in found.parts) / 10
    assert 0 < found.ratio[1] <= found.ratio[0] <= found.ratio[2] and found.bare_ratio[0] >= found.ratio[0]
    with pytest.raises(CheckFailed):
        spoiled = wrong(picked(parts), "o_proj", lambda outputs: outputs["out"].zero_())
        measure_layer(parts, spoiled, CPU, CpuTimer(CPU, NullMeter("none")), policy, laps=5)


@pytest.mark.parametrize("asked", [{"tp": 2}, {"kv_dtype": "float8_e4m3fn"}, {"shared_prefix": 16}], ids=lambda v: next(iter(v)))
def test_what_is_not_composed_is_refused(asked):
    with pytest.raises(UsageError, match=f"not composed with {next(iter(asked))}"):
        composed(LLAMA, dataclasses.replace(STEPS["decode"], **asked))


def test_layers_that_cannot_be_composed_say_so():
    with pytest.raises(UsageError, match="not for this model"):
        composed(LLAMA | {"model_type": "bert", "layer_norm_eps": 1e-5}, STEPS["prefill"])
