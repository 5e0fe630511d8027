"""Is a launch right? Poisoned outputs, fresh inputs, guard bands, and a comparison with the problem's own reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klab.kernels.contract import Launch, Problem, Tensors

if TYPE_CHECKING:
    import torch

# Elements before and after each output that a launch must leave alone. 4096 B keeps the output 16-byte aligned for TMA and catches
# a store that runs one tile row over.
GUARD_BYTES = 4096
GUARD = -12288.0  # exact in every floating-point dtype down to bf16
# One element may be off by this many tolerances (relative to itself plus its row's rms). A wrong element in 16 million does not
# move the Frobenius norm, but it does move this.
ELEMENT_FACTOR = 16.0


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


def compare(problem: Problem, outputs: Tensors, reference: Tensors) -> Check:
    """||out - ref|| / ||ref|| per output against the problem's tolerance; NaN, infinity and single wild elements never pass."""
    worst, tolerance = 0.0, problem.tolerance()
    for name, expected in reference.items():
        want = expected.double()
        got = outputs[name].to(want.device).double()
        if got.shape != want.shape:
            return Check(float("inf"), tolerance, f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        bad = int((~got.isfinite() & want.isfinite()).sum())
        if bad:
            return Check(float("inf"), tolerance, f"{bad} of {got.numel()} elements of {name} are not finite (unwritten or overflowed)")
        difference = (got - want).abs()
        norm = float(want.norm())
        error = float(difference.norm()) / norm if norm else float(difference.norm())
        worst = max(worst, error)
        if not error <= tolerance:
            return Check(error, tolerance, f"{name} is off by {error:.2e}, tolerance {tolerance:.2e}")
        scale = want.abs() + want.square().mean(dim=-1, keepdim=True).sqrt()
        excess = float((difference - ELEMENT_FACTOR * tolerance * scale).max())
        # The last term forgives rows that are exactly zero in the reference.
        if excess > tolerance * 1e-3:
            count = int((difference > ELEMENT_FACTOR * tolerance * scale + tolerance * 1e-3).sum())
            return Check(error, tolerance, f"{count} elements of {name} are off by more than {ELEMENT_FACTOR:.0f} tolerances")
    return Check(worst, tolerance, "")


def poison(outputs: Tensors) -> None:
    """Fill with NaN (integers: the smallest value), so that an element nobody writes cannot pass."""
    import torch

    for tensor in outputs.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def guarded_outputs(problem: Problem, device: str) -> tuple[Tensors, Callable[[], str]]:
    """Outputs inside guard bands, and a function that names the output whose band was written to (or returns "")."""
    import torch

    outputs: Tensors = {}
    bands: dict[str, list[torch.Tensor]] = {}
    for name, plain in problem.outputs(device=device).items():
        guard = GUARD_BYTES // plain.element_size()
        buffer = torch.empty(plain.numel() + 2 * guard, dtype=plain.dtype, device=device)
        value = GUARD if plain.is_floating_point() else 77
        bands[name] = [buffer[:guard].fill_(value), buffer[plain.numel() + guard :].fill_(value)]
        outputs[name] = buffer[guard : guard + plain.numel()].view(plain.shape)

    def trespass() -> str:
        for name, pair in bands.items():
            if any(bool((band != (GUARD if band.is_floating_point() else 77)).any()) for band in pair):
                return f"wrote outside {name}"
        return ""

    return outputs, trespass


def fingerprint(inputs: Tensors) -> dict[str, int]:
    """A sum over the bit patterns of each input: a launch that changes its inputs is wrong."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: int(t.contiguous().view(whole[t.element_size()]).sum(dtype=torch.int64)) for name, t in inputs.items()}


def attempt(problem: Problem, launch: Launch, inputs: Tensors, *, device: str) -> tuple[Tensors, str]:
    """Launch once into poisoned outputs between guard bands: (what it wrote, what it did wrong or "").

    Wrong is to write outside its outputs or to change its inputs. Whatever the launch raises passes through.
    """
    before = fingerprint(inputs)
    outputs, trespass = guarded_outputs(problem, device)
    poison(outputs)
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
