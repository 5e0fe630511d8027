"""What every configuration says alike: dtype, quantization, and the notes on fields that nobody understood."""

from __future__ import annotations

from collections.abc import Mapping

from klab.harness.catalog.architecture import Note
from klab.harness.catalog.fields import Fields
from klab.kernels.dtypes import long_name
from klab.kernels.errors import UsageError


def read_dtype(*places: Fields) -> tuple[str, list[Note]]:
    """The checkpoint's dtype, long; bfloat16 with a note where it is not stated."""
    for f in places:
        value = f.value("dtype", "torch_dtype")
        if value is not None:
            for other in places:
                other.understood.update({"dtype", "torch_dtype"})
            try:
                return long_name(str(value).removeprefix("torch.")), []
            except UsageError as error:
                raise UsageError(f"{f.where}: {error}") from error
    return "bfloat16", [Note("dtype", "missing; taken as bfloat16")]


def read_quantization(*places: Fields) -> str:
    """How quantised weights are stored, in words, or an empty string."""
    for f in places:
        config = f.value("quantization_config", "compression_config", "quantization")
        if isinstance(config, Mapping):
            method = str(config.get("quant_method") or config.get("quant_algo") or "quantised")
            block = config.get("weight_block_size")
            bits = config.get("bits")
            words = [method, f"{'x'.join(map(str, block))} blocks" if isinstance(block, list) else "", f"{bits} bits" if bits else ""]
            return " ".join(word for word in words if word)
    return ""


def left_over_notes(f: Fields) -> list[Note]:
    """One note per field that is neither understood nor known not to matter."""
    notes = []
    for name, suspicious in f.left_over():
        if suspicious:
            message = "not understood: if it changes a layer, the plan lacks that"
            notes.append(Note(name, message, None, "warning"))
        else:
            notes.append(Note(name, "not understood; it does not look like a shape"))
    return notes
