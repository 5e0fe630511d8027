"""Published serving measurements: what each row is in klab's words, and which rows are none."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from klab.harness.cost.plausible import peak_share, plausible
from klab.harness.cost.published import COLUMNS, INFERENCEX, SWEEP, Published, read_published
from klab.kernels.errors import UsageError

LLAMA = {
    "id": "a", "silicon_data_source": "source_file=2026-04-06.csv; silicon_concurrency=8", "backend": "vllm", "backend_version": "",
    "model_path": "meta-llama/Llama-3.1-70B", "system": "h200_sxm", "mode": "agg", "isl": "1024", "osl": "1024", "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8", "batch_size": "8.0", "tp_size": "4.0", "pp_size": "1.0", "attention_dp_size": "1.0", "moe_tp_size": "4.0",
    "moe_ep_size": "1.0", "silicon_ttft_ms": "200.5", "silicon_tpot_ms": "20.25",
}  # fmt: skip
DEEPSEEK = LLAMA | {
    "model_path": "deepseek-ai/DeepSeek-R1", "backend": "sglang", "moe_quant_mode": "fp8_block", "tp_size": "8.0", "moe_tp_size": "8.0",
}  # fmt: skip


def read(tmp_path: Path, *rows: dict[str, str]) -> tuple[list[Published], dict[str, int]]:
    path = tmp_path / "points.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    found, skipped = read_published(path)
    return found, dict(skipped)


def one(tmp_path: Path, **changes: str) -> Published:
    found, skipped = read(tmp_path, LLAMA | changes)
    assert not skipped, skipped
    return found[0]


def why(tmp_path: Path, base: dict[str, str] = LLAMA, **changes: str) -> str:
    found, skipped = read(tmp_path, base | changes)
    assert not found
    return next(iter(skipped))


def test_a_row_in_klabs_words(tmp_path: Path) -> None:
    found = one(tmp_path)
    assert (found.model, found.chip, found.tp, found.expert_parallel) == ("llama-3.1-70b", "h200", 4, False)
    assert (found.quantization, found.kv_dtype, found.campaign) == ("fp8_tensor", "float8_e4m3fn", INFERENCEX)
    assert (found.isl, found.osl, found.concurrency) == (1024, 1024, 8)
    assert (found.ttft_s, found.tpot_s) == (pytest.approx(0.2005), pytest.approx(0.02025))
    assert found.deployment.label == "h200 x 4 fp8_tensor kv float8_e4m3fn"
    # InferenceX draws lengths between 0.8 and 1 of the nominal ones.
    assert (found.workload.isl, found.workload.osl, found.workload.chunk_tokens) == (922, 922, 8192)


def test_sweeps_have_lengths_as_they_say_and_caches_as_the_engine_has(tmp_path: Path) -> None:
    source = "source_file=/somewhere/auto-gap-analysis/data/h100_sxm/vllm/0.12.0/x.csv"
    found = one(tmp_path, silicon_data_source=source, gemm_quant_mode="", moe_quant_mode="", system="h100_sxm", moe_tp_size="1.0")
    assert (found.campaign, found.workload.isl, found.quantization, found.kv_dtype, found.chip) == (SWEEP, 1024, "", "", "h100")
    assert one(tmp_path, silicon_data_source=source, backend="trtllm").kv_dtype == "float8_e4m3fn"


def test_expert_parallel_runs_that_are_written_twice_are_one(tmp_path: Path) -> None:
    right = DEEPSEEK | {"tp_size": "8.0", "moe_tp_size": "1.0", "moe_ep_size": "8.0"}
    wrong = DEEPSEEK | {"id": "b", "tp_size": "64.0", "moe_tp_size": "8.0", "moe_ep_size": "8.0"}
    found, skipped = read(tmp_path, right, wrong)
    assert [(p.tp, p.expert_parallel, p.quantization) for p in found] == [(8, True, "fp8_block")]
    assert skipped == {"the same run again": 1}
    alone, _ = read(tmp_path, wrong)
    assert (alone[0].tp, alone[0].expert_parallel) == (8, True)
    # Four GPUs whose experts are split two by two are nothing that klab plans, where the importer writes tp as it is.
    source = "source_file=/somewhere/auto-gap-analysis/data/h100_sxm/vllm/0.12.0/x.csv"
    split = {"silicon_data_source": source, "tp_size": "4.0", "moe_tp_size": "2.0", "moe_ep_size": "2.0"}
    assert why(tmp_path, DEEPSEEK, **split) == "experts sharded in a way that klab does not plan"


def test_v3_and_r1_are_one_model(tmp_path: Path) -> None:
    found, skipped = read(tmp_path, DEEPSEEK, DEEPSEEK | {"id": "b", "model_path": "deepseek-ai/DeepSeek-V3"})
    assert len(found) == 1 and skipped == {"the same run again": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "disagg"}, "prefill and decode on GPUs of their own"),
        ({"model_path": "nobody/nothing"}, "no nobody/nothing in the catalogue"),
        ({"system": "gb300"}, "no gb300 in the catalogue"),
        ({"system": "h100_pcie"}, "no h100_pcie in the catalogue"),
        ({"attention_dp_size": "8.0"}, "attention data parallel"),
        ({"pp_size": "2"}, "pipeline parallelism"),
        ({"silicon_ttft_ms": "0"}, "a length, a concurrency or a time that is none"),
        ({"silicon_tpot_ms": "nan"}, "a length, a concurrency or a time that is none"),
        ({"batch_size": ""}, "a length, a concurrency or a time that is none"),
        ({"tp_size": "0"}, "a number of GPUs that is none"),
    ],
)
def test_rows_that_are_left_out_say_why(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    assert why(tmp_path, **changes) == reason


def test_settings_of_the_servers(tmp_path: Path) -> None:
    waits = one(tmp_path, backend="trtllm")
    assert (waits.waits_steps, replace(waits, tp=8).waits_steps, replace(waits, osl=8192).waits_steps) == (20, 0, 0)
    polled, _ = read(tmp_path, DEEPSEEK | {"system": "b200_sxm", "batch_size": "16"})
    assert (polled[0].waits_steps, replace(polled[0], concurrency=8).waits_steps, replace(polled[0], chip="h200").waits_steps) == (15, 5, 0)
    assert polled[0].prefill_alone and polled[0].chunk_tokens == 32768
    assert replace(waits, isl=20_000).chunk_tokens > 20_000  # TensorRT-LLM takes a prompt whole


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\x00\xff"])
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="is not a table of serving measurements"):
        read_published(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_published(tmp_path / "nowhere.csv")


def test_what_no_chip_can_do_takes_its_series_along(tmp_path: Path) -> None:
    fine = one(tmp_path)
    assert 0 < peak_share(fine) < 0.5
    # 70e9 x 2 FLOP per token: a prompt of 922 takes 16 ms of four H200 at their fp8 peak, so 8 of them 0.13 s.
    fast = replace(fine, id="fast", concurrency=64, osl=8, ttft_s=0.1, tpot_s=0.02)
    other_engine = replace(fine, id="other", backend="sglang", concurrency=16)
    kept, skipped = plausible([fine, fast, other_engine])
    assert [p.id for p in kept] == ["other"]
    assert sum(skipped.values()) == 2


def test_speculation_shows_in_its_twin_or_in_fewer_users(tmp_path: Path) -> None:
    slow = one(tmp_path)
    twin = replace(slow, id="twin", tpot_s=slow.tpot_s / 1.5)
    more = replace(slow, id="more", concurrency=32, tpot_s=slow.tpot_s / 1.3)
    fewer = replace(slow, id="fewer", concurrency=4, tpot_s=slow.tpot_s / 1.3)
    again = replace(slow, id="again", tpot_s=slow.tpot_s * 1.02)
    kept, _ = plausible([slow, twin, more, fewer, again])
    assert {p.id for p in kept} == {"a", "fewer", "again"}
