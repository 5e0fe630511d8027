"""The CPU of this machine as a Chip: cores and caches as the system tells them, peaks modelled, bandwidth measured once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from klab.harness.catalog.cpu_probe import PROBES, CpuFacts, best_copy, copy_gb_per_s, probe
from klab.kernels.contract import Chip

# Where nothing is known: low figures, and labelled as such.
UNKNOWN_CLOCK_MHZ = 2000.0
UNKNOWN_CACHE_BYTES = 8 << 20
UNKNOWN_MEMORY_BYTES = 4 << 30
UNKNOWN_GB_PER_S = 10.0


@cache
def detect_cpu() -> Chip:
    """This machine's CPU. Bandwidth is measured (below 0.5 s) in the first few processes and remembered; later calls in a process
    return the same Chip.
    """
    return chip_of(probe(Path("/")), measure=True)


def chip_of(facts: CpuFacts, *, measure: bool) -> Chip:
    """A Chip from what was probed; without `measure`, bandwidth is a low guess."""
    clock = facts.clock_mhz or UNKNOWN_CLOCK_MHZ
    cache_bytes = facts.cache_bytes or UNKNOWN_CACHE_BYTES
    per_cycle, model = flops_per_cycle(facts)
    formula = f"modelled: {facts.cores} cores x {clock:.0f} MHz x {{}} FLOP per cycle ({model})"
    bandwidth, bandwidth_source = UNKNOWN_GB_PER_S, "not measured: a low guess"
    if measure:
        try:
            bandwidth, copies = best_copy(facts, cache_bytes, copy_gb_per_s)
            bandwidth_source = (
                f"measured: a copy by {facts.cores} threads, reads and writes counted, best round of 0.3 s; the best of {copies} such "
                f"copies on this processor so far, at most {PROBES} (remembered in klab/ of the user's cache folder)"
            )
        except (MemoryError, RuntimeError, OSError) as error:
            bandwidth_source = f"not measured ({type(error).__name__}): a low guess"
    return Chip(
        name="cpu",
        title=f"{facts.model} ({facts.cores} {'core' if facts.cores == 1 else 'cores'})",
        kind="cpu",
        sm_count=facts.cores,
        max_clock_mhz=clock,
        spec_clock_mhz=clock,
        peak_tflops={dtype: facts.cores * clock * 1e6 * flops / 1e12 for dtype, flops in per_cycle.items()},
        memory_bytes=facts.memory_bytes or UNKNOWN_MEMORY_BYTES,
        memory_gb_per_s=round(bandwidth, 2),
        l2_bytes=cache_bytes,
        provenance={
            "sm_count": facts.cores_source,
            "max_clock_mhz": facts.clock_source or "not known: a low guess",
            "spec_clock_mhz": facts.clock_source or "not known: a low guess",
            "memory_bytes": "memory of the machine or its container" if facts.memory_bytes else "not known: a low guess",
            "memory_gb_per_s": bandwidth_source,
            "l2_bytes": "last-level cache of the cores in use" if facts.cache_bytes else "not known: a low guess",
            **{f"peak_tflops.{dtype}": formula.format(f"{flops:g}") for dtype, flops in per_cycle.items()},
        },
    )


def flops_per_cycle(facts: CpuFacts) -> tuple[dict[str, float], str]:
    """FLOP per cycle and core by dtype, and in words why. Only dtypes with instructions of their own are listed.

    A core with two fused multiply-add units of w lanes does 4 w: Haswell and later, Zen and later. Zen 4 (family 25) splits 512-bit
    operations in two. AMX multiplies 16 x 32 by 32 x 16 bf16 tiles in 16 cycles: 1024 multiply-adds a cycle (Intel's optimisation manual).
    """
    flags = facts.flags
    if "avx512f" in flags:
        halved = facts.vendor == "AuthenticAMD" and facts.family is not None and facts.family < 26
        fp32, why = (32.0, "AVX-512 on 256-bit units") if halved else (64.0, "AVX-512, two FMA units")
    elif "fma" in flags and ("avx2" in flags or "avx1.0" in flags or "avx" in flags):
        fp32, why = 32.0, "AVX2, two FMA units"
    elif "avx" in flags or "avx1.0" in flags:
        fp32, why = 16.0, "AVX, one add and one multiply"
    elif flags & {"asimd", "neon"} or facts.machine in ("arm64", "aarch64"):
        fp32, why = 16.0, "128-bit NEON, two FMA units"
    else:
        fp32, why = 4.0, "unknown instruction set: a low guess"
    rates = {"float32": fp32}
    if "avx512_bf16" in flags or "bf16" in flags:  # the product of pairs: twice the lanes; "bf16" is Arm's flag
        rates["bfloat16"] = 2 * fp32
    if "avx512_vnni" in flags or "asimddp" in flags:
        rates["int8"] = 4 * fp32
    if "avx512_fp16" in flags:
        rates["float16"] = 2 * fp32
    if "amx_bf16" in flags:
        rates["bfloat16"] = 2048.0
        why += ", AMX tiles for bf16"
    if "amx_int8" in flags:
        rates["int8"] = 4096.0
    return rates, why
