"""`klab cost` as a user types it."""

import io
import json

import pytest
from rich.console import Console

from klab.harness.cli import _console, _figures
from klab.harness.cost.single_pass import DENOISE_STEPS

QUICK = (
    "cost",
    "-m",
    "qwen3-0.6b",
    "-c",
    "h200",
    "--reference",
    "no",
    "--isl",
    "512",
    "--osl",
    "64",
    "--tp",
    "1",
    "--memory-share",
    "0.02",
)


@pytest.fixture(autouse=True)
def _no_results(monkeypatch, tmp_path):
    monkeypatch.setenv("KLAB_RESULTS", str(tmp_path))
    monkeypatch.delenv("KLAB_REFERENCE", raising=False)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_tables(klab):
    code, out, err = klab(*QUICK, "--sell", "0.5,2", "--prefix-hit", "0.5", "--utilisation", "0.5", "--price", "1,2,4")
    assert code == 0
    for words in (
        "qwen3-0.6b on NVIDIA H200", "256 of the prompt cached", "at work in 50% of the paid time", "promised: TTFT 2 s, TPOT 25 ms",
        "$ per million input tokens", "$ per million cached input tokens", "gross margin", "joules per output token (GPU boards)",
        "tokens/s per MW (provisioned)", "rests on", "modelled", "the dollars' range: 0.50 to 2.00 of the middle from the price",
        "coverage: 0% of the time", "Below 90% a total is not called measured",
        "By contract", "h200 owned", "(--offline)", "Where the time goes", "decode_attention", "measure it there with:",
        "klab run --model qwen3-0.6b --chip h200",
    ):  # fmt: skip
        assert words in out, words
    assert "no measurement of klab's own of h200" in err and "a guess (--host-us)" in err and "sold at the price of input" in err


def test_json_is_pure_and_says_the_same(klab):
    code, out, _ = klab(*QUICK, "--json", "--price", "1,2,4", "--host-us", "0")
    rows = lines(out)
    kinds = [row["type"] for row in rows]
    assert code == 0 and kinds[0] == "scenario" and kinds[-1] == "answer"
    assert set(kinds) == {"scenario", "option", "front", "step", "operator", "missing", "measure", "contract", "offline", "note", "answer"}
    found = rows[-1]
    p = found["point"]
    assert found["feasible"] and found["label"] == p["label"] == "modelled" and rows[0]["price"]["mid"] == 2.0
    cost = 2.0 / 3600 / p["requests_per_s"]["mid"]
    assert p["usd_per_mtok_total"]["mid"] == pytest.approx(cost / (512 + 64) * 1e6)
    for name in ("usd_per_mtok_total", "ttft_s", "tpot_s", "joules_per_token", "tokens_per_s_per_mw"):
        assert p[name]["low"] < p[name]["mid"] < p[name]["high"]
    twice = lines(klab(*QUICK, "--json", "--price", "2,4,8", "--host-us", "0")[1])[-1]["point"]
    assert twice["usd_per_mtok_output"]["mid"] == pytest.approx(2 * p["usd_per_mtok_output"]["mid"])


def test_without_a_price_there_are_no_dollars(klab, tmp_path):
    chip = tmp_path / "new.toml"
    chip.write_text(
        'name = "new"\nkind = "datasheet"\nmemory_bytes = 3000000000\nmemory_gb_per_s = 8000\ntdp_w = 500\n[peak_tflops]\nbfloat16 = 1000\n'
    )
    line = ("cost", "-m", "qwen3-0.6b", "-c", chip, "--isl", "512", "--osl", "64", "--reference", "no")
    code, out, _ = klab(*line)
    assert (
        code == 0
        and "no price is known" in out
        and "tokens/s per MW (GPU boards)" in out
        and "gross margin" not in out
        and "$ per" not in out
    )
    code, out, _ = klab(*line, "--price", "2", "--json")
    assert code == 0 and lines(out)[-1]["point"]["usd_per_mtok_total"]["mid"] > 0


