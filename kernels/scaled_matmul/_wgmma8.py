"""Writes the CUDA C++ function of Hopper's warpgroup product of 8-bit elements, which names every accumulator."""

from __future__ import annotations


def wgmma8_function(n: int, *, integers: bool) -> str:
    """Source of `void multiply8(Sum (&d)[n / 8][4], uint64_t left, uint64_t right, bool accumulate)`: d (+)= left * right over 32 of k.

    64 x n sums, int32 of int8 or float of e4m3; `n` is a multiple of 16 up to 256. Operands are descriptors of panel_rows (hopper.cuh):
    rows of 128 bytes, 128 elements of k. On the host it calls the emulator. With it comes `settled(d)`: what follows reads these sums
    behind the wait before it, and not ahead of it, where compilers else move arithmetic.
    """
    sums = n // 2
    constraint, sum_type, kind = ("r", "int32_t", "s32.s8.s8") if integers else ("f", "float", "f32.e4m3.e4m3")
    outputs = ", ".join(f'"+{constraint}"(d[{i // 4}][{i % 4}])' for i in range(sums))
    places = ", ".join(f"%{i}" for i in range(sums))
    factors = "" if integers else ", 1, 1"  # of the operands: as they are
    return f"""
namespace klab {{
#if defined(KLAB_ON_DEVICE)
KLAB_DEVICE void multiply8({sum_type} (&d)[{n // 8}][4], uint64_t left, uint64_t right, bool accumulate) {{
    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{sums + 2}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{n}k32.{kind} {{{places}}}, %{sums}, %{sums + 1}, more{factors};\\n}}"
                 : {outputs}
                 : "l"(left), "l"(right), "r"(static_cast<int>(accumulate)));
}}
KLAB_DEVICE void settled({sum_type} (&d)[{n // 8}][4]) {{
    KLAB_UNROLL
    for (int i = 0; i < {sums}; ++i) asm volatile("" : "+{constraint}"(d[i / 4][i % 4])::"memory");
}}
#else
inline void settled({sum_type} (&)[{n // 8}][4]) {{}}
void wgmma8_issue(void* d, int n, bool integers, uint64_t a, uint64_t b, bool accumulate);
inline void multiply8({sum_type} (&d)[{n // 8}][4], uint64_t left, uint64_t right, bool accumulate) {{
    wgmma8_issue(&d[0][0], {n}, {"true" if integers else "false"}, left, right, accumulate);
}}
#endif
}}  // namespace klab
"""
