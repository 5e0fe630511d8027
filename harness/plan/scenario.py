"""Scenario: what is asked of the model. The defaults of every kind of chip are in this file and nowhere else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from klab.harness.catalog.architecture import Model
from klab.kernels.contract import Chip, Record
from klab.kernels.dtypes import long_name
from klab.kernels.errors import UsageError

PLANNED_DTYPES = ("bfloat16", "float16", "float32")
KV_DTYPES = ("", "float8_e4m3fn")


@dataclass(frozen=True)
class Scenario(Record):
    """One way of using a model.

    `isl`: prompt tokens, of which `prefix_len` are in the cache already (for a diffusion transformer: latent tokens; for Whisper: tokens of
    the decoder's prompt). `osl`: tokens to generate. `batches`: sequences per decode step, one plan for each; `prefill_batch`: per
    prefill. `tp`: GPUs of one tensor-parallel group; with `expert_parallel` whole experts are spread over them instead of slices.
    `dtype`: empty for the model's own. `kv_dtype`: of the cache ("float8_e4m3fn"; empty: as `dtype`). `shared_prefix`: prompt tokens that
    all sequences of a decode step share (one system prompt). `q_len`: tokens per sequence and decode step, above 1 for verifying
    speculated tokens. `quantization`: the format of the layers' weights (and activations, where the format has it), "fp8_block" say.
    """

    isl: int = 8192
    osl: int = 1024
    batches: tuple[int, ...] = (1, 8, 32, 128)
    prefill_batch: int = 1
    tp: int = 1
    expert_parallel: bool = False
    dtype: str = ""
    page_size: int = 16
    prefix_len: int = 0
    q_len: int = 1
    kv_dtype: str = ""
    shared_prefix: int = 0
    quantization: str = ""

    def __post_init__(self) -> None:
        least_of = {"isl": 1, "osl": 0, "prefill_batch": 1, "tp": 1, "page_size": 1, "prefix_len": 0, "q_len": 1, "shared_prefix": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is at least {least}, not {getattr(self, name)}")
        if any(batch < 1 for batch in self.batches):
            raise UsageError(f"--batch takes numbers of at least 1, not {', '.join(map(str, self.batches))}")
        if self.prefix_len >= self.isl:
            raise UsageError(f"--prefix {self.prefix_len} is the cached part of the {self.isl} prompt tokens (--isl): it must be smaller")
        if self.shared_prefix > self.isl:
            raise UsageError(f"--shared-prefix {self.shared_prefix} is a part of the {self.isl} prompt tokens (--isl): it cannot be longer")
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"--kv-dtype is fp8 (or nothing: as the model computes), not {self.kv_dtype}")
        if self.dtype and long_name(self.dtype) not in PLANNED_DTYPES:
            raise UsageError(f"--dtype is bf16, fp16 or fp32, not {self.dtype}: for narrower weights say --with quantization=fp8_block")

    @property
    def context(self) -> int:
        """Tokens in the cache at a decode step, the new ones included: half way through the generation."""
        return max(self.isl + self.osl // 2, self.q_len)


# A GPU serves long prompts and many users. A CPU gets what ends in minutes: 512 + 128 tokens, one user and eight.
DEFAULTS = {"cuda": Scenario(), "datasheet": Scenario(), "cpu": Scenario(isl=512, osl=128, batches=(1, 8))}
# Latent tokens of a picture that a CPU can draw while one waits: 512 x 512 in Flux.
CPU_LATENT_TOKENS = 1024
# Whisper's decoder starts from: start of transcript, language, task, no timestamps.
WHISPER_PROMPT = 4


def scenario_for(model: Model, chip: Chip, **given: object) -> Scenario:
    """The default scenario of this kind of chip and model, with the fields that are `given` (not None) replaced.

    A default never exceeds the model's longest context. UsageError for an impossible value.
    """
    base = DEFAULTS[chip.kind]
    if model.kind == "diffusion_transformer":
        tokens = model.default_tokens if chip.kind != "cpu" else min(model.default_tokens, CPU_LATENT_TOKENS)
        base = dataclasses.replace(base, isl=tokens, osl=0, batches=())
    elif model.kind == "encoder":
        base = dataclasses.replace(base, isl=min(base.isl, model.max_tokens or base.isl), osl=0, batches=())
    elif model.encoder is not None and model.encoder.tokens:
        base = dataclasses.replace(base, isl=WHISPER_PROMPT, osl=min(base.osl, max((model.max_tokens or base.osl) - WHISPER_PROMPT, 1)))
    elif model.max_tokens and base.isl + base.osl > model.max_tokens:
        osl = min(base.osl, model.max_tokens // 4)
        base = dataclasses.replace(base, isl=max(model.max_tokens - osl, 1), osl=osl)
    changes = {name: value for name, value in given.items() if value is not None}
    names = {field.name for field in dataclasses.fields(Scenario)}
    unknown = sorted(set(changes) - names)
    if unknown:
        raise UsageError(f"a scenario has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    for name in ("dtype", "kv_dtype"):
        if changes.get(name):
            changes[name] = long_name(str(changes[name]))
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]
