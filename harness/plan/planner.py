"""Model x Chip x Scenario -> Plan."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import replace

from klab.harness.catalog.architecture import (
    Attention,
    JointAttention,
    LatentAttention,
    LayerGroup,
    LinearAttention,
    Mixer,
    Model,
    Note,
    ParallelBlock,
    Stack,
    UnknownMixer,
)
from klab.harness.plan.attention import attention_rows, latent_rows, linear_attention_rows
from klab.harness.plan.blocks import joint_rows, parallel_rows
from klab.harness.plan.feed_forward import feed_forward_rows
from klab.harness.plan.memory import kv_bytes_per_token, memory_notes, weight_bytes
from klab.harness.plan.precision import planned_dtype
from klab.harness.plan.quantization import check_format, left_wide, quantised
from klab.harness.plan.roofline import Roofline
from klab.harness.plan.rows import Plan, Row
from klab.harness.plan.scenario import Scenario, scenario_for
from klab.harness.plan.step import Draft, Step, drafted, modelled
from klab.kernels.contract import Chip
from klab.kernels.conv1d.problem import Conv1d
from klab.kernels.embedding.problem import Embedding
from klab.kernels.errors import UsageError
from klab.kernels.sampling.problem import Sampling

# Engines pad the vocabulary so that every GPU's part is a multiple of this.
VOCABULARY_MULTIPLE = 64
# What model cards recommend most often (Qwen3: 20 and 0.95, Llama 3: none and 0.9, gpt-oss: none): both filters are exercised.
SAMPLED_TOP_K, SAMPLED_TOP_P = 50, 0.95


def plan(model: Model, chip: Chip, scenario: Scenario | None = None) -> Plan:
    """The problems of a model on one chip of its tensor-parallel group: a prefill (or denoising) step, then a decode step per batch size.

    Without a scenario, the default of this kind of chip. Shapes are those a serving engine launches: fused qkv and gate-up, heads and
    intermediate sizes divided by tensor parallelism, the last token alone through the output head in prefill, a decode step at context
    isl + osl/2. UsageError when tensor parallelism does not divide the model, or the chip lacks a peak or a link.
    """
    scenario = scenario or scenario_for(model, chip)
    _check(chip, scenario)
    dtype, notes = planned_dtype(model, chip, scenario.dtype, scenario.quantization)
    roofline = Roofline(chip, dtype)
    rows: list[Row] = []
    for step, layers in _steps(model, scenario, dtype):
        narrow = [(count, [quantised(draft, scenario.quantization) for draft in drafts]) for count, drafts in layers]
        rows += _merged(step, narrow, roofline)
        notes += [
            note for note in left_wide(itertools.chain(*(drafts for _, drafts in narrow)), scenario.quantization) if note not in notes
        ]
    return Plan(
        model=model,
        chip=chip,
        scenario=scenario,
        dtype=dtype,
        rows=tuple(rows),
        notes=(*model.notes, *notes, *_cache_notes(model, scenario), *memory_notes(model, chip, scenario, dtype)),
        weight_bytes=weight_bytes(model, dtype, scenario.tp, scenario.quantization),
        kv_bytes_per_token=kv_bytes_per_token(model, scenario.kv_dtype or dtype),
    )


def step_rows(model: Model, chip: Chip, scenario: Scenario, phase: str) -> list[Row]:
    """The rows of one phase of a plan, for who asks for hundreds of steps. UsageError as for `plan`."""
    _check(chip, scenario)
    dtype, _ = planned_dtype(model, chip, scenario.dtype, scenario.quantization)
    roofline = Roofline(chip, dtype)
    rows: list[Row] = []
    for step, layers in _steps(model, scenario, dtype, phase):
        narrow = [(count, [quantised(draft, scenario.quantization) for draft in drafts]) for count, drafts in layers]
        rows += _merged(step, narrow, roofline)
    return rows


def _check(chip: Chip, scenario: Scenario) -> None:
    """UsageError for what no plan can be made of."""
    if scenario.tp > 1 and chip.link_gb_per_s is None:
        raise UsageError(f"chip {chip.name} has no link to another one (link_gb_per_s): plan it with --tp 1")
    check_format(scenario.quantization)


def _cache_notes(model: Model, scenario: Scenario) -> list[Note]:
    """What a narrower cache does not reach."""
    mixers = [mixer for group in model.stack.groups for mixer in group.mixers]
    if scenario.kv_dtype and any(isinstance(mixer, LatentAttention) and mixer.index_topk for mixer in mixers):
        return [Note("kv_dtype", "sparse latent attention is planned on a cache of 16 bits, whatever kv_dtype says", 1.0, "warning")]
    return []


def step_of(model: Model, chip: Chip, scenario: Scenario, phase: str) -> Step:
    """The prefill or the (first) decode step of a plan. UsageError for a phase that the model has not."""
    dtype, _ = planned_dtype(model, chip, scenario.dtype, scenario.quantization)
    for step, _layers in _steps(model, scenario, dtype, phase):
        return replace(step, norm=model.stack.norm)
    raise UsageError(f"{model.name} has no {phase} step in this scenario")


Layers = tuple[int, list[Draft]]
"""How many layers are alike, and the drafts of one of them."""


def _steps(model: Model, s: Scenario, dtype: str, phase: str = "") -> Iterator[tuple[Step, list[Layers]]]:
    """The steps of a phase (default: of all), each drafted when it is asked for."""
    common = {"dtype": dtype, "tp": s.tp, "expert_parallel": s.expert_parallel, "page_size": s.page_size}
    common |= {"kv_dtype": s.kv_dtype, "shared_prefix": s.shared_prefix}
    if model.kind == "diffusion_transformer":
        step = Step("denoise", s.prefill_batch, s.isl, 0, text=model.text_tokens, **common)  # type: ignore[arg-type]
        if phase in ("", "denoise"):
            yield step, _stack(model.stack, step)
        return
    encoded: list[Layers] = []
    if model.encoder is None:
        prefill = Step("prefill", s.prefill_batch, s.isl - s.prefix_len, s.prefix_len, **common)  # type: ignore[arg-type]
        source, context = 0, s.context
    else:
        # Whisper's encoder has a length of its own and isl is the decoder's prompt; otherwise the encoder reads isl tokens.
        source = model.encoder.tokens or s.isl
        prompt = s.isl if model.encoder.tokens else 1
        context = max(prompt + s.osl // 2, s.q_len)
        prefill = Step("prefill", s.prefill_batch, prompt, 0, source=source, **common)  # type: ignore[arg-type]
        encoder_step = Step("prefill", s.prefill_batch, source, 0, **common)  # type: ignore[arg-type]
        if phase in ("", "prefill"):
            encoded = _named("encoder_", _stack(model.encoder, encoder_step))
    if phase in ("", "prefill"):
        yield prefill, [*encoded, *_stack(model.stack, prefill), *_ends(model, prefill, s.prefill_batch)]
    for batch in s.batches if s.osl and phase in ("", "decode") else ():
        step = Step("decode", batch, s.q_len, context - s.q_len, source=source, **common)  # type: ignore[arg-type]
        yield step, [*_stack(model.stack, step), *_ends(model, step, step.tokens)]


def _named(prefix: str, layers: list[Layers]) -> list[Layers]:
    return [(count, [replace(d, role=prefix + d.role) for d in drafts]) for count, drafts in layers]


def _stack(stack: Stack, step: Step) -> list[Layers]:
    """The layers of a stack and what surrounds them."""
    step = replace(step, norm=stack.norm)
    once = []
    for p in stack.projections:
        if p.operator == "conv1d":
            # Both convolutions of a Whisper encoder read 2 frames per token; the one that reads "frames" keeps them, the other halves.
            frames, stride = 2 * step.new, 1 if p.stream == "frames" else 2
            draft = drafted(p.role, Conv1d(step.batch, frames, p.k // 3, p.n, stride=stride, dtype=step.dtype))
        else:
            draft = step.linear(p.role, step.rows_of(p.stream), p.n, p.k)
        once += [draft] * p.count
    return [(1, once), *((group.count, _group(group, stack.hidden, step)) for group in stack.groups)]


def _group(group: LayerGroup, hidden: int, step: Step) -> list[Draft]:
    drafts: list[Draft] = []
    for mixer in group.mixers:
        drafts += _mixer(mixer, hidden, step)
    return drafts + feed_forward_rows(group.mlp, hidden, step)


def _mixer(mixer: Mixer, hidden: int, step: Step) -> list[Draft]:
    match mixer:
        case Attention():
            if mixer.cross and mixer.source_tokens:
                step = replace(step, source=mixer.source_tokens)
            return attention_rows(mixer, hidden, step)
        case LatentAttention():
            return latent_rows(mixer, hidden, step)
        case LinearAttention():
            return linear_attention_rows(mixer, hidden, step)
        case JointAttention():
            return joint_rows(mixer, hidden, step)
        case ParallelBlock():
            return parallel_rows(mixer, hidden, step)
        case UnknownMixer():
            return []


def _ends(model: Model, step: Step, sampled: int) -> list[Layers]:
    """Embedding before the layers; norm, output head and sampling behind them, for the `sampled` last tokens."""
    hidden = model.stack.hidden
    step = replace(step, norm=model.stack.norm)
    multiple = VOCABULARY_MULTIPLE * step.tp
    vocabulary = -(-model.vocab // multiple) * multiple
    table = Embedding(step.tokens, vocabulary // step.tp, hidden, step.dtype)
    drafts = [drafted("embedding", table), *step.all_reduce(step.tokens, hidden)]
    if model.kind == "encoder":
        return [(1, drafts)]
    drafts.append(step.normed("final_norm", sampled, hidden, residual=True))
    drafts.append(step.linear("lm_head", sampled, vocabulary // step.tp, hidden))
    if step.tp > 1:
        sent = (step.tp - 1) / step.tp * sampled * vocabulary * step.size
        shape = {"rows": sampled, "width": vocabulary, "gpus": step.tp}
        moved = float(sampled * vocabulary * step.size)
        drafts.append(Draft("logits_gather", "all_gather", shape, 0.0, moved, sent, why=modelled("all_gather")))
    drafts.append(drafted("sampling", Sampling(sampled, vocabulary, top_k=SAMPLED_TOP_K, top_p=SAMPLED_TOP_P, dtype=step.dtype)))
    return [(1, drafts)]


def _merged(step: Step, layers: list[Layers], roofline: Roofline) -> list[Row]:
    """Equal launches become one row: counts add, roles are joined."""
    found: dict[Hashable, tuple[Draft, dict[str, None], int, int]] = {}
    for count, drafts in layers:
        counted = set()
        for draft in drafts:
            identity = draft.identity
            first, roles, launches, in_layers = found.get(identity, (draft, {}, 0, 0))
            roles[draft.role] = None
            in_layers += 0 if identity in counted else count
            counted.add(identity)
            found[identity] = (first, roles, launches + count, in_layers)
    return [
        Row(
            step.phase,
            step.batch,
            " + ".join(roles),
            draft.operator,
            draft.shape,
            launches,
            in_layers,
            draft.flops,
            draft.bytes_moved,
            draft.link_bytes,
            *(roofline.of(draft.problem.math_dtype) if draft.problem else roofline).bound(draft.flops, draft.bytes_moved, draft.link_bytes),
            draft.problem,
            draft.why,
        )
        for draft, roles, launches, in_layers in found.values()
    ]
