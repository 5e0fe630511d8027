"""`klab export`, `lint-tuned` and `import` as a user runs them, on made-up results; what is written is read by the engines' rules."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engine_loaders import sglang_moe, sglang_moe_name, taken, vllm_moe, vllm_moe_name
from made_results import failed, made

from klab.harness.choose.profile import read_profile
from klab.harness.cli.main import build_app
from klab.harness.store.read import iter_results
from klab.harness.store.result import Result, Status
from klab.kernels import discover
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.fused_moe._engine_config import EngineConfig, sglang_default, vllm_default
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.scaled_matmul.problem import ScaledMatmul

MODEL, CHIP = ("--model", "qwen3-30b-a3b"), ("--chip", "h200")
# Each four times the one before: no gap that matters.
LADDER = (1, 4, 16, 64, 256, 1024, 4096)
# One configuration per number of tokens, so that a mixed-up entry is seen.
BEST = {tokens: EngineConfig(16 if tokens < 128 else 64, 64, 128, 1 + n, 4, 2 + n % 3) for n, tokens in enumerate((*LADDER, 2, 8, 32, 128))}
NAME = vllm_moe_name("NVIDIA H200", 128, 768)
BLOCK = vllm_moe_name("NVIDIA H200", 128, 768, "fp8_w8a8", [128, 128])


def row(problem: FusedMoe, config: EngineConfig, us: float, **changes: Any) -> Result:
    return made(problem, "triton_engine", config=config.to_json_full(), level_us=us, noise=0.001, **changes)


def experts(tokens: int, **changes: Any) -> FusedMoe:
    return FusedMoe(**{"tokens": tokens, "hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8} | changes)


def rows_of(tokens: tuple[int, ...] = LADDER, **changes: Any) -> list[Result]:
    """Of each number of tokens the best, vLLM's own configuration at 1.25 of its time, and what must never be in a table."""
    found = []
    for t in tokens:
        problem, us = experts(t, **changes), 40.0 + t / 16
        wrong = dataclasses.replace(BEST[t], GROUP_SIZE_M=32)
        found += [
            row(problem, BEST[t], us),
            row(problem, vllm_default(problem), 1.25 * us),
            failed(problem, "triton_engine", Status.INCORRECT, "out is off", config=wrong.to_json_full()),
            row(problem, dataclasses.replace(BEST[t], num_stages=5), us / 2, checks=0, error=None),  # fast and unchecked
            row(problem, dataclasses.replace(BEST[t], GROUP_SIZE_M=64), us / 2, kind="reference"),  # somebody else's
            made(problem, "cuda_moe", config={"block_m": 64}, level_us=us / 3),  # no engine has this kernel
        ]
    return found


def stored(folder: Path, rows: list[Result]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "made.jsonl").write_text("".join(json.dumps(one.to_json()) + "\n" for one in rows))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("rows"), rows_of() + rows_of(format="fp8_block") + rows_of(skew=1.0))


@pytest.fixture(scope="module", autouse=True)
def catalogue() -> Iterator[None]:
    """Found once."""
    once = cache(discover.discover)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discover, "discover", lambda folders=(): once(tuple(folders)))
        yield


def klab(*words: object) -> int:
    """The exit code."""
    return build_app()(args=[str(word) for word in words], standalone_mode=False) or 0


def export(engine: str, store: Path, out: Path, *words: object) -> None:
    klab("export", "--engine", engine, *MODEL, *CHIP, "--results", store, "--out", out, *words)


