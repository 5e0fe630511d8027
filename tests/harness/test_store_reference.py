"""Published tables: small ones in the package's layout, written here."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.candidates import why_not
from klab.harness.choose.choose import choose
from klab.harness.choose.goals import judge
from klab.harness.cli.main import build_app
from klab.harness.cost.estimate import Origin
from klab.harness.cost.reference_source import AGAIN, sources_for
from klab.harness.plan import plan
from klab.harness.plan.communication import Collective
from klab.harness.plan.scenario import scenario_for
from klab.harness.store.journal import Journal
from klab.harness.store.query import done_keys, numerics_verified
from klab.harness.store.read import iter_results
from klab.harness.store.reference import Reading, available, links, points, results
from klab.harness.store.reference.columns import Columns
from klab.harness.store.reference.compare import compare
from klab.harness.store.reference.families import FAMILIES
from klab.harness.store.reference.systems import chip_of
from klab.harness.store.reference.tables import inventory, system_of, tables, version_key
from klab.harness.store.reference.traps import FOREIGN, HICCUP, LAUNCHES, MIXED, NO_PROVENANCE, NOT_A_TIME, TOO_FAST, WARM
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import LATENCY
from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.contract import Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.errors import UsageError
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.gated_delta_rule.problem import GatedDeltaRule
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.scaled_matmul.problem import ScaledMatmul
from klab.kernels.weight_only_moe.problem import WeightOnlyMoe

DATABASE = pytest.importorskip("duckdb").connect()

H200, B200 = find_chip("h200"), find_chip("b200")
Rows = Sequence[Mapping[str, Any]]
ENGINES = {"trtllm": "TRTLLM", "sglang": "SGLang", "vllm": "VLLM", "nccl": "TRTLLM"}
DEVICES = {"h200_sxm": "NVIDIA H200", "b200_sxm": "NVIDIA B200", "gb200": "NVIDIA GB200"}


def write(root: Path, place: str, rows: Rows) -> None:
    """`place` is system/folder/engine/version/file; what a row does not say of its origin is filled in."""
    system, _, engine, version, _ = place.split("/")
    origin = {"framework": ENGINES[engine], "version": version, "device": DEVICES[system], "op_name": "op", "kernel_source": "k"}
    path = root / "data" / f"{place}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.with_suffix(".json")
    lines.write_text("\n".join(json.dumps({**origin, **row}) for row in rows))
    DATABASE.execute(f"copy (select * from read_json('{lines}', format='newline_delimited')) to '{path}' (format parquet)")
    lines.unlink()


def gemm(m: int, n: int, k: int, us: float | None, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    return {"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency": None if us is None else us / 1e3, **more}


GEMM = "h200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf"


def bound_us(problem: Problem, chip: Any = H200) -> float:
    peak = chip.peak_tflops[problem.math_dtype] * 1e12
    return max(problem.flops() / peak, problem.bytes_moved() / chip.memory_gb_per_s / 1e9) * 1e6


# Where the tables are, and which version


def test_tables_are_found_where_named_or_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KLAB_REFERENCE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available() is None
    with pytest.raises(UsageError, match="pip install"):
        list(points(H200))
    with pytest.raises(UsageError, match="holds no tables"):
        available(tmp_path)
    write(tmp_path / "systems", GEMM, [gemm(1, 64, 64, 3.0)])
    assert available(tmp_path) == available(tmp_path / "systems") == tmp_path / "systems"
    monkeypatch.setenv("KLAB_REFERENCE", str(tmp_path))
    assert available() == tmp_path / "systems"
    monkeypatch.setenv("KLAB_REFERENCE", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="KLAB_REFERENCE"):
        available()


def test_versions_sort_as_they_were_released() -> None:
    released = ["0.5.6", "0.5.6.post2", "0.5.9", "0.5.14", "1.0.0", "1.3.0rc9", "1.3.0rc20", "1.3.0", "2.23", "2.27.3", "2.29.2"]
    assert sorted(set(released), key=version_key) == released


def test_one_version_is_read_the_declared_one_before_the_newest(tmp_path: Path) -> None:
    for version, us in (("1.3.0rc9", 10.0), ("1.3.0rc20", 20.0), ("1.3.0rc23", 30.0)):
        write(tmp_path, f"h200_sxm/gemm/trtllm/{version}/gemm_perf", [gemm(64, 4096, 4096, us)])
    assert [p.us for p in points(H200, root=tmp_path)] == [30.0]
    declared = tmp_path / "d"
    declared.mkdir()
    (declared / "data").symlink_to(tmp_path / "data")
    pytest.importorskip("yaml")
    (declared / "query_versions.yaml").write_text(
        'defaults: {trtllm: {current: "1.3.0rc9"}}\noverrides: {h200_sxm: {trtllm: {current: "1.3.0rc20"}}}'
    )
    assert [p.us for p in points(H200, root=declared)] == [20.0]
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "data").symlink_to(tmp_path / "data")
    (tmp_path / "e" / "query_versions.yaml").write_text("defaults: [1, 2]")
    with pytest.raises(UsageError, match="list of versions"):
        list(points(H200, root=tmp_path / "e"))


def test_a_chip_without_tables_is_named(tmp_path: Path) -> None:
    write(tmp_path, GEMM, [gemm(1, 64, 64, 3.0)])
    with pytest.raises(UsageError, match="no reference tables of b200; there are some of h200"):
        list(points(B200, root=tmp_path))
    assert system_of("H200", tmp_path) == system_of("h200_sxm", tmp_path) == "h200_sxm"
    (only,) = inventory(tmp_path)
    assert (only.system, only.tables, only.rows, dict(only.engines)) == ("h200_sxm", 1, 1, {"trtllm": "?"})


def test_a_file_that_is_no_table_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "data" / f"{GEMM}.parquet"
    path.parent.mkdir(parents=True)
    path.write_text("no parquet")
    with pytest.raises(UsageError, match="cannot read"):
        list(points(H200, root=tmp_path))
    with pytest.raises(UsageError, match="cannot read"):
        inventory(tmp_path)


# Which problem a row is


def _published(problem: Any, us: float = 100.0) -> tuple[str, dict[str, Any]] | None:
    """The table and the row of a problem, as the package would hold it; None for what it does not measure."""
    ms = us / 1e3
    kv = "fp8" if getattr(problem, "kv_dtype", "") else "bfloat16"
    match problem:
        case Matmul():
            return "gemm/{}/gemm_perf", gemm(problem.m, problem.n, problem.k, us)
        case ScaledMatmul(format="fp8_block" | "nvfp4"):
            return "gemm/{}/gemm_perf", gemm(problem.m, problem.n, problem.k, us, problem.format)
        case PrefillAttention(head_dim=192, causal=True):
            row = {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": problem.heads, "tp_size": 1}
            return "mla/{}/context_mla_perf", {**row, "batch_size": len(problem.q_lens), "isl": problem.q_lens[0], "step": 0, "latency": ms}
        case PrefillAttention(causal=True):
            row = {"num_heads": problem.heads, "num_key_value_heads": problem.kv_heads, "head_dim": problem.head_dim, "beam_width": 1}
            row |= {"attn_dtype": "bfloat16", "kv_cache_dtype": kv, "window_size": problem.window, "batch_size": len(problem.q_lens)}
            return "attention/{}/context_attention_perf", {**row, "isl": problem.q_lens[0], "step": problem.prefixes[0], "latency": ms}
        case PrefillAttention():
            row = {"batch_size": len(problem.q_lens), "isl": problem.q_lens[0], "num_heads": problem.heads, "head_dim": problem.head_dim}
            return "encoder_attention/{}/encoder_attention_perf", {**row, "attn_dtype": "bfloat16", "latency": ms}
        case DecodeAttention():
            row = {"num_heads": problem.heads, "num_key_value_heads": problem.kv_heads, "head_dim": problem.head_dim, "beam_width": 1}
            row |= {"attn_dtype": "bfloat16", "kv_cache_dtype": kv, "window_size": problem.window, "batch_size": problem.batch, "isl": 1}
            return "attention/{}/generation_attention_perf", {**row, "step": problem.max_kv_len - 1, "latency": ms}
        case LatentAttention():
            row = {"mla_dtype": "bfloat16", "kv_cache_dtype": kv, "num_heads": problem.heads, "batch_size": problem.batch, "isl": 1}
            return "mla/{}/generation_mla_perf", {**row, "step": problem.max_kv_len - 1, "latency": ms}
        case BatchedMatmul():
            name = "mla_gen_pre" if problem.n == 512 else "mla_gen_post"
            return "mla_bmm/{}/mla_bmm_perf", {
                "bmm_dtype": "bfloat16", "op_name": name, "num_tokens": problem.m, "num_heads": problem.batch, "latency": ms
            }  # fmt: skip
        case FusedMoe() | WeightOnlyMoe():
            names = {"": "bfloat16", "mxfp4": "w4a16_mxfp4", "int4": "int4_wo"}
            row = {
                "moe_dtype": names.get(problem.format, problem.format),
                "num_tokens": problem.tokens,
                "hidden_size": problem.hidden,
                "moe_tp_size": 2,
            }
            row |= {"inter_size": 2 * problem.intermediate, "topk": problem.top_k, "num_experts": problem.experts, "latency": ms}
            return "moe/{}/moe_perf", {**row, "moe_ep_size": problem.experts // problem.local, "distribution": "power_law_1.01"}
        case GatedDeltaRule():
            decode = set(problem.seq_lens) == {1}
            source = "fused_recurrent_gated_delta_rule" if decode else "chunk_gated_delta_rule"
            row = {"phase": "generation" if decode else "context", "kernel_source": source, "batch_size": problem.batch, "d_conv": 4}
            row |= {"seq_len": problem.seq_lens[0], "num_k_heads": problem.key_heads, "num_v_heads": problem.value_heads, "latency": ms}
            return "linear_attention/{}/gdn_perf", {**row, "head_k_dim": problem.key_dim, "head_v_dim": problem.value_dim}
        case CausalConv1d():
            row = {"phase": "generation" if set(problem.seq_lens) == {1} else "context", "kernel_source": "causal_conv1d_fn", "d_conv": 4}
            row |= {"batch_size": problem.batch, "seq_len": problem.seq_lens[0], "num_k_heads": 16, "num_v_heads": 32, "latency": ms}
            return "linear_attention/{}/gdn_perf", {**row, "head_k_dim": 128, "head_v_dim": 128}
    return None


UNPUBLISHED = {
    "norm", "rope_cache", "activation", "embedding", "sampling", "topk_routing", "copy", "all_reduce", "all_gather", "conv1d",
    "weight_only_matmul",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "scenario", "expected"),
    [
        ("llama-3.1-70b", {"tp": 4, "quantization": "fp8_block", "kv_dtype": "fp8"}, {"scaled_matmul", "decode_attention"}),
        ("deepseek-v3", {"tp": 8, "quantization": "fp8_block"}, {"prefill_attention", "latent_attention", "batched_matmul", "fused_moe"}),
        ("qwen3-30b-a3b", {"tp": 4, "expert_parallel": True}, {"fused_moe"}),
        ("gpt-oss-120b", {"tp": 2, "quantization": "w4a16_mxfp4"}, {"weight_only_moe", "matmul"}),
        ("kimi-k2", {"tp": 8, "quantization": "w4a16"}, {"weight_only_moe"}),
        ("gemma-3-27b", {}, {"matmul", "prefill_attention", "decode_attention"}),
        ("qwen3-next-80b-a3b", {}, {"gated_delta_rule", "causal_conv1d"}),
        ("whisper-large-v3", {}, {"prefill_attention"}),
    ],
)
def test_a_plans_problems_are_exact_hits(tmp_path: Path, model: str, scenario: dict[str, Any], expected: set[str]) -> None:
    found = find_model(model)
    planned = plan(found, H200, scenario_for(found, H200, batches=(1, 32), **scenario))
    made: dict[str, dict[str, dict[str, Any]]] = {}
    wanted: dict[str, Problem] = {}
    for problem in planned.problems():
        published = _published(problem, 10 * bound_us(problem))
        if published is None:
            assert problem.operator in UNPUBLISHED
            continue
        if getattr(problem, "sinks", False):
            continue  # the tables do not say whether a row has them: answered as its nearest relative
        if isinstance(problem, PrefillAttention) and (problem.kv_tokens or (not problem.causal and problem.heads != problem.kv_heads)):
            continue
        made.setdefault(published[0], {})[problem.key] = published[1]
        wanted[problem.key] = problem
    for table, rows in made.items():
        write(tmp_path, "h200_sxm/" + table.format("trtllm/1.0.0"), list(rows.values()))
    assert expected <= {problem.operator for problem in wanted.values()}
    rows = {row.problem_key: row for row in results(H200, root=tmp_path)}
    (source,) = sources_for(H200, tmp_path, [])
    for key, problem in wanted.items():
        answer = source.launch(problem)
        assert answer is not None, problem.label()
        assert answer.origin is Origin.REFERENCE
        if problem.dtype != "bfloat16":  # the tables' dtype: others of 16 bits are as fast
            assert answer.us.low <= 10 * bound_us(problem) <= answer.us.high
            continue
        assert key in rows, problem.label()
        assert math.isclose(rows[key].median_us or 0.0, 10 * bound_us(problem), rel_tol=1e-9)
        assert math.isclose(answer.us.mid, 10 * bound_us(problem), rel_tol=1e-9), (problem.label(), answer.how)


def test_what_klab_has_no_problem_for_is_counted(tmp_path: Path) -> None:
    moe = {
        "num_tokens": 8,
        "hidden_size": 64,
        "inter_size": 64,
        "topk": 2,
        "num_experts": 8,
        "moe_tp_size": 1,
        "moe_ep_size": 1,
        "latency": 1,
    }
    write(tmp_path, GEMM, [gemm(8, 64, 64, 9.0), gemm(8, 64, 64, 9.0, "int8_wo"), gemm(8, 64, 72, 9.0, "nvfp4")])
    balanced = {**moe, "moe_dtype": "bfloat16", "distribution": "balanced"}
    uneven = {**moe, "moe_dtype": "bfloat16", "distribution": "power_law_1.01", "moe_tp_size": 3}
    narrow = {**moe, "moe_dtype": "nvfp4", "distribution": "power_law_1.01"}
    write(tmp_path, "h200_sxm/moe/trtllm/1.0.0/moe_perf", [balanced, uneven, narrow])
    reading = Reading()
    (only,) = points(H200, root=tmp_path, reading=reading)
    assert only.problem == Matmul(8, 64, 64)
    assert sum(reading.unmapped.values()) == 5
    assert any("balanced" in why for why in reading.unmapped)


def test_experts_without_a_gate_are_known_by_kernel_or_shape(tmp_path: Path) -> None:
    row = {"moe_dtype": "bfloat16", "distribution": "power_law_1.01", "num_tokens": 64, "moe_tp_size": 1, "moe_ep_size": 1, "latency": 5}
    nemotron = {**row, "hidden_size": 2688, "inter_size": 1856, "topk": 6, "num_experts": 128}
    other = {**row, "hidden_size": 1024, "inter_size": 512, "topk": 2, "num_experts": 8}
    write(tmp_path, "h200_sxm/moe/vllm/1.0/moe_perf", [nemotron, other, {**other, "num_tokens": 1, "kernel_source": "x_nongated"}])
    assert {(p.one.tokens, p.one.hidden): p.one.gated for p in points(H200, root=tmp_path)} == {  # type: ignore[attr-defined]
        (64, 2688): False, (64, 1024): True, (1, 1024): False,
    }  # fmt: skip


def test_notes_say_in_what_a_row_differs(tmp_path: Path) -> None:
    for engine in ("trtllm", "sglang"):
        write(tmp_path, f"h200_sxm/gemm/{engine}/1.0/gemm_perf", [gemm(64, 4096, 4096, 30.0, "fp8"), gemm(64, 4096, 4096, 30.0)])
    rows = {(row.backend, row.problem.get("format", "")): row for row in results(H200, backend=None, root=tmp_path)}
    assert {("trtllm", "fp8_tensor"), ("sglang", "fp8_row")} < set(rows)
    assert "quantisation of x" in rows["trtllm", "fp8_tensor"].reason
    assert rows["trtllm", ""].reason == ""


# Traps


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"us": 0.0}, NOT_A_TIME),
        ({"us": -1.0}, NOT_A_TIME),
        ({"us": None}, NOT_A_TIME),
        ({"us": 0.5}, TOO_FAST),
        ({"us": 2100.0}, TOO_FAST),  # bound 2223 us at the specification's clock, 2054 at the highest: allowed down to 1952
        ({"us": 900.0, "device": "NVIDIA H100"}, FOREIGN),
        ({"us": 900.0, "device": "NVIDIA GH200"}, FOREIGN),
        ({"us": 900.0, "version": "1.3.0rc19"}, MIXED),
        ({"us": 900.0, "device": None}, NO_PROVENANCE),
        ({"us": 900.0, "version": None}, NO_PROVENANCE),
    ],
)
def test_traps_are_left_out_and_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    given = dict(row)
    us = given.pop("us")
    shape = (8192, 8192, 16384) if us == 2100.0 else (64, 8192, 8192)
    fine = [gemm(m, 8192, 8192, 2 * bound_us(Matmul(m, 8192, 8192))) for m in (8, 16, 32)]
    if us == 2100.0:
        us = 1900.0
    write(tmp_path, GEMM, [*fine, gemm(*shape, us, **given)])
    reading = Reading()
    used = list(points(H200, root=tmp_path, reading=reading))
    assert len(used) == 3
    assert list(reading.flagged.items()) == [((GEMM, why), 1)]
    bad = [p for p in points(H200, root=tmp_path, flagged=True) if p.flag]
    assert [p.flag for p in bad] == [why]
    kept = [r for r in results(H200, root=tmp_path, flagged=True) if r.status is Status.UNSUPPORTED]
    assert [r.reason for r in kept] == [why]
    assert all(math.isfinite(r.median_us) and r.median_us > 0 for r in kept if r.median_us is not None)


def test_a_chip_may_run_at_its_highest_clock_and_its_cache_may_help(tmp_path: Path) -> None:
    at_most = Matmul(8192, 8192, 8192)
    # 1980 of 1830 MHz is 8% more than the specification's peak; the operands of a small problem may lie in 60 MB of cache.
    cached = Matmul(1, 4096, 4096)
    write(tmp_path, GEMM, [gemm(8192, 8192, 8192, bound_us(at_most) / 1.05), gemm(1, 4096, 4096, bound_us(cached) / 1.5)])
    flags = {p.problem: p.flag for p in points(H200, root=tmp_path, flagged=True)}
    assert flags == {at_most: "", cached: WARM}


def test_a_table_that_was_not_replayed_from_a_graph_hides_its_small_rows(tmp_path: Path) -> None:
    sizes = [(m, 128, 128) for m in range(1, 17)]
    hidden = [gemm(*size, 55.0 + i, "fp8_block") for i, size in enumerate(sizes)]
    large = gemm(8192, 8192, 8192, 1500.0, "fp8_block")
    quick = [gemm(*size, 3.0) for size in sizes]
    write(tmp_path, GEMM, [*hidden, large, *quick])
    reading = Reading()
    used = {p.problem for p in points(H200, root=tmp_path, reading=reading)}
    assert used == {ScaledMatmul(8192, 8192, 8192), *(Matmul(*size) for size in sizes)}
    assert reading.flagged == {(GEMM, LAUNCHES): 16}


def test_a_row_that_more_of_the_same_outruns_is_a_hiccup(tmp_path: Path) -> None:
    times = {1: 14.0, 2: 14.0, 4: 3000.0, 8: 15.0, 16: 60.0, 32: 30.0}
    rows = [_published(DecodeAttention((2048,) * batch, 4, 1, 128), us) for batch, us in times.items()]
    other = _published(DecodeAttention((4096,) * 64, 4, 1, 128), 40.0)  # of another context: says nothing
    write(tmp_path, "h200_sxm/attention/trtllm/1.0/generation_attention_perf", [row[1] for row in (*rows, other) if row])
    reading = Reading()
    used = {p.times for p in points(H200, root=tmp_path, reading=reading)}
    assert used == {1, 2, 8, 16, 32, 64}
    assert [why for _, why in reading.flagged] == [HICCUP]


def test_columns_and_rows_tell_the_same(tmp_path: Path) -> None:
    rows = [gemm(m, n, k, 30 * bound_us(Matmul(m, n, k)) ** 0.5) for m in (1, 3, 64, 512) for n in (256, 8192) for k in (128, 4096)]
    rows += [gemm(2, 256, 128, 0.0), gemm(4, 8192, 4096, 1.0), gemm(8, 256, 128, 900.0), gemm(64, 256, 128, 1.0, device="NVIDIA H100")]
    rows += [gemm(1, 256, 128, 70.0, kernel_source="slow")]
    write(tmp_path, GEMM, rows)
    family = FAMILIES[0]
    (table,) = tables(tmp_path, "h200_sxm", family.folder, family.file)
    columns = Columns(H200, family, table, Matmul(1, 1, 1))
    by_columns = {p.problem: p.us for i in range(len(columns)) if (p := columns.point(i))}
    by_rows: dict[Problem, float] = {}
    for point in points(H200, root=tmp_path):
        by_rows[point.problem] = min(point.us, by_rows.get(point.problem, math.inf))
    # Where a faster row of the same size is a trap, columns leave the size out.
    assert by_columns == {problem: us for problem, us in by_rows.items() if problem != Matmul(64, 256, 128)}
    sizes = columns.axes(("m", "n", "k"))
    assert len({tuple(row) for row in sizes.tolist()}) == len(columns)


def test_a_format_that_another_build_measured_is_mixed_for_the_estimator_too(tmp_path: Path) -> None:
    most = [gemm(m, 4096, 4096, 40.0) for m in (8, 16, 32)]
    write(tmp_path, GEMM, [*most, gemm(8, 4096, 4096, 30.0, "fp8_block", version="0.1.dev")])
    (source,) = sources_for(H200, tmp_path, [])
    assert source.launch(Matmul(8, 4096, 4096)) is not None
    assert source.launch(ScaledMatmul(8, 4096, 4096)) is None
    assert [p.flag for p in points(H200, root=tmp_path, flagged=True) if isinstance(p.one, ScaledMatmul)] == [MIXED]


# Results, and that nobody mistakes them


def _result(tmp_path: Path) -> Result:
    write(tmp_path, GEMM, [gemm(8192, 14336, 4096, 1400.0)])
    (only,) = results(H200, root=tmp_path)
    return only


def test_a_result_says_where_it_is_from_and_survives_the_store(tmp_path: Path) -> None:
    row = _result(tmp_path)
    problem = Matmul(8192, 14336, 4096)
    assert (row.kind, row.status, row.kernel, row.chip, row.median_us) == ("reference", Status.OK, "matmul/trtllm.k", "h200", 1400.0)
    assert (row.problem_key, row.flops, row.device) == (problem.key, problem.flops(), "NVIDIA H200")
    assert row.environment["table"] == GEMM
    assert row.environment["version"] == "1.3.0rc20"
    assert row.energy_j is None and row.ci_low_us is None and row.samples_us == ()
    journal = Journal(tmp_path / "store", row.run_id)
    journal.append(row)
    journal.close()
    assert list(iter_results(tmp_path / "store")) == [row]


def test_reference_rows_are_never_taken_for_measurements(tmp_path: Path) -> None:
    row = _result(tmp_path)
    assert why_not(row, LATENCY) == "reference, not measured"
    assert choose([row], None, LATENCY, chip="h200").choices == ()
    assert all(verdict.verdict == "not measured" for verdict in judge([row], "h200"))
    assert not numerics_verified(row)
    assert done_keys([row], "some epoch") == set()
    # Even named as a kernel of klab's own.
    ours = dataclasses.replace(row, kernel="matmul/torch_matmul", samples_us=(1.0,) * 50, ci_low_us=1399.0, ci_high_us=1401.0)
    assert choose([ours], None, LATENCY, chip="h200").choices == ()


# Between and beyond rows; several engines


def _grid(chip: Any, share: Callable[[Problem], float], dtype: str = "bfloat16") -> list[dict[str, Any]]:
    made = []
    for m in (1, 8, 64, 512, 4096):
        for n in (1024, 4096, 16384):
            for k in (1024, 4096, 16384):
                problem = Matmul(m, n, k) if dtype == "bfloat16" else ScaledMatmul(m, n, k, format=dtype)
                made.append(gemm(m, n, k, bound_us(problem, chip) / share(problem) + 2.0, dtype))
    return made


def test_between_rows_the_share_of_the_roofline_is_interpolated(tmp_path: Path) -> None:
    write(tmp_path, GEMM, _grid(H200, lambda p: 0.7))
    notes: list[str] = []
    (source,) = sources_for(H200, tmp_path, notes)
    assert "h200_sxm" in notes[0]
    between = Matmul(256, 6144, 5120)
    answer = source.launch(between)
    assert answer is not None and answer.origin is Origin.REFERENCE
    assert answer.us.low < bound_us(between) / 0.7 + 2.0 < answer.us.high
    assert math.isclose(answer.us.mid, bound_us(between) / 0.7 + 2.0, rel_tol=0.1)
    assert "TRTLLM 1.3.0rc20 on NVIDIA H200" in answer.how
    exact = source.launch(Matmul(64, 4096, 4096))
    assert exact is not None
    us = bound_us(Matmul(64, 4096, 4096)) / 0.7 + 2.0
    assert [exact.us.low, exact.us.mid, exact.us.high] == pytest.approx([share * us for share in AGAIN])
    assert source.launch(Matmul(4_000_000, 4096, 4096)) is None
    assert source.launch(Matmul(64, 4096, 4096, "float32")) is None
    assert source.launch(ScaledMatmul(64, 4096, 4096)) is None
    assert "scaled_matmul" in source.why_not(ScaledMatmul(64, 4096, 4096))  # type: ignore[attr-defined]


def test_of_several_engines_the_one_that_is_fastest_at_its_worst_answers(tmp_path: Path) -> None:
    write(tmp_path, GEMM, _grid(H200, lambda p: 0.5))
    write(tmp_path, "h200_sxm/gemm/vllm/0.24.0/gemm_perf", _grid(H200, lambda p: 0.8))
    for backend, engine in ((None, "VLLM"), ("trtllm", "TRTLLM"), (("trtllm", "sglang"), "TRTLLM")):
        (source,) = sources_for(H200, tmp_path, [], backend)
        answer = source.launch(Matmul(64, 4096, 4096))
        assert answer is not None and engine in answer.how
    assert sources_for(H200, False, []) == []
    with pytest.raises(UsageError, match="no reference tables of b200"):
        sources_for(B200, tmp_path, [])


def test_tables_that_nothing_can_read_are_left_alone_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GEMM, [gemm(64, 1024, 1024, 50.0)])
    monkeypatch.setenv("KLAB_REFERENCE", str(tmp_path))
    notes: list[str] = []
    assert len(sources_for(H200, None, notes)) == 1
    assert sources_for(B200, None, notes) == []
    monkeypatch.setattr("klab.harness.cost.reference_source.importlib.util.find_spec", lambda name: None)
    assert sources_for(H200, None, notes) == [] and "duckdb" in notes[-1]
    monkeypatch.setitem(sys.modules, "duckdb", None)
    (source,) = sources_for(H200, True, notes)
    with pytest.raises(UsageError, match="DuckDB"):
        source.launch(Matmul(64, 1024, 1024))


# Collectives


def _nccl(kind: str, gpus: int, elements: int, us: float, dtype: str = "half", **more: Any) -> dict[str, Any]:
    return {"op_name": kind, "num_gpus": gpus, "nccl_dtype": dtype, "message_size": elements, "latency": us / 1e3, **more}


def test_collectives_count_elements_and_the_fastest_kernel_answers(tmp_path: Path) -> None:
    nccl = [_nccl("all_reduce", 8, 1 << n, 20.0 + (1 << n) / 1e5) for n in range(8, 29, 4)]
    nccl += [_nccl("alltoall", 8, 1 << 20, 40.0), _nccl("all_reduce", 8, 1 << 20, 1.0, "int8"), _nccl("all_gather", 4, 1 << 24, 1.0)]
    write(tmp_path, "h200_sxm/comm/nccl/2.29.2/nccl_perf", nccl)
    write(tmp_path, "h200_sxm/comm/nccl/2.23/nccl_perf", [_nccl("all_reduce", 8, 256, 1.0)])
    own = {"op_name": "all_reduce", "num_gpus": 8, "allreduce_dtype": "bfloat16"}
    custom = [{**own, "message_size": 1 << n, "latency": 5e-3, "kernel_source": "custom_graph"} for n in (8, 12)]
    custom += [{**own, "message_size": 256, "latency": 1e-3, "kernel_source": "custom_eager"}]
    write(tmp_path, "h200_sxm/comm/vllm/0.24.0/custom_allreduce_perf", custom)
    found = list(links(H200, root=tmp_path, flagged=True))
    assert {link.flag for link in found} == {"", TOO_FAST, LAUNCHES}
    assert len([link for link in found if link.one.kind == "all_reduce"]) == len(range(8, 29, 4)) + 3
    (source,) = sources_for(H200, tmp_path, [])
    small = source.collective(Collective("all_reduce", 8, 2 * 256))
    assert small is not None and small.us.mid == pytest.approx(5.0)
    assert small.origin is Origin.REFERENCE and "custom_graph" in small.how
    large = source.collective(Collective("all_reduce", 8, 2 << 20))
    assert large is not None and large.us.mid == pytest.approx(20.0 + (1 << 20) / 1e5) and "NCCL" in large.how
    between = source.collective(Collective("all_reduce", 8, 2 << 22))
    assert between is not None and 20.0 + (1 << 20) / 1e5 < between.us.mid < 20.0 + (1 << 24) / 1e5
    for unknown in (Collective("all_reduce", 4, 4096), Collective("all_reduce", 8, 1 << 40), Collective("reduce_scatter", 8, 4096)):
        assert source.collective(unknown) is None


# Two chips


def test_a_comparison_is_of_the_same_shapes_by_the_same_engine(tmp_path: Path) -> None:
    # Half the share of H200's time at every shape; one shape that only H200 has, one row that is a trap.
    old = _grid(H200, lambda p: 0.1)
    new = [{**row, "latency": row["latency"] / 2} for row in old]
    write(tmp_path, GEMM, [*old, gemm(2, 1024, 1024, 50.0)])
    write(tmp_path, "b200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf", [*new, gemm(64, 1024, 1024, 0.0)])
    write(tmp_path, "b200_sxm/gemm/vllm/0.24.0/gemm_perf", new)
    found = list(compare([H200, B200], root=tmp_path))
    assert {one.engine for one in found} == {"trtllm"}
    assert sum(one.shapes for one in found) == len(old)
    assert {one.regime for one in found} == {"small", "memory", "compute"}
    assert all(one.ratio == pytest.approx(0.5) for one in found)
    assert all(one.least == pytest.approx(0.5) and one.most == pytest.approx(0.5) for one in found)
    back = list(compare([B200, H200], ["matmul"], root=tmp_path))
    assert sum(one.shapes for one in back) == len(old) and all(one.ratio == pytest.approx(2.0) for one in back)
    with pytest.raises(UsageError, match="two or more"):
        list(compare([H200], root=tmp_path))


def test_a_system_that_klab_has_no_profile_of_is_judged_by_what_it_states(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    write(tmp_path, "gb200/gemm/trtllm/1.0/gemm_perf", [gemm(4096, 4096, 4096, 100.0), gemm(4096, 4096, 8192, 20.0)])
    with pytest.raises(UsageError, match="does not state"):
        chip_of("gb200", tmp_path)
    gpu = "{mem_bw: 8.0e12, mem_capacity: 186000000000, bfloat16_tc_flops: 2.5e15, fp8_tc_flops: 5.0e15, power: 1200}"
    (tmp_path / "gb200.yaml").write_text(f"gpu: {gpu}\nnode: {{intra_node_bw: 900000000000}}\n")
    chip = chip_of("gb200", tmp_path)
    assert (chip.name, chip.memory_gb_per_s, chip.tdp_w, chip.link_gb_per_s) == ("gb200", 8000.0, 1200.0, 900.0)
    assert {p.problem: p.flag for p in points(chip, root=tmp_path, flagged=True)} == {
        Matmul(4096, 4096, 4096): "", Matmul(4096, 4096, 8192): TOO_FAST,
    }  # fmt: skip
    assert chip_of("h200_sxm", tmp_path) == H200
    with pytest.raises(UsageError, match="no reference tables of b300"):
        chip_of("b300", tmp_path)


# The real package, where it is installed


@pytest.mark.skipif(
    bool(os.environ.get("KLAB_REFERENCE")) or available() is None,
    reason="aiconfigurator-core is not installed: pip install -e '.[reference]'",
)
def test_the_installed_tables_are_read() -> None:
    reading = Reading()
    found = list(points(H200, ["latent_attention", "batched_matmul"], reading=reading))
    assert len(found) > 2000
    assert sum(reading.flagged.values()) < 0.05 * len(found)
    shares = sorted(point.bound_us / point.us for point in found if point.bound_us > 100)
    assert 0.3 < shares[len(shares) // 2] < 1.0


# The verb


def _klab(*words: str) -> Any:
    return CliRunner().invoke(build_app(), ["reference", *words], env={"COLUMNS": "200", "KLAB_REFERENCE": ""})


def test_the_verb_lists_counts_and_compares(tmp_path: Path) -> None:
    old = _grid(H200, lambda p: 0.1)
    write(tmp_path, GEMM, [*old, gemm(2, 1024, 1024, 0.0)])
    write(tmp_path, "b200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf", [{**row, "latency": row["latency"] / 4} for row in old])
    there = [json.loads(line) for line in _klab("--data", str(tmp_path), "--json").stdout.splitlines()]
    assert [(one["system"], one["rows"]) for one in there] == [("b200_sxm", 45), ("h200_sxm", 46)]
    assert "h200_sxm" in _klab("--data", str(tmp_path)).stdout
    shown = _klab("--data", str(tmp_path), "--chip", "h200", "--traps")
    assert shown.exit_code == 0 and "matmul" in shown.stdout and NOT_A_TIME in shown.stdout
    rows = [json.loads(line) for line in _klab("--data", str(tmp_path), "--chip", "h200", "--json").stdout.splitlines()]
    assert len(rows) == 45 and {row["kind"] for row in rows} == {"reference"}
    assert Result.from_json(rows[0]).to_json() == Result.from_json(Result.from_json(rows[0]).to_json()).to_json()
    compared = [json.loads(line) for line in _klab("--data", str(tmp_path), "--chip", "h200,b200", "--json").stdout.splitlines()]
    assert sum(one["shapes"] for one in compared) == 45 and all(one["ratio"] == pytest.approx(0.25) for one in compared)
    assert "0.25" in _klab("--data", str(tmp_path), "--chip", "h200,b200", "--operator", "matmul").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chip", "h100"], "there are some of h200"),
        (["--chip", "h200,b200"], "there are some of h200"),
        (["--chip", "h200,h200"], "twice"),
        (["--chip", ","], "names no chip"),
        (["--chip", "h200", "--operator", "norm"], "no table is of norm"),
        (["--chip", "h200", "--backend", "tensorrt"], "trtllm, sglang, vllm or all"),
        (["--traps"], "say --chip"),
        (["--chip", "h200,h200_sxm", "--traps"], "twice"),
    ],
)
def test_the_verb_refuses_nonsense(tmp_path: Path, words: list[str], said: str) -> None:
    write(tmp_path, GEMM, [gemm(64, 1024, 1024, 50.0)])
    done = _klab("--data", str(tmp_path), *words)
    assert isinstance(done.exception, UsageError) and said in str(done.exception)


def test_without_tables_the_verb_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.store.reference.tables.importlib.util.find_spec", lambda name: None)
    done = _klab()
    assert isinstance(done.exception, UsageError) and "pip install -e '.[reference]'" in str(done.exception)