def test_what_cannot_be_ends_in_1_with_an_answer(klab):
    code, out, _ = klab(*QUICK, "--slo-tpot", "10us")
    assert code == 1 and "No configuration keeps the SLOs. The nearest:" in out and "--slo-tpot" in out and "What it takes" in out
    code, out, _ = klab("cost", "-m", "llama-3.1-70b", "-c", "h200", "--tp", "1", "--reference", "no")
    assert code == 1 and "does not fit: 141 GB of weights per GPU exceed" in out and "--tp 2 holds it" in out
    code, out, _ = klab(*QUICK, "--slo-tpot", "10us", "--json")
    answer = lines(out)[-1]
    assert code == 1 and not answer["feasible"] and answer["point"]["meets_slo"] is False
    assert any(row["type"] == "remedy" for row in lines(out))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--slo-tpot", "0"), "--slo-tpot '0' is not a positive time"),
        (("--slo-ttft", "-2s"), "--slo-ttft '-2s' is not a positive time"),
        (("--price", "-2"), "price per GPU-hour is a positive number"),
        (("--price", "gold"), "unknown contract"),
        (("--sell", "0,0"), "--sell is dollars"),
        (("--sell", "1"), "--sell '1': write dollars per million INPUT,OUTPUT"),
        (("--tp", "0"), "--tp"),
        (("--tp", "3"), "does not divide"),
        (("--isl", "0"), "--isl is at least 1"),
        (("--osl", "-1"), "--osl is at least 0"),
        (("--prefix-hit", "1"), "--prefix-hit is a share below 1"),
        (("--utilisation", "0"), "--utilisation is a share above 0"),
        (("--quantization", "fp5"), "quantization is one of fp8_block"),
        (("--objective", "speed"), "--objective is cost, energy, latency, not 'speed'"),
        (("--host-us", "3,2,1"), "not in this order"),
        (("--kw-per-gpu", "0"), "--kw-per-gpu is a positive number"),
        (("--memory-share", "0"), "--memory-share"),
        (("--max-error", "2"), "--max-error 2"),
        (("--offline", "--slo-tpot", "25ms"), "contradict each other"),
        (("--steps", "20"), "--steps: qwen3-0.6b generates text"),
        (("--expert-parallel",), "--expert-parallel: qwen3-0.6b has no experts"),
        (("--reference", "nowhere"), "klab: nowhere holds no tables"),
        (("--profile", "nowhere.json"), "nowhere.json does not exist"),
    ],
)
def test_bad_input_is_one_line_and_2(klab, options, words):
    code, out, err = klab(*QUICK, *options)
    assert code == 2 and not out and words in err and err.count("\n") == 1


def test_formats_are_compared_with_what_they_lose(klab):
    code, out, _ = klab(*QUICK, "-q", "all", "--offline")
    assert code == 0 and "Formats (error" in out and "not measured" in out and "0 (unquantised)" in out and "no: wide" in out
    rows = lines(klab(*QUICK, "--max-error", "0.1", "--offline", "--json")[1])
    formats = [row for row in rows if row["type"] == "format"]
    assert [row["format"] for row in formats][:2] == ["none", "fp8_block"] and all(row["wide_error"] is None for row in formats)
    assert rows[-1]["deployment"] == "h200"


def test_what_stops_a_point_and_what_the_host_takes_is_told(klab):
    rows = [line for line in klab(*QUICK, "--objective", "latency", "--host-us", "500")[1].splitlines() if "kept" in line]
    assert "1 of " in rows[0] and rows[0].rstrip("│ ").endswith("latency")
    out = klab(*QUICK, "--slo-ttft", "none", "--slo-tpot", "none", "--host-us", "500")[1]
    assert "kept" not in out and "missed" not in out and "no more tokens per GPU" in out
    assert "of the time is the wait for the host" in out and "the wait for the host" not in klab(*QUICK, "--host-us", "0")[1]


def test_a_narrow_terminal_is_enough(klab, monkeypatch):
    monkeypatch.setattr(_console, "out", narrow := Console(highlight=False, force_terminal=True, color_system=None, width=110))
    monkeypatch.setattr(_figures, "out", narrow)
    narrow.file = io.StringIO()
    klab("cost", "-m", "llama-3.1-70b", "-c", "h200", "--reference", "no", "--isl", "1024", "--osl", "64")
    shown = narrow.file.getvalue()
    assert "bfloat16" in shown and "prefill_attention" in shown and "35.3 + " in shown and "the longest launch" not in shown
    tables = [line for line in shown.splitlines() if line[:1] in "│┃┏└"]
    assert max(map(len, tables)) <= 110 and "tp 1: 141 GB of weights per GPU exceed" in shown


def test_a_batch_job_promises_nothing(klab):
    code, out, _ = klab(*QUICK, "--offline", "--json")
    rows = lines(out)
    assert code == 0 and rows[0]["workload"]["slo_tpot_s"] is None and rows[0]["workload"]["offline"] and rows[-1]["feasible"]


def test_pictures_and_speech(klab):
    line = ("cost", "-m", "flux.1-dev", "-c", "h200", "--reference", "no", "--tp", "1")
    code, out, _ = klab(*line, "--sell", "0.02")
    assert code == 0 and "$ per image" in out and "images per GPU-hour" in out and "gross margin" in out and "per other" not in out
    one, half = (lines(klab(*line, "--steps", n, "--json")[1])[-1]["point"] for n in (DENOISE_STEPS, DENOISE_STEPS // 2))
    assert half["joules_per_unit"]["mid"] == pytest.approx(one["joules_per_unit"]["mid"] / 2, rel=0.01)
    code, out, err = klab(*line, "--slo", "1ms")
    nearest = out.partition("--slo ")[2].split()[0]
    assert code == 1 and "would be met" in out and klab(*line, "--slo", nearest)[0] == 0 and "waits for the host" in err
    code, _, err = klab(*line, "--slo-tpot", "25ms")
    assert code == 2 and "flux.1-dev is not billed by the token" in err
    speech = ("cost", "-m", "whisper-large-v3", "-c", "h200", "--reference", "no", "--tp", "1")
    assert klab(*speech, "--steps", "3")[0] == 2 and "draws nothing" in klab(*speech, "--no-guidance")[2]
    code, out, _ = klab(*speech, "--json")
    assert code == 0 and lines(out)[-1]["point"]["unit"] == "audio hour"
