// The primitives of fp8.cuh on the host: e4m3 by definition, and the int8 product of a warp.
#include <cmath>
#include <cstdint>

#include "emulator.h"
#include "fp8.cuh"

#define HERE __builtin_return_address(0)
namespace klab {
using namespace emulator;

namespace {

float fp8_bits_to_float(uint8_t bits) {
    int exponent = bits >> 3 & 15, fraction = bits & 7;
    float sign = bits & 0x80 ? -1.0f : 1.0f;
    if (exponent == 15 && fraction == 7) return bits_float(0x7fc00000u);
    return sign * (exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(static_cast<float>(fraction), -9));
}

uint8_t float_to_fp8_bits(float f) {
    uint8_t sign = static_cast<uint8_t>(float_bits(f) >> 24 & 0x80);
    if (std::isnan(f)) return 0x7f;
    float magnitude = std::fmin(std::fabs(f), 448.0f);
    int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
    // nearbyint rounds to nearest even; a carry into the exponent is what the sum below makes of it.
    int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
    return static_cast<uint8_t>(sign | (((exponent + 6) << 3) + fraction));
}

void carry_out_mma_s8(Thread* warp, const void*) {
    int8_t a[16][32], b[32][8];
    for (int lane = 0; lane < WARP; ++lane) {
        const Call& call = warp[lane].call;
        int group = lane / 4, first = 4 * (lane % 4);
        for (int i = 0; i < 16; ++i)
            a[group + (i / 4 % 2) * 8][first + i / 8 * 16 + i % 4] = static_cast<int8_t>(call.a[i / 4] >> (8 * (i % 4)));
        for (int i = 0; i < 8; ++i) b[first + i / 4 * 16 + i % 4][group] = static_cast<int8_t>(call.b[i / 4] >> (8 * (i % 4)));
    }
    for (int lane = 0; lane < WARP; ++lane) {
        for (int i = 0; i < 4; ++i) {
            int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
            int64_t sum = static_cast<int32_t>(warp[lane].call.out[i]);
            for (int k = 0; k < 32; ++k) sum += a[row][k] * b[k][column];
            warp[lane].call.out[i] = static_cast<uint32_t>(sum);
        }
    }
}

}  // namespace

uint32_t fp8x2_to_half2(uint16_t pair) {
    uint32_t low = float_to_half_bits(fp8_bits_to_float(static_cast<uint8_t>(pair & 0xff)));
    return low | static_cast<uint32_t>(float_to_half_bits(fp8_bits_to_float(static_cast<uint8_t>(pair >> 8)))) << 16;
}
uint16_t floats_to_fp8x2(float f0, float f1) { return static_cast<uint16_t>(float_to_fp8_bits(f0) | float_to_fp8_bits(f1) << 8); }

void mma_s8(int32_t* d, const uint32_t* a, const uint32_t* b) {
    Call call;
    call.out = reinterpret_cast<uint32_t*>(d);
    call.a = a;
    call.b = b;
    collective(At::mma, call, carry_out_mma_s8, HERE);
}

}  // namespace klab
