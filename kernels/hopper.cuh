// Primitives of Hopper (sm_90a) on top of device.cuh: barriers of part of a block, the fence before the tensor cores, warpgroup products.
//
// A warpgroup is 4 warps, threads 128 i .. 128 i + 127. Its product (wgmma) of 64 x n takes 16 columns at a time from shared memory (or the
// left operand from registers) and runs on its own: between wgmma_commit and the wgmma_wait that covers it nobody touches its
// accumulators, its registers or its shared memory. The products themselves are written by wgmma.py, one function per n.
//
// Rules: what threads wrote to shared memory (cp.async included, after its wait) is visible to a product after fence_async_proxy() by the
// writer and a barrier; accumulators and registers that ordinary code has written are fit for a product after wgmma_fence().
// Layouts: the accumulators of a warp's 16 rows are side by side those of m16n8k16, its register operand is that of m16n8k16.
#pragma once
#include "device.cuh"

namespace klab {

#if defined(KLAB_ON_DEVICE)
// An mbarrier: a phase ends when `count` threads have arrived. Wait for the end of the phase of this parity (0, 1, 0, ..).
KLAB_DEVICE void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// By the thread that has initialised them, before a sync_threads().
KLAB_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
KLAB_DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
KLAB_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}
// bar.sync and bar.arrive of barrier 1 .. 15: `count` threads, those that wait and those that only arrive.
KLAB_DEVICE void named_barrier_sync(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
KLAB_DEVICE void named_barrier_arrive(int id, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }
KLAB_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Of a whole warpgroup: give registers back to the block's pool, or take some. Multiples of 8 from 24 to 240.
template <int registers>
KLAB_DEVICE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
KLAB_DEVICE void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

KLAB_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KLAB_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int unfinished>
KLAB_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(unfinished) : "memory");
}
#else  // On the host: defined by tests/cuda_emulator/hopper.cpp.
void barrier_init(uint64_t* barrier, int count);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void named_barrier_sync(int id, int count);
void named_barrier_arrive(int id, int count);
void fence_async_proxy();
template <int registers>
void release_registers() {}
template <int registers>
void claim_registers() {}
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_groups(int unfinished);
template <int unfinished>
void wgmma_wait() {
    wgmma_wait_groups(unfinished);
}
// `registers`: the left operand, or null if `a` describes it. `transposed`: b's rows are its 16 columns.
void wgmma_issue(float* d, int n, bool half, const uint32_t* registers, uint64_t a, uint64_t b, bool transposed, bool accumulate);
inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - static_cast<const char*>(shared_memory_base()));
}
#endif

// Operands lie in panels of 64 columns: rows of 128 bytes one behind another, swizzled as swizzle<128> says, from a multiple of 1024 bytes.
// `at` is where the 16 columns begin. For a left operand, and for a right one that is n x 16 ("keys"), rows are those of the product.
KLAB_DEVICE uint64_t panel_rows(uint32_t at) { return (at >> 4 & 0x3fff) | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62; }
// A right operand that is 16 x n ("values"): 16 rows from `at` on of panels that are `panel_bytes` apart.
KLAB_DEVICE uint64_t panel_columns(uint32_t at, int panel_bytes) {
    return panel_rows(at) | static_cast<uint64_t>(panel_bytes >> 4) << 16;
}

}  // namespace klab
