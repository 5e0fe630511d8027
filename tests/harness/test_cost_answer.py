"""The answer of `klab cost`: held against trying everything, and every remedy against following it."""

import dataclasses
import json
import re
import shlex

import pytest
from made_results import made

from klab.harness.catalog.architecture import Note
from klab.harness.catalog.chips import find_chip
from klab.harness.catalog.models import find_model, load_models
from klab.harness.catalog.prices import Price
from klab.harness.cost.accuracy import FormatError, format_errors
from klab.harness.cost.answer import Question, answer, choose, formats_for, native, options_of, stored_format
from klab.harness.cost.estimate import Estimate, Estimator, Origin
from klab.harness.cost.explain import commands, missing, spent, step_times
from klab.harness.cost.fit import least_tp
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.serving import meets, operating_points
from klab.harness.cost.sources import estimator_for
from klab.harness.cost.workload import Workload
from klab.harness.plan import plan, scenario_for
from klab.harness.store.result import Status
from klab.kernels.errors import UsageError
from klab.kernels.scaled_matmul.problem import ScaledMatmul

SMALL, H200 = find_model("qwen3-0.6b"), find_chip("h200")
PRICE = Price("h200", "given", 2.0, 3.0, 5.0, "2026-11", "here", "given")
SHORT = Workload(isl=512, osl=64, slo_ttft_s=0.5, slo_tpot_s=0.002)
# An H200 with so little memory that a search over everything is short.
TINY = dataclasses.replace(H200, memory_bytes=int(2.6e9))


def asked(model=SMALL, chip=TINY, workload=SHORT, **changes):
    return Question(model, chip, workload, **{"tps": (1, 2), "price": PRICE, "provisioned_kw": 1.73, "host_us": ZERO} | changes)


class Knows:
    """A source that has measured some operators, in no time off the model's."""

    def __init__(self, chip, operators, origin=Origin.MEASURED, joules=True):
        self.estimator, self.operators, self.origin, self.joules = Estimator(chip), operators, origin, joules

    def launch(self, problem):
        if problem.operator not in self.operators:
            return None
        known = self.estimator.launch(problem)
        energy = (known.joules, self.origin) if self.joules else (None, Origin.MODELLED)
        return Estimate(known.us, self.origin, "measured here", *energy, kernel=f"{problem.operator}/best")

    def collective(self, one):
        return None


def everything(question, estimator):
    return [p for o in options_of(question, "", estimator) for p in operating_points(o.steps, question.workload, range(1, 2000))]


@pytest.mark.parametrize("objective", ["cost", "energy", "latency"])
def test_nothing_that_keeps_the_slos_is_better(objective):
    question, estimator = asked(objective=objective), Estimator(TINY)
    found = answer(question, estimator)
    every = [p for p in everything(question, estimator) if meets(p)]
    assert found.feasible and len(every) > 10
    value = {
        "cost": lambda p: p.deployment.tp / p.requests_per_s.mid,
        "energy": lambda p: p.joules_per_request.mid,
        "latency": lambda p: p.tpot_s.mid,
    }[objective]
    best = min(map(value, every))
    # Between powers of two the search does not look, but at the end of the SLOs.
    assert best <= value(found.priced.point) <= best * 1.02
    assert found.priced.meets() and found.chosen.deployment == found.priced.point.deployment


def test_the_front_has_no_beaten_point_and_offline_gives_most():
    found = answer(asked(), Estimator(TINY))
    users = [one.point.tpot_s.mid for one in found.front]
    rates = [one.point.output_tokens_per_s_per_gpu.mid for one in found.front]
    assert users == sorted(users) and rates == sorted(rates) and len(found.front) > 5
    most = max(p.requests_per_s.mid / p.deployment.tp for o in found.options for p in o.points)
    assert found.offline.point.requests_per_s.mid / found.offline.point.deployment.tp == most
    cheap = answer(asked(workload=dataclasses.replace(SHORT, offline=True)), Estimator(TINY))
    assert cheap.priced.point.requests_per_s.mid / cheap.priced.point.deployment.tp == pytest.approx(most)
    assert cheap.priced.money.usd_per_mtok_total.mid < found.priced.money.usd_per_mtok_total.mid


