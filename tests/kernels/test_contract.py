"""The contract itself: keys, JSON, discovery, and what a broken kernel file does to the others."""

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from klab.harness.catalog import find_chip
from klab.kernels.contract import Chip, Config, NoConfig, digest
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul
from klab.kernels.sources import _NOT_CODE, source_digest, sources_of
from klab.kernels.user_files import IMPORT_LIMIT_S, KNOWN, rejected

EXAMPLES = [p for cls in discover().operators.values() for p in cls.examples()]


@pytest.mark.parametrize("problem", EXAMPLES[::5], ids=lambda p: p.label())
def test_problem_survives_json(problem):
    again = type(problem).from_json(problem.to_json())
    assert again == problem and again.key == problem.key


def test_keys_differ_between_examples():
    assert len({p.key for p in EXAMPLES}) == len(EXAMPLES)


def test_a_field_added_later_changes_no_key():
    @dataclasses.dataclass(frozen=True)
    class Before(Config):
        tile: int

    @dataclasses.dataclass(frozen=True)
    class After(Config):
        tile: int
        added: int = 3

    assert digest(Before(4).to_json()) == digest(After(4).to_json()) != digest(After(4, 5).to_json())
    assert After(4).to_json_full() == {"tile": 4, "added": 3}


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(UsageError, match="no field tile"):
        Matmul.from_json({"m": 1, "n": 1, "k": 1, "tile": 3})
    with pytest.raises(UsageError, match="needs n, k"):
        Matmul.from_json({"m": 1})


@pytest.mark.parametrize("problem", EXAMPLES[::7], ids=lambda p: p.label())
def test_inputs_are_seeded_and_padded_rows_hold_the_same_shapes(problem):
    first, again, other = (problem.inputs(seed=s) for s in (1, 1, 2))
    padded = problem.inputs(seed=1, row_padding=8)
    main = str(getattr(torch, problem.dtype))
    apart = 0
    for name, tensor in first.items():
        assert tensor.equal(again[name])
        assert padded[name].shape == tensor.shape and padded[name].stride(-1) == 1
        if str(tensor.dtype) == main and tensor.dim() > 1:
            assert not tensor.equal(other[name])
        # Activations and weights lie apart; scales, tables, states and what is packed may stay dense.
        apart += tensor.dim() > 1 and padded[name].stride(-2) > tensor.shape[-1]
    assert apart, "nothing is padded"
    assert any(not tensor.equal(other[name]) for name, tensor in first.items())
    meta = problem.inputs(seed=1, device="meta")
    assert {n: (t.shape, t.dtype) for n, t in meta.items()} == {n: (t.shape, t.dtype) for n, t in first.items()}


KERNEL = """
from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul

@kernel(Matmul, backend="cpu", kinds=("cpu",))
def {name}(problem, config, chip):
    '''A user's kernel.'''
    return lambda inputs, outputs: None
"""


