"""`klab tune` as a user runs it, on the CPU: stopped, continued, exported; and what it says to wrong input."""

import json
import os
import signal
import subprocess
import sys

import pytest

from klab.harness.cli.main import build_app
from klab.harness.tune.replay.files import read_space
from klab.kernels.errors import CannotMeasure, UsageError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "torch_dtype": "float32",
}
SMALL = ("tune", "--model", "config.json", "--chip", "cpu", "--isl", "32", "--osl", "8", "--batch", "2", "--results", "rows")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def start(place, *words):
    env = {**os.environ, "KLAB_LOCK_DIR": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "klab.harness.cli", *SMALL, *words]
    return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_tuning_run_is_stopped_continued_chosen_from_and_exported(place):
    words = ("--problem", "matmul 32x64x64", "--strategy", "random", "--evaluations", "4", "--out", "pack.json", "--json")
    process = start(place, *words)
    rows = [json.loads(process.stdout.readline()) for _ in range(3)]  # the two baselines and a candidate of the search
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "The same command goes on where it was" in said, said
    stopped = [json.loads(line) for line in rest.splitlines()]
    assert all(row["status"] == "ok" for row in rows) and any(row.get("type") == "tuning" for row in stopped)

    done = start(place, *words, "--gpu-seconds", "9", "--export", "spaces")
    told, said = done.communicate(timeout=200)
    assert done.returncode == 0, said
    lines = [json.loads(line) for line in told.splitlines()]
    tuned = next(line for line in lines if line.get("type") == "tuned")
    whole = next(line for line in lines if line.get("type") == "tuning")
    assert (
        tuned["evaluations"] == tuned["candidates"] == 4
        and tuned["resumed"] >= 1
        and whole["ended"] in ("evaluations", "exhausted", "device seconds")
    )
    assert tuned["default_us"] > 0 and tuned["library_us"] > 0 and tuned["further_is"] == "modelled" and whole["ended"]
    measured = {line["key"] for line in lines if line.get("status") == "ok"}
    assert not measured & {row["key"] for row in rows}, "what was measured before was not measured again"
    choice = json.loads((place / "pack.json").read_text())["choices"][0]
    assert choice["kernel"] == tuned["chosen"] and choice["config"] == tuned["chosen_config"]
    (exported,) = [line["file"] for line in lines if line.get("type") == "export"]
    space = read_space(place / exported)
    assert len(space.space) >= 4 and space.optimum_us > 0 and any(len(samples) for samples in space.samples_us)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--strategy", "clever"), UsageError, "no strategy 'clever'; there are"),
        (("--evaluations", "0"), UsageError, "too small for one"),
        (("--gpu-seconds", "-1"), UsageError, "too small"),
        (("--budget", "0s"), UsageError, "no time"),
        (("--budget", "50ms"), UsageError, "not a time"),
        (("--budget", "0.01s", "--strategy", "random"), UsageError, "too small for one evaluation"),
        (("--problem", "nowhere"), UsageError, "--problem nowhere: none matches; there are"),
        (("--kernel", "no_such"), UsageError, "no_such"),
        (("--objective", "speed"), UsageError, "unknown objective"),
        (("--objective", "energy", "--strategy", "random"), CannotMeasure, "power sensor"),
        (("--pareto",), CannotMeasure, "power sensor"),
        (("--allow-clock-control", "--strategy", "random"), CannotMeasure, "for GPUs"),
        (("--phase", "denoise"), UsageError, "--phase denoise"),
        (("--kernel", "torch_matmul", "--strategy", "random"), UsageError, "nothing to tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_one_clear_line(place, monkeypatch, words, error, says):
    monkeypatch.chdir(place)
    monkeypatch.setenv("KLAB_LOCK_DIR", str(place))
    with pytest.raises(error, match=says) as raised:
        build_app()(args=[*SMALL, *words], standalone_mode=False)
    assert "\n" not in str(raised.value)


def test_a_dry_run_tells_the_spaces_and_measures_nothing(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    build_app()(args=[*SMALL[:-1], "none", "--dry-run", "--json"], standalone_mode=False)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(row["candidates"] for row in told if row["type"] == "target") == told[-1]["candidates"] > 50
    assert not (place / "none").exists()