MOST = {"matmul", "decode_attention", "norm", "activation", "rope_cache", "prefill_attention"}


@pytest.mark.parametrize(
    ("knows", "time", "energy"),
    [
        (Knows(H200, MOST), "measured", "measured"),
        (Knows(H200, MOST, joules=False), "measured", "modelled"),
        (Knows(H200, {"decode_attention", "norm"}), "modelled", "modelled"),
        (Knows(H200, MOST, Origin.REFERENCE), "reference", "reference"),
    ],
)
def test_a_total_is_called_what_nine_tenths_of_it_are(knows, time, energy):
    question = asked(tps=(1,))
    found = answer(question, Estimator(TINY, [knows]))
    assert (found.label, found.energy_label) == (time, energy)
    # Of a model that is not wholly understood nothing is measured.
    unknown = Note("layer_types", "not understood", 0.99, "warning")
    part = dataclasses.replace(question, model=dataclasses.replace(SMALL, notes=(unknown,)))
    assert answer(part, Estimator(TINY, [knows])).label == "modelled"


def test_objectives_prefer_different_points():
    some = answer(asked(), Estimator(TINY)).priced.point
    alone = dataclasses.replace(some, deployment=dataclasses.replace(some.deployment, tp=1))

    def one(rate, joules, tpot_s, of=alone):
        return dataclasses.replace(of, requests_per_s=Range.exact(rate), joules_per_request=Range.exact(joules), tpot_s=Range.exact(tpot_s))

    most, least, fast = one(10, 50, 0.03), one(8, 30, 0.02), one(2, 90, 0.01)
    points = [least, fast, most]
    assert [choose(points, objective) for objective in ("cost", "energy", "latency")] == [most, least, fast]
    # Two GPUs with less than twice the requests cost more, and of equals the smaller replica is taken.
    two = dataclasses.replace(some.deployment, tp=2)
    assert choose([most, one(19, 20, 0.01, dataclasses.replace(some, deployment=two))], "cost") is most
    assert choose([one(20, 50, 0.03, dataclasses.replace(some, deployment=two)), most], "cost") is most
    assert choose([], "cost") is None


def test_the_host_counts_as_modelled():
    knows = Knows(H200, MOST)
    slow = asked(tps=(1,), host_us=Range(500, 1000, 2000))
    found = answer(slow, Estimator(TINY, [knows]))
    assert found.label == "modelled" and any("1000 us" in note for note in found.notes)
    assert {s.operator: s for s in spent(found.priced.point)}["host"].share > 0.1


def test_where_the_time_goes_adds_up():
    knows = Knows(H200, {"matmul", "norm"})
    point = answer(asked(host_us=Range(0, 20, 50), tps=(2,)), Estimator(TINY, [knows])).priced.point
    parts = spent(point)
    assert sum(s.share for s in parts) == pytest.approx(1)
    assert sum(s.seconds.mid for s in parts) == pytest.approx(1 / point.requests_per_s.mid)
    assert sum(s.joules.mid for s in parts) == pytest.approx(point.joules_per_request.mid)
    assert {s.operator for s in parts} > {"matmul", "norm", "all_reduce", "host", "decode_attention"}
    (matmul,) = [s for s in parts if s.operator == "matmul"]
    assert matmul.origins[Origin.MEASURED] == 1 and matmul.kernels == ("matmul/best",)
    lacking = missing(point)
    host = next(s.share for s in parts if s.operator == "host")
    assert sum(m.share for m in lacking) == pytest.approx(1 - point.time_shares[Origin.MEASURED] - host)
    assert not {m.operator for m in lacking} & {"matmul", "norm", "host"}
    assert [m.share for m in lacking] == sorted((m.share for m in lacking), reverse=True)


