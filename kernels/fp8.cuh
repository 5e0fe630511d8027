// fp8 (e4m3fn) and int8 on top of device.cuh: conversions, and the products of m16n8k32 tiles.
//
// On sm_90 and sm_100 there is no mma.sync for fp8: ptxas makes of it conversions to half, anew for every product, and mma.sync of halves.
// So fragments are converted here once and multiplied as halves: every e4m3 number is a half, the products are exact and the sums float,
// which is more than Hopper's wgmma keeps (about 14 bits). int8 has mma.sync of its own on all of them.
//
// Fragments of m16n8k32 with 8-bit elements (PTX ISA, "Matrix Fragments for mma.m16n8k32"), group = lane / 4, pair = lane % 4; each
// register holds four elements, the lowest index in the lowest byte. What ldmatrix brings of rows of 16-byte chunks is just this:
//   a[0]: A[group][4 pair + {0..3}]         a[1]: A[group + 8][4 pair + {0..3}]
//   a[2]: A[group][4 pair + 16 + {0..3}]    a[3]: A[group + 8][4 pair + 16 + {0..3}]
//   b[0]: B[4 pair + {0..3}][group]         b[1]: B[4 pair + 16 + {0..3}][group]         (B is k x n)
//   d as in m16n8k16
#pragma once
#include "device.cuh"

namespace klab {

// e4m3fn as its bit pattern: largest 448, no infinity, 0x7f is NaN.
struct fp8_t {
    uint8_t bits;
};

#if defined(KLAB_ON_DEVICE)
// Two e4m3 as two halves, the lower byte in the lower half; exact.
KLAB_DEVICE uint32_t fp8x2_to_half2(uint16_t pair) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
    return halves;
}
// Two floats as two e4m3, f0 in the lower byte: nearest even, magnitudes above 448 become 448.
KLAB_DEVICE uint16_t floats_to_fp8x2(float f0, float f1) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(f1), "f"(f0));
    return pair;
}
// d += a * b in int32.
KLAB_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else  // On the host: defined by tests/cuda_emulator/narrow.cpp.
uint32_t fp8x2_to_half2(uint16_t pair);
uint16_t floats_to_fp8x2(float f0, float f1);
void mma_s8(int32_t* d, const uint32_t* a, const uint32_t* b);
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_s8(d, a, b); }
#endif

KLAB_DEVICE float to_float(fp8_t x) { return to_float(half_t{static_cast<uint16_t>(fp8x2_to_half2(x.bits) & 0xffffu)}); }
template <>
KLAB_DEVICE fp8_t from_float<fp8_t>(float f) {
    return fp8_t{static_cast<uint8_t>(floats_to_fp8x2(f, 0.0f) & 0xffu)};
}
// Two e4m3 as floats.
KLAB_DEVICE Pair fp8x2_to_floats(uint16_t pair) { return unpack2<half_t>(fp8x2_to_half2(pair)); }
// Four e4m3 as four halves.
KLAB_DEVICE void fp8x4_to_halves(uint32_t four, uint32_t& low, uint32_t& high) {
    low = fp8x2_to_half2(static_cast<uint16_t>(four & 0xffffu));
    high = fp8x2_to_half2(static_cast<uint16_t>(four >> 16));
}

// Fragments of a (16 x 32) or b (32 x 8) of e4m3, as the halves of two products of k = 16
// (of a register's four elements the lower two take one place in the k of a product, the upper two another, in a and b alike).
KLAB_DEVICE void fp8_fragment_to_halves(const uint32_t (&a)[4], uint32_t (&first)[4], uint32_t (&second)[4]) {
    fp8x4_to_halves(a[0], first[0], first[2]);
    fp8x4_to_halves(a[1], first[1], first[3]);
    fp8x4_to_halves(a[2], second[0], second[2]);
    fp8x4_to_halves(a[3], second[1], second[3]);
}
KLAB_DEVICE void fp8_fragment_to_halves(const uint32_t (&b)[2], uint32_t (&first)[2], uint32_t (&second)[2]) {
    fp8x4_to_halves(b[0], first[0], first[1]);
    fp8x4_to_halves(b[1], second[0], second[1]);
}

}  // namespace klab
