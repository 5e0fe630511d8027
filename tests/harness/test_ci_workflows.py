"""What CI runs: workflow files are valid, keep strangers' code off our machines and call klab as it is; the container file is sound."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="the development packages are not installed (pip install -e '.[dev]')")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
CONTAINER = ROOT / "ci" / "container" / "Containerfile"
BIN = Path(sys.executable).parent

# What only people with write access, or the clock, can start. Everything else may carry a stranger's code or words.
TRUSTED = {"schedule", "workflow_dispatch"}
HOSTED = re.compile(r"(ubuntu|windows|macos)-[0-9.]+(-arm)?")
# Triggers that hand a stranger's request the repository's own token and secrets.
NEVER = {"pull_request_target", "workflow_run", "issue_comment", "issues", "discussion", "discussion_comment", "fork", "watch"}


def read(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def triggers(workflow: dict[Any, Any]) -> set[str]:
    """YAML 1.1 reads the key `on` as true."""
    found = workflow.get("on", workflow.get(True))
    return {found} if isinstance(found, str) else set(found)


def faults(workflow: dict[Any, Any]) -> list[str]:
    """Where a workflow lets a stranger onto a machine of ours, or has more rights than it needs."""
    found = [f"trigger {name}" for name in sorted(triggers(workflow) & NEVER)]
    if workflow.get("permissions") != {}:
        found.append("rights for all jobs")
    for name, job in workflow["jobs"].items():
        labels = job.get("runs-on", [])
        labels = [labels] if isinstance(labels, str) else labels
        hosted = isinstance(labels, list) and labels and all(isinstance(one, str) and HOSTED.fullmatch(one) for one in labels)
        if not hosted and not triggers(workflow) <= TRUSTED:
            found.append(f"{name}: {labels} may be a machine of ours, and strangers can start it")
        if any(right != "read" for right in job.get("permissions", {"all": "write"}).values()):
            found.append(f"{name}: may write")
        if "timeout-minutes" not in job:
            found.append(f"{name}: no end")
        for step in job.get("steps", []):
            if "uses" in step and not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]):
                found.append(f"{name}: {step['uses']} is not pinned by a commit")
            if "checkout" in step.get("uses", "") and step.get("with", {}).get("persist-credentials") is not False:
                found.append(f"{name}: leaves the token in the checkout")
            if "${{" in step.get("run", ""):
                found.append(f"{name}: pastes values into a script")
    return found


def test_there_are_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["nightly.yml", "pull-request.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_stranger_reaches_a_gpu(path: Path) -> None:
    assert faults(read(path)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w[True].update(pull_request=None), "strangers can start it"),
        (lambda w: w[True].update(pull_request_target=None), "trigger pull_request_target"),
        (lambda w: w[True].update(push={"branches": ["**"]}), "strangers can start it"),
        (lambda w: w.update(permissions={"contents": "write"}), "rights for all jobs"),
        (lambda w: w.pop("permissions"), "rights for all jobs"),
        (lambda w: w["jobs"]["night"].pop("permissions"), "may write"),
        (lambda w: w["jobs"]["night"]["steps"][0].update(uses="actions/checkout@v6"), "not pinned"),
        (lambda w: w["jobs"]["night"]["steps"][0].pop("with"), "leaves the token"),
        (lambda w: w["jobs"]["night"]["steps"][1].update(run="echo ${{ inputs.budget }}"), "pastes values"),
        (lambda w: w["jobs"]["night"].pop("timeout-minutes"), "no end"),
    ],
)
def test_the_check_of_workflows_bites(change: Callable[[dict[Any, Any]], object], fault: str) -> None:
    workflow = copy.deepcopy(read(ROOT / ".github/workflows/nightly.yml"))
    change(workflow)
    assert any(fault in one for one in faults(workflow))


def test_a_pull_request_that_asks_for_our_runners_is_found() -> None:
    workflow = read(ROOT / ".github/workflows/pull-request.yml")
    for labels in (["self-hosted", "h200"], "h200", "${{ matrix.chip }}", {"group": "gpu"}, []):
        changed = copy.deepcopy(workflow)
        changed["jobs"]["gate"]["runs-on"] = labels
        assert faults(changed), labels


def test_the_files_are_what_github_takes() -> None:
    for schema, files in (("vendor.github-workflows", WORKFLOWS), ("vendor.dependabot", [ROOT / ".github/dependabot.yml"])):
        done = subprocess.run([BIN / "check-jsonschema", "--builtin-schema", schema, *files], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_finds_nothing_but_that_gpus_are_ours() -> None:
    done = subprocess.run(
        [BIN / "zizmor", "--offline", "--no-progress", "--persona=auditor", "--format=json", ROOT / ".github"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    found = [one["ident"] for one in json.loads(done.stdout)]
    assert found == ["self-hosted-runner"], done.stdout[:2000]


def test_the_night_calls_klab_as_it_is(klab: Callable[..., tuple[int | str, str, str]]) -> None:
    """Every option in the workflow is one that the verb has, and the artifact is what it writes."""
    (job,) = read(ROOT / ".github/workflows/nightly.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["chip"] == ["h200", "b200"] and job["runs-on"][-1] == "${{ matrix.chip }}"
    assert job["strategy"]["fail-fast"] is False and job["concurrency"]["cancel-in-progress"] is False
    script = "\n".join(step.get("run", "") for step in job["steps"])
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    code, out, _ = klab("nightly", "--help")
    wanted = set(re.findall(r"--[a-z-]+", script))
    assert code == 0 and {"--policy", "--budget", "--history", "--out", "--strict"} <= wanted
    assert all(option in re.sub(r"\x1b\[[0-9;]*m", "", out) for option in wanted)
    keep = job["steps"][-1]
    assert keep["if"] == "always()" and keep["with"]["path"] == "night/" and "--out night " in script
    variables = set(re.findall(r"\$\{([A-Z]+)", script))
    assert variables <= set(job["env"])


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of a container file, with its lines joined and its comments gone."""
    lines = [one for one in text.splitlines() if not one.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word.upper(), " ".join(rest.split())) for word, _, rest in (one.strip().partition(" ") for one in joined.splitlines()) if word]


