"""PTX that turns packed weights into pairs of 16-bit floats, without a conversion instruction.

A 32-bit register holds two 16-bit words of a row. Register i of the result holds weight i of the first word and weight i of the second:
what a shift and a mask leave in place, so that nothing is shuffled.
"""

from __future__ import annotations

# A nibble with its sign bit turned is value + 8; in the low mantissa bits of 128 (bf16) or 1024 (fp16) it is exact, and one
# multiply-add takes 136 or 1032 away. (magic with the turned bit, 1.0, -136 or -1032, instruction)
_INT4 = {
    "bfloat16": ("0x43084308", "0x3f803f80", "0xc308c308", "fma.rn.bf16x2"),
    "float16": ("0x64086408", "0x3c003c00", "0xe408e408", "fma.rn.f16x2"),
}
# e4m3 with sign, exponent and mantissa moved to their places has the wrong exponent bias: 2^120 (bf16: 2^(127 - 7)) or 2^8 corrects it,
# subnormal numbers included. (shift of exponent and mantissa, their places, the factor, -0.0, instruction)
_FP8 = {
    "bfloat16": (4, "0x07f007f0", "0x7b807b80", "0x80008000", "fma.rn.bf16x2"),
    "float16": (1, "0x3f803f80", "0x5c005c00", "0x80008000", "fma.rn.f16x2"),
}


def unpack_ptx(form: str, dtype: str) -> str:
    """The instructions for one format and dtype: $0 .. are the results (4 for int4, 2 for fp8), the last operand is the packed register."""
    lines = [".reg .b32 v<4>, s, one, zero;"]
    if form == "int4":
        magic, one, offset, fma = _INT4[dtype]
        lines += [f"mov.b32 one, {one};", f"mov.b32 zero, {offset};"]
        for i in range(4):
            lines += [f"shr.u32 s, $4, {4 * i};"] if i else ["mov.b32 s, $4;"]
            # 0x6a is (a & b) ^ c.
            lines += [f"lop3.b32 v{i}, s, 0x000f000f, {magic}, 0x6a;", f"{fma} ${i}, v{i}, one, zero;"]
    else:
        shift, places, factor, zero, fma = _FP8[dtype]
        lines += [f"mov.b32 one, {factor};", f"mov.b32 zero, {zero};"]
        for i in range(2):
            # The byte in question goes to the upper half of its word, where its sign already lies right.
            lines += ["shl.b32 v3, $2, 8;"] if i == 0 else ["mov.b32 v3, $2;"]
            lines += [f"shr.u32 s, v3, {shift};", f"and.b32 s, s, {places};"]
            # 0xf8 is a | (b & c).
            lines += [f"lop3.b32 v{i}, s, v3, 0x80008000, 0xf8;", f"{fma} ${i}, v{i}, one, zero;"]
    return "{\n" + "\n".join(lines) + "\n}"
