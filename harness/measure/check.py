"""Is a launch right? Poisoned outputs, fresh inputs, guard bands, and a comparison with the problem's own reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klab.kernels.contract import Launch, Problem, Tensors

if TYPE_CHECKING:
    import torch

# Elements before and after each output that a launch must leave alone. 4096 B keeps the output 16-byte aligned for TMA and catches
# a store that runs one tile row over.
GUARD_BYTES = 4096
GUARD = 0xC6  # every byte of a band: -25000 and the like in 16 and 32 bits, -14 in fp8, no value that a kernel writes by chance
# Large beside any right element, and finite in float16.
FINITE_POISON = (8192.0, 32768.0)
# One element may be off by this many tolerances (relative to itself plus its row's rms). A wrong element in 16 million does not
# move the Frobenius norm, but it does move this.
ELEMENT_FACTOR = 16.0
FEW_COLUMNS = 8


@dataclass(frozen=True)
class Check:
    """What a check found. `error` is the worst relative Frobenius error over the outputs; `reason` is empty when it passed."""

    error: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        """True when every output is right."""
        return not self.reason


def exact_sums() -> None:
    """No TF32 and no partial sums in the output's dtype: switches of the whole process, which a kernel's file may have thrown.

    The reference must not use them, and a library's time and error must not depend on who was measured before it.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def compare(problem: Problem, outputs: Tensors, reference: Tensors) -> Check:
    """||out - ref|| / ||ref|| per output against the problem's tolerance; NaN, infinity and single wild elements never pass.

    Computed in the reference's own precision (float32 or float64), norms summed in float64.
    """
    import torch

    worst, tolerance = 0.0, problem.tolerance()
    for name, output in outputs.items():
        expected, limit = reference[name], problem.tolerance_of(name)
        if output.shape != expected.shape:
            return Check(float("inf"), limit, f"{name} has shape {tuple(output.shape)}, not {tuple(expected.shape)}")
        if not output.is_floating_point():
            wrong = problem.mismatch(name, output.to(expected.device), reference)
            if wrong:
                return Check(float("inf"), limit, wrong)
            continue
        want = expected if expected.dtype in (torch.float32, torch.float64) else expected.double()
        got = output.to(want.device).to(want.dtype)
        hidden = None
        if _has_hidden(want):
            hidden = want.isneginf()
            # Hidden positions of scores are -inf by definition: they must be just that, and no norm counts them.
            wrong_places = int((got != want)[hidden].sum())
            if wrong_places:
                return Check(float("inf"), limit, f"{wrong_places} elements of {name} are not -inf")
            got, want = got.masked_fill(hidden, 0.0), want.masked_fill(hidden, 0.0)
        difference = got - want
        deviation = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        # A norm is finite only if every element is, which saves counting them where all is well.
        bad = None if math.isfinite(deviation) else ~got.isfinite() & want.isfinite()
        if bad is not None and bool(bad.any()):
            told = f"{int(bad.sum())} of {got.numel()} elements of {name} are not finite (unwritten or overflowed)"
            return Check(float("inf"), limit, told + _place(bad, got, want))
        norm = float(torch.linalg.vector_norm(want, dtype=torch.float64))
        error = deviation / norm if norm else deviation
        if error / limit >= worst / tolerance:  # the output that is nearest to its own limit stands for the launch
            worst, tolerance = error, limit
        difference.abs_()
        if not error <= limit:
            beyond = _wild_elements(difference, want, limit, slack=limit * 1e-3, hidden=hidden)
            return Check(error, limit, f"{name} is off by {error:.2e}, tolerance {limit:.2e}" + _place(beyond, got, want))
        wild = _wild_elements(difference, want, ELEMENT_FACTOR * limit, slack=limit * 1e-3, hidden=hidden)
        if wild is not None:
            told = f"{int(wild.sum())} elements of {name} are off by more than {ELEMENT_FACTOR:.0f} tolerances"
            return Check(error, limit, told + _place(wild, got, want))
    return Check(worst, tolerance, "")


def distance(outputs: Tensors, wide: Tensors) -> float:
    """||out - wide|| / ||wide||, the worst of the floating-point outputs; infinite where one is not finite."""
    import torch

    worst = 0.0
    for name, output in outputs.items():
        if output.is_floating_point() and name in wide:
            want = wide[name].double()
            hidden = want.isneginf()  # hidden positions of scores, which `compare` judges
            difference = (output.to(want.device).double() - want).masked_fill_(hidden, 0.0)
            norm = torch.linalg.vector_norm(want.masked_fill(hidden, 0.0)).clamp_min(1e-300)
            error = float(torch.linalg.vector_norm(difference) / norm)
            worst = max(worst, error if math.isfinite(error) else float("inf"))
    return worst


def _has_hidden(want: torch.Tensor) -> bool:
    """Whether a reference has elements of -inf; one sum tells, where there are none."""
    return not math.isfinite(float(want.sum())) and bool(want.isneginf().any())


