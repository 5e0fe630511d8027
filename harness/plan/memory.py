"""Bytes that weights and cached keys and values take, and whether they fit."""

from __future__ import annotations

from klab.harness.catalog.architecture import Attention, LatentAttention, LinearAttention, Model, Note
from klab.harness.catalog.matrices import kv_shard, parameters
from klab.harness.plan.quantization import formats_of
from klab.harness.plan.scenario import Scenario
from klab.kernels.contract import Chip
from klab.kernels.dtypes import SIZE_BYTES

# Bytes of a weight with its share of the scales: one float32 per 128 x 128 elements or per row is below 0.1%, one per 128 of a row 3%.
FORMAT_BYTES = {"mxfp8": 1 + 1 / 32, "mxfp4": 0.5 + 1 / 32, "w4a16_mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16, "w4a16": 0.5 + 4 / 128}


def weight_bytes(model: Model, dtype: str, tp: int = 1, quantization: str = "") -> float:
    """Bytes of weights per GPU, as planned: with `quantization` the layers' matrices and the routed experts are in that format where their
    operator has it, the embedding and the head never.
    """
    size = float(SIZE_BYTES[dtype])
    narrow = FORMAT_BYTES.get(quantization, 1.0)
    counted = parameters(model, tp)
    tables = min(counted.total, model.vocab * model.stack.hidden * (1 if model.tied else 2) // tp)
    layers = narrow if quantization in formats_of("matmul") else size
    experts = narrow if quantization in formats_of("fused_moe") else size
    return (counted.total - tables - counted.routed) * layers + counted.routed * experts + tables * size


def kv_bytes_per_token(model: Model, dtype: str) -> float:
    """Bytes that one token adds to the cache of the whole model, all GPUs together, before any window drops some.

    Grouped attention 2 x kv_heads x head_dim per layer; latent attention kv_lora_rank + rope_dim (+ the indexer's key).
    """
    growing = ((group.count, m) for group in model.stack.groups for m in group.mixers if not (isinstance(m, Attention) and m.cross))
    return float(SIZE_BYTES[dtype]) * sum(count * _cached(mixer, 1) for count, mixer in growing)


def cache_bytes(model: Model, dtype: str, context: int, tp: int = 1) -> float:
    """Bytes per GPU that one sequence of `context` tokens keeps: windows and chunks cut it, states of linear attention do not grow."""
    size, total = SIZE_BYTES[dtype], 0.0
    for group in model.stack.groups:
        for mixer in group.mixers:
            if isinstance(mixer, LinearAttention):
                total += group.count * mixer.value_heads * mixer.key_dim * mixer.value_dim * SIZE_BYTES.get(mixer.state_dtype, 4) / tp
                continue
            limit = (mixer.window or mixer.chunk or context) if isinstance(mixer, Attention) else context
            source = (
                mixer.source_tokens or (model.encoder.tokens if model.encoder else 0) if isinstance(mixer, Attention) and mixer.cross else 0
            )
            total += group.count * _cached(mixer, tp) * (source or min(context, limit)) * size
    return total


def _cached(mixer: object, tp: int) -> int:
    """Elements that one token leaves in the cache of one GPU."""
    match mixer:
        case Attention() if mixer.causal or mixer.cross:
            return 2 * kv_shard(mixer.kv_heads, tp) * mixer.head_dim
        case LatentAttention():  # every GPU holds the latents whole
            return mixer.kv_lora_rank + mixer.rope_dim + (mixer.index_dim if mixer.index_topk else 0)
        case _:
            return 0


def memory_notes(model: Model, chip: Chip, scenario: Scenario, dtype: str) -> list[Note]:
    """Warnings when weights, or weights and cache, exceed the memory of a chip, or the prompt the model's context."""
    notes = []
    weights = weight_bytes(model, dtype, scenario.tp, scenario.quantization)
    free = chip.memory_bytes - weights
    if free < 0:
        words = f"{weights / 1e9:.0f} GB of weights per chip exceed its {chip.memory_bytes / 1e9:.0f} GB; a larger --tp divides them"
        notes.append(Note("memory", words, 1.0, "warning"))
    elif scenario.osl and scenario.batches:
        one = cache_bytes(model, scenario.kv_dtype or dtype, scenario.context, scenario.tp)
        too_many = [batch for batch in scenario.batches if batch * one > free]
        if too_many:
            words = f"a cache of {one / 1e9:.2f} GB per sequence does not fit beside the weights at batch {', '.join(map(str, too_many))}"
            notes.append(Note("memory", words, 1.0, "warning"))
    tokens = scenario.isl + scenario.osl
    if model.kind != "diffusion_transformer" and model.max_tokens and tokens > model.max_tokens:
        notes.append(Note("max_position_embeddings", f"isl + osl = {tokens} exceeds the model's {model.max_tokens} tokens", 1.0, "warning"))
    return notes
