"""The estimator of a chip: what is there is used in order, said, and never taken for what it is not."""

import dataclasses
import json

import pytest

from klab.harness.catalog import find_chip
from klab.harness.choose.choose import choose
from klab.harness.choose.profile import write_text
from klab.harness.cost.estimate import Origin
from klab.harness.cost.known import Interpolated, Known
from klab.harness.cost.own import WORTH_KEEPING, facts_of
from klab.harness.cost.ranges import Range
from klab.harness.cost.sources import estimator_for
from klab.harness.plan.communication import Collective, Point, Table, modelled
from klab.harness.store.read import iter_results
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul
from klab.kernels.norm.problem import Norm
from tests.harness.made_results import contest, made

H200, B200 = find_chip("h200"), find_chip("b200")


def stored(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("results"), contest())


def test_own_results_are_used_at_their_shapes_and_between(results):
    whole = estimator_for(H200, results=[results], reference=False)
    assert any("measured problems of NVIDIA H200" in note for note in whole.notes)
    choices = {choice.wanted.problem_key: choice for choice in choose(contest(), None, chip="h200").choices}
    at = DecodeAttention((16384,) * 64, heads=16, kv_heads=8, head_dim=128)
    seen = choices[at.key].evidence
    found = whole.launch(at)
    assert (found.us.low, found.us.mid, found.us.high) == (seen.interval_us[0], seen.median_us, seen.interval_us[1])
    assert found.origin is found.energy_origin is Origin.MEASURED and found.joules.mid == seen.energy_j
    assert found.kernel == choices[at.key].kernel and dict(found.config) == dict(choices[at.key].config)
    between = whole.launch(Matmul(200, 2048, 1024))
    low, high = (choices[Matmul(m, 2048, 1024).key].evidence.median_us for m in (64, 512))
    assert between.origin is Origin.MEASURED and min(low, high) < between.us.mid < max(low, high) * 1.1 and between.us.doubt > 0.02


def test_what_nobody_measured_is_modelled(results):
    found = estimator_for(H200, results=[results], reference=False).launch(Norm(64, 4096))
    assert found.origin is Origin.MODELLED and "no norm is known" in found.how


def test_results_of_another_chip_and_other_kinds_are_not_its_own(tmp_path):
    rows = [made(Matmul(m, 2048, 1024), chip="cpu") for m in (1, 64)]
    rows += [made(Matmul(64, 2048, 1024), level_us=1.0, kind="reference"), made(Matmul(64, 2048, 1024), level_us=1.0, kind="modelled")]
    whole = estimator_for(H200, results=[stored(tmp_path / "r", rows)], reference=False)
    assert whole.launch(Matmul(64, 2048, 1024)).origin is Origin.MODELLED and whole.sources == ()
    assert any("no measurement of klab's own of h200" in note for note in whole.notes)


def test_unchecked_failed_and_throttled_rows_are_no_facts(tmp_path):
    problem = Matmul(64, 2048, 1024)
    rows = [made(problem, level_us=5.0, error=None, checks=0), made(problem, "triton_x", level_us=4.0, marked=(1,) * 20)]
    assert estimator_for(H200, results=[stored(tmp_path / "r", rows)], reference=False).sources == ()


def test_an_empty_list_means_no_results_and_a_missing_folder_is_said():
    assert estimator_for(H200, results=[], reference=False).sources == ()
    with pytest.raises(UsageError, match="does not exist"):
        estimator_for(H200, results=["nowhere"], reference=False)


def test_spoilt_lines_are_said_and_stop_nothing(tmp_path):
    folder = stored(tmp_path / "r", contest()[:12])
    with (folder / "rows.jsonl").open("a") as file:
        file.write("{}\n")
    whole = estimator_for(H200, results=[folder], reference=False)
    assert whole.sources and any("1 skipped" in note for note in whole.notes)


def test_a_profile_stands_before_the_results(tmp_path, results):
    problem = Matmul(64, 2048, 1024)
    slow = choose([made(problem, "cuda_mma", level_us=500.0)], None, chip="h200")
    path = tmp_path / "profile.json"
    write_text(path, slow.to_text())
    whole = estimator_for(H200, results=[results], profile=path, reference=False)
    assert whole.launch(problem).us.mid == pytest.approx(500, rel=0.1) and whole.launch(problem).kernel == "matmul/cuda_mma"
    assert whole.launch(Matmul(512, 2048, 1024)).kernel != "matmul/cuda_mma" and any(str(path) in note for note in whole.notes)
    with pytest.raises(UsageError, match="says nothing of b200"):
        estimator_for(B200, results=[], profile=path, reference=False)
    with pytest.raises(UsageError, match="does not exist"):
        estimator_for(H200, results=[], profile=tmp_path / "none.json", reference=False)


