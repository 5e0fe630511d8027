"""What comes from others is data: nothing of it is executed, names of files stay in their folders, and no secret reaches a kernel.

That the pages escape what they show is tested where the pages are: test_report_page.py, test_report_night_page.py, test_cli_accept.py,
test_watch_outputs.py. That workers on a cluster's nodes have no secrets: test_fleet_ray.py. docs/security.md says what all this rests on.
"""

import ast
import dataclasses
import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from made_nights import night
from made_results import made
from night_fleet import write_policy
from tiny_model import CONFIG

from klab.harness.catalog.chips import find_chip
from klab.harness.catalog.models import find_model
from klab.harness.fleet.parcel import unpack_folders
from klab.harness.measure import communication
from klab.harness.measure.calibration import Calibration, write_calibration
from klab.harness.measure.client import WorkerClient
from klab.harness.measure.lock import lock_path
from klab.harness.store.journal import Journal
from klab.harness.tune.farm_compiler import Compiler, FarmClosed
from klab.harness.watch.history import History
from klab.harness.watch.sides import Kind, Side
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

ROOT = Path(__file__).parents[2]
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
UPWARD = "../../evil"

# What turns data into code, by the last part of its name; and modules that do nothing else.
DANGEROUS = {
    "eval",
    "exec",
    "__import__",
    "import_module",
    "exec_module",
    "spec_from_file_location",
    "run_path",
    "run_module",
    "system",
    "popen",
}
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code"}
ALLOWED = {
    ("harness/cli/main.py", "import_module"): "klab's own verbs, found by looking into its own package",
    ("harness/tune/strategy.py", "import_module"): "klab's own strategies, the same",
    ("harness/tune/replay/peers_kernel_tuner.py", "import_module"): "an optional package, by a name in the source",
    ("harness/measure/probes.py", "import_module"): "toolkits that klab doctor looks for, by names in the source",
    ("harness/watch/side_main.py", "import_module"): "klab's own modules, of the side's checkout that the user named",
    ("harness/watch/side_main.py", "run_module"): "the side's own klab, by the module that compare names",
    ("harness/watch/side_main.py", "runpy"): "the same",
    ("kernels/discover.py", "import_module"): "the operators and kernels of klab's own package",
    ("kernels/user_files.py", "exec_module"): "a kernel file in a folder that the user named (--kernels)",
    ("kernels/user_files.py", "spec_from_file_location"): "the same",
}


@cache
def parsed(path):
    return ast.parse(path.read_text())


def sources():
    return [path for room in ("harness", "kernels") for path in (ROOT / room).rglob("*.py")]