def container_faults(text: str) -> list[str]:
    """The rules of hadolint that matter here, by its numbers, and ours."""
    found: list[str] = []
    said = instructions(text)
    args = dict(rest.split("=", 1) for word, rest in said if word == "ARG" and "=" in rest)
    for word, rest in said:
        if word == "FROM":
            image = re.sub(r"\$\{?(\w+)\}?", lambda match: args.get(match[1], ""), rest.split()[0])
            if not re.search(r":[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$", image) or ":latest" in image:
                found.append("DL3006 the base image has no version")
        if word == "ADD":
            found.append("DL3020 ADD where COPY would do")
        if word == "WORKDIR" and not rest.startswith("/"):
            found.append("DL3000 a relative folder")
        if word in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            found.append("DL3025 not as a list of words")
        if word == "RUN":
            if re.search(r"\bsudo\b", rest):
                found.append("DL3004 sudo")
            if "apt-get install" in rest and not ("--no-install-recommends" in rest and re.search(r"(-y|--yes)\b", rest)):
                found.append("DL3014, DL3015 apt-get")
            if "apt-get update" in rest and "rm -rf /var/lib/apt/lists" not in rest:
                found.append("DL3009 lists are left")
            if re.search(r"\bpip install\b", rest) and "--no-cache-dir" not in rest:
                found.append("DL3042 pip's cache is left")
            if re.search(r"\bpip install\b(?!.*(-r |-e ))", rest):
                found.append("DL3013 packages without versions")
            if re.search(r"curl|wget", rest):
                found.append("fetches what nothing pins")
        if word in ("ENV", "ARG") and re.search(r"(?i)(password|secret|token|api_?key)\w*=", rest):
            found.append("a secret")
    users = [rest for word, rest in said if word == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        found.append("DL3002 runs as root")
    if [word for word, _ in said].count("ENTRYPOINT") != 1:
        found.append("DL4004 one entry point")
    return found


def test_the_container_file() -> None:
    text = CONTAINER.read_text(encoding="utf-8")
    assert container_faults(text) == []
    env = dict(one.split("=", 1) for word, rest in instructions(text) if word == "ENV" for one in rest.split())
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "utility,compute" and env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"KLAB_RESULTS", "KLAB_CACHE", "KLAB_LOCK_DIR"} <= set(env)
    made = " ".join(rest for word, rest in instructions(text) if word == "RUN")
    assert all("/".join(env[name].split("/")[:3]) in made for name in env if name.startswith(("KLAB", "HOME", "TRITON", "CUPY")))
    copied = [rest.split()[0] for word, rest in instructions(text) if word == "COPY"]
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ".venv" in ignored and "results/local" in ignored and ".git" not in ignored, "nights know their commit"


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (":3.11.14-slim-bookworm", ":latest", "DL3006"),
        ("python:3.11.14-slim-bookworm\nFROM", "python\nFROM", "DL3006"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("USER 10001:10001", "", "DL3002"),
        ("--no-install-recommends ", "", "DL3015"),
        ("    && rm -rf /var/lib/apt/lists/*", "    && true", "DL3009"),
        ("--no-cache-dir ", "", "DL3042"),
        ('ENTRYPOINT ["klab"]', "ENTRYPOINT klab", "DL3025"),
        ("ENV HOME", "ENV API_KEY=x HOME", "a secret"),
        ("COPY . .", "ADD . .", "DL3020"),
    ],
)
def test_the_check_of_the_container_file_bites(before: str, after: str, fault: str) -> None:
    text = CONTAINER.read_text(encoding="utf-8")
    assert before in text
    assert any(fault in one for one in container_faults(text.replace(before, after)))
