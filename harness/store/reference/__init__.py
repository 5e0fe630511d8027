"""Published measurements of chips that are not at hand: the tables of NVIDIA's aiconfigurator-core, as Results of kind "reference"."""

from __future__ import annotations

from klab.harness.store.reference.collectives import Curves, Link, links
from klab.harness.store.reference.points import Point, Reading, points
from klab.harness.store.reference.results import results
from klab.harness.store.reference.tables import available

__all__ = ["Curves", "Link", "Point", "Reading", "available", "links", "points", "results"]