@pytest.mark.parametrize(
    "workload",
    [
        SHORT,
        Workload(isl=3000, osl=100, chunk_tokens=1024, prefix_hit=0.2, slo_tpot_s=0.01),
        dataclasses.replace(SHORT, draft_tokens=2),
        Workload(isl=32, osl=8, slo_tpot_s=0.02),  # many prompts share a step
    ],
)
def test_the_commands_measure_what_is_missing(workload, tmp_path):
    """Results of the plans that the commands name make nine tenths of the answer measured (all but what drafting costs); a second time
    where the better times moved the answer to another load.
    """
    question, model = asked(workload=workload, tps=(1,)), Estimator(H200)
    point = first = answer(question, estimator_for(H200, results=[], reference=False)).priced.point
    rows = []
    for _ in range(2):
        lines = commands(point, "qwen3-0.6b", "h200", missing(point))
        assert lines and all(line.startswith("klab run --model qwen3-0.6b --chip h200") for line in lines)
        for line in lines:
            told = dict(re.findall(r"--(isl|osl|batch|tp) (\S+)", line))
            fields = dict(one.split("=") for one in re.findall(r"--with (\S+)", line))
            batches = tuple(map(int, told.get("batch", "1").split(",")))
            lengths = {"isl": int(told["isl"]), "osl": int(told["osl"]), "batches": batches, "tp": int(told["tp"])}
            made_plan = plan(SMALL, H200, scenario_for(SMALL, H200, **lengths, **{name: int(value) for name, value in fields.items()}))
            phase = re.search(r"--phase (\w+)", line)
            for row in made_plan.rows:
                if row.problem and (phase is None or row.phase == phase[1]):
                    us = model.launch(row.problem).us.mid
                    rows.append(made(row.problem, "triton_x", level_us=us, noise=0.002))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in {r.key: r for r in rows}.values()))
        point = answer(question, estimator_for(H200, results=[tmp_path], reference=False)).priced.point
        drafts = sum(s.share for s in spent(point) if s.operator == "draft")
        if point.time_shares[Origin.MEASURED] > 0.95 * (1 - drafts):
            break
    assert point.time_shares[Origin.MEASURED] > 0.95 * (1 - drafts)
    assert point.tpot_s.mid == pytest.approx(first.tpot_s.mid, rel=0.15)


def test_the_commands_name_the_very_steps():
    chunked = Workload(isl=3000, osl=100, chunk_tokens=1024, prefix_hit=0.2, draft_tokens=2, slo_tpot_s=0.01)
    point = answer(asked(workload=chunked, tps=(1,), kv_dtype="fp8"), Estimator(TINY)).priced.point
    prefill, decode = commands(point, "qwen3-0.6b", "h200", missing(point))
    # 600 of 3000 tokens are cached; the middle chunk of 1024 has half of the other 1376 before it.
    assert "--isl 2312 " in prefill and prefill.endswith("--with kv_dtype=float8_e4m3fn --with prefix_len=1288 --phase prefill")
    assert "--isl 3000 --osl 100 " in decode and decode.endswith("--with kv_dtype=float8_e4m3fn --with q_len=3 --phase decode")


def test_collectives_are_measured_with_their_own_verb():
    point = answer(asked(tps=(2,)), Estimator(TINY)).priced.point
    lines = commands(point, "my model.json", "h200", missing(point))
    assert lines[-1].startswith("klab communication --chip h200 --gpus 2 --out ")
    assert shlex.split(lines[0])[3] == "my model.json"


