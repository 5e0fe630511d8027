"""Screening compiles real launches for sm_90 and sm_100 with no GPU, and a bad candidate is a row, never an end."""

import dataclasses
import os
import subprocess
import sys

import pytest
from contest import BLACKWELL, HOPPER

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.harness.tune import farm_compiler, sass, screen_rules, screen_worker
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.screen import Limits, screen, tally
from klab.kernels import cuda_module, disk_cache
from klab.kernels.artifact import Artifact
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

TRITON = """
from __future__ import annotations
import os
from dataclasses import dataclass
import triton
import triton.language as tl
from klab.kernels.contract import Config, kernel
from klab.kernels.matmul.problem import Matmul

@triton.jit
def product(x, w, out, m, n, k, sx, sw, so, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNUSED: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        rk = start + tl.arange(0, BK)
        a = tl.load(x + rm[:, None] * sx + rk[None, :], mask=(rm[:, None] < m) & (rk[None, :] < k), other=0.0)
        b = tl.load(w + rn[None, :] * sw + rk[:, None], mask=(rn[None, :] < n) & (rk[:, None] < k), other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(out + rm[:, None] * so + rn[None, :], acc.to(out.dtype.element_ty), mask=(rm[:, None] < m) & (rn[None, :] < n))

@dataclass(frozen=True)
class Tile(Config):
    bm: int = 128
    bn: int = 128
    num_warps: int = 4
    num_stages: int = 3
    unused: int = 0
    warp_specialize: bool = False
    fault: str = ""

@kernel(Matmul, backend="triton", config=Tile)
def tile(problem, config, chip):
    '''A tile.'''
    if config.fault == "abort":
        os.abort()
    if config.fault == "eat":
        held = bytearray(1 << 40)
    if config.fault == "print":
        print('{"status": "ok"}', flush=True)
    def launch(inputs, outputs):
        if config.fault == "raise":
            raise ValueError("no such tile" + chr(10) + "and more")
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        grid = (triton.cdiv(problem.m, config.bm), triton.cdiv(problem.n, config.bn))
        product[grid](x, w, out, problem.m, problem.n, problem.k, x.stride(0), w.stride(0), out.stride(0),
                      config.bm, config.bn, 64, config.unused, num_warps=config.num_warps, num_stages=config.num_stages)
    return launch
"""

