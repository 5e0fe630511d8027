"""Engine tables: names against the engines' own rules, the linter against loaders that follow them, and what an import is taken for."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from engine_loaders import sglang_moe, sglang_moe_name, taken, vllm_moe, vllm_moe_name

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.candidates import why_not
from klab.harness.choose.engines import DIALECTS, find_dialect
from klab.harness.choose.engines.contestants import models_for, new_rows, read_contestants
from klab.harness.choose.engines.lint import BREAKS, NEVER, NOTE, SLOW, Expected, guess, lint, worst
from klab.harness.choose.engines.names import DENSE, MOE, USUAL_TOKENS, TableName, far_off, nearest, read_name
from klab.harness.choose.engines.reading import read_table
from klab.harness.choose.engines.shapes import shapes_of
from klab.harness.plan.trial import Policy
from klab.harness.store.query import done_keys, numerics_verified
from klab.harness.store.schema import parse
from klab.harness.tune.prior import prior_for
from klab.harness.tune.space import KERNEL, Space, kernel_points
from klab.kernels.contract import Kernel
from klab.kernels.errors import UsageError
from klab.kernels.fused_moe._engine_config import EngineConfig
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.fused_moe.triton_engine import triton_engine
from klab.kernels.scaled_matmul.triton_tiled import triton_tiled

VLLM, SGLANG = DIALECTS["vllm"], DIALECTS["sglang"]
H200 = find_chip("h200")
KERNELS: dict[str, Kernel] = {kernel.id: kernel for kernel in (triton_engine, triton_tiled)}
ENTRY = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4}
GOOD = {str(tokens): ENTRY for tokens in USUAL_TOKENS}
NAME = "E=128,N=768,device_name=NVIDIA_H200.json"
FP8 = "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
# Facts of published tables of vLLM's (0.33): names that are loaded, and one that never is.
PUBLISHED = (
    "E=128,N=1856,device_name=NVIDIA_B200.json",
    "E=128,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8.json",
    "E=8,N=14336,device_name=NVIDIA_H200,dtype=int8_w8a16.json",
    "E=128,N=1536,device_name=AMD_Instinct_MI308X,dtype=int4_w4a16.json",
    "E=10,N=512,device_name=Intel(R)_Arc(TM)_Pro_B60_Graphics.json",
    FP8,
)
NEVER_LOADED = "E=128,N=384,device_name=NVIDIA_H100_PCIe,block_shape=[128,128].json"


def put(folder: Path, name: str, table: Any = GOOD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def levels(folder: Path, engine: str = "vllm", **expected: Any) -> dict[str, str]:
    return dict(worst(lint(folder, find_dialect(engine), Expected(**expected))))


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H20", "AMD Instinct MI300X/HF  VF"])
@pytest.mark.parametrize(("dtype", "block"), [(None, None), ("fp8_w8a8", None), ("fp8_w8a8", [128, 128]), ("float32", None)])
def test_names_are_what_the_engines_look_for(device: str, dtype: str | None, block: list[int] | None) -> None:
    table = TableName(MOE, device, 768, 64, dtype=dtype or "", block=(block[0], block[1]) if block else None)
    assert VLLM.file_name(table) == vllm_moe_name(device, 64, 768, dtype, block)
    if "/" not in device:
        assert SGLANG.file_name(table) == sglang_moe_name(device, 64, 768, dtype, block)
        assert SGLANG.file_name(dataclasses.replace(table, down=True)) == sglang_moe_name(device, 64, 768, dtype, block, down=True)


def test_dense_names() -> None:
    table = TableName(DENSE, "NVIDIA H200", 12288, k=7168, dtype="fp8_w8a8", block=(128, 128))
    assert VLLM.file_name(table) == "N=12288,K=7168,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    assert SGLANG.file_name(table) == "N=12288,K=7168,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
    # The family rule is the experts' alone.
    assert "H200_NVL" in VLLM.file_name(dataclasses.replace(table, device="NVIDIA H200 NVL"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_understood_and_fine(tmp_path: Path, name: str) -> None:
    found = read_name(name)
    assert found is not None and VLLM.file_name(found) == name and VLLM.never(found) == ""
    put(tmp_path, name)
    assert levels(tmp_path) == {name: NOTE}


@pytest.mark.parametrize(
    "name",
    [
        NEVER_LOADED,
        NAME.replace(",N", ", N"),
        NAME.replace("NVIDIA_H200", "NVIDIA_H200_NVL"),
        NAME.replace("NVIDIA_H200", "NVIDIA H200"),
        NAME.replace("E=128", "E=0128"),
        NAME.replace("E=128,N=768", "N=768,E=128"),
        NAME.replace(".json", ",dtype=bfloat16.json"),
        NAME.replace(".json", ".JSON"),
        NAME.replace(".json", ".json.bak"),
        NAME.replace(".json", "_down.json"),
        NAME.replace(".json", ",dtype=int4_w4a16,block_shape=[0,128].json"),
        FP8.replace("[128,128]", "[128, 128]"),
        FP8.replace(".json", ",per_channel_quant=True.json"),
        "fused_moe.json",
    ],
)
def test_a_name_nobody_asks_for(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name)
    asked = [vllm_moe_name("NVIDIA H200", 128, 768, dtype, block) for dtype, block in ((None, None), ("fp8_w8a8", [128, 128]))]
    assert all(vllm_moe(tmp_path, one) is None for one in asked)
    assert levels(tmp_path)[path.name] == NEVER


def without(field: str) -> dict[str, int]:
    return {name: value for name, value in ENTRY.items() if name != field}


STOPS: dict[str, Any] = {
    "a key that is no number": GOOD | {"default": ENTRY},
    "no num": GOOD | {"8": without("BLOCK_SIZE_N")},
    "an unknown field": GOOD | {"8": ENTRY | {"waves_per_eu": 2}},
    "no power of two": GOOD | {"8": ENTRY | {"BLOCK_SIZE_K": 96}},
    "text": GOOD | {"8": ENTRY | {"num_warps": "4"}},
    "true": GOOD | {"8": ENTRY | {"num_warps": True}},
    "zero": GOOD | {"8": ENTRY | {"GROUP_SIZE_M": 0}},
    "an entry that is a list": GOOD | {"8": [16, 64]},
    "a list": [GOOD],
    "cut off": json.dumps(GOOD)[:-20],
    "a mark before": "\ufeff" + json.dumps(GOOD),
}


@pytest.mark.parametrize("fault", STOPS)
def test_what_stops_a_loader_or_a_launch(tmp_path: Path, fault: str) -> None:
    put(tmp_path, NAME, STOPS[fault])

    def serve() -> None:
        table = vllm_moe(tmp_path, NAME)
        assert table is not None
        for tokens in range(1, 64):
            taken(table, tokens)

    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, IndexError)):
        serve()
    assert levels(tmp_path)[NAME] == BREAKS


@pytest.mark.parametrize(("table", "engine", "level"), [(GOOD | {"triton_version": "3.7.1"}, "vllm", NOTE), (GOOD, "vllm", NOTE)])
def test_what_is_loaded_is_not_called_broken(tmp_path: Path, table: Any, engine: str, level: str) -> None:
    put(tmp_path, NAME, table)
    loaded = vllm_moe(tmp_path, vllm_moe_name("NVIDIA H200", 128, 768))
    assert loaded is not None and [taken(loaded, t) for t in (1, 5000)] == [ENTRY, ENTRY]
    assert levels(tmp_path, engine)[NAME] == level


def test_sglang_cannot_read_a_version_key_and_wants_its_folder(tmp_path: Path) -> None:
    home = tmp_path / "configs" / "triton_3_6_0"
    put(home, NAME)
    assert sglang_moe(tmp_path, "3.6.0", sglang_moe_name("NVIDIA H200", 128, 768)) is not None
    assert set(levels(tmp_path, "sglang").values()) == {NOTE}
    assert levels(home, "sglang") == levels(tmp_path, "sglang")  # the root is found from below
    put(home, NAME, GOOD | {"triton_version": "3.6.0"})
    with pytest.raises(ValueError, match="triton_version"):
        sglang_moe(tmp_path, "3.6.0", NAME)
    assert set(levels(tmp_path, "sglang").values()) == {BREAKS}
    put(tmp_path, NAME)
    assert levels(tmp_path, "sglang")[NAME] == NEVER
    assert guess(tmp_path) == "sglang"


def test_a_folder_of_a_strange_version_stops_every_miss(tmp_path: Path) -> None:
    put(tmp_path / "configs" / "triton_3_6_0", NAME)
    put(tmp_path / "configs" / "triton_3_6_0+git1", NAME)
    with pytest.raises(ValueError, match="git"):
        sglang_moe(tmp_path, "3.6.0", "E=1,N=1,device_name=X.json")
    assert levels(tmp_path, "sglang")["configs/triton_3_6_0+git1"] == BREAKS


def test_which_version_wins(tmp_path: Path) -> None:
    for version in ("3_4_0", "3_5_1", "3_10_0"):
        put(tmp_path / "configs" / f"triton_{version}", NAME, {"1": ENTRY | {"num_stages": int(version.split("_")[1])}})
    for triton in ("3.5.1", "3.6.0"):
        loaded = sglang_moe(tmp_path, triton, NAME)
        assert loaded is not None
        dead = {file for file, level in levels(tmp_path, "sglang", triton=triton).items() if level == NEVER}
        used = f"triton_3_{loaded[1]['num_stages']}_"
        assert len(dead) == 2 and not any(used in file for file in dead)


def test_down_goes_with_its_table(tmp_path: Path) -> None:
    home = tmp_path / "configs" / "triton_3_6_0"
    down = NAME.replace(".json", "_down.json")
    put(home, down, {key: ENTRY | {"USE_TMA": True} for key in GOOD})
    shown = f"configs/triton_3_6_0/{down}"
    assert levels(tmp_path, "sglang")[shown] == NEVER
    put(home, NAME)
    assert levels(tmp_path, "sglang")[shown] == NOTE
    put(home, NAME, GOOD | {"64": ENTRY | {"BLOCK_SIZE_M": 32}})
    assert levels(tmp_path, "sglang")[shown] == BREAKS


def test_dense_tables_are_read_from_the_package_alone(tmp_path: Path) -> None:
    name = "N=12288,K=7168,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    put(tmp_path, name)
    assert levels(tmp_path)[name] == NEVER
    package = tmp_path / "vllm" / "model_executor" / "layers" / "quantization" / "utils" / "configs"
    put(package, name)
    assert levels(package)[name] == NOTE
    put(package, name, GOOD | {"triton_version": "3.7.1"})
    assert levels(package)[name] == BREAKS
    put(package, name, GOOD | {"8": ENTRY | {"BLOCK_SIZE_K": 256}})
    assert any("several scales" in f.text for f in lint(package, VLLM))


def test_the_engines_own_folders(tmp_path: Path) -> None:
    ours = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe" / "configs"
    put(ours, NAME)
    put(tmp_path / "vllm", NAME.replace("768", "384"))
    assert set(levels(ours).values()) == {NOTE}
    assert sorted(levels(tmp_path).values()) == sorted([NOTE, NEVER])
    theirs = tmp_path / "sglang" / "srt" / "layers" / "moe" / "fused_moe_triton" / "configs"
    put(theirs / "triton_3_4_0", NAME)
    put(theirs, NAME)  # where SGLang looked before it kept tables by version
    for root in (theirs, tmp_path / "sglang"):
        found = {Path(file).parent.name: level for file, level in levels(root, "sglang").items() if "384" not in file}
        assert (found["triton_3_4_0"], found["configs"]) == (NOTE, NEVER)


def test_the_same_folder_by_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standing in it, from below, one file alone."""
    home = tmp_path / "configs" / "triton_3_6_0"
    down = NAME.replace(".json", "_down.json")
    for name in (NAME, down):
        put(home, name)
    monkeypatch.chdir(home)
    for words in (".", "..", "../..", NAME, down, str(home / down)):
        assert set(levels(Path(words), "sglang").values()) == {NOTE}, words
        assert guess(Path(words)) == "sglang", words
    put(home, NAME, GOOD | {"64": ENTRY | {"BLOCK_SIZE_M": 32}})
    assert BREAKS in levels(Path(down), "sglang").values()