def test_a_users_folder_competes_and_a_broken_file_stops_nothing(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.py").write_text(KERNEL.format(name="mine"))
    (tmp_path / "broken.py").write_text("1/0")
    (tmp_path / "quits.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "empty.py").write_text("x = 1")
    (tmp_path / "absent.py").write_text("import cupy_backends.nothing_of_that_name")
    found = discover([tmp_path])
    assert found.kernels["matmul/mine"].summary == "A user's kernel."
    reasons = {u.path.name: u.reason for u in found.unavailable}
    assert "ZeroDivisionError" in reasons["broken.py"] and "SystemExit" in reasons["quits.py"]
    assert "no kernel" in reasons["empty.py"] and "absent.py" in reasons


@pytest.fixture
def _fresh(monkeypatch):
    monkeypatch.setenv(KNOWN, "{}")


@pytest.mark.usefixtures("_fresh")
def test_files_that_end_or_hang_the_process_stop_nothing(tmp_path):
    (tmp_path / "a_leaves.py").write_text("import os; os._exit(0)")
    (tmp_path / "b_mine.py").write_text(KERNEL.format(name="mine"))
    (tmp_path / "c_crashes.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "d_other.py").write_text(KERNEL.format(name="other"))
    found = discover([tmp_path, tmp_path])
    assert {"matmul/mine", "matmul/other"} <= set(found.kernels)
    assert {u.path.name: u.reason for u in found.unavailable if u.path.parent == tmp_path} == {
        "a_leaves.py": "ended the process at import (exit status 0)",
        "c_crashes.py": "ended the process at import (SIGSEGV)",
    }
    # Another process of klab's believes what this one found, and imports none of the two again.
    code = f"from klab.kernels.discover import discover; print(len(discover([{str(tmp_path)!r}]).unavailable))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == f"{len(found.unavailable)}\n"


@pytest.mark.usefixtures("_fresh")
def test_a_file_that_hangs_is_left_behind_and_one_that_changed_is_tried_again(tmp_path):
    hangs, fine = tmp_path / "hangs.py", tmp_path / "fine.py"
    hangs.write_text("while True: pass")
    fine.write_text("x = 1")
    assert rejected([hangs, fine], limit_s=5) == {hangs: "did not finish importing in 5 s"}
    start = time.monotonic()
    assert rejected([hangs, fine]) != {} and time.monotonic() - start < IMPORT_LIMIT_S
    hangs.write_text("x = 12")
    assert rejected([hangs, fine]) == {}


@pytest.mark.usefixtures("_fresh")
def test_what_a_file_prints_stays_out_of_standard_output(tmp_path, capfd):
    (tmp_path / "loud.py").write_text("import os\nprint('by print')\nos.write(1, b'by descriptor')\nassert not os.read(0, 1)\ninput()\n")
    found = discover([tmp_path])
    assert any("EOFError" in u.reason for u in found.unavailable)
    print("klab's own")
    out, err = capfd.readouterr()
    assert out == "klab's own\n" and "by print" in err and "by descriptor" in err


def test_a_name_that_is_taken_makes_the_later_file_unavailable(tmp_path):
    (tmp_path / "a.py").write_text(KERNEL.format(name="mine"))
    (tmp_path / "b.py").write_text(KERNEL.format(name="mine") + KERNEL.format(name="second"))
    found = discover([tmp_path])
    assert found.kernels["matmul/mine"].path == tmp_path / "a.py" and "matmul/second" in found.kernels
    (clash,) = [u for u in found.unavailable if u.path.parent == tmp_path]
    assert clash.path.name == "b.py" and "is the name of a kernel in" in clash.reason


def test_every_kernel_offers_its_default_first_and_only_candidates_that_fit():
    from contest import BLACKWELL, CPU, HOPPER

    for kernel in discover().kernels.values():
        for chip in (HOPPER, BLACKWELL, CPU):
            for problem in kernel.problem_type.examples()[::4]:
                if kernel.unfit(problem, chip) is not None:
                    assert list(kernel.space(problem, chip)) == []
                    continue
                seen = []
                for config in kernel.space(problem, chip):
                    seen.append(config)
                    if len(seen) == 50:
                        break
                assert seen[0] == kernel.default(problem, chip)
                assert all(kernel.fits(problem, c, chip) is None for c in seen), kernel.id
                assert len(set(seen)) == len(seen), f"{kernel.id} offers a candidate twice"
                assert all(type(c).from_json(c.to_json_full()) == c for c in seen)


def test_a_kernel_says_why_it_does_not_fit():
    from contest import CPU, HOPPER

    triton_like = next(k for k in discover().kernels.values() if k.kinds == ("cuda",))
    assert "not cpu" in (triton_like.fits(triton_like.problem_type.examples()[0], NoConfig(), CPU) or "")
    wrong = next(p for p in EXAMPLES if p.operator != triton_like.problem_type.operator)
    assert "is for" in (triton_like.unfit(wrong, HOPPER) or "")


def test_a_kernels_identity_covers_the_helpers_it_imports():
    found = discover()
    for kernel in found.kernels.values():
        names = {f.name for f in sources_of(kernel.path)}
        assert kernel.path.name in names and "contract.py" not in names
        if kernel.backend == "cuda":
            assert {"cuda_module.py", "device.cuh"} <= names


@functools.cache
def used_by(path):
    """The files of klab.kernels that Python, or the preprocessor, finds for what one file imports or includes."""
    names, text = set(), path.read_text()
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else []:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names.add(node.module)
            module = importlib.util.find_spec(node.module) if node.module.startswith("klab.kernels") else None
            if module and module.submodule_search_locations:  # a package: what is taken from it may be a module
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    specs = [importlib.util.find_spec(name) for name in sorted(names) if name.startswith("klab.kernels.")]
    files = [Path(spec.origin) for spec in specs if spec and spec.origin and not spec.submodule_search_locations]
    headers = [Path(klab_kernels()) / name for name in re.findall(r'#include "(\w+\.cuh)"', text)]
    assert all(header.is_file() for header in headers)
    return [file.resolve() for file in files + headers if file.stem not in _NOT_CODE]


@functools.cache
def klab_kernels():
    return importlib.util.find_spec("klab.kernels.contract").origin.rpartition("/")[0]


def test_a_kernels_identity_covers_all_that_it_imports_and_includes():
    shared = 0
    for kernel in discover().kernels.values():
        files, todo = {kernel.path.resolve()}, [kernel.path.resolve()]
        while todo:
            new = [file for file in used_by(todo.pop()) if file not in files]
            files.update(new)
            todo += new
        missing = files - {file.resolve() for file in sources_of(kernel.path)}
        assert not missing, f"{kernel.id} lacks {sorted(file.name for file in missing)}"
        shared += any(file.name.startswith("_") for file in files)
    assert shared


@pytest.mark.parametrize(
    "line",
    [
        "from klab.kernels.norm import _eager",
        "from klab.kernels.norm import _eager as other",
        "from klab.kernels.norm._eager import norm",
        "import klab.kernels.norm._eager",
        "def build():\n    from klab.kernels.norm import (\n        _eager,\n    )",
    ],
)
def test_every_form_of_import_is_followed(line, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f'"""Not klab.kernels.wgmma, which is only named."""\n{line}\nHEADER = "fp8.cuh"\n')
    names = [file.name for file in sources_of(path)]
    assert names[0] == "mine.py" and {"_eager.py", "row_quantize.py", "fp8.cuh", "device.cuh"} <= set(names)
    assert "wgmma.py" not in names and "problem.py" not in names
    alone = tmp_path / "alone.py"
    alone.write_text("x = 1\n")
    assert [file.name for file in sources_of(alone)] == ["alone.py"] and source_digest(alone) != source_digest(path)


def test_a_chip_survives_json_and_stays_hashable():
    """Workers get the chip as JSON, and kernels keep what they compiled by chip."""
    for chip in (find_chip("h200"), find_chip("b200")):
        again = Chip.from_json(json.loads(json.dumps(dataclasses.asdict(chip))))
        assert again == chip and hash(again) == hash(chip)
