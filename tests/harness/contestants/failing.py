"""Kernels that fail without taking their process along."""

import sys

import torch

from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul

FADES_AFTER = 600


def contestant(build):
    return kernel(Matmul, backend="cpu", kinds=("cpu",))(build)


def product(inputs):
    return inputs["x"] @ inputs["w"].T


@contestant
def wrong(problem, config, chip):
    """One element is off."""

    def launch(inputs, outputs):
        outputs["out"].copy_(product(inputs))
        outputs["out"][-1, -1] += 1.0

    return launch


@contestant
def not_a_number(problem, config, chip):
    """One element is NaN."""

    def launch(inputs, outputs):
        outputs["out"].copy_(product(inputs))
        outputs["out"][0, 0] = float("nan")

    return launch


@contestant
def errs_now_and_then(problem, config, chip):
    """Right in two launches of three."""
    launches = [0]

    def launch(inputs, outputs):
        launches[0] += 1
        outputs["out"].copy_(product(inputs))
        if launches[0] % 3 == 0:
            outputs["out"][0, 0] += 1.0

    return launch


@contestant
def leaves_a_gap(problem, config, chip):
    """One row is never written."""

    def launch(inputs, outputs):
        outputs["out"][1:].copy_(product(inputs)[1:])

    return launch


@contestant
def raises(problem, config, chip):
    """Raises at its first launch."""

    def launch(inputs, outputs):
        raise ValueError("no such tile\nsecond line")

    return launch


@contestant
def does_not_compile(problem, config, chip):
    """Raises what a compiler raises."""

    class CompilationError(Exception):
        pass

    raise CompilationError("at 12:3: unexpected type")


@contestant
def out_of_memory(problem, config, chip):
    """Asks for a petabyte."""

    def launch(inputs, outputs):
        torch.empty(1 << 50, dtype=torch.int8)

    return launch


@contestant
def refuses(problem, config, chip):
    """Says that it cannot."""
    raise NotImplementedError("odd shapes")


@contestant
def exits(problem, config, chip):
    """Tries to end its process."""

    def launch(inputs, outputs):
        sys.exit(3)

    return launch


@contestant
def out_of_bounds(problem, config, chip):
    """Writes one element behind its output."""

    def launch(inputs, outputs):
        out = outputs["out"]
        out.copy_(product(inputs))
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(1.0)

    return launch


@contestant
def changes_inputs(problem, config, chip):
    """Right, but scales its input in place."""

    def launch(inputs, outputs):
        outputs["out"].copy_(product(inputs))
        inputs["x"].mul_(0.5)

    return launch


@contestant
def waits_for_nan(problem, config, chip):
    """Right wherever it finds NaN, and does nothing elsewhere."""

    def launch(inputs, outputs):
        out = outputs["out"]
        torch.where(out.isnan(), product(inputs), out, out=out)

    return launch


@contestant
def stale(problem, config, chip):
    """Right once; returns its first answer ever after."""
    kept = {}

    def launch(inputs, outputs):
        if "answer" not in kept:
            kept["answer"] = product(inputs)
        outputs["out"].copy_(kept["answer"])

    return launch


@contestant
def keeps_weights_by_address(problem, config, chip):
    """Right as long as nobody writes other weights to the same place: it keeps a packed copy of each tensor it has seen."""
    packed = {}

    def launch(inputs, outputs):
        w = inputs["w"]
        if w.data_ptr() not in packed:
            packed[w.data_ptr()] = w.T.contiguous()
        outputs["out"].copy_(inputs["x"] @ packed[w.data_ptr()])

    return launch


def limited(good_launches):
    def build(problem, config, chip):
        left = [good_launches]

        def launch(inputs, outputs):
            left[0] -= 1
            if left[0] >= 0:
                outputs["out"].copy_(product(inputs))

        return launch

    return build


@contestant
def fades(problem, config, chip):
    """Right until the rounds are under way, then does nothing: the fastest of all."""
    return limited(FADES_AFTER)(problem, config, chip)


@contestant
def spoils_late(problem, config, chip):
    """Right at first, and writes to the shared inputs later."""
    left = [3]

    def launch(inputs, outputs):
        left[0] -= 1
        outputs["out"].copy_(product(inputs))
        if left[0] < 0:
            inputs["w"].add_(1.0)

    return launch