def test_whose_tables_is_not_told_by_folders_above(tmp_path: Path) -> None:
    put(tmp_path / "triton_work" / "tables", NAME)
    assert guess(tmp_path / "triton_work" / "tables") == "vllm"
    package = tmp_path / "vllm" / "model_executor" / "layers" / "quantization" / "utils" / "configs"
    put(package, "N=256,K=128,device_name=NVIDIA_H200,dtype=int8_w8a8,block_shape=[128, 128].json")
    assert guess(package) == guess(tmp_path / "vllm") == "vllm" and set(levels(package).values()) == {NOTE}


def test_links_to_nothing_and_evidence_without_end(tmp_path: Path) -> None:
    put(tmp_path, NAME)
    (tmp_path / FP8).symlink_to("nowhere")
    (tmp_path / "round").symlink_to(".")
    os.mkfifo(tmp_path / NAME.replace(".json", ".evidence.json"))
    assert levels(tmp_path) == {NAME: NOTE, FP8: NEVER}


def test_keys_below_one_are_loaded(tmp_path: Path) -> None:
    put(tmp_path, NAME, GOOD | {"-4": ENTRY, "0": ENTRY})
    loaded = vllm_moe(tmp_path, NAME)
    assert loaded is not None and taken(loaded, 1) == ENTRY
    assert levels(tmp_path)[NAME] == SLOW
    assert set(imported(tmp_path / NAME).left_out) == {-4, 0}


