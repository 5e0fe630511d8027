"""The answer of klab place, and the verb."""

import json
import math
import sys
from pathlib import Path

import pytest
from made_sides import ASKED, CARD, H200, MODEL
from typer.testing import CliRunner

from klab.harness.catalog import find_chip, find_model
from klab.harness.cli.main import build_app
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.place import Demand
from klab.harness.cost.placement import Question, place
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.side_jobs import sides_of_all
from klab.harness.cost.sides import Builder
from klab.harness.cost.staffing import Pool, Terms, fleet_of
from klab.harness.cost.transfer import link_between, transfer
from klab.harness.cost.workload import Deployment, Workload
from klab.kernels.errors import KlabError, UsageError


def test_bad_demands_are_refused():
    for wrong, says in (
        ({"rate_per_s": 0.0}, "--rate"),
        ({"rate_per_s": math.nan}, "--rate"),
        ({"rate_per_s": 1.0, "objective": "fun"}, "--objective"),
        ({"rate_per_s": 1.0, "machine_gpus": 0}, "--machine"),
        ({"rate_per_s": 1.0, "link_gb_per_s": -1.0}, "--link"),
    ):
        with pytest.raises(UsageError, match=says):
            Demand(ASKED, **wrong)
    with pytest.raises(UsageError, match="nothing to decode"):
        Demand(Workload(100, 1), 1.0)
    with pytest.raises(UsageError, match="no language model"):
        Question(find_model("flux.1-dev"), [H200], Demand(ASKED, 1.0), {})
    with pytest.raises(UsageError, match="twice"):
        Question(MODEL, [H200, H200], Demand(ASKED, 1.0), {})


def test_real_points_agree_with_the_search():
    """The winner of a whole answer, put together again from its parts."""
    small = find_model("qwen3-8b")
    terms = {"h200": Terms(Range(2.0, 4.0, 8.0), 1.73), "decode-card": Terms(Range.exact(1.0), 1.0)}
    chips = [H200, find_chip(CARD)]
    w = Workload(4096, 512, slo_ttft_s=1.0, slo_tpot_s=0.012)
    asked = Question(small, chips, Demand(w, 40.0), terms, tps=(1, 2), host_us=ZERO)
    answer = place(asked, {chip.name: Estimator(chip) for chip in chips})
    best = answer.ranking.winner
    assert best.kind == "apart, two chips" and best.shape == (("prefill", "h200"), ("decode", "decode-card"))
    assert answer.label is Origin.MODELLED and any("datasheet" in note for note in answer.notes)
    first, second = best.pools
    way = transfer(small, "bfloat16", 4096, first.side.deployment.tp, second.side.deployment.tp, link_between(*chips))
    assert best.transfer == way and best.ttft_s.mid == pytest.approx(first.point.ttft_s.mid + best.exposed_s.mid)
    rebuilt = fleet_of((Pool(first.side, first.point, 40.0), Pool(second.side, second.point, 40.0)), asked.demand, terms)
    assert rebuilt == best.fleet and best.fleet.usd_per_hour.mid == 4.0 * best.fleet.gpus["h200"].mid + best.fleet.gpus["decode-card"].mid
    assert all(pool.replicas * pool.point.requests_per_s.mid >= 40.0 for pool in best.pools)
    assert [rank.winner.value for rank in answer.by_count.values()] == sorted(rank.winner.value for rank in answer.by_count.values())
    assert answer.verdict.startswith(("Settled", "It hangs", "Leaning", "Open")) and answer.reasons
    told = {one.role: one.side.deployment.chip.name for one in reversed(answer.roles)}
    assert told["prefill"] == "h200" and told["decode"] == "decode-card"
    assert {one.what for one in answer.sensitivities} >= {"price of h200", "prompt length", "rate", "TTFT allowed", "TPOT allowed"}


def test_a_process_per_chip_says_the_same(monkeypatch):
    monkeypatch.delitem(sys.modules, "duckdb", raising=False)
    chips = [H200, find_chip(CARD)]
    w = Workload(512, 64, slo_tpot_s=0.005)
    like = Deployment(find_model("qwen3-0.6b"), H200, memory_share=0.05)
    made = []
    for jobs in (1, 2):
        builder = Builder({chip.name: Estimator(chip) for chip in chips})
        made.append((*sides_of_all(chips, (1, 5), like, w, builder, jobs), builder.estimators["h200"].answers))
    assert made[0] == made[1] and len(made[0][0]) == 2 and "tensor parallelism of 5" in made[0][1][0]
    assert len(made[1][2][0]) > 20


