"""Serving measurements that others published: each row mapped to the deployment and workload that klab would call it."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.workload import CHUNK_TOKENS, Deployment, Workload
from klab.harness.plan.quantization import format_of
from klab.kernels.discover import approximations_of
from klab.kernels.errors import UsageError
from klab.kernels.fused_moe.problem import FusedMoe

FILE = "silicon_sample.csv"
# Columns of the file as aiconfigurator-core 0.12.0 has it; another table with these is read as well.
COLUMNS = (
    "id", "silicon_data_source", "backend", "backend_version", "model_path", "system", "mode", "isl", "osl", "gemm_quant_mode",
    "moe_quant_mode", "batch_size", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size",
    "silicon_ttft_ms", "silicon_tpot_ms",
)  # fmt: skip
MODELS = {
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "nvidia/Qwen3-32B-NVFP4": "qwen3-32b",
    "deepseek-ai/DeepSeek-R1": "deepseek-r1",
    "deepseek-ai/DeepSeek-V3": "deepseek-r1",  # the same shapes; rows of both names are the same runs
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-r1",
    "nvidia/DeepSeek-V3.1-NVFP4": "deepseek-r1",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "moonshotai/Kimi-K2.5": "kimi-k2",  # its language model
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
# What the weights of a checkpoint are in; the file says fp8 for all of these and means the checkpoint.
BLOCK_SCALED = frozenset({"qwen3-235b-a22b", "deepseek-r1"})
FORMATS = {"": "", "bfloat16": "", "fp8": "fp8_tensor", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int4_wo": "w4a16"}
# Both projects that the file's rows come from; the second measured with lengths that do not vary.
INFERENCEX, SWEEP = "InferenceX", "sweep"
# InferenceX draws each length evenly between 0.8 and 1.0 of the nominal one (its scripts: --random-range-ratio 0.8).
INFERENCEX_SHORTEST = 0.8
# How many times the concurrency both benchmarks send, all at once at the start, never more than the concurrency in flight (InferenceX's
# scripts: --num-prompts CONC x 10 --request-rate inf; of the sweeps this is a guess).
WAVES = 10
# Decode steps that a request waits before the scheduler looks at it. InferenceX's scripts: Llama 70B under TensorRT-LLM at 1024 + 1024
# tokens on fewer than 8 GPUs waits 20 steps to batch prompts (batch_wait_timeout_iters); DeepSeek under SGLang on B200 polls every 10
# steps, from 16 requests on and 8 GPUs every 30 (scheduler-recv-interval), so half of that on average.
BATCH_WAIT_STEPS, POLL_STEPS, SLOW_POLL_STEPS = 20.0, 5.0, 15.0
# Reading a prompt on the server, one after another: a guess, of the order of what tokenizers do on one core.
INTAKE_S_PER_TOKEN = 1e-6
# Tokens per step that the servers were started with: InferenceX's scripts give 8192 to vLLM, the whole prompt and at least 8192 to
# TensorRT-LLM, 32768 to SGLang (8192 on four GPUs); the sweeps ran with defaults.
SGLANG_TOKENS = 32768


@dataclass(frozen=True)
class Published:
    """One measured point: `concurrency` requests of `isl` + `osl` tokens (nominal) in flight on one replica of `tp` GPUs.

    `ttft_s` is a mean over all requests, those of the start included; `tpot_s` is (latency - TTFT) / (osl - 1). `quantization` and
    `kv_dtype` in klab's words; the file does not state the cache's and it is taken from the scripts (InferenceX) or guessed (sweeps).
    """

    id: str
    model: str
    chip: str
    backend: str
    version: str
    campaign: str
    tp: int
    expert_parallel: bool
    quantization: str
    kv_dtype: str
    isl: int
    osl: int
    concurrency: int
    ttft_s: float
    tpot_s: float

    @cached_property
    def deployment(self) -> Deployment:
        """UsageError for a chip or a model that the catalogue lacks."""
        return Deployment(
            find_model(self.model),
            find_chip(self.chip),
            self.tp,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            expert_parallel=self.expert_parallel,
        )

    @property
    def setting(self) -> tuple[str, str, str, str, int, bool, str]:
        """What has one set of steps: model, chip, backend, campaign, tp, expert parallelism, format."""
        return (self.model, self.chip, self.backend, self.campaign, self.tp, self.expert_parallel, self.quantization)

    @property
    def shortest(self) -> float:
        """Lengths are drawn evenly between this share of the nominal one and all of it."""
        return INFERENCEX_SHORTEST if self.campaign == INFERENCEX else 1.0

    @property
    def prefill_alone(self) -> bool:
        """Whether the engine runs prompts in steps of their own while the others wait (SGLang's default)."""
        return self.backend == "sglang"

    @property
    def chunk_tokens(self) -> int:
        """Tokens that the engine puts through one step."""
        if self.backend == "sglang" and self.campaign == INFERENCEX and self.tp >= 8:
            return SGLANG_TOKENS
        return max(CHUNK_TOKENS, self.isl + 64) if self.backend == "trtllm" else CHUNK_TOKENS

    @property
    def waits_steps(self) -> float:
        """Decode steps before the scheduler looks at a request, by the server's settings."""
        if self.campaign != INFERENCEX:
            return 0.0
        if (self.backend, self.model, self.isl, self.osl) == ("trtllm", "llama-3.1-70b", 1024, 1024) and self.tp < 8:
            return BATCH_WAIT_STEPS
        if (self.backend, self.model, self.chip) == ("sglang", "deepseek-r1", "b200"):
            return SLOW_POLL_STEPS if self.concurrency >= 16 and self.tp >= 8 else POLL_STEPS
        return 0.0

    @property
    def intake_s(self) -> float:
        """Seconds to read one request."""
        return self.isl * (1 + self.shortest) / 2 * INTAKE_S_PER_TOKEN

    @property
    def workload(self) -> Workload:
        """With the mean lengths."""
        mean = (1 + self.shortest) / 2
        return Workload(isl=max(1, round(self.isl * mean)), osl=max(1, round(self.osl * mean)), chunk_tokens=self.chunk_tokens)


def read_published(path: Path) -> tuple[list[Published], Counter[str]]:
    """Every row that klab can plan, once, and why the others were left out (reason: rows).

    UsageError for a file that is no such table.
    """
    skipped: Counter[str] = Counter()
    found: dict[tuple[object, ...], Published] = {}
    for row in _rows(path):
        one = _mapped(row)
        if isinstance(one, str):
            skipped[one] += 1
            continue
        # The file holds many runs twice or three times, imported on different days.
        key = (one.model, one.chip, one.backend, one.isl, one.osl, round(one.ttft_s, 6), round(one.tpot_s, 7))
        if found.setdefault(key, one) is not one:
            skipped["the same run again"] += 1
    return list(found.values()), skipped


def _rows(path: Path) -> Iterator[Mapping[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(f"{path} is not a table of serving measurements: it has no column {', '.join(missing)}")
            yield from reader
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a table of serving measurements: {error}") from None


def _mapped(row: Mapping[str, str]) -> Published | str:
    """The point, or why there is none."""
    if row["mode"] != "agg":
        return "prefill and decode on GPUs of their own"
    model, chip = MODELS.get(row["model_path"]), row["system"].removesuffix("_sxm")
    if model is None:
        return f"no {row['model_path']} in the catalogue"
    if not _known_chip(chip):
        return f"no {chip} in the catalogue"
    numbers = {name: _number(row[name]) for name in COLUMNS if name.endswith(("_size", "_ms", "isl", "osl"))}
    isl, osl, concurrency = (numbers[name] for name in ("isl", "osl", "batch_size"))
    ttft_ms, tpot_ms = numbers["silicon_ttft_ms"], numbers["silicon_tpot_ms"]
    if not all(math.isfinite(value) and value > 0 for value in (isl, osl, concurrency, ttft_ms, tpot_ms)):
        return "a length, a concurrency or a time that is none"
    if numbers["pp_size"] not in (1, 0):
        return "pipeline parallelism"
    campaign = SWEEP if "auto-gap-analysis" in row["silicon_data_source"] else INFERENCEX
    sharded = _sharding(numbers, campaign, experts=_has_experts(model))
    if isinstance(sharded, str):
        return sharded
    tp, expert_parallel = sharded
    quantization = _format(row, model)
    if quantization is None:
        return f"klab has no experts in {row['moe_quant_mode']}"
    kv_dtype = _cache(row["backend"], campaign, model, chip, quantization)
    times = (ttft_ms * 1e-3, tpot_ms * 1e-3)
    version = row["backend_version"] or "version not stated"
    where = (row["id"], model, chip, row["backend"], version, campaign)
    return Published(*where, tp, expert_parallel, quantization, kv_dtype, int(isl), int(osl), int(concurrency), *times)


def _sharding(numbers: Mapping[str, float], campaign: str, *, experts: bool) -> tuple[int, bool] | str:
    """(GPUs, whether whole experts are spread over them), or why klab does not plan it.

    Two importers wrote expert-parallel runs as tp = (true tp) x (expert groups) with moe_tp = true tp: the same runs, times equal to the
    last digit, are in the file as "tp 8, 1 x 8" and as "tp 64, 8 x 8".
    """
    tp, moe_tp, moe_ep = (int(numbers[name]) if math.isfinite(numbers[name]) else 0 for name in ("tp_size", "moe_tp_size", "moe_ep_size"))
    data_parallel = numbers["attention_dp_size"]
    if math.isfinite(data_parallel) and data_parallel > 1:
        return "attention data parallel"
    if tp < 1:
        return "a number of GPUs that is none"
    if not experts:
        return tp, False
    if campaign == INFERENCEX and min(moe_tp, moe_ep) > 1 and tp == moe_tp * moe_ep:
        tp, moe_tp = moe_tp, 1
    if (moe_tp, moe_ep) == (1, tp):
        return tp, tp > 1
    return (tp, False) if (moe_tp, moe_ep) == (tp, 1) else "experts sharded in a way that klab does not plan"


def _format(row: Mapping[str, str], model: str) -> str | None:
    """klab's word for the weights' format; None where klab has no experts in it."""
    experts = row["moe_quant_mode"] if _has_experts(model) else ""
    if experts and model in BLOCK_SCALED and experts.startswith("fp8"):
        found = "fp8_block"
    elif model == "gpt-oss-120b":
        found = "w4a16_mxfp4"  # of this checkpoint, its experts alone; the file calls it nvfp4
    else:
        found = FORMATS.get(experts or row["gemm_quant_mode"], "")
    return None if found and _has_experts(model) and found not in _expert_formats() else found


def _cache(backend: str, campaign: str, model: str, chip: str, quantization: str) -> str:
    """The cache's dtype: InferenceX's scripts say fp8 for all quantised models but gpt-oss, and DeepSeek under SGLang on Hopper."""
    if not quantization or model == "gpt-oss-120b":
        return ""
    if campaign == INFERENCEX:
        return "" if backend == "sglang" and chip != "b200" else "float8_e4m3fn"
    return "float8_e4m3fn" if backend == "trtllm" else ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@cache
def _known_chip(name: str) -> bool:
    try:
        return find_chip(name).kind == "cuda"
    except UsageError:
        return False


@cache
def _has_experts(model: str) -> bool:
    return any(getattr(group.mlp, "experts", 0) for group in find_model(model).stack.groups)


@cache
def _expert_formats() -> frozenset[str]:
    return frozenset(map(format_of, approximations_of(FusedMoe(256, 256, 256, 8, 2))))
