"""Steps: a mixed step does the work of its halves, once; what is planned is what is counted."""

from types import SimpleNamespace

import pytest

import klab.harness.cost.steps as steps_module
from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.estimate import Estimate, Estimator, Origin
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment
from klab.harness.plan import plan, planner
from klab.harness.plan.memory import cache_bytes
from klab.harness.plan.planner import step_rows
from klab.kernels.errors import UsageError

H200 = find_chip("h200")
MODELS = [("llama-3.1-8b", 1), ("gpt-oss-20b", 1), ("deepseek-v3", 8), ("deepseek-v3.2", 8), ("qwen3-next-80b-a3b", 2), ("gemma-3-27b", 2)]


class Counting:
    """An estimator whose microseconds are what `of` says of a problem; collectives cost nothing."""

    def __init__(self, of):
        self.of = of

    def launch(self, problem):
        return Estimate(Range.exact(self.of(problem)), Origin.MEASURED, "", Range.exact(1.0), Origin.MEASURED)

    def collective(self, one):
        return Estimate(ZERO, Origin.MEASURED, "", ZERO, Origin.MEASURED)


def steps(name, tp, of, **fields):
    return Steps(Deployment(find_model(name), H200, tp, **fields), Counting(of))


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_a_mixed_step_does_the_work_of_both_halves(name, tp):
    """Flops add up but for the logits of the prompt's last token, which a mixed step leaves out."""
    made = steps(name, tp, lambda problem: problem.flops())
    halves = made.prefill(1000, 512).us.mid + made.decode(32, 3000).us.mid
    assert made.mixed(1000, 512, 32, 3000).us.mid == pytest.approx(halves, rel=2e-3)


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_a_mixed_step_reads_the_weights_once(name, tp):
    made = steps(name, tp, lambda problem: problem.bytes_moved())
    mixed, prefill, decode = made.mixed(3000, 0, 32, 3000).us.mid, made.prefill(3000).us.mid, made.decode(32, 3000).us.mid
    assert max(prefill, decode) < mixed < prefill + decode - 0.4 * made.weight_bytes  # 32 tokens miss half of 512 experts


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_a_mixed_step_launches_its_norms_once(name, tp):
    """In a decode step the plan merges the last norm with those of the layers; a mixed step has as many norms as any other."""
    made = steps(name, tp, lambda problem: 1.0)
    counts = [sum(p.count for p in step.parts if p.operator == "norm") for step in (made.prefill(64), made.mixed(64, 0, 8, 100))]
    assert counts[0] == counts[1]
    at_the_end = [p for p in made.mixed(64, 0, 8, 100).parts if p.role in ("final_norm", "lm_head", "sampling")]
    assert [p.count for p in at_the_end] == [1, 1, 1]
    assert made.mixed(64, 0, 0, 100) == made.prefill(64)


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_nothing_of_either_half_is_forgotten(name, tp):
    """Per role as many launches as one half has, or both have together for what belongs to sequences."""
    made = steps(name, tp, lambda problem: 1.0)

    def counts(step):
        return {(role, p.operator): p.count for p in step.parts for role in p.role.split(" + ")}

    prefill, decode, mixed = counts(made.prefill(1000, 512)), counts(made.decode(32, 3000)), counts(made.mixed(1000, 512, 32, 3000))
    assert set(mixed) == set(prefill) | set(decode)
    for role in ("q_absorb", "v_absorb", "kv_b_proj"):
        assert [n for (r, _), n in mixed.items() if r == role] == [n for (r, _), n in {**prefill, **decode}.items() if r == role]


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_steps_between_sizes_take_what_their_size_takes(name, tp):
    """Large heaps are interpolated: what a model of the times says of the size itself is not far."""
    made = Steps(Deployment(find_model(name), H200, tp), Estimator(H200))
    alone = Steps(made.deployment, made.estimator)
    alone._heap = alone._exact_heap
    for new in (300, 1111, 5000):
        between, exact = made.mixed(new, 0, 16, 4000), alone.mixed(new, 0, 16, 4000)
        assert between.us.mid == pytest.approx(exact.us.mid, rel=0.01)
        assert between.joules.mid == pytest.approx(exact.joules.mid, rel=0.02)
        assert [(p.role, p.count) for p in between.parts] == [(p.role, p.count) for p in exact.parts]
    assert made.mixed(1000, 0, 24, 4000) == alone.mixed(1000, 0, 24, 4000)


