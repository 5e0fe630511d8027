"""`klab` as a user runs it: from a config.json to rows, a pack and a page, in processes of their own, on the CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import CONFIG


def klab(*words, cwd, timeout=280, **env):
    command = [sys.executable, "-m", "klab.harness.cli", *map(str, words)]
    variables = {**os.environ, "KLAB_LOCK_DIR": str(cwd), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)


def lines(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


SMALL = ("--model", "config.json", "--chip", "cpu", "--isl", "32", "--osl", "8", "--batch", "2")


@pytest.fixture(scope="module")
def first_run(place):
    return klab("run", *SMALL, "--results", "rows", "--out", "pack.json", "--json", cwd=place)


def test_a_run_measures_stores_chooses_and_reports(first_run, place):
    assert first_run.returncode == 0, first_run.stderr
    told = lines(first_run)
    measured = [row for row in told if "status" in row]
    assert {row["operator"] for row in measured} == {
        "activation", "decode_attention", "embedding", "matmul", "norm", "prefill_attention", "rope_cache", "sampling",
    }  # fmt: skip
    fine = [row for row in measured if row["status"] == "ok"]
    assert fine and all(row["median_us"] > 0 and row["checks"] >= 2 and row["error"] <= row["tolerance"] for row in fine)
    assert any(row["library"] for row in measured) and any(not row["library"] for row in measured)
    pack = json.loads((place / "pack.json").read_text())
    assert len(pack["choices"]) == len({row["problem_key"] for row in measured}) and not pack["open"]
    page = Path(next(row["page"] for row in told if row.get("type") == "report")).read_text()
    assert "<html" in page and all(row["problem_label"] in page for row in measured)
    stored = [json.loads(line) for part in (place / "rows").glob("*.jsonl") for line in part.read_text().splitlines()]
    assert len(stored) == len(measured) and all(row["samples_us"] for row in stored if row["status"] == "ok")


def test_a_second_run_measures_nothing_and_again_forces(first_run, place):
    words = ("measure", *SMALL, "--results", "rows", "--json", "-k", "matmul/torch_matmul", "--phase", "decode")
    outcome = lines(klab(*words, cwd=place))[-1]
    assert outcome["new"] == {} and outcome["known"] > 0
    forced = lines(klab(*words, "--again", cwd=place))[-1]
    assert forced["known"] == 0 and forced["new"]["ok"] == outcome["known"]


def test_a_dry_run_measures_nothing(place):
    done = klab("run", *SMALL, "--results", "none", "--dry-run", "--json", cwd=place)
    told = lines(done)
    assert done.returncode == 0 and told[-1]["trials"] == len(told) - 1 > 5 and told[-1]["seconds"] > 0
    assert not (place / "none").exists()


def test_an_interrupt_keeps_what_was_measured_and_exits_130(place):
    command = [sys.executable, "-m", "klab.harness.cli", "measure", *SMALL, "--results", "cut", "--json", "--candidates", "sample:20"]
    env = {**os.environ, "KLAB_LOCK_DIR": str(place)}
    process = subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    stored = [json.loads(line) for part in (place / "cut").glob("*.jsonl") for line in part.read_text().splitlines()]
    assert stored and all(row["status"] == "ok" for row in stored)


def test_a_campaign_continues_where_the_last_one_ended(place):
    words = ("campaign", "--chip", "cpu", "--model", "config.json", "--out", "camp", "--json")
    first = klab(*words, "--budget", "40s", cwd=place)
    assert first.returncode == 0, first.stderr
    files = [p.name for p in (place / "camp").iterdir()]
    assert files == ["results.jsonl.gz"]
    done = {row["key"] for row in lines(first) if row.get("status") == "ok"}
    assert done and any(row.get("type") == "kernel" and row["right"] for row in lines(first))
    second = klab(*words, "--budget", "10s", cwd=place)
    assert second.returncode == 0 and not done & {row["key"] for row in lines(second) if row.get("status") == "ok"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("run", "--model", "no-such-model"), 2, "no-such-model"),
        (("run", "--model", "config.json", "--chip", "h900"), 2, "h900"),
        (("measure", "--model", "config.json", "--chip", "h200"), 4, "H200"),
        (("measure", "--model", "config.json", "--chip", "cpu", "-k", "no_such_kernel"), 2, "no_such_kernel"),
        (("measure", "--model", "config.json", "--chip", "cpu", "--budget", "0"), 2, "no time"),
        (("measure", "--model", "config.json", "--chip", "cpu", "--budget", "soon"), 2, "not a time"),
        (("measure", "--model", "config.json", "--chip", "cpu", "--candidates", "some"), 2, "sample:N"),
        (("measure", "--model", "config.json", "--chip", "cpu", "--kernels", "nowhere"), 2, "not a folder"),
        (("measure", "--model", "broken.json", "--chip", "cpu"), 2, "broken.json"),
        (("measure", "--model", "fields.json", "--chip", "cpu"), 2, "hidden_size"),
        (("measure", "--model", "config.json", "--chip", "cpu", "--results", "config.json"), 2, "config.json"),
        (("measure", "--model", "config.json", "--chip", "cpu", "--results", "/proc/klab"), 4, "/proc/klab"),
        (("plan", "--model", "config.json", "--chip", "cpu", "--tp", "3"), 2, ""),
        (("results", "--results", "nowhere"), 2, "nowhere"),
        (("campaign", "--chip", "h200", "--out", "x"), 4, "H200"),
    ],
    ids=lambda v: " ".join(v[:4]) if isinstance(v, tuple) else None,
)
def test_bad_input_is_one_clear_line(words, code, says, place):
    (place / "broken.json").write_text("{not json")
    (place / "fields.json").write_text(json.dumps({"model_type": "llama"}))
    done = klab(*words, cwd=place)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and says in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("klab:")]) <= 1


def test_a_users_kernel_competes_and_a_broken_one_is_told(place):
    folder = place / "mine"
    folder.mkdir()
    (folder / "my_matmul.py").write_text(
        "import torch\n"
        "from klab.kernels.contract import kernel\n"
        "from klab.kernels.matmul.problem import Matmul\n\n"
        "@kernel(Matmul, backend='torch', kinds=('cpu',))\n"
        "def my_matmul(problem, config, chip):\n"
        "    '''Mine.'''\n"
        "    def launch(inputs, outputs):\n"
        "        w = inputs['w']\n"
        "        torch.matmul(inputs['x'], w.T if problem.layout == 'nt' else w, out=outputs['out'])\n"
        "    return launch\n\n"
        "@kernel(Matmul, backend='torch', kinds=('cpu',))\n"
        "def my_wrong(problem, config, chip):\n"
        "    '''Off by one part in ten.'''\n"
        "    def launch(inputs, outputs):\n"
        "        outputs['out'].copy_(1.1 * (inputs['x'] @ inputs['w'].T))\n"
        "    return launch\n"
    )
    (folder / "typo.py").write_text("import no_such_module_at_all")
    words = ("measure", *SMALL, "--phase", "decode", "--kernels", "mine", "-k", "my_matmul", "-k", "my_wrong", "--results", "u", "--json")
    done = klab(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    by_kernel = {(row["kernel"], row["status"]) for row in lines(done) if "kernel" in row}
    assert by_kernel == {("matmul/my_matmul", "ok"), ("matmul/my_wrong", "incorrect")}
    assert "no_such_module_at_all" in done.stderr
