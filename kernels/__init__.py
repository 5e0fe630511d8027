"""klab's kernels: what competes, and `apply`, which runs what a profile chose."""

from klab.kernels.tuned import Served, Tuned, apply

__all__ = ["Served", "Tuned", "apply"]