def dangers(path):
    """(what, line) of everything in a file that could execute data."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((name.split(".")[0], node.lineno) for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        keywords = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        owner = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        if called in DANGEROUS and owner != "platform" and not (called == "eval" and owner):
            yield called, node.lineno
        if keywords.get("shell") or keywords.get("allow_pickle"):
            yield "shell" if keywords.get("shell") else "allow_pickle", node.lineno
        if (owner, called) == ("torch", "load") and keywords.get("weights_only") is not True:
            yield "torch.load", node.lineno
        if owner == "yaml" and called != "safe_load" and not any("Safe" in ast.unparse(word.value) for word in node.keywords):
            yield f"yaml.{called}", node.lineno
        if called in ("read_pickle", "load_pickle") or (owner in ("np", "numpy") and called == "load" and "allow_pickle" not in keywords):
            yield called, node.lineno


def test_nothing_turns_data_into_code_but_where_it_is_said_why():
    found = {}
    for path in sources():
        for what, line in dangers(path):
            found[path.relative_to(ROOT).as_posix(), what] = line
    assert set(found) - set(ALLOWED) == set(), found
    assert set(ALLOWED) - set(found) == set(), "no longer needed"


@pytest.mark.parametrize(
    "source", ["import pickle", "from joblib import load", "eval('1')", "torch.load(p)", "np.load(p)", "subprocess.run(c, shell=True)",
     "os.system(c)",
     "yaml.load(t)"]
)  # fmt: skip
def test_the_check_sees_what_it_is_for(tmp_path, source):
    path = tmp_path / "x.py"
    path.write_text(source)
    assert list(dangers(path))


# Processes without `env=` inherit everything. These run programs of the system on klab's own words.
INHERITING = {
    "harness/catalog/cpu_probe.py": "sysctl",
    "harness/measure/environment.py": "git",
    "harness/tune/inspect_cubin.py": "cuobjdump and nvdisasm",
    "kernels/user_files.py": "imports the files of --kernels, as klab's own process does right after it",
}


def test_every_process_has_a_scrubbed_environment_or_a_reason():
    starts = ("subprocess.Popen", "subprocess.run", "subprocess.check_output")
    found = set()
    for path in sources():
        if "subprocess" in path.read_text():
            calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and ast.unparse(node.func) in starts]
            found |= {path.relative_to(ROOT).as_posix() for node in calls if not any(word.arg == "env" for word in node.keywords)}
    assert found == set(INHERITING)


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_ACCESS_KEY_ID": "hunter2", "HF_TOKEN": "hunter2", "GITHUB_TOKEN": "hunter2",
    "ACTIONS_RUNTIME_TOKEN": "hunter2", "WANDB_API_KEY": "hunter2", "GOOGLE_APPLICATION_CREDENTIALS": "hunter2", "SSH_AUTH_SOCK": "hunter2",
}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_no_secret_reaches_a_worker(secrets):
    client = WorkerClient(CHIP)
    client.start()
    told = Path(f"/proc/{client.pid}/environ").read_bytes()
    client.kill()
    assert b"PATH=" in told and b"hunter2" not in told


def test_no_secret_reaches_the_other_processes(secrets, monkeypatch):
    given = []

    class Process:
        def __init__(self, command, **how):
            given.append((command, how["env"]))
            raise OSError("that is all we wanted to know")

    for module in ("measure.communication", "tune.farm_compiler", "watch.node_runner"):
        monkeypatch.setattr(f"klab.harness.{module}.subprocess.Popen", Process)
    from klab.harness.watch.node_runner import Job, _Process

    starts = (
        lambda: communication._start({"folder": "/tmp"}, 0),
        lambda: Compiler(CHIP, [], 1 << 30)._start(),
        lambda: _Process(CHIP, Job("first", "GPU-1", 1.0), 1.0),
    )
    for start in starts:
        with pytest.raises((OSError, FarmClosed)):
            start()
    sides = [Side("A", Kind.ENVIRONMENT, "other", "/usr/bin/python3"), Side("B", Kind.COMMIT, "HEAD", "/usr/bin/python3", ROOT, ROOT)]
    found = [env for _, env in given] + [side.variables() for side in sides]
    assert len(given) == len(starts)
    assert all("PATH" in env and "hunter2" not in env.values() for env in found)


@pytest.mark.parametrize("name", [UPWARD, "/etc/evil", "..", ".", "a/b", "evil\0", "x" * 400])
def test_names_from_others_stay_in_their_folder(tmp_path, monkeypatch, name):
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    row = dataclasses.replace(made(Matmul(8, 64, 32), "torch", run_id=name), device_uuid=name, key=name, chip=name)
    with Journal(home / "rows", name) as journal:
        journal.append(row)
    history = History(home / "nights")
    history.add(night(chip=name, identity=name))
    assert len(history.nights(name)) == 1
    write_calibration(Calibration(name[:100], name, name, "2026-01-01T00:00:00Z", ""), home / "rows")
    monkeypatch.setenv("KLAB_LOCK_DIR", str(home))
    assert lock_path(name[:80]).parent == home
    made_here = {path for path in tmp_path.rglob("*") if path not in before}
    assert made_here and all(home in path.parents for path in made_here)
    assert not Path("/etc/evil.json").exists()


@pytest.mark.parametrize("name", [UPWARD, "/etc/evil", "a/b", ".hidden", ""])
def test_a_chip_or_a_model_of_a_strange_name_is_refused(tmp_path, name):
    """Their names become names of profiles and tables."""
    text = (ROOT / "profiles" / "chips" / "h200.toml").read_text()
    path = tmp_path / "chip.toml"
    path.write_text("\n".join(f"name = {json.dumps(name)}" if line.startswith("name =") else line for line in text.splitlines()))
    with pytest.raises(UsageError, match="is no name"):
        find_chip(str(path))
    if name:
        path = tmp_path / "model.json"
        path.write_text(json.dumps({"name": name, "config": CONFIG}))
        with pytest.raises(UsageError, match="is no name"):
            find_model(str(path))


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "evil.sh"])
def test_a_parcel_does_not_leave_its_folder(name):
    with ExitStack() as keep, pytest.raises(UsageError, match="no name for a kernel file"):
        unpack_folders([{"path": "/nowhere/at/all", "files": {name: "print('evil')"}}], keep)


def test_a_kernel_file_runs_only_when_its_folder_was_named(tmp_path, klab, monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "KLAB_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    policy = write_policy(tmp_path, operators=("norm",))
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    rows = tmp_path / "rows"
    rows.mkdir()
    for place in (tmp_path, rows):
        for name in ("evil", "norm", "random", "conftest", "sitecustomize"):
            (place / f"{name}.py").write_text(code)
    strange = {"path": str(tmp_path / "evil.py"), "__reduce__": ["os.system", ["touch ran"]], "!!python/object/apply": "os.system"}
    row = made(Matmul(8, 64, 32), "torch")
    row = dataclasses.replace(
        row, kernel=f"{tmp_path}/evil", config=strange, build=strange, environment=strange, backend="evil", chip="cpu"
    )
    with Journal(rows, "r") as journal:
        journal.append(row)
        journal.append(dataclasses.replace(row, kernel="norm/evil", operator="norm"))
    profile = tmp_path / "pack.json"
    choice = {"problem": {}, "kernel": f"{tmp_path}/evil.py", "config": strange}
    profile.write_text(json.dumps({"chip": "cpu", "objective": "latency", "choices": [choice], "schema": 1}))
    words = ("--model", "config.json", "--chip", "cpu", "--isl", "32", "--osl", "8", "--batch", "2")
    for command in (
        ("results", "--results", rows, "--json"),
        ("choose", *words, "--results", rows, "--out", tmp_path / "chosen.json"),
        ("report", "--results", rows, "--out", tmp_path / "page.html"),
        ("nightly", "--policy", policy, "--chip", "cpu", "--results", rows, "--dry-run"),
        ("nightly", "--policy", policy, "--chip", "cpu", "--profile", profile, "--dry-run"),
        ("measure", *words, "-k", f"{tmp_path}/evil.py", "--results", rows, "--dry-run"),
        ("import", profile),
    ):
        _, _, err = klab(*command)
        assert "Traceback" not in err, command
        assert not (tmp_path / "ran").exists(), command
    klab("measure", *words, "-k", "norm/torch_norm", "--kernels", rows, "--results", rows, "--dry-run")
    assert (tmp_path / "ran").exists(), "a folder that is named is trusted: its files are imported"