def _wild_elements(
    difference: torch.Tensor, want: torch.Tensor, factor: float, *, slack: float, hidden: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Which elements differ by more than `factor` times (their size plus the rms of what their row shows, where zeros stand for what
    is `hidden`); None where none does. `slack` forgives rows that are all zero."""
    import torch

    if not difference.numel():
        return None
    shown = torch.ones_like(want[..., :1]) * want.shape[-1] if hidden is None else (~hidden).sum(dim=-1, keepdim=True)
    rms = (want.square().sum(dim=-1, keepdim=True) / shown.clamp_min(1)).sqrt()
    few = shown < FEW_COLUMNS
    if bool(few.any()):  # a row of one cancelling sum has no size of its own
        overall = (want.square().sum() / shown.sum().clamp_min(1)).sqrt()
        rms = torch.where(few, rms.clamp_min(float(overall)), rms)
    # Nothing to look at one by one where the largest difference is small for the smallest row.
    if float(difference.max()) <= factor * float(rms.min()):
        return None
    wild = difference > factor * (want.abs() + rms) + slack
    return wild if bool(wild.any()) else None


def _place(wrong: torch.Tensor | None, got: torch.Tensor, want: torch.Tensor) -> str:
    """Where an output is wrong: the box that holds all such elements, and the worst of them. Often the only trace of a defect that shows on
    another machine: one tile, the last rows, every second column.
    """
    import torch

    if wrong is None or not wrong.ndim:
        return ""
    box, every = [], range(wrong.ndim)
    for axis in every:
        others = [other for other in every if other != axis]
        here = (wrong.any(dim=others) if others else wrong).nonzero().flatten()
        box.append(f"{int(here[0])}:{int(here[-1]) + 1}")
    off = (got - want).abs().nan_to_num(nan=float("inf")).masked_fill(~wrong, -1.0)
    at = [int(index) for index in torch.unravel_index(off.argmax(), off.shape)]
    told = f"{int(wrong.sum())} in [{', '.join(box)}] of {list(wrong.shape)}"
    return f"; {told}, the worst at {at}: {got[tuple(at)]:.4g}, not {want[tuple(at)]:.4g}"


def poison(outputs: Tensors, *, finite: bool = False) -> None:
    """Fill with NaN (integers: the smallest value), so that an element nobody writes cannot pass.

    `finite` fills with a large number instead, another at each call: a launch that is right only where it finds NaN is wrong.
    """
    import torch

    large = random.SystemRandom().uniform(*FINITE_POISON)
    for tensor in outputs.values():
        if tensor.is_floating_point():
            # In fp8 the largest number is 448.
            tensor.fill_(min(large, torch.finfo(tensor.dtype).max) if finite else float("nan"))
        else:
            limits = torch.iinfo(tensor.dtype)
            tensor.fill_(limits.max if finite else limits.min)


def guarded_outputs(problem: Problem, device: str) -> tuple[Tensors, Callable[[], str]]:
    """Outputs inside guard bands, and a function that names the output whose band was written to (or returns "")."""
    import torch

    outputs: Tensors = {}
    bands: dict[str, list[torch.Tensor]] = {}
    for name, plain in problem.outputs(device=device).items():
        size = plain.numel() * plain.element_size()
        # In bytes, because fp8 and integers have no value in common with the wider formats.
        buffer = torch.empty(size + 2 * GUARD_BYTES, dtype=torch.uint8, device=device)
        bands[name] = [buffer[:GUARD_BYTES].fill_(GUARD), buffer[GUARD_BYTES + size :].fill_(GUARD)]
        outputs[name] = buffer[GUARD_BYTES : GUARD_BYTES + size].view(plain.dtype).view(plain.shape)

    def trespass() -> str:
        for name, pair in bands.items():
            if any(bool((band != GUARD).any()) for band in pair):
                return f"wrote outside {name}"
        return ""

    return outputs, trespass


def fingerprint(inputs: Tensors) -> dict[str, int]:
    """A sum over the bits of each input, in words of 8 bytes (16 ms for 60 MB; in words of 2 bytes it took 750): a launch that changes
    its inputs is wrong.
    """
    return {name: _sum_of_bits(tensor) for name, tensor in inputs.items()}


def _sum_of_bits(tensor: torch.Tensor) -> int:
    import torch

    raw = tensor.contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def attempt(problem: Problem, launch: Launch, inputs: Tensors, *, device: str, finite: bool = False) -> tuple[Tensors, str]:
    """Launch once into poisoned outputs (see `poison`) between guard bands: (what it wrote, what it did wrong or "").

    Wrong is to write outside its outputs or to change its inputs. Whatever the launch raises passes through.
    """
    before = fingerprint(inputs)
    outputs, trespass = guarded_outputs(problem, device)
    poison(outputs, finite=finite)
    launch(inputs, outputs)
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    wrote_outside = trespass()
    if wrote_outside:
        return outputs, wrote_outside
    changed = [name for name, value in fingerprint(inputs).items() if value != before[name]]
    return outputs, f"changed its input {', '.join(changed)}" if changed else ""


def check(problem: Problem, launch: Launch, *, seed: int, device: str = "cpu", row_padding: int = 0, reference_device: str = "") -> Check:
    """Run `launch` once on fresh inputs of this seed and judge what it wrote.

    The reference is computed on `reference_device` (default: the device of the inputs). Whatever the launch raises passes through.
    """
    inputs = problem.inputs(seed=seed, device=device, row_padding=row_padding)
    outputs, wrong = attempt(problem, launch, inputs, device=device)
    if wrong:
        return Check(float("inf"), problem.tolerance(), wrong)
    at = reference_device or device
    reference = problem.reference({name: tensor.to(at) for name, tensor in inputs.items()})
    return compare(problem, outputs, reference)
