"""Optuna's TPE, its default sampler, on a recorded space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import ABSENT, KERNEL, Space

# Optuna's samplers know no constraint between parameters and propose the same point again; neither is charged. This many proposals per
# evaluation of the budget end a study that proposes little else; each takes 5 to 20 ms by then.
PROPOSALS_PER_EVALUATION = 20


def run_tpe(recorded: RecordedSpace, *, seed: int, evaluations: int, order: dict[int, None]) -> None:
    """Add the candidates to `order` as they are first evaluated.

    A parameter of numbers is an integer range over the positions of its values, so that the sampler sees their order; any other is
    categorical; where candidates are of several kernels, only the parameters of the kernel proposed are. A point outside the recorded
    space and a candidate that failed are told as pruned, which TPE ranks below all values; a point proposed again is told its value again.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = recorded.space
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    ranges = _ranges(space)
    limit = min(evaluations, len(space))
    for _ in range(PROPOSALS_PER_EVALUATION * limit):
        if len(order) == limit:
            break
        trial = study.ask()
        row = np.full((1, len(space.names)), ABSENT, dtype=np.int64)
        chosen = None
        for column, choices in ranges:
            name, choice = space.names[column], choices.get(chosen)
            if isinstance(choice, int):
                row[0, column] = trial.suggest_int(name, 0, choice)
            elif choice:
                row[0, column] = trial.suggest_categorical(name, choice)
            if name == KERNEL:
                chosen = int(row[0, column])
        candidate = int(space.lookup(row)[0])
        if candidate >= 0:
            order.setdefault(candidate)
        if candidate < 0 or not np.isfinite(recorded.time_us[candidate]):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, float(recorded.time_us[candidate]))


def _ranges(space: Space) -> list[tuple[int, dict[int | None, int | list[int]]]]:
    """Columns, the kernel first; for each, by position of the kernel (None: no kernel was proposed), its last position or the choices."""
    columns = sorted(range(len(space.names)), key=lambda c: space.names[c] != KERNEL)
    kernels: dict[int | None, NDArray[np.bool_]] = {None: np.ones(len(space), dtype=bool)}
    found = []
    for column in columns:
        here, values = space.rows[:, column], space.values[column]
        applies = [kernel for kernel, rows in kernels.items() if (here[rows] != ABSENT).any()]
        partly = any((here[kernels[kernel]] == ABSENT).any() for kernel in applies)
        numeric = not partly and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        choice: int | list[int] = len(values) - 1 if numeric else list(range(ABSENT if partly else 0, len(values)))
        found.append((column, dict.fromkeys(applies, choice)))
        if space.names[column] == KERNEL:
            kernels = {int(k): here == k for k in np.unique(here)}
    return found
