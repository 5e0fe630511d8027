"""`klab models|chips|kernels|plan` as a user types them."""

import dataclasses
import json

import pytest


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_models(klab):
    code, out, _ = klab("models")
    assert code == 0 and "deepseek-v3" in out and "70,272" in out and "671 B" in out
    code, out, _ = klab("models", "--json")
    rows = {row["name"]: row for row in lines(out)}
    assert code == 0 and len(rows) == 24
    assert rows["llama-3.1-8b"]["parameters"] == 8_029_995_008
    assert rows["llama-3.1-70b"]["kv_bytes_per_token"] == 327_680
    code, out, _ = klab("models", "qwen3.5-35b-a3b")
    assert code == 0 and "vision_config" in out and "gated delta net" in out
    code, out, _ = klab("models", "openai/GPT-OSS-20B", "--json")
    (row,) = lines(out)
    assert row["name"] == "gpt-oss-20b" and row["config"]["num_local_experts"] == 32 and row["notes"]


def test_models_of_a_strange_file(klab, tmp_path):
    config = {"model_type": "zorblax", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024,
              "vocab_size": 1000, "warp_factor": 9, "layer_types": ["full_attention", "mamba", "mamba", "full_attention"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for verb in (("models", tmp_path), ("plan", "--model", tmp_path, "--chip", "h200")):
        code, out, _ = klab(*verb)
        assert code == 0
        assert "'mamba' in 2 of 4 layers is not understood" in out and "covered share of the flops: unknown" in out
        assert "warp_factor: not understood" in out and "'zorblax'" in out


def test_chips(klab):
    code, out, _ = klab("chips")
    assert code == 0 and all(name in out for name in ("h100", "h200", "b200", "cpu", "7,700"))
    _, out, _ = klab("chips", "--json")
    rows = {row["name"]: row for row in lines(out)}
    assert set(rows) == {"h100", "h200", "b200", "cpu"} and rows["b200"]["peak_tflops"]["bfloat16"] == 2250
    _, out, _ = klab("chips", "h200")
    assert "datasheet" in out and "4,800" in out


def test_plan(klab):
    code, out, _ = klab("plan", "--model", "llama-3.1-8b", "--chip", "h200", "--batch", "1,8", "--tp", "2")
    assert code == 0
    assert "Prefill, batch 1" in out and "Decode, batch 8" in out and "matmul 8192x14336x4096 bf16" in out and "all_reduce" in out
    code, out, _ = klab("plan", "-m", "deepseek-v3", "-c", "b200", "--tp", "8", "--batch", "1", "--json")
    rows = lines(out)
    assert code == 0 and {row["type"] for row in rows} == {"plan", "row", "totals", "note"}
    assert [row["phase"] for row in rows if row["type"] == "totals"] == ["prefill", "decode"]
    assert {row["operator"] for row in rows if row["type"] == "row" and row["why"]} == {"all_reduce", "all_gather"}
    assert any("quantization=fp8_block" in row["message"] for row in rows if row["type"] == "note")
    code, out, _ = klab(
        "plan", "-m", "deepseek-v3", "-c", "b200", "--tp", "8", "--with", "quantization=fp8_block", "--with", "q_len=2", "--json"
    )
    assert code == 0 and any(row.get("operator") == "scaled_matmul" for row in lines(out))


def test_plan_on_this_machines_cpu(klab):
    code, out, _ = klab("plan", "--model", "qwen3-0.6b", "--chip", "cpu", "--dtype", "fp32")
    assert code == 0 and "512 new tokens" in out and "fp32" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("plan", "-m", "llama-3.1-8c", "-c", "h200"), "did you mean llama-3.1-8b"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h300"), "did you mean h200"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--tp", "3"), "does not divide"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--batch", "1,x"), "--batch"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--dtype", "fp8"), "quantization=fp8_block"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--with", "q_len"), "NAME=VALUE"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--with", "q_len=two"), "whole number"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--with", "quantization=fp5"), "fp8_block"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--isl", "0"), "--isl"),
        (("plan", "-m", "llama-3.1-8b", "-c", "h200", "--isl", "many"), "--isl"),
        (("plan", "-c", "h200"), "--model"),
        (("models", "nothing-like-it"), "unknown model"),
        (("models", "./absent.json"), "does not exist"),
        (("chips", "mi300"), "unknown chip"),
        (("kernels", "--chip", "mi300"), "unknown chip"),
        (("kernels", "--kernels", "/absent"), "not a folder"),
    ],
)
def test_wrong_requests_end_in_one_line_and_code_2(klab, args, says):
    code, out, err = klab(*args)
    assert code == 2 and out == "" and "Traceback" not in err
    assert says in " ".join(err.split())


