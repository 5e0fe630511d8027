"""SGLang's tables: names, places and keys, as its loaders of 0.5.23 have them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from klab.harness.choose.engines.names import DENSE, MOE, Dialect

VERSION_FOLDER = re.compile(r"triton_(\d+(?:_\d+)*)")


class Sglang(Dialect):
    """MoE tables from configs/triton_X_Y_Z of SGLANG_MOE_CONFIG_DIR; dense ones from the package alone."""

    def device(self, name: str, kind: str) -> str:
        """Spaces become underscores, and nothing else changes."""
        return name.replace(" ", "_")

    def folder(self, kind: str, triton: str) -> str:
        """The version of Triton is in the path."""
        # What follows a plus (3.4.0+git1) would stop the loader, which makes a number of every part of every version.
        return f"configs/triton_{triton.split('+')[0].replace('.', '_')}" if kind == MOE else self.package[DENSE]

    def where(self, kind: str, parts: tuple[str, ...]) -> str:
        """Nothing but configs/triton_X_Y_Z is looked at."""
        path = PurePosixPath(*parts)
        if kind == DENSE:
            home = PurePosixPath(self.package[DENSE])
            inside = path.parts[-len(home.parts) :] == home.parts
            return "" if inside else f"SGLang reads dense tables from its package alone ({home}): {self.variable} is not consulted"
        right = len(parts) == 2 and parts[0] == "configs" and VERSION_FOLDER.fullmatch(parts[1]) is not None
        place = "." if not parts else str(path)
        return "" if right else f"SGLang looks for it in configs/triton_X_Y_Z of the folder of {self.variable}, not in {place}"


def version_of(parts: tuple[str, ...]) -> str:
    """The version of Triton that a path says, "3.6.0", or an empty string."""
    found = VERSION_FOLDER.fullmatch(parts[-1]) if parts else None
    return found[1].replace("_", ".") if found else ""


SGLANG = Sglang(
    engine="sglang",
    title="SGLang",
    variable="SGLANG_MOE_CONFIG_DIR",
    block_separator=", ",
    dtypes={MOE: ("", "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16", "float32"), DENSE: ("fp8_w8a8", "int8_w8a8")},
    extras={MOE: ("USE_TMA",), DENSE: ("SPLIT_K", "SWAP_AB")},
    package={
        MOE: "sglang/srt/layers/moe/fused_moe_triton/configs",
        DENSE: "sglang/srt/layers/quantization/configs",
    },
    features=("per_channel_quant", "_down"),
)