def test_vllm_loads_what_was_measured_and_nothing_else(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("vllm", store, tmp_path, "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(Path(line["file"]).name for line in lines) == sorted([NAME, BLOCK])
    for name in (NAME, BLOCK):
        table = vllm_moe(tmp_path, name)
        assert table is not None and list(table) == list(LADDER)
        for tokens in LADDER:
            wanted = {field: value for field, value in BEST[tokens].to_json_full().items() if field != "SPLIT_K"}
            assert taken(table, tokens) == wanted
        facts = json.loads((tmp_path / name.replace(".json", ".evidence.json")).read_text())
        assert facts["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        one = facts["entries"]["64"]
        low, high = one["evidence"]["interval_us"]
        assert low <= one["evidence"]["median_us"] <= high and one["evidence"]["sm_clock_mhz"] == 1755.0
        assert (
            one["evidence"]["error"] <= one["evidence"]["tolerance"] and one["evidence"]["versions"]["triton"] == facts["triton"] == "3.7.1"
        )
        assert one["without_table"]["ratio"] == pytest.approx(1.25, rel=0.01)
    assert json.loads((tmp_path / NAME).read_text())["triton_version"] == "3.7.1"
    assert klab("lint-tuned", tmp_path, *CHIP) == 0


def test_sglang_loads_it_under_its_triton(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("sglang", store, tmp_path)
    name = sglang_moe_name("NVIDIA H200", 128, 768, "fp8_w8a8", [128, 128])
    assert (tmp_path / "configs" / "triton_3_7_1" / name).exists()
    for triton in ("3.7.1", "3.8.0"):
        table = sglang_moe(tmp_path, triton, name)
        assert table is not None and list(table) == list(LADDER)
        assert taken(table, 630)["GROUP_SIZE_M"] == BEST[256].GROUP_SIZE_M
    klab("lint-tuned", tmp_path, *CHIP, "--triton", "3.7.1")
    said = capsys.readouterr()
    assert "SGLANG_MOE_CONFIG_DIR" in said.out and "0 of them" in said.err


def test_the_same_results_give_the_same_bytes(store: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        export("vllm", store, tmp_path / folder)
    export("vllm", store, tmp_path / "a")  # its own tables are replaced
    a, b = (sorted(p for p in (tmp_path / folder).iterdir()) for folder in ("a", "b"))
    assert [p.name for p in a] == [p.name for p in b] and [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_what_somebody_else_wrote_stays(store: Path, tmp_path: Path) -> None:
    theirs = json.dumps({"8": {"BLOCK_SIZE_M": 16}})
    (tmp_path / NAME).write_text(theirs)
    with pytest.raises(UsageError, match="klab did not write it"):
        export("vllm", store, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME] and (tmp_path / NAME).read_text() == theirs
    export("vllm", store, tmp_path, "--force")
    with pytest.raises(UsageError, match="--force replaces it"):
        (tmp_path / NAME).write_text((tmp_path / NAME).read_text().replace('"num_warps": 4', '"num_warps": 8'))
        export("vllm", store, tmp_path)
    klab("lint-tuned", tmp_path)


def test_fewer_entries_replace_no_table_unasked(store: Path, tmp_path: Path) -> None:
    export("vllm", store, tmp_path)
    fewer = stored(tmp_path / "rows", [r for r in rows_of() if r.problem["tokens"] != 64])
    with pytest.raises(UsageError, match=r"entries that the new one lacks \(64 tokens"):
        export("vllm", fewer, tmp_path, "--partial")


def test_a_table_with_gaps_is_not_written_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = stored(tmp_path / "rows", rows_of((1, 8, 32)) + rows_of((1, 8), intermediate=384))
    with pytest.raises(CannotMeasure, match="gaps"):
        export("vllm", few, tmp_path / "out")
    said = capsys.readouterr().err
    assert "4096 (would take 32)" in said and "klab tune --model qwen3-30b-a3b" in said and "--tp 2" in said
    assert not (tmp_path / "out").exists()
    export("vllm", few, tmp_path / "out", "--partial", "--tp", "1")
    assert [p.name for p in (tmp_path / "out").iterdir() if "evidence" not in p.name] == [NAME]


def test_versions_of_triton_are_not_mixed(tmp_path: Path) -> None:
    old = [dataclasses.replace(r, environment={"triton": "3.5.1"}) for r in rows_of((1, 2))]
    both = stored(tmp_path / "rows", [*rows_of((4, 8)), *old])
    export("sglang", both, tmp_path / "new", "--partial")
    export("sglang", both, tmp_path / "old", "--partial", "--triton", "3.5.1")
    for folder, triton, tokens in (("new", "3.7.1", [4, 8]), ("old", "3.5.1", [1, 2])):
        table = sglang_moe(tmp_path / folder, triton, NAME)
        assert table is not None and list(table) == tokens


def test_newer_tritons_of_other_models_and_devices_hide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = {"triton": "3.8.0"}
    others = [dataclasses.replace(r, environment=new) for r in rows_of((1,), hidden=4096)]
    rows = stored(tmp_path / "rows", rows_of((1, 4)) + others)
    export("vllm", rows, tmp_path / "out", "--partial")
    assert vllm_moe(tmp_path / "out", NAME) is not None
    nvl = [dataclasses.replace(r, environment=new, device="NVIDIA H200 NVL") for r in rows_of((1, 4, 16))]
    rows = stored(tmp_path / "both", rows_of((1, 4)) + nvl)
    export("vllm", rows, tmp_path / "h200", "--partial", "--device", "NVIDIA H200")
    table = vllm_moe(tmp_path / "h200", NAME)
    assert table is not None and list(table) == [1, 4]
    capsys.readouterr()
    export("sglang", rows, tmp_path / "nvl", "--partial")
    assert "another Triton than 3.8.0 are set aside (--triton 3.7.1)" in capsys.readouterr().err
    name = sglang_moe_name("NVIDIA H200 NVL", 128, 768)
    assert sglang_moe(tmp_path / "nvl", "3.8.0", name) is not None
    # A name that klab's catalog does not have, but its own evidence: nothing to warn of.
    klab("lint-tuned", tmp_path / "nvl", "--json")
    assert not [line for line in capsys.readouterr().out.splitlines() if json.loads(line).get("rule") == "device"]


@pytest.mark.parametrize(
    ("version", "device", "what"),
    [
        ("3.7.0rc1", "NVIDIA H200", "no folder can be for results of Triton '3.7.0rc1'"),
        ("../../x", "NVIDIA H200", "no folder can be"),
        ("", "NVIDIA H200", "do not say theirs: measure again"),
        ("3.7.1", "NVIDIA H200/X", "is no name of a file"),
    ],
)
def test_what_sglang_could_not_look_up_is_not_written(tmp_path: Path, version: str, device: str, what: str) -> None:
    """A folder of a version with letters stops SGLang whenever another table is missing."""
    rows = [dataclasses.replace(r, environment={"triton": version}, device=device) for r in rows_of((1, 4))]
    with pytest.raises(UsageError, match=what):
        export("sglang", stored(tmp_path / "rows", rows), tmp_path / "out", "--partial")
    assert not (tmp_path / "out").exists()
    export("vllm", tmp_path / "rows", tmp_path / "v", "--partial")
    assert klab("lint-tuned", tmp_path / "v", "--device", device) == 0


def test_hostile_text_is_told_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that no terminal takes, and fields of millions of them."""
    entry = {name: value for name, value in BEST[8].to_json_full().items() if name != "SPLIT_K"}
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / NAME).write_text(json.dumps({"8": entry | {"\ud801\x1b[31m": 1}, "16": entry | {"num_warps": "x" * 1_000_000}, "64": entry}))
    assert klab("lint-tuned", folder) == 1
    said = capsys.readouterr().out
    said.encode()
    assert "\x1b[31m" not in said and len(said) < 100_000
    (folder / NAME).rename(folder / NAME.replace(".json", "\udcff.json"))
    klab("import", folder, *MODEL, "--chip", "h200", "--results", tmp_path / "rows")
    said = capsys.readouterr().out
    said.encode()
    assert len(said) < 100_000 and len(list(iter_results(tmp_path / "rows"))) == 1


def test_expert_parallel_tables_are_by_local_experts(tmp_path: Path) -> None:
    rows = stored(tmp_path / "rows", rows_of((1, 4), local_experts=32))
    export("vllm", rows, tmp_path / "out", "--partial")
    assert vllm_moe(tmp_path / "out", vllm_moe_name("NVIDIA H200", 32, 768)) is not None


def test_products_of_a_kernel_with_the_engines_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """klab ships none; a user's own may be it."""
    fields = {name: value for name, value in BEST[8].to_json_full().items() if name != "SPLIT_K"}
    rows = []
    for m in (1, 8, 64):
        for n, k in ((4096, 4096), (4096, 4000)):  # the second is no matrix of the model
            problem = ScaledMatmul(m, n, k)
            for split, us in ((1, 20.0), (4, 10.0)):  # a split is a field of SGLang's, and nothing that vLLM would do
                rows.append(made(problem, "triton_mine", config=fields | {"SPLIT_K": split, "SWAP_AB": False}, level_us=us))
            rows.append(made(problem, "triton_tiled", config={"block_m": 64, "num_warps": 4}, level_us=5.0))
    found = stored(tmp_path / "rows", rows)
    words = ("--model", "llama-3.1-8b", *CHIP, "--results", found, "--partial")
    klab("export", "--engine", "vllm", *words, "--out", tmp_path / "v")
    klab("export", "--engine", "sglang", *words, "--out", tmp_path / "s")
    assert "copy them there" in capsys.readouterr().out
    name = "N=4096,K=4096,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128{}128].json"
    [vllm] = [p for p in (tmp_path / "v").rglob("*.json") if "evidence" not in p.name]
    [sglang] = [p for p in (tmp_path / "s").rglob("*.json") if "evidence" not in p.name]
    assert str(vllm.relative_to(tmp_path / "v")) == f"vllm/model_executor/layers/quantization/utils/configs/{name.format(',')}"
    assert str(sglang.relative_to(tmp_path / "s")) == f"sglang/srt/layers/quantization/configs/{name.format(', ')}"
    tables = [{int(key): value for key, value in json.loads(path.read_text()).items()} for path in (vllm, sglang)]
    assert tables[0] == dict.fromkeys((1, 8, 64), fields)
    assert tables[1] == dict.fromkeys((1, 8, 64), fields | {"SPLIT_K": 4, "SWAP_AB": False})
    assert klab("lint-tuned", tmp_path / "v") == klab("lint-tuned", tmp_path / "s") == 0


def test_a_profile_for_ones_own_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = stored(tmp_path / "rows", rows_of((1, 8, 32, 128)))
    export("json", rows, tmp_path / "out", "--json")
    [line] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    profile = read_profile(Path(line["file"]))
    assert profile is not None and profile.model == "qwen3-30b-a3b"
    assert {c.kernel for c in profile.choices} == {"fused_moe/cuda_moe"} and len(profile.choices) == line["choices"] == 4
    facts = json.loads(Path(line["evidence"]).read_text())
    assert facts["sha256"] == hashlib.sha256(Path(line["file"]).read_bytes()).hexdigest()
    export("json", rows, tmp_path / "out")
    Path(line["file"]).write_text("{}")
    with pytest.raises(UsageError, match="--force replaces it"):
        export("json", rows, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "error", "what"),
    [
        (("--engine", "tgi", *MODEL, *CHIP), UsageError, "vllm and sglang"),
        (("--engine", "vllm", "--model", "nosuch", *CHIP), UsageError, "unknown model"),
        (("--engine", "vllm", *MODEL, "--chip", "cpu"), UsageError, "tables for GPUs"),
        (("--engine", "vllm", *MODEL, *CHIP, "--tp", "7"), UsageError, "--tp 7 divides neither"),
        (("--engine", "vllm", *MODEL, "--chip", "b200"), CannotMeasure, "klab tune --model qwen3-30b-a3b --chip b200"),
        (("--engine", "vllm", "--model", "qwen3-0.6b", *CHIP), CannotMeasure, "no routed experts.*no kernel of scaled_matmul"),
        (("--engine", "vllm", *MODEL, *CHIP, "--triton", "9.9"), CannotMeasure, "no verified result"),
        (("--engine", "vllm", *MODEL, *CHIP, "--with", "q_len=2"), UsageError, "--with describes a plan"),
    ],
)
def test_export_says_what_is_wrong(store: Path, tmp_path: Path, words: tuple[str, ...], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        klab("export", *words, "--results", store, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lint_tells_by_its_exit_code(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("vllm", store, tmp_path, "--json")
    capsys.readouterr()
    assert klab("lint-tuned", tmp_path, *CHIP, *MODEL, "--json") == 0
    assert klab("lint-tuned", tmp_path, *CHIP, *MODEL, "--tp", "2", "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["bad"] for line in lines if line["type"] == "summary"] == [0, 3]
    missing = [line["file"] for line in lines if line.get("rule") == "missing"]
    assert missing == [vllm_moe_name("NVIDIA H200", 128, 384)]
    (tmp_path / NAME).write_text((tmp_path / NAME).read_text().replace('"num_warps": 4', '"num_warps": 8'))
    klab("lint-tuned", tmp_path)
    assert "it was edited since" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("nowhere",), "does not exist"),
        (("empty",), "no tables"),
        (("tables", "--tp", "2"), "give --model too"),
        (("tables", *MODEL), "give --chip or --device"),
        (("tables", "--model", "qwen3-8b", *CHIP), "no routed experts"),
        (("tables", "--chip", "cpu"), "is no GPU"),
        (("tables", *MODEL, *CHIP, "--tp", "7"), "--tp 7 does not divide"),
    ],
)
def test_lint_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / NAME).write_text("{}")
    with pytest.raises(UsageError, match=what):
        klab("lint-tuned", *words)


def test_import_and_what_the_store_makes_of_it(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("sglang", store, tmp_path / "tables")
    capsys.readouterr()
    for _ in range(2):
        klab("import", tmp_path / "tables", *MODEL, "--results", tmp_path / "rows", "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["stored"], line["known"]) for line in lines if line["type"] == "import"] == [(14, 0), (0, 14)]
    rows = list(iter_results(tmp_path / "rows"))
    assert len(rows) == 14 and {r.kind for r in rows} == {"reference"} and {r.median_us for r in rows} == {None}
    # Of a folder for many devices, a chip's own are taken.
    other = tmp_path / "tables" / "configs" / "triton_3_7_1" / NAME.replace("H200", "B200")
    other.write_text(json.dumps({"8": BEST[8].to_json_full()}))
    klab("import", tmp_path / "tables", *MODEL, "--chip", "h200", "--results", tmp_path / "rows")
    assert len(list(iter_results(tmp_path / "rows"))) == 14 and "1 files are left out" in capsys.readouterr().err
    # They are chosen nowhere and exported nowhere.
    with pytest.raises(CannotMeasure, match="no verified result"):
        export("vllm", tmp_path / "rows", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("nowhere",), "does not exist"),
        (("tables",), "--model says them"),
        (("tables", *MODEL, "--budget", "8m"), "go with --measure"),
        (("tables", "--model", "mixtral-8x7b"), "no share of mixtral-8x7b, which has 8 experts of 14336"),
        (("tables", *MODEL, "--chip", "cpu"), "is no GPU"),
        (("several", *MODEL), "of several chips .b200, h200.: name one with --chip"),
    ],
)
def test_import_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], what: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, names in (("tables", [NAME]), ("several", [NAME, NAME.replace("H200", "B200")])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(json.dumps({"8": BEST[8].to_json_full()}))
    with pytest.raises(UsageError, match=what):
        klab("import", *words, "--results", "rows")
    assert not (tmp_path / "rows").exists()


def test_imported_configurations_are_measured_beside_klabs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Job:
        def __init__(self, *_: object, **__: object) -> None:
            self.outcome = None

        def run(self, trials: list[Any], kernels: object) -> None:
            asked.extend(trials)

    monkeypatch.setattr("klab.harness.tune.job.Job", Job)
    monkeypatch.setattr("klab.harness.cli._setup.tell_outcome", lambda *_, **__: None)
    (tmp_path / NAME).write_text(json.dumps({"8": sglang_default(experts(8)).to_json_full() | {"GROUP_SIZE_M": 3}}))
    klab("import", tmp_path / NAME, *MODEL, "--results", tmp_path / "rows", "--measure")
    engine = [t.config.GROUP_SIZE_M for t in asked if t.kernel == "fused_moe/triton_engine"]
    assert engine[0] == 3 and len(engine) == 2  # the table's, then klab's default
    assert len({t.kernel for t in asked}) > 3 and len({t.problem.key for t in asked}) == 1
