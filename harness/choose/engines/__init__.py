"""Tables of tuned configurations in the dialects of serving engines: written from results, checked, and read as contestants."""

from __future__ import annotations

from klab.harness.choose.engines.names import Dialect
from klab.harness.choose.engines.sglang import SGLANG
from klab.harness.choose.engines.vllm import VLLM
from klab.kernels.errors import UsageError

DIALECTS: dict[str, Dialect] = {dialect.engine: dialect for dialect in (VLLM, SGLANG)}


def find_dialect(engine: str) -> Dialect:
    """UsageError with the known ones for an unknown engine."""
    if engine.strip().lower() not in DIALECTS:
        raise UsageError(f"--engine {engine}: klab knows the tables of {' and '.join(DIALECTS)}")
    return DIALECTS[engine.strip().lower()]
