"""Rotary position embedding of queries and keys, and the write of keys and values to their slots of the KV cache, if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.quantize import FP8_MAX
from klab.kernels.row_quantize import fp8_tolerance

if TYPE_CHECKING:
    import torch

LEAST_POSITIONS = 4096
THETA = 10000.0


@dataclass(frozen=True)
class RopeCache(Problem):
    """Turn q and k by their positions; write k and v to slots of a paged cache (`slot_mapping`), as fp8 with `kv_dtype`.

    Pair i of a head turns by the angle of cos, sin [positions[t], i]: (a cos - b sin, b cos + a sin). It is (x[i], x[i + rotary_dim / 2]),
    or (x[2 i], x[2 i + 1]) with `interleaved`. Behind `rotary_dim` (0: head_dim) a head is copied. All in float32, rounded once.
    fp8 values are value / scale of their head, clamped to +-448. rotary=False: the cache is written and nothing turned (q is left out).
    latent > 0 (MLA): the one cache row of a token is `latent` values, copied, then the turned key of head_dim; kv_heads is ignored.
    cache=False: q and k are turned and nothing else, as in diffusion transformers and encoders.

    The cache has exactly `tokens` slots, so that each is written: pages of `page_size` in any order, the last perhaps short. In an engine
    q is turned in place and the cache is larger; the bytes are the same.

    inputs: q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim], v [tokens, kv_heads, dim_v], `dtype`; positions [tokens] int32;
            cos, sin [table rows, rotary_dim / 2] float32; slot_mapping [tokens] int32; fp8: k_scale, v_scale [kv_heads] float32.
            latent: q_rope [tokens, heads, head_dim], latent [tokens, latent], k_rope [tokens, head_dim]; fp8: kv_scale [1] float32.
            cache=False: no v and no slot_mapping.
    outputs: q [tokens, heads, head_dim], k_cache [tokens, kv_heads, head_dim], v_cache [tokens, kv_heads, dim_v];
             latent: q_rope [tokens, heads, head_dim], cache [tokens, latent + head_dim].
             cache=False: q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim].
    """

    operator: ClassVar[str] = "rope_cache"

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int = 0
    head_dim_v: int = 0
    latent: int = 0
    interleaved: bool = False
    page_size: int = 16
    kv_dtype: str = ""
    rotary: bool = True
    dtype: str = "bfloat16"
    cache: bool = True

    def __post_init__(self) -> None:
        if min(self.tokens, self.heads, self.kv_heads, self.head_dim, self.page_size) < 1 or min(self.head_dim_v, self.latent) < 0:
            raise UsageError(f"rope_cache needs positive sizes: {self.to_json()}")
        if self.rotary and (self.turned < 2 or self.turned % 2 or self.turned > self.head_dim):
            raise UsageError(f"rotary_dim is even and at most head_dim={self.head_dim}, not {self.turned}")
        if self.kv_dtype not in ("", "float8_e4m3fn"):
            raise UsageError(f"rope_cache writes its own dtype or float8_e4m3fn, not {self.kv_dtype!r}")
        if not self.cache and (not self.rotary or self.latent or self.head_dim_v or self.kv_dtype):
            raise UsageError(f"without a cache there are only q and k to turn, no values, no latent and no fp8: {self.to_json()}")

    @property
    def turned(self) -> int:
        """Elements of a head that are turned."""
        return self.rotary_dim or self.head_dim

    @property
    def dim_v(self) -> int:
        """Head dimension of the values."""
        return self.head_dim_v or self.head_dim

    @property
    def cache_dtype(self) -> str:
        """Dtype of the cache."""
        return self.kv_dtype or self.dtype

    @property
    def table_rows(self) -> int:
        """Positions that the tables of cosines and sines have."""
        return max(LEAST_POSITIONS, self.tokens)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The `dtype` inputs."""
        if self.latent:
            shapes: dict[str, tuple[int, ...]] = {"latent": (self.tokens, self.latent), "k_rope": (self.tokens, self.head_dim)}
            return {"q_rope": (self.tokens, self.heads, self.head_dim), **shapes} if self.rotary else shapes
        shapes = {"k": (self.tokens, self.kv_heads, self.head_dim)}
        if self.cache:
            shapes["v"] = (self.tokens, self.kv_heads, self.dim_v)
        return {"q": (self.tokens, self.heads, self.head_dim), **shapes} if self.rotary else shapes

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        found = {
            name: random_normal(shape, self.dtype, seed=seed + i, device=device, row_padding=row_padding)
            for i, (name, shape) in enumerate(self._shapes().items())
        }
        # Drawn on the CPU, so that every device sees the same positions, slots and tables.
        generator = torch.Generator().manual_seed(seed)
        if self.rotary:
            positions = torch.randperm(self.table_rows, generator=generator)[: self.tokens]
            positions[-1] = self.table_rows - 1
            angle = torch.arange(self.table_rows)[:, None] * THETA ** (-torch.arange(0, self.turned, 2) / self.turned)
            found["positions"] = positions.to(torch.int32).to(device)
            for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
                padded = torch.nn.functional.pad(table.float(), (0, row_padding), value=float("nan"))
                found[name] = padded.to(device)[:, : self.turned // 2]
        if self.cache:
            found["slot_mapping"] = self._slots(generator).to(torch.int32).to(device)
        if self.kv_dtype:
            for name in ["kv_scale"] if self.latent else ["k_scale", "v_scale"]:
                # Powers of two would hide a reciprocal; the largest values of a normal distribution reach 448 times the smallest.
                scale = 0.008 * (1.0 + torch.rand(1 if self.latent else self.kv_heads, generator=generator))
                found[name] = scale.to(device)
        return found

    def _slots(self, generator: torch.Generator) -> torch.Tensor:
        import torch

        pages = torch.randperm(-(-self.tokens // self.page_size), generator=generator)
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()
        return slots[slots < self.tokens]

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        def new(dtype: str, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch_dtype(dtype), device=device)

        queries = new(self.dtype, self.tokens, self.heads, self.head_dim)
        if not self.cache:
            return {"q": queries, "k": new(self.dtype, self.tokens, self.kv_heads, self.head_dim)}
        if self.latent:
            cache = {"cache": new(self.cache_dtype, self.tokens, self.latent + self.head_dim)}
            return {"q_rope": queries, **cache} if self.rotary else cache
        caches = {
            "k_cache": new(self.cache_dtype, self.tokens, self.kv_heads, self.head_dim),
            "v_cache": new(self.cache_dtype, self.tokens, self.kv_heads, self.dim_v),
        }
        return {"q": queries, **caches} if self.rotary else caches

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        wide = {name: inputs[name].double() for name in self._shapes()}
        if self.rotary:
            at = inputs["positions"].long()
            cos, sin = (inputs[name][at].double()[:, None, :] for name in ("cos", "sin"))
            for name in set(wide) & {"q", "k", "q_rope"}:
                wide[name] = self._turn(wide[name], cos, sin)
            if self.latent:
                wide["k_rope"] = self._turn(wide["k_rope"][:, None], cos, sin)[:, 0]
        if not self.cache:
            return {name: value.float() for name, value in wide.items()}
        if self.latent:
            cached = {"cache": (torch.cat([wide["latent"], wide["k_rope"]], dim=-1), inputs.get("kv_scale"))}
        else:
            scales = [inputs[f"{name}_scale"][:, None] if self.kv_dtype else None for name in ("k", "v")]
            cached = {"k_cache": (wide["k"], scales[0]), "v_cache": (wide["v"], scales[1])}
        found = {}
        for name, (value, scale) in cached.items():
            if scale is not None:
                # Divided in float32, as every kernel does: in float64 a tie would fall elsewhere.
                value = (value.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            found[name] = torch.empty(value.shape, dtype=torch.float32, device=value.device)
            found[name][inputs["slot_mapping"].long()] = value.float()
        queries = "q_rope" if self.latent else "q"
        return {queries: wide[queries].float(), **found} if self.rotary else found

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        import torch

        part, rest = x[..., : self.turned], x[..., self.turned :]
        half = self.turned // 2
        a, b = (part[..., 0::2], part[..., 1::2]) if self.interleaved else (part[..., :half], part[..., half:])
        first, second = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([first, second], dim=-1).flatten(-2) if self.interleaved else torch.cat([first, second], dim=-1)
        return torch.cat([turned, rest], dim=-1)

    def _cached_elements(self) -> int:
        """Elements written beside the queries: to the cache, or without one the keys."""
        per_token = self.latent + self.head_dim if self.latent else self.kv_heads * (self.head_dim + self.dim_v * self.cache)
        return self.tokens * per_token

    def flops(self) -> float:
        heads = (self.heads + (1 if self.latent else self.kv_heads)) * self.rotary
        return float(3 * self.tokens * heads * self.turned + (2 * self._cached_elements() if self.kv_dtype else 0))

    def bytes_moved(self) -> float:
        size, cached = SIZE_BYTES[self.dtype], self._cached_elements()
        queries = 2 * size * self.tokens * self.heads * self.head_dim * self.rotary
        tables = self.tokens * (4 + self.turned * 4) * self.rotary
        return float(queries + (size + SIZE_BYTES[self.cache_dtype]) * cached + tables + 4 * self.tokens * self.cache)

    def tolerance(self) -> float:
        # One rounding of the output (0.3 u on average, 1 u for few elements); a head that is only copied is exact.
        return max(UNIT_ROUNDOFF[self.dtype], 1e-6)

    def tolerance_of(self, output: str) -> float:
        if output in ("q", "q_rope") or not self.kv_dtype:
            return 1e-9 if output == "v_cache" or not self.rotary else self.tolerance()
        per_token = self._cached_elements() // self.tokens
        return fp8_tolerance(self.tokens * per_token // (1 if self.latent else 2), self.dtype)

    def label(self) -> str:
        width = f"latent {self.latent}+{self.head_dim}" if self.latent else f"h{self.heads}/{self.kv_heads} d{self.head_dim}"
        if self.dim_v != self.head_dim and not self.latent:
            width += f"/{self.dim_v}"
        parts = [
            "rope" + "+cache" * self.cache if self.rotary else "cache write",
            f"{self.tokens}",
            f"h{self.heads}" if self.latent else "",
            width,
        ]
        if self.rotary and self.turned != self.head_dim:
            parts.append(f"turned {self.turned}")
        parts += ["interleaved" * self.interleaved, SHORT[self.kv_dtype] + " cache" if self.kv_dtype else ""]
        return " ".join([*filter(None, parts), SHORT[self.dtype]])

    @classmethod
    def examples(cls) -> list[Problem]:
        fp8 = "float8_e4m3fn"
        made: list[Problem] = []
        for dtype in ("float16", "float32"):
            made += [
                cls(11, 8, 2, 64, dtype=dtype),
                cls(5, 6, 3, 96, rotary_dim=32, head_dim_v=48, page_size=4, interleaved=True, dtype=dtype),
            ]
        return [
            *made,
            cls(1, 1, 1, 2, dtype="float16"),
            cls(3, 2, 1, 17, rotary_dim=6, head_dim_v=5, dtype="float16"),
            cls(3, 4, 2, 80, rotary_dim=32, dtype="float16"),
            cls(7, 3, 3, 40, rotary=False, page_size=1, dtype="float16"),
            cls(9, 5, 1, 64, latent=160, interleaved=True, dtype="float16"),
            cls(5, 4, 2, 128, kv_dtype=fp8, dtype="float16"),
            cls(5, 3, 2, 64, cache=False, interleaved=True, dtype="float16"),
            cls(5, 3, 1, 32, latent=96, kv_dtype=fp8, dtype="float16"),
            cls(5, 3, 1, 32, latent=96, rotary=False, dtype="float16"),
            cls(11, 8, 2, 64),
            cls(5, 4, 2, 128, kv_dtype=fp8),
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [  # Llama 3.1 8B in prefill and decode, the latter with an fp8 cache; DeepSeek V3's latent cache
            cls(8192, 32, 8, 128),
            cls(64, 32, 8, 128, kv_dtype="float8_e4m3fn"),
            cls(4096, 128, 1, 64, latent=512, interleaved=True, page_size=64),
        ]
