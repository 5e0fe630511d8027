// Device primitives for klab's CUDA C++ kernels. A kernel written on these (and on plain C++17) compiles for the GPU by NVRTC and,
// unchanged, for the host, where tests/cuda_emulator runs it thread by thread and checks every memory access.
//
// A kernel's source:
//
//     #include "device.cuh"
//     using namespace klab;
//     KLAB_KERNEL(scale, THREADS)(const ELEMENT* x, ELEMENT* out, int n) {
//         int i = block_idx_x() * THREADS + thread_idx();
//         if (i < n) out[i] = from_float<ELEMENT>(2.0f * to_float(x[i]));
//     }
//
// ELEMENT and THREADS come from `defines`, whose names are capitals (nothing in this header is, but for KLAB_ and T); ELEMENT is half_t,
// bf16_t or float.
//
// Rules for code that must also run on the host:
//   - blocks are one-dimensional: thread_idx() counts 0..threads-1, lane = thread_idx() % 32, warp = thread_idx() / 32;
//   - shared memory is dynamic only, shared_memory<T>() is its base (128-byte aligned); no __shared__ variables;
//   - helper functions are marked KLAB_DEVICE, or KLAB_BOTH if constexpr and used for sizes; no function-local statics, no printf;
//   - warp-collective functions (shfl*, ldmatrix*, mma*, sync_warp) are reached by all 32 lanes together, sync_threads by the block;
//   - a lane that reads what another lane wrote to shared memory needs sync_warp() between (sync_threads() across warps); shfl,
//     ldmatrix and mma order no memory;
//   - 16-byte accesses need 16-byte aligned addresses; what cp_async_16 brings is readable by the thread that issued it after
//     cp_async_wait<N>(), by other threads after a sync_threads() (or sync_warp() in the same warp) behind that wait.
//
// Fragment layouts are those of the PTX ISA, section "Matrix Fragments for mma.m16n8k16 with floating point type", with
// group = lane / 4 and pair = lane % 4. Each 32-bit register holds two elements, the lower index in the lower half:
//   a[0]: A[group][2 pair + {0,1}]        a[1]: A[group + 8][2 pair + {0,1}]
//   a[2]: A[group][2 pair + 8 + {0,1}]    a[3]: A[group + 8][2 pair + 8 + {0,1}]
//   b[0]: B[2 pair + {0,1}][group]        b[1]: B[2 pair + 8 + {0,1}][group]          (B is k x n)
//   d[0], d[1]: D[group][2 pair + {0,1}]  d[2], d[3]: D[group + 8][2 pair + {0,1}]
// ldmatrix reads 8x8 matrices of 16-bit elements: matrix i has its eight row addresses (16 bytes each) in lanes 8 i .. 8 i + 7, and
// r[i] of a lane is M[group][2 pair + {0,1}]; with _trans it is M[2 pair + {0,1}][group]. x2 reads the addresses of lanes 0..15 only.
#pragma once

#if defined(__CUDACC__)
#define KLAB_ON_DEVICE 1
#define KLAB_DEVICE __device__ __forceinline__
#define KLAB_BOTH __host__ __device__ __forceinline__
#define KLAB_UNROLL _Pragma("unroll")
#define KLAB_NO_UNROLL _Pragma("unroll 1")
// `threads` bounds the registers; with KLAB_KERNEL_MIN_BLOCKS also so that `blocks` fit on one SM.
#define KLAB_KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
#define KLAB_KERNEL_MIN_BLOCKS(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define KLAB_DEVICE inline
#define KLAB_BOTH inline
#define KLAB_UNROLL
#define KLAB_NO_UNROLL
#define KLAB_KERNEL(name, threads) extern "C" void name
#define KLAB_KERNEL_MIN_BLOCKS(name, threads, blocks) extern "C" void name
#endif