def test_slos_that_nothing_keeps():
    hard = dataclasses.replace(SHORT, slo_tpot_s=1e-4, slo_ttft_s=0.0005)
    found = answer(asked(workload=hard), Estimator(TINY))
    assert not found.feasible and found.priced is not None and not found.priced.meets()
    missed = [max(p.tpot_s.mid / 1e-4, p.ttft_s.mid / 5e-4) for o in found.options for p in o.points]
    p = found.priced.point
    assert max(p.tpot_s.mid / 1e-4, p.ttft_s.mid / 5e-4) == min(missed)
    # The promise that is proposed can be kept, and only just.
    proposed = dict(re.findall(r"--slo-(ttft|tpot) ([\d.]+)ms", found.remedies[0]))
    weaker = dataclasses.replace(hard, slo_ttft_s=float(proposed["ttft"]) / 1e3, slo_tpot_s=float(proposed["tpot"]) / 1e3)
    assert answer(asked(workload=weaker), Estimator(TINY)).feasible
    tighter = dataclasses.replace(weaker, slo_tpot_s=weaker.slo_tpot_s * 0.85)
    assert not answer(asked(workload=tighter), Estimator(TINY)).feasible


def test_a_format_or_a_chip_that_keeps_the_slos_is_named():
    llama = find_model("llama-3.1-8b")
    wide = answer(asked(llama, H200, tps=(1,)), Estimator(H200))
    assert not wide.feasible
    tpot_s = min(p.tpot_s.mid for p in wide.options[0].points) * 0.9
    found = answer(asked(llama, H200, tps=(1,), workload=dataclasses.replace(SHORT, slo_tpot_s=tpot_s)), Estimator(H200))
    named = [line for line in found.remedies if line.startswith("--quantization fp8_block --tp 1 meets")]
    assert not found.feasible and named
    again = asked(llama, H200, tps=(1,), formats=("fp8_block",), workload=dataclasses.replace(SHORT, slo_tpot_s=tpot_s))
    assert answer(again, Estimator(H200)).feasible
    assert any(line.startswith("--chip b200 --tp 1 meets") for line in found.remedies)


def test_a_model_that_does_not_fit():
    llama = find_model("llama-3.1-70b")
    found = answer(asked(llama, H200, tps=(1,)), Estimator(H200))
    assert not found.feasible and found.priced is None and "GB of weights per GPU exceed" in found.options[0].why_not
    assert "--tp 2 holds it: the least of 1, 2, 4, 8, 16, 32, 64, 128" in found.remedies
    assert any(line == "--quantization fp8_block --tp 1 holds it" for line in found.remedies)
    assert not any("mxfp4 --tp 2" in line for line in found.remedies)
    assert answer(asked(llama, H200, tps=(2,)), Estimator(H200)).priced is not None
    # Without a size, the board's are tried, and beyond the board the least that holds it.
    deepseek = find_model("deepseek-v3")
    found = answer(asked(deepseek, H200, tps=(), formats=("",)), Estimator(H200))
    assert [o.deployment.tp for o in found.options] == [1, 2, 4, 8, 16] and found.chosen.deployment.tp == 16
    assert any("as if they were on one board" in note for note in found.notes)
    assert least_tp(lambda tp: asked(deepseek, H200).deployment(tp, "fp8_block"), SHORT) == 8
    # The cache of a long request counts.
    llama_8b, small = find_model("llama-3.1-8b"), dataclasses.replace(H200, memory_bytes=int(20e9))
    sizes = [least_tp(lambda tp: asked(llama_8b, small).deployment(tp, ""), Workload(isl=isl, osl=1)) for isl in (100, 30_000)]
    assert sizes == [1, 2]
    # 16 GPUs would have the memory, and do not divide 40 heads; without a link there is but one.
    maverick, smaller = find_model("llama-4-maverick"), dataclasses.replace(H200, memory_bytes=int(32e9))
    assert least_tp(lambda tp: asked(maverick, smaller).deployment(tp, "fp8_block"), SHORT) is None
    assert least_tp(lambda tp: asked(maverick, H200).deployment(tp, "fp8_block"), SHORT) == 4
    alone = dataclasses.replace(H200, link_gb_per_s=None)
    found = answer(asked(llama, alone, tps=()), Estimator(alone))
    assert found.priced is None and not any(line.startswith("--tp") for line in found.remedies)
    assert "--chip b200 --tp 1 holds it" in found.remedies