FILE = '''
from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul


@kernel(Matmul, backend="torch", kinds=("cpu",))
def mine(problem, config, chip):
    """My own."""
    return lambda inputs, outputs: None


def refuse(problem, config, chip):
    raise RuntimeError("nope")


@kernel(Matmul, backend="torch", kinds=("cpu",), fits=refuse)
def raising(problem, config, chip):
    """Its fits() fails."""
    return lambda inputs, outputs: None
'''


def test_kernels(klab, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "results").mkdir()
    code, out, _ = klab("kernels", "--kernels", tmp_path, "--results", tmp_path / "results", "--chip", "cpu", "--json")
    assert code == 0
    rows = {row["kernel"]: row for row in lines(out) if row["type"] == "kernel"}
    mine = rows["matmul/mine"]["chips"]["cpu"]
    assert mine["fits"] and mine["candidates"] == 1 and not mine["verified"]
    assert "nope" in rows["matmul/raising"]["chips"]["cpu"]["why"]
    assert any("nothing_of_that_name" in row["reason"] for row in lines(out) if row["type"] == "unavailable")
    code, out, _ = klab("kernels", "--kernels", tmp_path, "--results", tmp_path / "results", "--chip", "h200")
    assert code == 0 and "does not fit: runs on cpu, not cuda" in out and "broken.py" in out


def test_kernels_verified_by_a_recorded_result(klab, tmp_path):
    from klab.harness.store.result import Result, Status
    from klab.kernels.discover import discover

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "mine.py").write_text(FILE)
    source = discover([tmp_path / "kernels"]).kernels["matmul/mine"].source_digest
    common = {
        "problem": {},
        "problem_key": "p",
        "problem_label": "p",
        "config": {},
        "policy": {},
        "run_id": "r",
        "recorded_at": "2026-11-20T00:00:00+00:00",
    }
    row = Result(
        "key", Status.OK, "matmul/mine", "torch", False, source, "matmul", chip="cpu", error=1e-7, tolerance=1e-5, checks=2, **common
    )
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "part.jsonl").write_text(json.dumps(row.to_json()) + "\n")
    _, out, _ = klab("kernels", "--kernels", tmp_path / "kernels", "--results", tmp_path / "results", "--json")
    rows = {row["kernel"]: row for row in lines(out) if row["type"] == "kernel"}
    assert rows["matmul/mine"]["chips"]["cpu"]["verified"]
    assert not rows["matmul/raising"]["chips"]["cpu"]["verified"]
    wrong = dataclasses.replace(row, key="another", status=Status.INCORRECT, error=1.0)
    (tmp_path / "results" / "other.jsonl").write_text(json.dumps(wrong.to_json()) + "\n")
    words = ("kernels", "--kernels", tmp_path / "kernels", "--results", tmp_path / "results", "--chip", "cpu")
    mine = next(r for r in lines(klab(*words, "--json")[1]) if r.get("kernel") == "matmul/mine")["chips"]["cpu"]
    assert not mine["verified"] and mine["wrong_trials"] == 1
    assert "wrong on 1 trial" in " ".join(klab(*words)[1].split())


def test_the_share_that_klab_measures_is_of_what_is_understood(klab):
    from klab.harness.cli.plan import _understood

    assert _understood(1.0) == "" and "84.0%" in _understood(0.84) and "unknown share" in _understood(None)
    _, out, _ = klab("plan", "--model", "llama-3.1-8b", "--chip", "h200", "--batch", "1")
    assert "klab measures" in out and "understood" not in out