def test_gaps_and_twice_the_same_key(tmp_path: Path) -> None:
    put(tmp_path, NAME, {"1": ENTRY, "8": ENTRY, "32": ENTRY})
    [gap] = [f for f in lint(tmp_path, VLLM) if f.rule == "batch_sizes"]
    assert gap.level == SLOW and "4096 (takes 32)" in gap.text and "128 (" not in gap.text
    text = json.dumps(GOOD)[:-1] + ', "8": ' + json.dumps(ENTRY) + "}"
    put(tmp_path, NAME, text)
    assert any(f.level == SLOW and "more than once" in f.text for f in lint(tmp_path, VLLM))


def test_the_nearest_entry_is_the_engines() -> None:
    keys = (1, 8, 64, 512, 4096)
    table = {key: ENTRY | {"num_stages": key} for key in keys}
    for tokens in (*range(1, 700), 2304, 2305, 9000):
        assert nearest(tokens, keys) == taken(table, tokens)["num_stages"]
    assert far_off(USUAL_TOKENS) == {} and set(far_off((1,))) == {t for t in USUAL_TOKENS if t > 4}


def test_another_device_and_another_chip(tmp_path: Path) -> None:
    put(tmp_path, NAME)
    assert levels(tmp_path, device="NVIDIA H200 NVL", chip=H200)[NAME] == NOTE  # vLLM's family
    assert levels(tmp_path, device="NVIDIA B200")[NAME] == NEVER
    put(tmp_path, "E=8,N=768,device_name=NVIDIA_H100.json")
    assert levels(tmp_path)["E=8,N=768,device_name=NVIDIA_H100.json"] == SLOW  # CUDA says NVIDIA H100 80GB HBM3
    big = ENTRY | {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 256, "num_warps": 8, "num_stages": 4}
    put(tmp_path, NAME, GOOD | {"512": big})
    assert levels(tmp_path)[NAME] == BREAKS  # 768 KiB of 227
    assert triton_engine.fits(FusedMoe(512, 2048, 768, 128, 8), EngineConfig(**big), H200) == "too much shared memory"


