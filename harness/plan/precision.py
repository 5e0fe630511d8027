"""In which dtype a model is planned on a chip, and what the reader must know of that."""

from __future__ import annotations

from klab.harness.catalog.architecture import Model, Note
from klab.harness.plan.scenario import PLANNED_DTYPES
from klab.kernels.contract import Chip
from klab.kernels.dtypes import SHORT, long_name
from klab.kernels.errors import UsageError


def planned_dtype(model: Model, chip: Chip, wanted: str = "", quantization: str = "") -> tuple[str, list[Note]]:
    """(dtype, notes): the one that is `wanted`, else the model's, else float32 where a CPU has no instructions for that.

    UsageError when the chip states no peak for it, so that no bound could be given.
    """
    notes = []
    dtype = long_name(wanted) if wanted else model.dtype
    if dtype not in PLANNED_DTYPES:
        notes.append(
            Note("dtype", f"{dtype} is planned as bf16, unless a format is asked for: --with quantization=fp8_block", 1.0, "warning")
        )
        dtype = "bfloat16"
    if model.quantization and not quantization:
        words = f"the checkpoint is quantised ({model.quantization}); planned as {SHORT[dtype]} unless asked: --with quantization=fp8_block"
        notes.append(Note("quantization_config", words, 1.0, "warning"))
    if dtype in chip.peak_tflops:
        return dtype, notes
    if chip.kind != "cpu":
        raise UsageError(f"chip {chip.name} states no peak for {dtype}: add {dtype} to peak_tflops in its file, or choose another --dtype")
    if "float32" not in chip.peak_tflops:
        raise UsageError(f"chip {chip.name} states no peak for {dtype} nor float32: add one to peak_tflops in its file")
    if wanted:
        words = f"this CPU has no instructions for {SHORT[dtype]}: bounds are float32's, and the kernels will be slow"
        return dtype, [*notes, Note("dtype", words)]
    words = f"this CPU has no instructions for the model's {SHORT[dtype]}: planned as float32"
    return "float32", [*notes, Note("dtype", words)]