namespace klab {

#if defined(KLAB_ON_DEVICE)
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;
#else
using ::int32_t;
using ::int64_t;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
#endif

// IEEE binary16 and bfloat16 as bit patterns: arithmetic goes through float.
struct half_t {
    uint16_t bits;
};
struct bf16_t {
    uint16_t bits;
};
// Two floats, and 16 bytes.
struct Pair {
    float x, y;
};
struct alignas(16) Vec16 {
    uint32_t word[4];
};

// ---------------------------------------------------------------------------------------------------------- pure functions
KLAB_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
KLAB_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
KLAB_BOTH constexpr int min_of(int a, int b) { return a < b ? a : b; }
KLAB_BOTH constexpr int max_of(int a, int b) { return a > b ? a : b; }

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile whose rows are row_bytes long (16, 32, 64, or a multiple of 128).
// Shared memory serves 128 bytes (32 banks) at once; eight consecutive rows read at the same chunk (one ldmatrix phase) fall on eight
// different 16-byte columns of that line, and so do the eight chunks of one row that a cp.async of consecutive lanes writes.
template <int row_bytes>
KLAB_BOTH constexpr int swizzle(int row, int chunk) {
    static_assert(row_bytes == 16 || row_bytes == 32 || row_bytes == 64 || row_bytes % 128 == 0, "row of 16, 32, 64 or 128 i bytes");
    constexpr int rows_per_line = row_bytes < 128 ? 128 / row_bytes : 1;
    constexpr int columns = row_bytes < 128 ? row_bytes / 16 : 8;
    return row * row_bytes + ((chunk ^ ((row / rows_per_line) % columns)) * 16);
}

#if defined(KLAB_ON_DEVICE)
// ---------------------------------------------------------------------------------------------------------------- indices
KLAB_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
KLAB_DEVICE int block_idx_x() { return static_cast<int>(blockIdx.x); }
KLAB_DEVICE int block_idx_y() { return static_cast<int>(blockIdx.y); }
KLAB_DEVICE int block_idx_z() { return static_cast<int>(blockIdx.z); }
KLAB_DEVICE int grid_dim_x() { return static_cast<int>(gridDim.x); }
KLAB_DEVICE int grid_dim_y() { return static_cast<int>(gridDim.y); }
KLAB_DEVICE int grid_dim_z() { return static_cast<int>(gridDim.z); }

KLAB_DEVICE void sync_threads() { __syncthreads(); }
KLAB_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
KLAB_DEVICE T* shared_memory() {
    extern __shared__ __align__(128) unsigned char klab_shared_memory[];
    return reinterpret_cast<T*>(klab_shared_memory);
}

// ------------------------------------------------------------------------------------------------------------ conversions
KLAB_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
KLAB_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

KLAB_DEVICE float to_float(float x) { return x; }
KLAB_DEVICE float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
KLAB_DEVICE float to_float(half_t x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
}

// Round to nearest even.
template <class T>
KLAB_DEVICE T from_float(float f);
template <>
KLAB_DEVICE float from_float<float>(float f) {
    return f;
}
template <>
KLAB_DEVICE half_t from_float<half_t>(float f) {
    half_t x;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
    return x;
}
template <>
KLAB_DEVICE bf16_t from_float<bf16_t>(float f) {
    bf16_t x;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
    return x;
}

// f0 goes to the lower half: what lies at the lower address.
template <class T>
KLAB_DEVICE uint32_t pack2(float f0, float f1);
template <>
KLAB_DEVICE uint32_t pack2<half_t>(float f0, float f1) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(f1), "f"(f0));
    return word;
}
template <>
KLAB_DEVICE uint32_t pack2<bf16_t>(float f0, float f1) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(f1), "f"(f0));
    return word;
}

// --------------------------------------------------------------------------------------------------------------- mathematics
KLAB_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
KLAB_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
KLAB_DEVICE float min_of(float a, float b) { return fminf(a, b); }
KLAB_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// 2^x to about 2 ulp; 2^-inf is 0.
KLAB_DEVICE float exp2f_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log2 x to about 1 ulp; log2 0 is -inf.
KLAB_DEVICE float log2f_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ------------------------------------------------------------------------------------------------------------------- memory
KLAB_DEVICE Vec16 load_16(const void* p) {
    uint4 v = *reinterpret_cast<const uint4*>(p);
    return Vec16{{v.x, v.y, v.z, v.w}};
}
KLAB_DEVICE void store_16(void* p, const Vec16& v) {
    *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
// Global memory that is read once and never written by this launch: keeps it out of L1. Volatile, or ptxas moves each load down to
// its use and waits there.
KLAB_DEVICE Vec16 load_16_once(const void* p) {
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

KLAB_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copy 16 bytes global -> shared asynchronously; with !valid nothing is read and zeros are written.
KLAB_DEVICE void cp_async_16(void* smem, const void* gmem, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(__cvta_generic_to_global(gmem)),
                 "r"(bytes)
                 : "memory");
}
// Close the group of copies issued since the last commit (it may be empty).
KLAB_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most `unfinished` of this thread's groups are unfinished.
template <int unfinished>
KLAB_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(unfinished) : "memory");
}

