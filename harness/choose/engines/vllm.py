"""vLLM's tables: names, places and keys, as its loaders of 0.33 have them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from klab.harness.choose.engines.names import DENSE, MOE, Dialect, TableName


class Vllm(Dialect):
    """MoE tables by VLLM_TUNED_CONFIG_FOLDER or from the package; dense ones from the package alone."""

    def device(self, name: str, kind: str) -> str:
        """White space and slashes become underscores; for experts, all of the H200 family are one."""
        written = re.sub(r"[\s/]+", "_", name)
        return "NVIDIA_H200" if kind == MOE and "H200" in written.split("_") else written

    def folder(self, kind: str, triton: str) -> str:
        """The folder itself; no version in the path."""
        return "" if kind == MOE else self.package[DENSE]

    def where(self, kind: str, parts: tuple[str, ...]) -> str:
        """Files of a subfolder are not looked at, nor dense tables outside the package."""
        path = PurePosixPath(*parts)
        if kind == DENSE:
            home = PurePosixPath(self.package[DENSE])
            inside = path.parts[-len(home.parts) :] == home.parts
            return "" if inside else f"vLLM reads dense tables from its package alone ({home}): {self.variable} is not consulted"
        return "" if not parts else f"vLLM looks for it in the folder of {self.variable} itself, not in {path}"

    def separator(self, table: TableName) -> str:
        """No space, but for the int8 products, whose loader writes one."""
        return ", " if table.kind == DENSE and table.dtype == "int8_w8a8" else self.block_separator


VLLM = Vllm(
    engine="vllm",
    title="vLLM",
    variable="VLLM_TUNED_CONFIG_FOLDER",
    block_separator=",",
    dtypes={MOE: ("", "fp8_w8a8", "fp8_w8a16", "int8_w8a16", "int4_w4a16", "float32"), DENSE: ("fp8_w8a8", "int8_w8a8")},
    extras={MOE: ("SPLIT_K",), DENSE: ()},
    package={
        MOE: "vllm/model_executor/layers/fused_moe/configs",
        DENSE: "vllm/model_executor/layers/quantization/utils/configs",
    },
    version_key=(MOE,),
)
