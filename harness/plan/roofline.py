"""The least time that a chip's limits allow."""

from __future__ import annotations

from klab.kernels.contract import Chip


class Roofline:
    """max(flops / peak, bytes / memory bandwidth, link bytes / link bandwidth), by the specification's peak of one dtype."""

    def __init__(self, chip: Chip, dtype: str) -> None:
        # A CPU multiplies a dtype that it has no instructions for in float32 (precision.py says so in a note).
        self.chip = chip
        peak = chip.peak_flops(dtype) or chip.peak_flops("float32")
        assert peak is not None, "planned_dtype() lets only chips with a peak through"
        self.peak_flops = peak
        self.bytes_per_s = chip.memory_gb_per_s * 1e9
        self.link_bytes_per_s = (chip.link_gb_per_s or 0.0) * 1e9

    def of(self, dtype: str) -> Roofline:
        """The same chip's, by the peak of another dtype; this one where the chip has no instructions for that."""
        return Roofline(self.chip, dtype) if self.chip.peak_flops(dtype) else self

    def bound(self, flops: float, bytes_moved: float, link_bytes: float = 0.0) -> tuple[float, str]:
        """(microseconds, which limit sets them: "compute", "memory" or "link")."""
        times = {"compute": flops / self.peak_flops, "memory": bytes_moved / self.bytes_per_s}
        if link_bytes:
            times["link"] = link_bytes / self.link_bytes_per_s
        limit = max(times, key=times.__getitem__)
        return times[limit] * 1e6, limit
