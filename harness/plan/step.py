"""One step of a model (a prefill, a decode, a denoising call) and the drafts of the rows in it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from klab.harness.catalog.matrices import Matrix
from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Json, Problem, canonical_json
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.matmul.problem import Matmul
from klab.kernels.norm.problem import Norm


@dataclass(frozen=True)
class Draft:
    """A row before it is merged and bounded: the work of one launch."""

    role: str
    operator: str
    shape: Mapping[str, Json] = field(hash=False)
    flops: float
    bytes_moved: float
    link_bytes: float = 0.0
    problem: Problem | None = None
    why: str = ""

    @property
    def identity(self) -> Hashable:
        """Equal for launches that are the same work, whatever their role."""
        if self.problem is not None:
            return self.problem, *self.shape
        return canonical_json([self.operator, dict(self.shape), self.flops, self.bytes_moved, self.link_bytes, self.why])


@dataclass(frozen=True)
class Step:
    """`batch` sequences with `new` tokens each behind `prefix` cached ones. `source` tokens per sequence feed cross-attention, `text`
    tokens are a diffusion model's prompt. `phase` is "prefill", "decode" or "denoise". `kv_dtype`: of the cache, where it differs from
    `dtype`; `shared_prefix`: tokens that all sequences of a decode step have in the same pages; `norm`: the stack's.
    """

    phase: str
    batch: int
    new: int
    prefix: int
    dtype: str
    tp: int = 1
    expert_parallel: bool = False
    page_size: int = 16
    source: int = 0
    text: int = 0
    kv_dtype: str = ""
    shared_prefix: int = 0
    norm: str = "rms"

    @property
    def tokens(self) -> int:
        """Tokens that flow through the layers."""
        return self.batch * self.new

    @property
    def context(self) -> int:
        """Keys per sequence, new ones included."""
        return self.prefix + self.new

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZE_BYTES[self.dtype]

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step."""
        return self.phase == "decode"

    def rows_of(self, stream: str) -> int:
        """Rows of the activations of a stream (see Projection and Matrix)."""
        return {
            "tokens": self.tokens,
            "source": self.batch * self.source,
            "text": self.batch * self.text,
            "all": self.tokens + self.batch * self.text,
            "samples": self.batch,
            "frames": 2 * self.tokens,
        }[stream]

    def linear(self, role: str, m: int, n: int, k: int) -> Draft:
        """x[m, k] @ W[n, k]^T."""
        return drafted(role, Matmul(m, n, k, self.dtype))

    def matrices(self, matrices: Sequence[Matrix], *, reduce: bool = True) -> list[Draft]:
        """The matrices of a part; behind a row-parallel one, the all-reduce of its partial sums."""
        drafts = []
        for matrix in matrices:
            if matrix.when == "prefill" and self.decodes:
                continue
            rows = self.rows_of(matrix.stream)
            drafts.append(self.linear(matrix.role, rows, matrix.n, matrix.k))
            if matrix.row_parallel and reduce:
                drafts += self.all_reduce(rows, matrix.n)
        return drafts

    def all_reduce(self, rows: int, width: int) -> list[Draft]:
        """The sum of one tensor over the group; every GPU sends 2 (tp - 1)/tp of it (ring, or switch without in-network sums)."""
        if self.tp == 1:
            return []
        sent = 2 * (self.tp - 1) / self.tp * rows * width * self.size
        shape = {"rows": rows, "width": width, "gpus": self.tp}
        return [Draft("all_reduce", "all_reduce", shape, 0.0, 2.0 * rows * width * self.size, sent, why=modelled("all_reduce"))]

    def normed(self, role: str, rows: int, width: int, *, kind: str = "", residual: bool = False, gated: bool = False) -> Draft:
        """The stack's norm (or `kind`) of `rows` rows; with `residual` fused with the addition before it, as engines do."""
        return drafted(role, Norm(rows, width, kind or self.norm, residual=residual, gated=gated, dtype=self.dtype))

    def activated(self, role: str, rows: int, width: int, kind: str, *, gated: bool) -> Draft:
        """The activation behind an up projection (times the other half, where `gated`)."""
        return drafted(role, Activation(rows, width, kind, gated=gated, dtype=self.dtype))


def drafted(role: str, problem: Problem, shape: Mapping[str, Json] | None = None) -> Draft:
    """The row of a problem that klab measures; its shape is the problem's fields unless something shorter is given."""
    return Draft(role, problem.operator, shape or _fields(problem), *flops_and_bytes(problem), problem=problem)


@lru_cache(maxsize=1024)
def _fields(problem: Problem) -> Mapping[str, Json]:
    return {name: value for name, value in problem.to_json().items() if name != "dtype"}


@lru_cache(maxsize=1024)
def flops_and_bytes(problem: Problem) -> tuple[float, float]:
    """(operations, bytes moved) of a launch. Kept, as they are asked for several times and a large batch sums over its sequences."""
    return problem.flops(), problem.bytes_moved()


def modelled(operator: str) -> str:
    """The reason of a row that takes several GPUs: `klab communication` measures those."""
    return f"between GPUs: {operator} is modelled here and measured by klab communication"