def test_nothing_is_forked_beside_a_reader_of_tables(monkeypatch):
    """A fork lacks the threads of DuckDB: a second answer in one process would never end."""
    monkeypatch.setitem(sys.modules, "duckdb", object())
    monkeypatch.setattr("klab.harness.cost.side_jobs.ProcessPoolExecutor", lambda *_: pytest.fail("forked"))
    chips = [H200, find_chip(CARD)]
    builder = Builder({chip.name: Estimator(chip) for chip in chips})
    like = Deployment(find_model("qwen3-0.6b"), H200, memory_share=0.05)
    assert len(sides_of_all(chips, (1,), like, Workload(512, 64), builder, 2)[0]) == 2


def klab(*arguments):
    return CliRunner().invoke(
        build_app(), ["place", "-m", "qwen3-0.6b", "--isl", "2048", "--osl", "64", "--chunk", "1024", "--reference", "no", *arguments]
    )


def test_the_verb():
    ran = klab("--chips", f"h200,{CARD}", "-p", "decode-card=1", "--rate", "300", "--tp", "1", "--slo-tpot", "20ms", "--json")
    assert ran.exit_code == 0, ran.output
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    head, options = lines[0], [line for line in lines if line["type"] == "option"]
    assert head["type"] == "placement" and head["label"] == "modelled" and head["winner"]["value"] == options[0]["value"]
    assert [option["value"] for option in options] == sorted(option["value"] for option in options)
    assert {line["type"] for line in lines} == {"placement", "option", "role", "sensitivity", "note"}
    assert all(option["label"] == option["energy_label"] == "modelled" for option in options)


def test_tables_that_were_asked_for_are_not_asked_of_a_datasheet(monkeypatch):
    """Nobody publishes measurements of a chip that is not there."""
    asked = {}
    monkeypatch.setattr(
        "klab.harness.cost.sources.estimator_for", lambda chip, **given: asked.update({chip.name: given["reference"]}) or Estimator(chip)
    )
    ran = klab("--chips", f"h200,{CARD}", "-p", "decode-card=1", "--rate", "300", "--tp", "1", "--reference", "tables")
    assert ran.exit_code == 0 and asked == {"h200": Path("tables"), "decode-card": False}


def test_the_verb_for_people():
    ran = klab("--chips", "h200", "--rate", "300", "--tp", "1", "--slo-ttft", "1s", "--slo-tpot", "1us")
    assert ran.exit_code == 1 and "No arrangement" in ran.stdout and "times what is allowed" in ran.stdout
    ran = klab("--chips", "h200", "--rate", "300", "--tp", "1", "--objective", "energy")
    assert ran.exit_code == 0 and "What flips it" in ran.stdout and "Whole numbers" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--chips", "h20", "--rate", "1"), "did you mean h200"),
        (("--chips", "h200", "--rate", "-1"), "--rate is a positive"),
        (("--chips", "h200", "--rate", "1", "--price", "h200=-2"), "positive number"),
        (("--chips", "h200", "--rate", "1", "--price", "b200=2"), "b200 is not among"),
        (("--chips", "h200", "--rate", "1", "--price", "2"), "CHIP=VALUE"),
        (("--chips", CARD, "--rate", "1"), "no on_demand price for chip decode-card"),
        (("--chips", CARD, "--rate", "1", "--price", "decode-card=2"), "nothing here both prefills and decodes"),
        (("--chips", "h200", "--rate", "1", "--slo-tpot", "soon"), "is not a positive time"),
        (("--chips", "h200", "--rate", "1", "--tp", "5"), "does not divide"),
        (("--chips", "h200", "--rate", "1", "--quantization", "fp3"), "quantization is one of"),
        (("--chips", "h200", "--rate", "1", "--kw-per-gpu", "h200=0"), "--kw-per-gpu"),
        (("--chips", "h200", "--rate", "1", "--contract", "stolen"), "--contract is"),
        (("--chips", "h200", "--rate", "1", "--host-us", "inf"), "--host-us"),
        (("--chips", "h200", "--rate", "1", "--kw-per-gpu", "h200=inf"), "--kw-per-gpu"),
        (("--chips", "h200", "--rate", "1", "--isl", "90000000"), "exceed"),
    ],
)
def test_bad_input_gets_one_line(arguments, says):
    ran = klab(*arguments)
    assert isinstance(ran.exception, KlabError) and ran.exception.exit_code == 2
    assert says in str(ran.exception) and "\n" not in str(ran.exception)
