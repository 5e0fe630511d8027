"""What there is: models from their configuration files, chips from their data files or from this machine."""

from klab.harness.catalog.architecture import Model, Note
from klab.harness.catalog.chips import find_chip, load_chips
from klab.harness.catalog.models import find_model, load_models

__all__ = ["Model", "Note", "find_chip", "find_model", "load_chips", "load_models"]
