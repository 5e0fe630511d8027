"""The wrappers of other people's packages, tried on stand-ins that compute the right thing through the same signatures.

A wrapper's own mistake (swapped arguments, another scale, a lost causal flag) is found here, without the package and without a GPU.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import outside_attention
import outside_products
import pytest
import torch
from contest import BLACKWELL, HOPPER

from klab.harness.measure.check import check
from klab.kernels import inductor
from klab.kernels.contract import Kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import ROOT, discover
from klab.kernels.errors import UsageError
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.grouped_matmul.problem import GroupedMatmul
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.scaled_matmul.problem import ScaledMatmul

STAND_INS = outside_attention.modules() | outside_products.modules()
SCHEMAS = {
    "flash_attn_3": {outside_attention.FLASH_ATTN_3_SCHEMA: outside_attention.flash_attn_3_forward},
    "_C": {
        "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()": (
            outside_products.cutlass_scaled_mm
        ),
        **{f"{name}(Tensor! out, Tensor input) -> ()": (lambda out, x, f=f: f(x, out)) for name, f in outside_products.GATED.items()},
    },
}
# Shapes that some package takes and that no example has: pages of 256 tokens, whole blocks, a sequence that fits every tile.
FURTHER = [
    DecodeAttention((300, 700), 4, 2, 64, page_size=256, dtype="float16"),
    DecodeAttention((300, 600), 4, 1, 64, q_len=3, page_size=256, window=100, softcap=20.0),
    PrefillAttention((40, 300), 4, 2, 64, prefix_lens=(300, 0), page_size=256, dtype="float16", window=60),
    PrefillAttention((33, 7), 4, 2, 64, prefix_lens=(5, 60), dtype="float16"),
    PrefillAttention((40, 20), 2, 2, 128, prefix_lens=(0, 30), page_size=16, softcap=15.0),
    LatentAttention((70, 130), 16, q_len=2, dtype="bfloat16"),
    ScaledMatmul(20, 256, 384, "bfloat16", "fp8_block"),
    ScaledMatmul(21, 64, 96, "float16", "fp8_row"),
    FusedMoe(20, 256, 128, 4, 2, "bfloat16", "fp8_block", local_experts=3),
    GroupedMatmul(70, 4, 2, 128, 256, format="fp8_block"),
]


def outside_files() -> list[Path]:
    return sorted(p for p in ROOT.glob("*/*.py") if not p.name.startswith("_") and "klab.kernels.outside import" in p.read_text())


FILES = outside_files()


def kernel_of(path: Path, text: str | None = None) -> Kernel:
    """The kernel that a file defines, or would define with another text; with a workspace of bytes instead of megabytes."""
    name = f"klab.kernels.{path.parent.name}.{path.stem}"
    module = types.ModuleType(f"{name}_changed")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    source = (text or path.read_text()).replace("<< 20", "<< 4")
    exec(compile(source, str(path), "exec"), vars(module))
    (found,) = (value for value in vars(module).values() if isinstance(value, Kernel))
    return found


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """The stand-ins, importable; operators on the CPU; and FlexAttention as torch computes it without compiling."""
    for name, contents in STAND_INS.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    monkeypatch.delitem(sys.modules, "klab.kernels.matmul._cuda_tile_source", raising=False)
    libraries = []
    for namespace, operators in SCHEMAS.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        libraries.append(library)
        for schema, function in operators.items():
            library.define(schema)
            library.impl(schema.split("(")[0], function, "CPU")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(inductor, "compiled", lambda function: function)
    # Otherwise it is traced anew for every problem, which takes a second.
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    yield
    for library in libraries:
        library._destroy()
    sys.modules.pop("klab.kernels.matmul._cuda_tile_source", None)


def problems(kernel: Kernel):
    """Examples, and the further shapes, that a kernel takes on some chip, with that chip."""
    all_of_them = [*kernel.problem_type.examples(), *(p for p in FURTHER if isinstance(p, kernel.problem_type))]
    for problem in all_of_them:
        if kernel.name == "torch_flex" and problem.dtype == "float32":
            continue  # its stand-in is torch itself, which takes a tenth of a second for each
        chip = next((c for c in (HOPPER, BLACKWELL) if kernel.unfit(problem, c) is None), None)
        if chip is not None:
            yield problem, chip


def verdicts(kernel: Kernel):
    """Why each of the kernel's launches is wrong, or ""; two seeds of one launch, which was planned for neither."""
    for problem, chip in problems(kernel):
        for config in list(kernel.space(problem, chip))[:3]:
            launch = kernel.build(problem, config, chip)
            for seed, row_padding in ((0, 0), (1, 8)):
                found = check(problem, launch, seed=seed, row_padding=row_padding)
                yield problem, config, found.reason


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_agrees_with_reference(path):
    found = list(verdicts(kernel_of(path)))
    wrong = [f"{problem.label()} {config.label()}: {reason}" for problem, config, reason in found if reason]
    assert found and not wrong, "\n".join(wrong)


