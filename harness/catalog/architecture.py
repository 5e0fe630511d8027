"""The neutral nouns of a model's architecture: what is computed, whatever the configuration file called it.

All sizes are of the whole model; the plan divides them by tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attention:
    """Softmax attention with grouped key/value heads.

    `window` > 0: a query sees the last `window` tokens; `chunk` > 0: it sees the tokens of its own chunk (Llama 4). `output_gate`
    doubles the query projection (Qwen3-Next). With `cross`, keys and values come from `source_tokens` tokens of another stream
    (0: as many as the encoder has). `rotary_dim` of each head are turned (0: all). `sinks`: a learned logit per head takes part in the
    softmax (gpt-oss). `softcap` > 0: logits pass through softcap * tanh(logits / softcap) (Gemma 2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    chunk: int = 0
    causal: bool = True
    rotary: bool = True
    output_gate: bool = False
    qk_norm: bool = False
    cross: bool = False
    source_tokens: int = 0
    rotary_dim: int = 0
    sinks: bool = False
    softcap: float = 0.0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): keys and values are compressed to `kv_lora_rank` + `rope_dim` numbers per token.

    `q_lora_rank` 0: the query is projected directly. `index_topk` > 0: an indexer picks that many keys per query (DeepSeek-V3.2).
    """

    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0

    @property
    def qk_dim(self) -> int:
        """Head dimension of queries and keys in prefill."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class LinearAttention:
    """Gated delta net: a state of `key_dim` x `value_dim` per value head instead of a cache (Qwen3-Next, Qwen3.5)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4
    state_dtype: str = "float32"


@dataclass(frozen=True)
class UnknownMixer:
    """A layer type that klab does not understand: it is counted, never planned."""

    layer_type: str


@dataclass(frozen=True)
class JointAttention:
    """A double block of an MMDiT (Flux): image and text tokens have their own projections and (plain) MLPs, and attend together."""

    heads: int
    head_dim: int
    intermediate: int


@dataclass(frozen=True)
class ParallelBlock:
    """A single block of an MMDiT (Flux): attention and MLP side by side on image and text tokens, one output projection."""

    heads: int
    head_dim: int
    intermediate: int


Mixer = Attention | LatentAttention | LinearAttention | UnknownMixer | JointAttention | ParallelBlock


@dataclass(frozen=True)
class Mlp:
    """A dense feed-forward layer; `gated` has two matrices going up (SwiGLU, GeGLU). `activation` as in kernels/activation."""

    intermediate: int
    gated: bool = True
    activation: str = "silu"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: `top_k` of `experts` per token, and shared experts of `shared_intermediate` in total that see every token.

    The router's logits become `scoring` ("softmax" or "sigmoid") scores; with `groups` > 1 only the best `topk_groups` groups of experts
    are chosen from (DeepSeek V3); `renormalize`: the chosen scores are divided by their sum.
    """

    experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int = 0
    shared_gate: bool = False
    gated: bool = True
    activation: str = "silu"
    scoring: str = "softmax"
    groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True


@dataclass(frozen=True)
class LayerGroup:
    """`count` layers that are alike: their mixers in order (a decoder with cross-attention has two), then the feed-forward part."""

    count: int
    mixers: tuple[Mixer, ...]
    mlp: Mlp | Experts | None


@dataclass(frozen=True)
class Projection:
    """A matrix [n, k] that is applied outside the layers, `count` times a step, to the tokens of `stream`.

    Streams: "tokens" (what flows through the stack), "text" (a diffusion model's prompt), "samples" (one row per sample), "frames"
    (an encoder's input before it is halved). `operator` names what it is when it is no plain matmul ("conv1d").
    """

    role: str
    n: int
    k: int
    stream: str = "tokens"
    count: int = 1
    operator: str = "matmul"


@dataclass(frozen=True)
class Stack:
    """Layers that one stream of tokens flows through. `tokens` > 0 fixes their number (a Whisper encoder's 1500 frames).

    `norm` is "rms" or "layer".
    """

    name: str
    hidden: int
    groups: tuple[LayerGroup, ...]
    tokens: int = 0
    projections: tuple[Projection, ...] = ()
    norm: str = "rms"

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(group.count for group in self.groups)


@dataclass(frozen=True)
class Note:
    """Something a reader must know of a model: a field, what was made of it, and the share of the model's flops that is covered.

    `covered_share` counts the flops of one token through every part; None: not known. `level` "warning": the plan lacks or
    assumes something that changes the work; "info": worth knowing, the work is as planned.
    """

    field: str
    message: str
    covered_share: float | None = 1.0
    level: str = "info"

    @property
    def text(self) -> str:
        """One line."""
        share = "unknown" if self.covered_share is None else f"{self.covered_share:.1%}"
        return f"{self.field}: {self.message}" + (f" (covered share of the flops: {share})" if self.level == "warning" else "")


@dataclass(frozen=True)
class Model:
    """A model as klab plans it.

    `kind` is "llm", "encoder" (one pass, no generation), "encoder_decoder" or "diffusion_transformer". `stack` is the decoder, denoiser
    or only encoder; `encoder` what runs before it, if anything. `dtype` is that of the checkpoint's unquantised weights;
    `quantization` names how others are stored, or is empty. `text_tokens` is a diffusion model's prompt; `default_tokens` its usual
    number of latent tokens. `max_tokens` 0: not stated.
    """

    name: str
    kind: str
    stack: Stack
    dtype: str
    vocab: int = 0
    tied: bool = False
    encoder: Stack | None = None
    max_tokens: int = 0
    text_tokens: int = 0
    default_tokens: int = 0
    model_type: str = ""
    quantization: str = ""
    hf_id: str = ""
    aliases: tuple[str, ...] = ()
    source: str = ""
    confidence: str = ""
    notes: tuple[Note, ...] = ()
    config: dict[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def covered_share(self) -> float | None:
        """The share of the flops that the plan covers by the warnings above: the smallest, or None when one of them is not known."""
        shares = [note.covered_share for note in self.notes if note.level == "warning"]
        return None if None in shares else min((s for s in shares if s is not None), default=1.0)