def test_a_models_own_tables(tmp_path: Path) -> None:
    model = find_model("qwen3-30b-a3b")
    for name in (NAME, FP8, "E=128,N=384,device_name=NVIDIA_H200.json"):
        put(tmp_path, name)
    wanted = tuple(shape.name("NVIDIA H200") for shape in shapes_of(model, 1))
    found = levels(tmp_path, device="NVIDIA H200", names=wanted)
    assert found == {NAME: NOTE, FP8: NOTE, "E=128,N=384,device_name=NVIDIA_H200.json": NEVER}
    sharded = tuple(shape.name("NVIDIA H200") for shape in shapes_of(model, 2, expert_parallel=True))
    assert levels(tmp_path, names=sharded)["E=64,N=768,device_name=NVIDIA_H200.json"] == NEVER  # looked for and absent


def test_how_experts_are_spread() -> None:
    shapes = list(shapes_of(find_model("deepseek-v3"), 8))
    sizes = {(s.problem.local, s.problem.intermediate, s.expert_parallel) for s in shapes}
    assert sizes == {(256, 256, False), (32, 2048, True)}
    assert [s.at(7, block_fp8=True) for s in shapes if not s.expert_parallel] == [FusedMoe(7, 7168, 256, 256, 8, format="fp8_block")]
    assert list(shapes_of(find_model("llama-3.1-8b"))) == []


def imported(path: Path, model: str | None = "qwen3-30b-a3b", chip: Any = H200) -> Any:
    return read_contestants(read_table(path), VLLM, chip, find_model(model) if model else None, KERNELS.values())