def test_by_energy_other_kernels_are_taken(tmp_path):
    problem = Matmul(64, 2048, 1024)

    def row(kernel, us, joules):
        return made(
            problem, kernel, level_us=us, noise=0.001, energy_j=joules, energy_ci_low_j=0.99 * joules, energy_ci_high_j=1.01 * joules
        )

    folder = stored(tmp_path / "r", [row("triton_fast", 80.0, 0.05), row("triton_frugal", 120.0, 0.03)])
    kernels = {o: estimator_for(H200, results=[folder], reference=False, objective=o).launch(problem).kernel for o in ("latency", "energy")}
    assert kernels == {"latency": "matmul/triton_fast", "energy": "matmul/triton_frugal"}


def test_choices_of_operators_that_are_gone_and_of_narrower_formats(results):
    choices = list(choose(contest(), None, chip="h200").choices)
    gone = dataclasses.replace(choices[0], wanted=dataclasses.replace(choices[0].wanted, operator="no_such_operator"))
    changed = dataclasses.replace(choices[0], wanted=dataclasses.replace(choices[0].wanted, problem={"no_field": 1}))
    assert facts_of([gone, changed]) == []
    narrow = dataclasses.replace(choices[0], instead="scaled_matmul 1x1x1 fp8_block", stale=True)
    assert "as scaled_matmul" in facts_of([narrow])[0].how and "older code" in facts_of([narrow])[0].how


def links(tmp_path, chip="h200", points=((4096, 20.0), (1 << 20, 40.0))):
    table = Table(chip, "nccl", tuple(Point("all_reduce", 8, size, us, 0.9 * us, 1.2 * us, 20) for size, us in points), {})
    path = tmp_path / f"{chip}.json"
    path.write_text(json.dumps(table.to_json()))
    return path


def test_measured_collectives_between_their_sizes_and_the_model_beyond(tmp_path):
    whole = estimator_for(H200, results=[], reference=False, table=links(tmp_path))
    found = whole.collective(Collective("all_reduce", 8, 1 << 16))
    assert found.origin is Origin.MEASURED and found.us.mid == pytest.approx(20 * 2**0.5, rel=1e-6)
    assert (found.us.low / found.us.mid, found.us.high / found.us.mid) == pytest.approx((0.9, 1.2))
    assert found.joules.mid > 0 and found.energy_origin is Origin.MODELLED
    assert whole.collective(Collective("all_reduce", 8, 4096)).us.mid == 20
    for other in (Collective("all_reduce", 8, 1 << 24), Collective("all_reduce", 4, 1 << 16), Collective("all_gather", 8, 1 << 16)):
        said = whole.collective(other)
        assert said.origin is Origin.MODELLED and said.us.mid == modelled(other, H200.link_gb_per_s).us
    with pytest.raises(UsageError, match="says nothing of b200"):
        estimator_for(B200, results=[], reference=False, table=links(tmp_path))


def test_published_tables_come_after_own_results(monkeypatch, results):
    published = Interpolated([Known(p, Range(1, 2, 3), Origin.REFERENCE) for p in (Matmul(64, 2048, 1024), Norm(64, 4096))], H200)
    asked = []

    def sources_for(chip, reference, notes):
        asked.append(reference)
        notes.append("published tables")
        return [published]

    monkeypatch.setattr("klab.harness.cost.reference_source.sources_for", sources_for)
    whole = estimator_for(H200, results=[results], reference=True)
    assert whole.launch(Matmul(64, 2048, 1024)).origin is Origin.MEASURED and whole.launch(Norm(64, 4096)).origin is Origin.REFERENCE
    estimator_for(H200, results=[])
    estimator_for(H200, results=[], reference=False)
    assert asked == [True, None] and whole.notes[-1] == "published tables"


def test_a_large_store_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    problem = Matmul(64, 2048, 1024)
    folder = stored(tmp_path / "r", [made(problem, config={"n": n}, level_us=50.0 + n, noise=0.001) for n in range(WORTH_KEEPING)])
    reads = []
    whole = "klab.harness.cost.own.iter_results"
    monkeypatch.setattr(whole, lambda files, report, real=iter_results: reads.append(1) or real(files, report))
    first, second = (estimator_for(H200, results=[folder], reference=False) for _ in range(2))
    assert len(reads) == 1 and first.launch(problem) == second.launch(problem) and first.notes == second.notes
    assert estimator_for(B200, results=[folder], reference=False).sources == () and len(reads) == 2
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(made(problem, config={"n": -1}, level_us=10.0, noise=0.001).to_json()) + "\n")
    assert estimator_for(H200, results=[folder], reference=False).launch(problem).us.mid < 11 and len(reads) == 3

    def gone(item):
        raise KeyError(item[0])

    monkeypatch.setattr("klab.harness.cost.own._from_json", gone)
    assert estimator_for(H200, results=[folder], reference=False).launch(problem).us.mid < 11 and len(reads) == 4
