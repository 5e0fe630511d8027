// What the threads of a warp do together, copies that arrive later, and 16-bit numbers: the primitives of device.cuh but for its barriers.
#include <cmath>
#include <cstring>

#include "device.cuh"
#include "emulator.h"

#define HERE __builtin_return_address(0)
namespace klab {
using namespace emulator;

namespace {

void carry_out_shuffle(Thread* warp, const void* pc) {
    for (int lane = 0; lane < WARP; ++lane) {
        int from = warp[lane].call.lane;
        if (from < 0 || from >= WARP) fail(pc, "shfl from lane %d", from);
        *warp[lane].call.out = warp[from].call.value;
    }
}

void carry_out_ldmatrix(Thread* warp, const void* pc) {
    int me = now.thread, matrices = warp[0].call.matrices;
    uint32_t my_sync = now.sync;
    uint16_t tile[4][8][8];
    for (int lane = 0; lane < matrices * 8; ++lane) {
        const void* row = warp[lane].call.row;
        now.thread = me / WARP * WARP + lane;  // the access counts as the lane's that gave the address
        now.sync = warp[lane].sync;
        check_aligned(row, 16, pc);
        check_shared(row, 16, pc);
        check_read(row, 16, pc);
        std::memcpy(tile[lane / 8][lane % 8], row, 16);
    }
    now.thread = me;
    now.sync = my_sync;
    for (int lane = 0; lane < WARP; ++lane) {
        const Call& call = warp[lane].call;
        if (call.matrices != matrices || call.trans != warp[0].call.trans) fail(pc, "lanes execute different ldmatrix instructions");
        int group = lane / 4, pair = 2 * (lane % 4);
        for (int i = 0; i < matrices; ++i) {
            uint16_t low = call.trans ? tile[i][pair][group] : tile[i][group][pair];
            uint16_t high = call.trans ? tile[i][pair + 1][group] : tile[i][group][pair + 1];
            call.out[i] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

void carry_out_mma(Thread* warp, const void*) {
    float a[16][16], b[16][8];
    auto convert = warp[0].call.to_float;
    for (int lane = 0; lane < WARP; ++lane) {
        const Call& call = warp[lane].call;
        int group = lane / 4, pair = 2 * (lane % 4);
        for (int i = 0; i < 8; ++i) {
            int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
            int column = pair + (i & 1) + (i < 4 ? 0 : 8);
            a[row][column] = convert(static_cast<uint16_t>(call.a[i / 2] >> (16 * (i & 1))));
        }
        for (int i = 0; i < 4; ++i) b[pair + (i & 1) + (i < 2 ? 0 : 8)][group] = convert(static_cast<uint16_t>(call.b[i / 2] >> (16 * (i & 1))));
    }
    for (int lane = 0; lane < WARP; ++lane) {
        for (int i = 0; i < 4; ++i) {
            int row = i < 2 ? lane / 4 : lane / 4 + 8, column = 2 * (lane % 4) + (i & 1);
            double sum = warp[lane].call.d[i];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            warp[lane].call.d[i] = static_cast<float>(sum);
        }
    }
}

void land(const Copy& copy) {
    if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
}

}  // namespace

uint32_t shfl(uint32_t value, int lane) {
    uint32_t out = 0;
    Call call;
    call.out = &out;
    call.value = value;
    call.lane = lane;
    collective(At::shuffle, call, carry_out_shuffle, HERE);
    return out;
}
float shfl(float value, int lane) { return bits_float(shfl(float_bits(value), lane)); }
uint32_t shfl_xor(uint32_t value, int mask) { return shfl(value, (now.thread % WARP) ^ mask); }
float shfl_xor(float value, int mask) { return shfl(value, (now.thread % WARP) ^ mask); }

void ldmatrix(uint32_t* r, int matrices, bool trans, const void* smem_row) {
    Call call;
    call.out = r;
    call.matrices = matrices;
    call.trans = trans;
    call.row = smem_row;
    collective(At::ldmatrix, call, carry_out_ldmatrix, HERE);
}

static void mma(float* d, const uint32_t* a, const uint32_t* b, float (*convert)(uint16_t), const void* pc) {
    Call call;
    call.d = d;
    call.a = a;
    call.b = b;
    call.to_float = convert;
    collective(At::mma, call, carry_out_mma, pc);
}
void mma_half(float* d, const uint32_t* a, const uint32_t* b) { mma(d, a, b, half_bits_to_float, HERE); }
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    mma(d, a, b, [](uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }, HERE);
}

Vec16 load_16(const void* p) {
    check_aligned(p, 16, HERE);
    check_read(p, 16, HERE);
    Vec16 v;
    std::memcpy(&v, p, 16);
    return v;
}
Vec16 load_16_once(const void* p) { return load_16(p); }
void store_16(void* p, const Vec16& v) {
    check_aligned(p, 16, HERE);
    check_write(p, 16, HERE);
    std::memcpy(p, &v, 16);
}

void cp_async_16(void* smem, const void* gmem, bool valid) {
    check_aligned(smem, 16, HERE);
    if (valid) {
        check_aligned(gmem, 16, HERE);
        check_read(gmem, 16, HERE);
    }
    begin_pending(smem, HERE);
    Copy copy{smem, gmem, valid};
    if (land_early) land(copy);
    threads[now.thread].open.push_back(copy);
}
void cp_async_commit() {
    Thread& self = threads[now.thread];
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}
void cp_async_wait_groups(int unfinished) {
    Thread& self = threads[now.thread];
    while (static_cast<int>(self.groups.size()) > unfinished) {
        for (const Copy& copy : self.groups.front()) {
            if (!land_early) land(copy);
            end_pending(copy.to);
        }
        self.groups.pop_front();
    }
}

float half_bits_to_float(uint16_t bits) {
    uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
    return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}
uint16_t float_to_half_bits(float f) {
    uint16_t sign = static_cast<uint16_t>(float_bits(f) >> 16 & 0x8000);
    float magnitude = std::fabs(f);
    if (std::isnan(f)) return 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    // nearbyint rounds to nearest even; a carry into the exponent is what the sum below makes of it.
    int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction));
}
uint16_t float_to_bf16_bits(float f) {
    uint32_t bits = float_bits(f);
    if (std::isnan(f)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
}  // namespace klab