def test_a_request_that_does_not_fit_beside_the_weights():
    chip = dataclasses.replace(H200, memory_bytes=int(1.5e9))
    long = Workload(isl=30_000, osl=100)
    found = answer(asked(chip=chip, workload=long, tps=(1,)), Estimator(chip))
    assert found.priced is None and "cache of one request" in found.options[0].why_not
    (line,) = [line for line in found.remedies if "a request of up to" in line]
    tokens = int(re.search(r"up to ([\d,]+)", line)[1].replace(",", ""))
    for osl, fits in ((1, True), (2, False)):
        shorter = Workload(isl=tokens - 1, osl=osl)
        assert (answer(asked(chip=chip, workload=shorter, tps=(1,)), Estimator(chip)).priced is not None) is fits


def test_sizes_that_do_not_divide():
    with pytest.raises(UsageError, match="does not divide"):
        answer(asked(tps=(3,)), Estimator(TINY))
    alone = dataclasses.replace(TINY, link_gb_per_s=None)
    assert [o.deployment.tp for o in answer(asked(chip=alone, tps=()), Estimator(alone)).options] == [1]


def test_a_chip_for_one_phase_alone_is_refused():
    with pytest.raises(UsageError, match=r"not made for prefill: klab place"):
        asked(chip=dataclasses.replace(H200, phases=("decode",)))


def test_formats_beside_one_another():
    errors = {"fp8_block": FormatError(0.02, 0.03, 4, ("cpu",), ("scaled_matmul",), own=True)}
    errors["w4a16"] = FormatError(0.1, 0.2, 1, ("cpu",), ("quantized_matmul",), own=False)
    chip = dataclasses.replace(H200, memory_bytes=int(18.1e9))
    short = Workload(isl=2000, osl=100, slo_tpot_s=0.02)
    question = asked(find_model("llama-3.1-8b"), chip, short, tps=(1,), formats=("", "fp8_block", "w4a16"))
    estimator = Estimator(H200)
    found = answer(question, estimator, errors=errors)
    rows = {format: priced for format, _, priced in found.by_format()}
    assert list(rows) == ["", "fp8_block", "w4a16"] and all(rows.values())
    # The unquantised model is the answer, however much cheaper another format is,
    assert found.chosen.deployment.quantization == "" and rows[""].point is found.priced.point
    assert rows["fp8_block"].money.usd_per_mtok_total.mid < rows[""].money.usd_per_mtok_total.mid
    # unless an error is accepted that it was measured to keep.
    for accepted, expected in ((0.05, "fp8_block"), (0.025, "")):
        found = answer(dataclasses.replace(question, max_error=accepted), estimator, errors=errors)
        assert found.chosen.deployment.quantization == expected
    assert answer(dataclasses.replace(question, max_error=0.05), estimator).chosen.deployment.quantization == ""


def test_errors_of_formats_come_from_valid_rows_and_from_ones_own_shapes_first():
    own, other = ScaledMatmul(8, 256, 256), ScaledMatmul(8, 512, 512)
    rows = [
        made(own, wide_error=0.02, wide_key=own.wide().key),
        made(own, "triton_x", wide_error=0.03, wide_key=own.wide().key),
        made(other, wide_error=0.5, wide_key=other.wide().key),
        made(own, "cuda_wrong", status=Status.INCORRECT, wide_error=0.9, wide_key=own.wide().key),
        made(own, "published", kind="reference", wide_error=0.8, wide_key=own.wide().key),
        made(ScaledMatmul(8, 256, 256, format="int8_row"), wide_error=0.01, wide_key=own.wide().key),
    ]
    found = format_errors(rows, {"fp8_block": [own.key]})
    assert set(found) == {"fp8_block", "int8_row"}
    assert (found["fp8_block"].worst, found["fp8_block"].problems, found["fp8_block"].own) == (0.03, 1, True)
    assert format_errors(rows)["fp8_block"].worst == 0.5 and not found["int8_row"].own


