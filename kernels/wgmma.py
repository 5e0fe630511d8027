"""Writes the CUDA C++ functions of Hopper's warpgroup products: one inline assembly names every accumulator, so each width has its own."""

from __future__ import annotations

PTX_TYPE = {"float16": "f16", "bfloat16": "bf16"}


def wgmma_functions(name: str, n: int, dtype: str, *, left_in_registers: bool, transposed: bool) -> str:
    """Source of `void name(float (&d)[n / 8][4], left, uint64_t right, bool accumulate)`: d (+)= left * right, 64 x n, over 16 columns.

    `n` is a multiple of 8 up to 256. `left` is a descriptor, or uint32_t (&)[4] with `left_in_registers`; descriptors are those of
    hopper.cuh. `transposed`: the right operand's rows are the 16 columns (values), not its n (keys). On the host it calls the emulator.
    """
    sums = n // 2
    left_type = "const uint32_t (&left)[4]" if left_in_registers else "uint64_t left"
    lefts = 4 if left_in_registers else 1
    outputs = ", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(sums))
    places = ", ".join(f"%{i}" for i in range(sums))
    left = "{" + ", ".join(f"%{sums + i}" for i in range(4)) + "}" if left_in_registers else f"%{sums}"
    left_inputs = ", ".join(f'"r"(left[{i}])' for i in range(4)) if left_in_registers else '"l"(left)'
    kind = PTX_TYPE[dtype]
    # Scales of the operands (1: as they are), then whether they are transposed; a left operand in registers has no such bit.
    modes = f"1, 1, {int(transposed)}" if left_in_registers else f"1, 1, 0, {int(transposed)}"
    host_left = "left, 0" if left_in_registers else "nullptr, left"
    half = "true" if dtype == "float16" else "false"
    return f"""
namespace klab {{
KLAB_DEVICE void {name}(float (&d)[{n // 8}][4], {left_type}, uint64_t right, bool accumulate) {{
#if defined(KLAB_ON_DEVICE)
    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{sums + lefts + 1}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{places}}}, {left}, %{sums + lefts}, more, {modes};\\n}}"
                 : {outputs}
                 : {left_inputs}, "l"(right), "r"(static_cast<int>(accumulate)));
#else
    wgmma_issue(&d[0][0], {n}, {half}, {host_left}, right, {"true" if transposed else "false"}, accumulate);
#endif
}}
}}  // namespace klab
"""