PROBLEM = Matmul(512, 1024, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of kernels; what is kept on disk is this module's own."""
    pytest.importorskip("triton")
    root = tmp_path_factory.mktemp("screen")
    (root / "kernels").mkdir()
    (root / "kernels" / "tile.py").write_text(TRITON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KLAB_CACHE", str(root / "cache"))
        patch.setenv("TRITON_CACHE_DIR", str(root / "triton"))
        yield root / "kernels"


def trials(folder, chip, *configs):
    kernel = discover([folder]).kernels["matmul/tile"]
    return [Trial.of(kernel, PROBLEM, kernel.config_type(**config), chip.name, Policy()) for config in configs]


WANTED = [
    ({"unused": 1}, "screened", "duplicate"),
    ({}, "ok", ""),
    ({"bn": 256}, "screened", "spills"),
    ({"bn": 256, "num_warps": 8, "num_stages": 7}, "screened", "does not fit"),
    ({"num_warps": 8, "warp_specialize": True}, "screened", "silent no-op"),
    ({"fault": "raise"}, "compile_error", "compile error"),
    ({"bm": 64, "fault": "print"}, "ok", ""),
    ({"fault": "abort"}, "crashed", "crashed"),
]


@pytest.fixture(scope="module")
def screened(folder):
    """Trials and verdicts of WANTED on an H200, one of a library and one that cannot be found, and how often the listener was told."""
    library = next(k for k in discover().kernels.values() if k.library and k.backend == "torch" and k.problem_type is Matmul)
    known = Trial.of(library, PROBLEM, library.default(PROBLEM, HOPPER), "h200", Policy())
    configs = trials(folder, HOPPER, *(config for config, _, _ in WANTED))
    all_of = [known, dataclasses.replace(known, kernel="matmul/none_such"), *configs]
    told = []
    found = screen(all_of, HOPPER, kernel_dirs=[folder], jobs=1, on_done=told.append)
    return all_of, found, len(told)


def test_every_rule_drops_its_own_and_the_rest_is_kept(screened):
    all_of, found, told = screened
    assert [(s.status.value, s.rule) for s in found[2:]] == [(status, rule) for _, status, rule in WANTED]
    assert [s.trial for s in found] == all_of and told == len(all_of)
    # The default stays, though its twin came first.
    assert found[2].twin == all_of[3].key and found[2].reason.startswith("unused=1 changes nothing: the same machine code")
    assert found[7].reason == "ValueError: no such tile"
    assert found[0].status is Status.OK and found[0].functions == []
    assert found[1].status is Status.UNSUPPORTED and "cannot be imported" in found[1].reason
    assert tally(found) == {"kept": 3, "unsupported": 1} | dict.fromkeys((rule for _, _, rule in WANTED if rule), 1)


def test_a_triton_error_is_told_by_its_cause(folder):
    """Of where it is, the source and the cause, the cause; also where a call between has nothing to say, and where only text is left."""
    import ast

    from triton.compiler.errors import CompilationError, UnsupportedLanguageConstruct

    source = "def tile(x):\n    x = y\n"
    node = ast.parse(source).body[0].body[0].value
    inner = CompilationError(source, node, "NameError('y is not defined')")
    assert str(inner).splitlines()[0] == "at 2:8:"
    outer = CompilationError(source, node)
    outer.__cause__ = inner
    for error in (inner, outer):
        assert screen_worker._told(error) == "CompilationError: NameError('y is not defined')"
    assert screen_worker._told(RuntimeError(str(inner))) == "RuntimeError: NameError('y is not defined')"
    assert screen_worker._told(CompilationError(source, node)) == "CompilationError: at 2:8: x = y"
    unknown = UnsupportedLanguageConstruct(None, node, "a set is unknown\nhere")
    assert screen_worker._told(unknown) == "UnsupportedLanguageConstruct: a set is unknown"
    assert screen_worker._told(ValueError()) == "ValueError: "
    assert len(screen_worker._told(ValueError("x" * 400))) == 300


def test_reads_what_was_built_for_hopper(screened):
    check(screened[1][3], "wgmma")


def test_reads_what_was_built_for_blackwell(folder):
    check(screen(trials(folder, BLACKWELL, {}), BLACKWELL, kernel_dirs=[folder], jobs=1)[0], "tcgen05")


def check(found, unit):
    (function,) = found.functions
    assert found.status is Status.OK and found.compile_s and function["matrix_unit"] == unit
    assert 64 <= function["registers"] <= 255 and function["stack_bytes"] == 0 and function["threads"] == 128
    # Two stages of a 128x64 and a 128x64 tile in bf16 at least: 64 KB; the system's own 1 KB is not counted.
    assert 64 << 10 <= function["smem_bytes"] <= 128 << 10
    assert function["grid"] == [4, 8]


def test_what_is_known_starts_no_process(folder, screened, monkeypatch):
    monkeypatch.setattr(farm_compiler, "WORKER", ["/nonexistent"])
    all_of, found, _ = screened
    again = screen(all_of[2:-1], HOPPER, kernel_dirs=[folder], limits=Limits(timeout_s=0.01), kernels=discover([folder]).kernels)
    assert [(s.status, s.rule, s.cached) for s in again] == [(s.status, s.rule, True) for s in found[2:-1]]
    # This kernel's tiles are bm and bn: the model reads them too.
    assert all(s.expected_us and s.expected_us > 0 for s in again)
    assert {s.to_json()["expected_us"] for s in found} == {None}


def test_what_is_hopeless_is_dropped_but_no_default(folder, screened, monkeypatch):
    monkeypatch.setattr(farm_compiler, "WORKER", ["/nonexistent"])
    expected = {"bm=64": 1.0, "bm=128": 5.0}
    monkeypatch.setattr(screen_rules, "expected_us", lambda problem, kernel, config, *_: expected[config.label().split()[0]])
    of = [screened[0][i] for i in (3, 8)]  # the default, and the other that is kept
    assert [s.rule for s in screen(of, HOPPER, kernel_dirs=[folder], limits=Limits(hopeless=4))] == ["", ""]
    expected |= {"bm=64": 25.0}
    default, other = screen(of, HOPPER, kernel_dirs=[folder], limits=Limits(hopeless=4))
    assert default.rule == "" and (other.status, other.rule) == (Status.SCREENED, "hopeless")
    assert other.reason == "expected (modelled) 25.0 us, 5.0 times the best's 5.0 us"
    assert screen(of, HOPPER, kernel_dirs=[folder], limits=Limits(hopeless=6))[1].rule == ""


def test_no_memory_is_a_row_of_its_own(folder):
    (trial,) = trials(folder, HOPPER, {"fault": "eat"})
    found = screen_worker.answer(trial.to_json(), discover([folder]), HOPPER)
    assert (found["status"], found["reason"]) == ("out_of_memory", "compiling ran out of memory (MemoryError: )")


def test_another_process_launches_what_was_compiled_here(folder, screened):
    """Though every stage of the compiler raises in it."""
    path = os.path.dirname(sys.modules["contest"].__file__)
    command = [sys.executable, "-c", LIVE, str(folder)]
    live = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert live.returncode == 0 and live.stdout.split() == ["found", "compiles"], live.stderr[-2000:]


LIVE = """
import sys
from contest import HOPPER
from triton.backends.nvidia.compiler import CUDABackend
from klab.harness.tune.offline import compile_launch
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

def raising(*args):
    raise AssertionError("it compiles")

CUDABackend.make_ttir = CUDABackend.make_ptx = CUDABackend.make_cubin = staticmethod(raising)
kernel = discover([sys.argv[1]]).kernels["matmul/tile"]
problem = Matmul(512, 1024, 512)
artifacts, _ = compile_launch(kernel, problem, kernel.config_type(), HOPPER)
print("found" if artifacts[0].cubin else "nothing")
try:
    compile_launch(kernel, problem, kernel.config_type(num_stages=2), HOPPER)
except AssertionError:
    print("compiles")
"""


SOURCE = """#include "device.cuh"
extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }
"""


def test_a_cubin_is_compiled_once_on_a_machine(tmp_path, monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path))
    run, calls = cuda_module.run_nvrtc, []
    monkeypatch.setattr(cuda_module, "run_nvrtc", lambda *args: calls.append(args) or run(*args))

    def compiled(arch="sm_90a", **defines):
        cuda_module._compile.cache_clear()  # another process has none of it
        return cuda_module.compile_cubin(SOURCE, "twice", arch, {"FACTOR": 2, **defines})

    first = compiled()
    assert compiled() == first and len(calls) == 1
    others = [compiled(FACTOR=3), compiled("sm_100a")]
    assert first not in others and len(calls) == 3
    monkeypatch.setattr(cuda_module, "_own_headers", lambda source: ["another device.cuh"])
    assert compiled() == first and len(calls) == 4
    for path in tmp_path.glob("cubin/*/*"):
        path.write_bytes(path.read_bytes()[:-100])
    assert compiled() == first and len(calls) == 5 and compiled() == first and len(calls) == 5
    monkeypatch.setenv("KLAB_CACHE", "/proc/nowhere")
    assert compiled() == first and len(calls) == 6
    # What was learned of one binary serves the next: nvdisasm is not asked twice about an opcode.
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path))
    sass._learned.clear()
    row = inspect_artifact(Artifact("twice", first))
    monkeypatch.setattr("klab.harness.tune.inspect_cubin._run", lambda *words: listing(words))
    listing = fail_but_for_usage
    assert inspect_artifact(Artifact("twice", first)) == row
    sass._learned.clear()
    assert inspect_artifact(Artifact("twice", first)) == row


def fail_but_for_usage(words):
    assert not words[0].endswith("nvdisasm"), words
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_the_disk_cache_keeps_what_was_used_last(tmp_path):
    cache = disk_cache.DiskCache(tmp_path, most_per_folder=3)
    for i in range(3):
        cache.put(f"00{i}", bytes([i]))
        os.utime(tmp_path / "00" / f"00{i}", (i, i))
    assert cache.get("000") == b"\0"
    cache.put("003", b"new")
    assert [cache.get(f"00{i}") for i in range(4)] == [b"\0", None, b"\2", b"new"]
    assert cache.get("none") is None and not cache.has("none")
