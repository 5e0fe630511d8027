// Hopper's copy engine for klab's CUDA C++ kernels: a box of a matrix to shared memory by one instruction of one thread. Needs sm_90.
//
// A kernel declares KLAB_TENSOR_MAP(name) and is launched with a klab.kernels.cuda_module.TensorMap in its place. The box has rows of 128
// bytes (64 elements of 16 bits) and lies in shared memory from a multiple of 1024 bytes on, swizzled as swizzle<128> of device.cuh says:
// the panels that hopper.cuh's products read. What lies outside the matrix becomes zero, and its bytes count all the same.
#pragma once
#include "hopper.cuh"

namespace klab {

#if defined(KLAB_ON_DEVICE)
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
#define KLAB_TENSOR_MAP(name) const __grid_constant__ klab::TensorMap name

// Arrive at the barrier, and announce so many bytes of its phase: it then also waits for them.
KLAB_DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Copy the map's box that begins at (column, row) to `box`; the barrier is told of the bytes when they have arrived.
KLAB_DEVICE void tma_load(void* box, const TensorMap& map, uint64_t* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared_address(box)),
                 "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
KLAB_DEVICE void tma_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
#else  // On the host: defined by tests/cuda_emulator/hopper.cpp.
struct TensorMap {
    const void* base;
    int64_t rows, columns, row_bytes;
    int64_t box_rows;
};
#define KLAB_TENSOR_MAP(name) klab::TensorMap name
void barrier_arrive_expect(uint64_t* barrier, int bytes);
void tma_load(void* box, const TensorMap& map, uint64_t* barrier, int column, int row);
inline void tma_prefetch(const TensorMap&) {}
#endif

}  // namespace klab
