"""Single pass: models that generate no text token by token: pictures, embeddings, and speech by the hour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from klab.harness.catalog.architecture import Model
from klab.harness.cost.estimate import Labelled, Origin
from klab.harness.cost.mix import Mix, energy, idle_joules, inverse, shares
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import LEAST_UTILISATION, Deployment
from klab.harness.plan.scenario import WHISPER_PROMPT
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError

# The model cards of Flux.1-dev and Wan 2.1 both draw in 50 steps.
DENOISE_STEPS = 50
# Whisper hears 30 seconds at a time (its paper, section 2.2).
WINDOW_S = 30.0
# Text tokens of a window: 150 spoken words a minute at 1.3 tokens per word; a guess that a transcript replaces.
WINDOW_TOKENS = 98
# Activations alive at once, in tensors of tokens x hidden: a guess (a feed-forward of four times the width and its gate, queries, keys,
# values, residuals).
LIVE_TENSORS = 20
MOST_BATCH = 256


@dataclass(frozen=True)
class Task:
    """What is asked of a model in one go. Fields that a model has no use for are ignored; None or 0: the model's own.

    `tokens`: latent tokens of a picture, or the text tokens of an encoder's request. `denoise_steps` per picture; `guidance`: every step
    is computed with and without the prompt (classifier-free guidance; None: unless the model was distilled to do without).
    `window_tokens`: text tokens per 30 seconds of speech, or generated per request. `utilisation`, `slo_s`: as in Workload.
    """

    tokens: int = 0
    denoise_steps: int = DENOISE_STEPS
    guidance: bool | None = None
    window_tokens: int = WINDOW_TOKENS
    utilisation: float = 1.0
    slo_s: float | None = None

    def __post_init__(self) -> None:
        """UsageError for what nobody can ask."""
        checks = (
            (self.tokens >= 0, f"--tokens is at least 1 (or 0: the model's usual number), not {self.tokens}"),
            (self.denoise_steps >= 1, f"--steps is at least 1, not {self.denoise_steps}"),
            (self.window_tokens >= 0, f"--window-tokens is at least 0, not {self.window_tokens}"),
            (
                LEAST_UTILISATION <= self.utilisation <= 1,
                f"--utilisation is a share above 0 and at most 1 (from {LEAST_UTILISATION:g} on), not {self.utilisation:g}",
            ),
            (self.slo_s is None or 0 < self.slo_s < math.inf, f"--slo is a positive time, not {self.slo_s}"),
        )
        for good, words in checks:
            if not good:
                raise UsageError(words)


@dataclass(frozen=True)
class PassPoint(Labelled):
    """A replica that works on `batch` of a `unit` at once: "image", "video", "audio hour" (its windows), or "request".

    `latency_s`: from the start of a batch to its end (of an audio hour: of one batch of windows). `units_per_s` at full load.
    `joules_per_unit`: boards of all GPUs, with what they draw while they wait where `utilisation` is below 1. `limit`: what stops a larger
    batch ("memory", "slo" or ""). `notes`: what the figures leave out or guess.
    """

    deployment: Deployment
    task: Task
    unit: str
    batch: int
    latency_s: Range
    units_per_s: Range
    joules_per_unit: Range
    time_shares: Mapping[Origin, float]
    energy_shares: Mapping[Origin, float]
    limit: str = ""
    notes: tuple[str, ...] = ()
    mix: Mix = field(default=(), compare=False, repr=False)

    @property
    def units_per_gpu_hour(self) -> Range:
        """At full load."""
        return self.units_per_s * (3600 / self.deployment.tp)

    @property
    def meets(self) -> bool:
        """Whether a batch ends within the task's time."""
        return self.task.slo_s is None or self.latency_s.mid <= self.task.slo_s


def serves(model: Model) -> bool:
    """Whether a model's work is counted here, and not in requests of generated tokens (serving.py)."""
    return model.kind != "llm"


def pass_points(steps: Steps, task: Task) -> list[PassPoint]:
    """Batches of 1, 2, 4, ... up to what fits; empty when not even one does. UsageError for a language model."""
    d = steps.deployment
    if not serves(d.model):
        raise UsageError(f"{d.model.name} generates text: its cost is by request")
    most = _most(steps, task)
    batches = [2**k for k in range(MOST_BATCH.bit_length()) if 2**k <= most]
    found = [_point(steps, task, batch) for batch in batches]
    return [_limited(point, found[i + 1] if i + 1 < len(found) else None) for i, point in enumerate(found)]