def test_an_import_is_no_measurement(tmp_path: Path) -> None:
    read = imported(put(tmp_path, NAME, {"triton_version": "3.5.1"} | GOOD))
    assert [c.problem.tokens for c in read.contestants] == list(USUAL_TOKENS) and read.why == ""
    assert {c.config for c in read.contestants} == {EngineConfig(**ENTRY)}
    rows = new_rows([read], H200, VLLM, [])
    assert len(rows) == len(USUAL_TOKENS) and new_rows([read], H200, VLLM, rows) == []
    for row in rows:
        assert parse(json.loads(json.dumps(row.to_json()))) == row
        assert row.kind == "reference" and row.median_us is None and "not measured" in str(why_not(row)) and not numerics_verified(row)
    assert done_keys(rows, "epoch-1") == set()
    trials = {c.trial(H200, Policy()).key for c in read.contestants}
    assert trials.isdisjoint(row.key for row in rows)  # no trial is taken for done


def test_what_an_import_leaves_out(tmp_path: Path) -> None:
    table = GOOD | {"8": ENTRY | {"BLOCK_SIZE_K": 96}, "16": ENTRY | {"BLOCK_SIZE_M": 256, "BLOCK_SIZE_N": 256}}
    read = imported(put(tmp_path, NAME, table))
    assert set(read.left_out) == {8, 16} and len(read.contestants) == len(USUAL_TOKENS) - 2
    assert imported(tmp_path / NAME, None).needs_model and not imported(tmp_path / NAME, None).contestants
    assert "no share of mixtral-8x7b" in imported(tmp_path / NAME, "mixtral-8x7b").why
    assert "fp8_w8a8 without blocks" in imported(put(tmp_path, NAME.replace(".json", ",dtype=fp8_w8a8.json"))).why
    assert imported(put(tmp_path, "E=128,N=768,device_name=NVIDIA_B200.json")).notes == ("was tuned on NVIDIA_B200, not on h200",)
    shared = imported(put(tmp_path, "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"), "deepseek-v3")
    assert shared.contestants[0].problem.experts == 256 and "fused shared expert" in shared.notes[0]
    assert "qwen3-30b-a3b" in models_for(TableName(MOE, "x", 384, 128), [find_model("qwen3-30b-a3b"), find_model("qwen3-8b")])


def test_products_start_klabs_own_tiles(tmp_path: Path) -> None:
    name = "N=12288,K=7168,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    read = imported(put(tmp_path, name), None)
    assert {c.kernel.id for c in read.contestants} == {"scaled_matmul/triton_tiled"}
    first = read.contestants[0]
    assert (first.problem.m, first.problem.n, first.problem.k, first.problem.format) == (1, 12288, 7168, "fp8_block")
    assert first.config.to_json() == {"block_m": 16, "block_n": 64, "group_m": 1, "num_warps": 4, "num_stages": 4}


def test_a_search_begins_with_what_was_imported(tmp_path: Path) -> None:
    odd = ENTRY | {"GROUP_SIZE_M": 64, "num_stages": 5}
    outside = ENTRY | {"GROUP_SIZE_M": 3}
    read = imported(put(tmp_path, NAME, {"32": odd, "64": ENTRY, "48": outside, "4096": ENTRY}))
    rows = new_rows([read], H200, VLLM, [])
    problem = FusedMoe(32, 2048, 768, 128, 8)
    space = Space.of(kernel_points([triton_engine], problem, H200))
    seeds = prior_for(space, problem, H200, KERNELS, rows).seeds
    default = space.find({KERNEL: triton_engine.id, **triton_engine.default(problem, H200).to_json_full()})
    assert [seeds[0], seeds[1]] == [default, space.find({KERNEL: triton_engine.id, **EngineConfig(**odd).to_json_full()})]
    assert len(seeds) <= 3 and prior_for(space, problem, H200, KERNELS, rows).expected is None  # no time is believed
    far = FusedMoe(512, 2048, 768, 128, 8)
    assert len(prior_for(Space.of(kernel_points([triton_engine], far, H200)), far, H200, KERNELS, rows).seeds) == 1
    # A published time is no recommendation, nor is another chip's table.
    timed = [dataclasses.replace(row, median_us=3.0) for row in rows]
    others = [dataclasses.replace(row, chip="b200") for row in rows]
    assert prior_for(space, problem, H200, KERNELS, timed + others).seeds == (default,)


def test_engines_by_name() -> None:
    with pytest.raises(UsageError, match="vllm and sglang"):
        find_dialect("tgi")