def test_several_prompts_in_one_step():
    made = steps("llama-3.1-8b", 1, lambda problem: problem.flops())
    one, three = made.mixed(100, 0, 8, 500), made.mixed(100, 0, 8, 500, prompts=3)
    assert three.tokens == 308
    attention = [next(p.us.mid for p in step.parts if p.operator == "prefill_attention") for step in (one, three)]
    assert attention[1] == pytest.approx(3 * attention[0])


def test_the_rows_of_a_phase_are_those_of_the_plan():
    model = find_model("qwen3-30b-a3b")
    d = Deployment(model, H200, 2, quantization="fp8_block")
    scenario = d.scenario(isl=700, osl=1, batches=(4,), prefill_batch=2)
    whole = plan(model, H200, scenario)
    assert step_rows(model, H200, scenario, "prefill") == whole.step("prefill", 2)
    assert step_rows(model, H200, scenario, "decode") == whole.step("decode", 4)
    assert step_rows(model, H200, scenario, "denoise") == []
    made = Steps(d, Estimator(H200))
    assert made.weight_bytes == whole.weight_bytes
    assert made.cache_bytes(100) == cache_bytes(model, "bfloat16", 100, 2)
    assert Steps(Deployment(model, H200, 2, kv_dtype="fp8"), Estimator(H200)).cache_bytes(100) == made.cache_bytes(100) / 2


def test_a_step_is_planned_once_and_its_phase_alone(monkeypatch):
    planned, drafted = [], []
    plain_rows, plain_draft = steps_module.step_rows, planner._ends
    monkeypatch.setattr(steps_module, "step_rows", lambda *given: planned.append(given[-1]) or plain_rows(*given))
    monkeypatch.setattr(planner, "_ends", lambda model, step, sampled: drafted.append(step.phase) or plain_draft(model, step, sampled))
    made = Steps(Deployment(find_model("qwen3-8b"), H200), Estimator(H200))
    made.decode(4, 1000)
    assert (planned, drafted) == (["decode"], ["decode"]), "no prompt is drafted for a decode step"
    made.mixed(252, 0, 4, 1000)
    made.mixed(508, 0, 4, 1000)
    assert planned.count("decode") == 1, "a step that decodes the same sequences beside a prompt has those rows"


def test_shares_are_of_time_and_of_energy():
    def launch(problem):
        measured = problem.operator == "matmul"
        one = Estimator(H200).launch(problem)
        return Estimate(one.us, Origin.MEASURED if measured else Origin.MODELLED, "", one.joules, Origin.MEASURED)

    step = Steps(Deployment(find_model("llama-3.1-8b"), H200), SimpleNamespace(launch=launch), host_us=Range(100, 200, 300)).decode(8, 1000)
    matmuls = sum(p.us.mid for p in step.parts if p.operator == "matmul")
    assert step.time_shares[Origin.MEASURED] == pytest.approx(matmuls / step.us.mid)
    assert step.energy_shares[Origin.MEASURED] == 1
    assert step.us.mid == pytest.approx(sum(p.us.mid for p in step.parts) + 200)
    assert next(iter(step.by_operator())) == "matmul"
    drafted = step.with_drafts(step, 0.5)
    assert drafted.us.mid == pytest.approx(1.5 * step.us.mid - 100)
    assert drafted.joules.mid == pytest.approx(1.5 * step.joules.mid)
    assert drafted.time_shares[Origin.MEASURED] < step.time_shares[Origin.MEASURED]


def test_what_cannot_be_planned():
    with pytest.raises(UsageError, match="heads"):
        Steps(Deployment(find_model("llama-3.1-8b"), H200, 3), Estimator(H200)).decode(1, 10)