def _limited(point: PassPoint, after: PassPoint | None) -> PassPoint:
    if not point.meets or (after is not None and not after.meets):
        return replace(point, limit="slo")
    return replace(point, limit="memory") if after is None and point.batch < MOST_BATCH else point


def _point(steps: Steps, task: Task, batch: int) -> PassPoint:
    unit, per_unit, mix, notes = _work(steps, task, batch)
    tp = steps.deployment.tp
    latency_s = sum((step.us * (count * 1e-6) for count, step in mix), ZERO)
    unit_s = latency_s * (per_unit / batch)
    mix = tuple((count * per_unit / batch, step) for count, step in mix)
    idle = idle_joules(steps, unit_s * (1 / task.utilisation - 1))
    return PassPoint(
        steps.deployment,
        task,
        unit,
        batch,
        latency_s,
        inverse(unit_s),
        energy(mix) * tp + idle,
        shares(mix, energy=False),
        shares(mix, energy=True, modelled=idle.mid / tp),
        notes=notes,
        mix=mix,
    )


def _work(steps: Steps, task: Task, batch: int) -> tuple[str, float, Mix, tuple[str, ...]]:
    """(unit, passes of one in a batch per unit, the steps of a batch, what is left out)."""
    model = steps.deployment.model
    tokens = _tokens(model, task)
    if model.kind == "diffusion_transformer":
        rows = batch * (2 if _guided(model, task) else 1)
        step = steps.of("denoise", rows * tokens, isl=tokens, prefill_batch=rows, osl=0, batches=())
        said = f"{task.denoise_steps} steps of {tokens} latent tokens, {'with' if rows > batch else 'without'} classifier-free guidance"
        left_out = "the text encoder and the autoencoder are not counted"
        return _picture(model), 1.0, ((float(task.denoise_steps), step),), (said, left_out)
    if model.kind == "encoder":
        step = steps.of("prefill", batch * tokens, isl=tokens, prefill_batch=batch, osl=0, batches=())
        return "request", 1.0, ((1.0, step),), (f"requests of {tokens} tokens",)
    heard = model.encoder is not None and model.encoder.tokens > 0
    first = steps.of("prefill", batch * tokens, isl=tokens, prefill_batch=batch, osl=0, batches=())
    mix: Mix = ((1.0, first),)
    if task.window_tokens > 1:
        # The decode step of a scenario is half way through its osl.
        step = steps.of("decode", batch, isl=tokens, prefill_batch=1, osl=task.window_tokens, batches=(batch,))
        mix += ((float(task.window_tokens - 1), step),)
    if heard:
        said = f"windows of {WINDOW_S:g} s without overlap, {task.window_tokens} text tokens each, greedy"
        return "audio hour", 3600 / WINDOW_S, mix, (said, "all windows of a batch end together")
    return "request", 1.0, mix, (f"requests of {tokens} tokens, {task.window_tokens} generated", "all requests of a batch end together")


def _picture(model: Model) -> str:
    return "video" if "wan" in model.model_type.lower() else "image"


def _guided(model: Model, task: Task) -> bool:
    return not model.config.get("guidance_embeds", False) if task.guidance is None else task.guidance


def _tokens(model: Model, task: Task) -> int:
    if model.encoder is not None and model.encoder.tokens:
        return WHISPER_PROMPT
    return task.tokens or model.default_tokens or min(512, model.max_tokens or 512)


def _most(steps: Steps, task: Task) -> int:
    """How many of a batch fit beside the weights: their caches and a guess at what is alive at once."""
    d, model = steps.deployment, steps.deployment.model
    free = d.chip.memory_bytes * d.memory_share - steps.weight_bytes
    tokens = max(_tokens(model, task) + model.text_tokens, model.encoder.tokens if model.encoder else 0)
    alive = (
        LIVE_TENSORS * tokens * model.stack.hidden * SIZE_BYTES[steps.dtype] * (2 if _guided(model, task) and model.default_tokens else 1)
    )
    one = alive + (steps.cache_bytes(_tokens(model, task) + task.window_tokens) if model.encoder else 0.0)
    return max(0, min(MOST_BATCH, int(free // one)))
