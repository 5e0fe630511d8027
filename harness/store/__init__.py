"""What happened, kept: a journal of results per writer, compaction, and the questions asked of them."""

from __future__ import annotations

from klab.harness.store.frame import load
from klab.harness.store.journal import Journal
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status

__all__ = ["Journal", "ReadReport", "Result", "Status", "iter_results", "load"]
