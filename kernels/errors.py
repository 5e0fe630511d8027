"""The errors a user sees: one clear line each, with the exit code it ends in."""


class KlabError(Exception):
    """Base of every error that klab raises on purpose; `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(KlabError):
    """The request itself is wrong: an unknown name, a missing field, a malformed file."""

    exit_code = 2


class CannotMeasure(KlabError):
    """The request is right but this machine cannot carry it out: chip absent, disk full, device busy."""

    exit_code = 4