def test_stored_formats():
    stored = {model.name: stored_format(model) for model in load_models()}
    assert stored["deepseek-v3"] == "fp8_block" and stored["llama-3.1-8b"] == ""
    # klab's experts have no mxfp4 with narrow activations; gpt-oss keeps these in 16 bits anyway.
    assert stored["gpt-oss-20b"] == "w4a16_mxfp4" in formats_for(find_model("gpt-oss-20b"))
    for words, expected in (
        ("gptq 4 bits", "w4a16"),
        ("awq 8 bits", "w8a16"),
        ("fbgemm_fp8", "fp8_row"),
        ("fp8", "fp8_tensor"),
        ("odd", ""),
    ):
        assert stored_format(dataclasses.replace(SMALL, quantization=words)) == expected
    assert "w4a16_mxfp4" not in formats_for(SMALL) and "fp8_row" in formats_for(SMALL)
    question = asked()
    assert native(question.deployment(1, "fp8_block")) and not native(question.deployment(1, "nvfp4"))
    assert native(question.deployment(1, "")) and native(question.deployment(1, "w4a16"))


def test_dearer_hours_and_idle_ones():
    one = answer(asked(), Estimator(TINY), [dataclasses.replace(PRICE, contract="owned", low=1.0, mid=1.5, high=2.5)])
    half = one.contracts[0][1]
    assert half.usd_per_mtok_total.mid == pytest.approx(one.priced.money.usd_per_mtok_total.mid / 2)
    idle = answer(asked(workload=dataclasses.replace(SHORT, utilisation=0.5)), Estimator(TINY))
    assert idle.priced.money.usd_per_mtok_total.mid == pytest.approx(2 * one.priced.money.usd_per_mtok_total.mid)
    assert one.priced.efficiency.joules_per_token.mid < idle.priced.efficiency.joules_per_token.mid
    free = answer(asked(price=None), Estimator(TINY))
    assert free.priced.money is None and free.priced.efficiency.joules_per_token == one.priced.efficiency.joules_per_token


def test_latencies_that_hold_in_the_middle_only_are_told():
    found = answer(asked(), Estimator(TINY))
    assert found.feasible and found.at_worst["TPOT"] == found.priced.point.tpot_s.high > SHORT.slo_tpot_s
    loose = answer(asked(workload=dataclasses.replace(SHORT, slo_ttft_s=50.0, slo_tpot_s=5.0)), Estimator(TINY))
    assert loose.feasible and not loose.at_worst


def test_speculation_says_from_where_it_pays():
    found = answer(asked(tps=(1,), workload=dataclasses.replace(SHORT, draft_tokens=3)), Estimator(TINY))
    assert any("3 drafts" in note for note in found.notes) and any("from an acceptance of" in note for note in found.notes)


def test_steps_by_batch_and_context():
    steps = answer(asked(tps=(1,)), Estimator(TINY)).chosen.steps
    found = step_times(steps, SHORT, 4, 16)
    assert [s.phase for s in found] == ["prefill"] + ["decode"] * 9 and found[0].us == steps.prefill(512).us
    times = {(s.batch, s.context): s.us.mid for s in found[1:]}
    assert sorted(times) == [(b, c) for b in (1, 4, 16) for c in (513, 544, 576)]
    assert times[1, 513] < times[4, 513] < times[16, 513] < times[16, 576]
    assert [s.phase for s in step_times(steps, Workload(isl=512, osl=1), 1, 1)] == ["prefill"]