// ------------------------------------------------------------------------------------------------------------ warp-collective
KLAB_DEVICE float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
KLAB_DEVICE uint32_t shfl_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
KLAB_DEVICE float shfl(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
KLAB_DEVICE uint32_t shfl(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

KLAB_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem_row))
                 : "memory");
}
KLAB_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem_row))
                 : "memory");
}
KLAB_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem_row))
                 : "memory");
}
KLAB_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem_row))
                 : "memory");
}

// d += a * b, products exact, sums in float.
template <class T>
KLAB_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
KLAB_DEVICE void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
KLAB_DEVICE void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else  // On the host: declared here, defined by tests/cuda_emulator/emulator.cpp.
int thread_idx();
int block_idx_x();
int block_idx_y();
int block_idx_z();
int grid_dim_x();
int grid_dim_y();
int grid_dim_z();
void sync_threads();
void sync_warp();
void* shared_memory_base();
template <class T>
T* shared_memory() {
    return static_cast<T*>(shared_memory_base());
}

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float bits_float(uint32_t x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
float half_bits_to_float(uint16_t bits);
uint16_t float_to_half_bits(float f);
uint16_t float_to_bf16_bits(float f);
inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(half_t x) { return half_bits_to_float(x.bits); }
template <class T>
T from_float(float f);
template <>
inline float from_float<float>(float f) {
    return f;
}
template <>
inline half_t from_float<half_t>(float f) {
    return half_t{float_to_half_bits(f)};
}
template <>
inline bf16_t from_float<bf16_t>(float f) {
    return bf16_t{float_to_bf16_bits(f)};
}
template <class T>
uint32_t pack2(float f0, float f1) {
    return from_float<T>(f0).bits | static_cast<uint32_t>(from_float<T>(f1).bits) << 16;
}

inline float infinity() { return INFINITY; }
inline float max_of(float a, float b) { return std::fmax(a, b); }
inline float min_of(float a, float b) { return std::fmin(a, b); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2f_fast(float x) { return std::exp2(x); }
inline float log2f_fast(float x) { return std::log2(x); }

Vec16 load_16(const void* p);
void store_16(void* p, const Vec16& v);
Vec16 load_16_once(const void* p);
void cp_async_16(void* smem, const void* gmem, bool valid);
void cp_async_commit();
void cp_async_wait_groups(int unfinished);
template <int unfinished>
void cp_async_wait() {
    cp_async_wait_groups(unfinished);
}

float shfl_xor(float value, int mask);
uint32_t shfl_xor(uint32_t value, int mask);
float shfl(float value, int lane);
uint32_t shfl(uint32_t value, int lane);
void ldmatrix(uint32_t* r, int matrices, bool trans, const void* smem_row);
inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) { ldmatrix(r, 4, false, smem_row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) { ldmatrix(r, 4, true, smem_row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) { ldmatrix(r, 2, false, smem_row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) { ldmatrix(r, 2, true, smem_row); }
void mma_half(float* d, const uint32_t* a, const uint32_t* b);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b);
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
inline void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_half(d, a, b);
}
template <>
inline void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
}
#endif

// --------------------------------------------------------------------------------------- the same on both: built on the above
template <class T>
KLAB_DEVICE Pair unpack2(uint32_t word);
template <>
KLAB_DEVICE Pair unpack2<half_t>(uint32_t word) {
    return Pair{to_float(half_t{static_cast<uint16_t>(word & 0xffffu)}), to_float(half_t{static_cast<uint16_t>(word >> 16)})};
}
template <>
KLAB_DEVICE Pair unpack2<bf16_t>(uint32_t word) {
    return Pair{bits_float(word << 16), bits_float(word & 0xffff0000u)};
}

// Sum, or maximum, over the lanes that differ in the bits below `lanes` (a power of two up to 32); every lane gets it.
template <int lanes>
KLAB_DEVICE float warp_sum(float value) {
    KLAB_UNROLL
    for (int mask = lanes / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
    return value;
}
template <int lanes>
KLAB_DEVICE float warp_max(float value) {
    KLAB_UNROLL
    for (int mask = lanes / 2; mask > 0; mask /= 2) value = max_of(value, shfl_xor(value, mask));
    return value;
}

}  // namespace klab