MISTAKES = [
    ("decode_attention/flashinfer_decode", "window_left=p.window - 1", "window_left=p.window"),
    ("decode_attention/flashinfer_decode", 'listed.fill(inputs["block_table"])', "pass"),
    ("prefill_attention/flashinfer_prefill", '"causal": p.causal', '"causal": False'),
    ("prefill_attention/flashinfer_prefill", '"sm_scale": p.scale', '"sm_scale": None'),
    ("latent_attention/flashinfer_mla", "sm_scale=p.scale", "sm_scale=p.dim**-0.5"),
    ("norm/flashinfer_rmsnorm", "rmsnorm(x, weight, eps=eps, out=out)", "rmsnorm(x, weight, out=x)"),
    ("norm/quack_rmsnorm", 'residual=inputs.get("residual")', "residual=None"),
    ("activation/vllm_activation", "NAMES[problem.kind]", '"silu_and_mul"'),
    ("decode_attention/flash_attn_2", "softcap=p.softcap", "softcap=0.0"),
    ("prefill_attention/flash_attn_2", "(p.window - 1, 0) if p.window", "(p.window, 0) if p.window"),
    ("prefill_attention/flash_attn_3", "is_causal=p.causal", "is_causal=True"),
    ("decode_attention/flash_attn_3", 'seqused_k=inputs["kv_lens"]', 'seqused_k=inputs["kv_lens"] - 1'),
    ("prefill_attention/flash_attn_4", 'learnable_sink=inputs.get("sinks")', "learnable_sink=None"),
    ("prefill_attention/xformers_attention", "BlockDiagonalCausalFromBottomRightMask if p.causal", "BlockDiagonalMask if p.causal"),
    ("prefill_attention/torch_flex", "> q_position[q] - p.window", ">= q_position[q] - p.window"),
    ("scaled_matmul/vllm_cutlass", "x_scale, w_scale.t(), None", "w_scale.t(), x_scale, None"),
    ("scaled_matmul/sgl_cutlass", "columns.of(x_scale), w_scale.t()", "x_scale, w_scale.t()"),
    ("scaled_matmul/deep_gemm_fp8", "disable_ue8m0_cast=True", "disable_ue8m0_cast=False"),
    ("grouped_matmul/deep_gemm_grouped", "+ (padded_ends - padded)[expert]", "+ padded_ends[expert]"),
    ("fused_moe/vllm_fused_experts", "torch.where(numbers < p.local, numbers, -1)", "numbers % p.local"),
    ("matmul/tilelang_tiled", "w[column * block_n, step * block_k]", "w[column * block_n, row * block_k]"),
    ("matmul/cuda_tile_tiled", 'nt = problem.layout == "nt"', "nt = True"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_planted_mistake_is_found(name, right, wrong):
    path = ROOT / f"{name}.py"
    text = path.read_text()
    assert right in text
    changed = kernel_of(path, text.replace(right, wrong))
    try:
        found = any(reason for _, _, reason in verdicts(changed))
    except (AssertionError, RuntimeError, TypeError):
        found = True  # the stand-in refused the call, as the package would
    assert found


def test_each_names_its_package_and_imports_it_late():
    for path in FILES:
        kernel = kernel_of(path)
        assert kernel.kinds == ("cuda",) and (kernel.requires or kernel.name == "torch_flex"), path
        assert kernel.library == (kernel.name not in ("tilelang_tiled", "cuda_tile_tiled"))
        if kernel.requires:
            assert kernel.requires.install.startswith("pip install ")
            late = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
            top = kernel.requires.module.split(".")[0]
            assert not [line for line in late if line.split()[1].split(".")[0] == top]


def test_absent_ones_are_told_and_asked_for_by_name(monkeypatch):
    from klab.kernels import discover as room

    monkeypatch.setattr(room, "_installed", lambda module: False)
    catalogue = discover()
    absent = {u.kernel: u for u in catalogue.unavailable if u.outside}
    assert len(absent) == len(FILES) - 1 and absent["norm/quack_rmsnorm"].install == "pip install quack-kernels"
    with pytest.raises(UsageError, match="quack_rmsnorm needs quack; pip install quack-kernels"):
        catalogue.select(["quack_rmsnorm"])


def test_another_version_is_another_contestant(monkeypatch):
    from klab.kernels import contract

    kernel = kernel_of(ROOT / "norm" / "quack_rmsnorm.py")
    digests = set()
    for version in ("0.6.5", "0.6.6"):
        monkeypatch.setattr(contract, "_installed_version", lambda names, v=version: f"{names[0]}=={v}")
        digests.add(kernel.source_digest)
    assert len(digests) == 2


def test_the_list_has_one_line_per_package():
    from klab.harness.cli.kernels import _absent_packages

    missing = [
        {"path": "a.py", "reason": "norm/a needs p", "install": "pip install p", "kernel": "norm/a"},
        {"path": "b.py", "reason": "SyntaxError: b", "install": None, "kernel": ""},
        {"path": "c.py", "reason": "matmul/c needs p", "install": "pip install p", "kernel": "matmul/c"},
    ]
    assert _absent_packages(missing)[1:] == ["  pip install p: matmul/c, norm/a"] and not _absent_packages(missing[1:2])


def test_a_row_tells_the_versions_of_outside_packages(monkeypatch):
    from klab.harness.measure import environment

    monkeypatch.setattr(environment, "version", lambda *names: "0.7.2" if names == ("flashinfer-python",) else None)
    found = environment.software()
    assert found["flashinfer-python"] == "0.7.2" and "vllm" not in found


# Which file of a package defines what a stand-in stands for, below the package's own folder.
REAL = [
    ("flashinfer", "decode.py", outside_attention.BatchDecodeWithPagedKVCacheWrapper, ("__init__", "_plan_impl:plan", "run")),
    ("flashinfer", "prefill.py", outside_attention.BatchPrefillWithRaggedKVCacheWrapper, ("__init__", "plan", "run")),
    ("flashinfer", "prefill.py", outside_attention.BatchPrefillWithPagedKVCacheWrapper, ("__init__", "plan", "run")),
    ("flashinfer", "mla/_batch_mla/_wrapper.py", outside_attention.BatchMLAPagedAttentionWrapper, ("__init__", "plan", "run")),
    ("flashinfer", "norm/__init__.py", None, (outside_products.rmsnorm, outside_products.fused_add_rmsnorm)),
    ("flash_attn", "cute/interface.py", None, (outside_attention._flash_attn_fwd,)),
    ("flash_attn", "flash_attn_interface.py", None, (outside_attention.flash_attn_varlen_func, outside_attention.flash_attn_with_kvcache)),
    ("xformers", "ops/fmha/__init__.py", None, (outside_attention.memory_efficient_attention_forward,)),
    ("quack", "rmsnorm.py", None, (outside_products._rmsnorm_fwd,)),
    ("sgl_kernel", "elementwise.py", None, (outside_products.rmsnorm, outside_products.fused_add_rmsnorm)),
    ("vllm", "_custom_ops.py", None, (outside_products.rms_norm, outside_products.fused_add_rms_norm)),
    ("vllm", "model_executor/layers/fused_moe/fused_moe.py", None, (outside_products.fused_experts,)),
    ("vllm", "model_executor/layers/fused_moe/config.py", None, (outside_products.fp8_w8a8_moe_quant_config,)),
]


@pytest.mark.parametrize(("package", "file", "cls", "functions"), REAL, ids=lambda value: value if isinstance(value, str) else "")
def test_stand_ins_have_the_real_signatures(package, file, cls, functions, monkeypatch):
    """Read from the installed package's source, which need not import here."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.find_spec(package)
    places = [Path(place) / file for place in (spec.submodule_search_locations or ()) if (Path(place) / file).exists()] if spec else []
    if not places:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse(places[0].read_text())
    body = tree.body if cls is None else next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__).body
    for function in functions:
        real_name, own = (function.split(":")[0], getattr(cls, function.split(":")[-1])) if cls else (function.__name__, function)
        found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == real_name]
        arguments = [n.args for n in found if not any("overload" in ast.unparse(d) for d in n.decorator_list)][-1]
        real = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        ours = inspect.signature(own).parameters.values()
        positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == real[: len(positional)], f"{real_name}: {real}"
        by_name = {p.name for p in ours if p.kind is p.KEYWORD_ONLY}
        assert by_name <= {*real, *(a.arg for a in arguments.kwonlyargs)}, real_name
        needed = real[: len(real) - len(arguments.defaults)]
        assert set(needed) <= {*positional, *by_name}, f"{real_name} needs {needed}"
