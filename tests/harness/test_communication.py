"""Collectives: the model behaves, tables interpolate and say what they are, and ranks on this CPU are really measured."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.harness.catalog import find_chip, find_model
from klab.harness.measure import communication as ranks
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.communication import (
    KINDS,
    Collective,
    Point,
    Table,
    exchanges,
    messages,
    modelled,
    read_table,
    sweep,
    total_us,
)  # fmt: skip
from klab.kernels.errors import CannotMeasure, UsageError

H200 = find_chip("h200")


@given(kind=st.sampled_from(KINDS), gpus=st.integers(2, 16), size=st.integers(1, 1 << 30))
def test_the_model_grows_with_the_message_and_never_beats_the_wire(kind, gpus, size):
    one, more = (modelled(Collective(kind, gpus, s), 450.0) for s in (size, 2 * size))
    assert one.origin == "modelled" and 6 < one.us <= more.us
    # In-switch reduction sends less than a ring's 2 (n - 1)/n: at least the tensor itself goes up once.
    least = size * (gpus - 1) / gpus / 450e3
    assert one.us >= least


def test_the_model_is_what_the_sources_say():
    # NCCL's maintainer: all-reduce of a large tensor on 8 H100 reaches a bus bandwidth of 480 GB/s, the others about 370.
    big = Collective("all_reduce", 8, 4 << 30)
    assert big.wire_bytes / modelled(big, 450.0).us / 1e3 == pytest.approx(480, rel=0.01)
    big = Collective("all_gather", 8, 4 << 30)
    assert big.wire_bytes / modelled(big, 450.0).us / 1e3 == pytest.approx(370, rel=0.01)
    assert modelled(Collective("all_gather", 2, 8), 450.0).us == pytest.approx(6.6 + 0.6, rel=0.01)


def table():
    points = (Point("all_reduce", 2, 1000, 10.0, 9.0, 11.0, 15), Point("all_reduce", 2, 100_000, 40.0, 39.0, 41.0, 15))
    return Table("cpu", "gloo", points, {"torch": "2.13.0"})


def test_a_table_interpolates_between_its_sizes_and_says_so():
    assert table().expected(Collective("all_reduce", 2, 1000), None).us == 10.0
    between = table().expected(Collective("all_reduce", 2, 10_000), None)
    assert between.us == pytest.approx(20.0) and between.origin == "measured" and "between" in between.how
    for other in (Collective("all_reduce", 4, 1000), Collective("all_reduce", 2, 10**7), Collective("all_gather", 2, 1000)):
        assert table().expected(other, 450.0).origin == "modelled"
        with pytest.raises(UsageError, match="no link"):
            table().expected(other, None)
    us, share = total_us({Collective("all_reduce", 2, 1000): 3, Collective("all_gather", 2, 1000): 1}, table(), 450.0)
    assert 0.5 < share < 1 and us > 30


def test_a_table_survives_its_file_and_a_foreign_one_is_named(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table().to_json()))
    assert read_table(path) == table()
    for text in ("{}", "[]", "not json", '{"schema": 1}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="klab communication"):
            read_table(path)
    path.write_text(json.dumps(table().to_json() | {"schema": 9}))
    with pytest.raises(UsageError, match="schema 9"):
        read_table(path)


def test_the_messages_are_the_plans():
    model = find_model("deepseek-v3")
    made = plan(model, H200, scenario_for(model, H200, tp=8, batches=(4,), expert_parallel=True))
    decode = messages(made)["decode", 4]
    # Two per layer, and one behind the embedding: 4 tokens x 7168 x 2 bytes.
    assert decode[Collective("all_reduce", 8, 4 * 7168 * 2)] == 2 * 61 + 1
    # The vocabulary of 129280 is padded to 64 x 8 x 253.
    assert decode[Collective("all_gather", 8, 4 * 129536 * 2)] == 1
    assert exchanges(made)["decode", 4] == {Collective("all_to_all", 8, 4 * 8 * 7168 * 2 // 8): 2 * 58}
    assert not messages(plan(model, H200, scenario_for(model, H200, batches=(4,))))


def test_ranks_on_this_machine_are_checked_and_timed():
    points = ranks.measure([Collective(kind, 2, 4096) for kind in KINDS], backend="gloo")
    assert [p.kind for p in points] == list(KINDS)
    assert all(0 < p.ci_low_us <= p.median_us <= p.ci_high_us for p in points)


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(CannotMeasure, match="a rank of 2"):
        ranks.measure([Collective("all_reduce", 2, 64)], backend="no-such-backend")


def test_impossible_requests():
    for arguments in (("all_reduce", 1, 8), ("broadcast", 2, 8), ("all_gather", 2, 0)):
        with pytest.raises(UsageError):
            Collective(*arguments)
    assert {one.kind for one in sweep(4)} == set(KINDS)


@pytest.mark.parametrize(("words", "says"), [
    (("-c", "h200"), "two or more"),
    (("-c", "cpu", "--gpus", "2"), "no link_gb_per_s"),
    (("-c", "h200", "--gpus", "8", "--backend", "gloo"), "--chip cpu"),
    (("-c", "h200", "--gpus", "8", "--backend", "mpi"), "--backend"),
])  # fmt: skip
def test_the_verb_refuses_in_one_line(words, says):
    from typer.testing import CliRunner

    from klab.harness.cli.main import build_app

    found = CliRunner().invoke(build_app(), ["communication", *words])
    assert isinstance(found.exception, UsageError | CannotMeasure) and says in str(found.exception)


def test_the_verb_models_without_gpus():
    words = [sys.executable, "-m", "klab.harness.cli", "communication", "-c", "h200", "--gpus", "8", "--backend", "none", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(sweep(8)) and {row["origin"] for row in rows} == {"modelled"}
