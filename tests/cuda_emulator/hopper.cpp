// Hopper's part of the emulator: barriers of part of a block, and products of a warpgroup (128 threads) that run on their own.
//
// sync_threads orders everything before it and everything behind it. Other barriers order pairs of threads, so with the first of them
// every thread gets a clock: what it did up to its n-th arrival. A barrier collects the clocks of those who arrive, and whoever waits
// learns them; memory.cpp asks `happened_before`. A product is carried out when somebody of its warpgroup first waits for it (or, with
// land_early, when it is issued): accumulators that are read before, or operands that are overwritten before, give wrong numbers or a race.
#include <algorithm>
#include <cstring>
#include <map>

#include "emulator.h"
#include "fp8.cuh"
#include "hopper.cuh"
#include "tma.cuh"

#define HERE __builtin_return_address(0)
namespace klab::emulator {

bool clocked;

namespace {

constexpr int WARPGROUP = 128;

// A box on its way from the copy engine.
struct Box {
    char* to;
    TensorMap map;
    int column, row;
};

struct Barrier {
    int count = 0, left = 0;
    int64_t due = 0;  // bytes announced and not yet arrived
    std::vector<Box> boxes;
    uint32_t phase = 0;
    std::vector<uint32_t> gathered, completed;
    std::vector<int> waiting;
};

struct Product {
    int n;
    bool half, transposed, accumulate, from_registers;
    uint64_t a, b;
    enum { BITS_16, E4M3, INT8 } elements;
    float* d[WARPGROUP];  // int32_t for INT8
    const uint32_t* registers[WARPGROUP];
};

struct Warpgroup {
    int arrived = 0, done = 0;  // threads at the product that is being issued; products carried out
    std::deque<Product> open;
};

std::map<std::size_t, Barrier> barriers;  // by offset in shared memory; named ones behind its end
std::map<int, Warpgroup> warpgroups;
constexpr std::size_t NAMED = 1 << 20;

void learn(std::vector<uint32_t>& known, const std::vector<uint32_t>& more) {
    known.resize(threads.size());
    for (std::size_t i = 0; i < more.size(); ++i) known[i] = std::max(known[i], more[i]);
}

void complete(Barrier& barrier) {
    if (barrier.left > 0 || barrier.due != 0) return;
    barrier.left = barrier.count;
    barrier.completed = barrier.gathered;
    ++barrier.phase;
    for (int thread : barrier.waiting) threads[thread].at = At::ready;
    barrier.waiting.clear();
}

void arrive(Barrier& barrier) {
    Thread& self = threads[now.thread];
    learn(barrier.gathered, self.known);
    barrier.gathered[now.thread] = self.tick++;
    --barrier.left;
    complete(barrier);
}

// Rows of 128 bytes; the engine swizzles addresses, as the products do.
void land(const Box& box) {
    const TensorMap& map = box.map;
    const std::size_t start = box.to - static_cast<char*>(shared_memory_begin());
    for (int64_t r = 0; r < map.box_rows; ++r)
        for (int64_t c = 0; c < 64; ++c) {
            std::size_t at = start + r * 128 + c * 2;
            at ^= (at >> 7 & 7) << 4;
            const bool inside = box.row + r < map.rows && box.column + c < map.columns;
            const char* from = static_cast<const char*>(map.base) + (box.row + r) * map.row_bytes + (box.column + c) * 2;
            uint16_t bits = 0;
            if (inside) std::memcpy(&bits, from, 2);
            std::memcpy(static_cast<char*>(shared_memory_begin()) + at, &bits, 2);
        }
}

void land_all(Barrier& barrier) {
    for (const Box& box : barrier.boxes) {
        land(box);
        barrier.due -= box.map.box_rows * 128;
    }
    const bool some = !barrier.boxes.empty();
    barrier.boxes.clear();
    if (some) complete(barrier);
}

void wait(Barrier& barrier, uint32_t phase) {
    land_all(barrier);
    while (barrier.phase == phase) {
        threads[now.thread].at = At::barrier;
        barrier.waiting.push_back(now.thread);
        wait_for_others();
    }
    learn(threads[now.thread].known, barrier.completed);
}

std::size_t offset_of(const void* p) { return static_cast<const char*>(p) - static_cast<const char*>(shared_memory_begin()); }

Barrier& barrier_at(const uint64_t* p, const void* pc) {
    auto found = barriers.find(offset_of(p));
    if (found == barriers.end()) fail(pc, "no barrier_init of the barrier at byte %zu", offset_of(p));
    return found->second;
}

void use_clocks() {
    if (clocked) return;
    clocked = true;
    start_clocks();
}

Barrier& named_barrier(int id, int count, const void* pc) {
    use_clocks();
    if (id < 1 || id > 15 || count % WARP) fail(pc, "named barrier %d of %d threads: 1 to 15, of whole warps", id, count);
    Barrier& barrier = barriers[NAMED + id];
    if (!barrier.count) barrier.count = barrier.left = count;
    if (barrier.count != count) fail(pc, "named barrier %d of %d threads and of %d", id, count, barrier.count);
    return barrier;
}

// Two bytes of an operand in shared memory, at `at` bytes behind its start: the hardware adds, then swizzles what it added.
uint16_t element_bits(uint64_t descriptor, std::size_t at, const void* pc) {
    std::size_t address = ((descriptor & 0x3fff) << 4) + at;
    if (descriptor >> 62 != 1) fail(pc, "only operands with rows of 128 swizzled bytes are emulated");
    address ^= (address >> 7 & 7) << 4;
    const char* p = static_cast<const char*>(shared_memory_begin()) + address;
    check_shared(p, 2, pc);
    check_read(p, 2, pc);
    check_fenced(p, 2, pc);
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return bits;
}

float element(uint64_t descriptor, std::size_t at, bool half, const void* pc) {
    const uint16_t bits = element_bits(descriptor, at, pc);
    return half ? half_bits_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

float register_element(const uint32_t* const* registers, int row, int k, bool half) {
    const uint32_t* mine = registers[row / 16 * WARP + row % 8 * 4 + k % 8 / 2];
    uint32_t word = mine[row % 16 / 8 + k / 8 * 2];
    uint16_t bits = static_cast<uint16_t>(k % 2 ? word >> 16 : word);
    return half ? half_bits_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

// 32 elements of k in the 32 bytes of each row: 64 rows of a, n of b.
void carry_out_8_bit(const Product& product, const void* pc) {
    static float a[64][32], b[256][32];
    auto load = [&](uint64_t descriptor, int rows, float (*to)[32]) {
        const std::size_t stride = (descriptor >> 32 & 0x3fff) << 4;
        for (int row = 0; row < rows; ++row)
            for (int k = 0; k < 32; k += 2) {
                const uint16_t pair = element_bits(descriptor, row / 8 * stride + row % 8 * 128 + k, pc);
                const uint32_t halves = fp8x2_to_half2(pair);
                for (int h = 0; h < 2; ++h)
                    to[row][k + h] = product.elements == Product::INT8 ? static_cast<int8_t>(pair >> (8 * h))
                                                                      : half_bits_to_float(static_cast<uint16_t>(halves >> (16 * h)));
            }
    };
    load(product.a, 64, a);
    load(product.b, product.n, b);
    for (int row = 0; row < 64; ++row)
        for (int n = 0; n < product.n; ++n) {
            double sum = 0.0;  // exact for int8, and far better than the hardware's 14 bits for e4m3
            for (int k = 0; k < 32; ++k) sum += static_cast<double>(a[row][k]) * b[n][k];
            float* d = product.d[row / 16 * WARP + row % 8 * 4 + n % 8 / 2] + n / 8 * 4 + row % 16 / 8 * 2 + n % 2;
            if (product.elements == Product::INT8) {
                int32_t total;
                std::memcpy(&total, d, 4);
                total = static_cast<int32_t>(sum) + (product.accumulate ? total : 0);
                std::memcpy(d, &total, 4);
            } else {
                *d = static_cast<float>(sum + (product.accumulate ? *d : 0.0f));
            }
        }
}

void carry_out(const Product& product, const void* pc) {
    if (product.elements != Product::BITS_16) return carry_out_8_bit(product, pc);
    static float a[64][16], b[16][256];
    auto strides = [](uint64_t descriptor) {
        return std::pair<std::size_t, std::size_t>((descriptor >> 16 & 0x3fff) << 4, (descriptor >> 32 & 0x3fff) << 4);
    };
    auto [a_leading, a_stride] = strides(product.a);
    auto [b_leading, b_stride] = strides(product.b);
    for (int row = 0; row < 64; ++row)
        for (int k = 0; k < 16; ++k)
            a[row][k] = product.from_registers ? register_element(product.registers, row, k, product.half)
                                               : element(product.a, row / 8 * a_stride + row % 8 * 128 + 2 * k, product.half, pc);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < product.n; ++n) {
            std::size_t at = product.transposed ? n / 64 * b_leading + k / 8 * b_stride + k % 8 * 128 + n % 64 * 2
                                                : n / 8 * b_stride + n % 8 * 128 + 2 * k;
            b[k][n] = element(product.b, at, product.half, pc);
        }
    for (int row = 0; row < 64; ++row) {
        double sum[256] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < product.n; ++n) sum[n] += static_cast<double>(a[row][k]) * b[k][n];
        for (int n = 0; n < product.n; ++n) {
            float& d = product.d[row / 16 * WARP + row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
            d = static_cast<float>(sum[n] + (product.accumulate ? d : 0.0f));
        }
    }
    (void)a_leading;
}

// What is read counts as read by the first lane of this warp.
void carry_out_up_to(int last, const void* pc) {
    Warpgroup& group = warpgroups[now.thread / WARPGROUP];
    const int me = now.thread;
    now.thread = me / WARP * WARP;
    while (group.done < last) {
        carry_out(group.open.front(), pc);
        group.open.pop_front();
        ++group.done;
    }
    now.thread = me;
}

void wait_as_a_warp(Thread* warp, const void* pc) {
    const int unfinished = warp[0].call.lane;
    for (int lane = 0; lane < WARP; ++lane) {
        if (warp[lane].call.lane != unfinished || warp[lane].product_groups != warp[0].product_groups)
            fail(pc, "lanes wait for different products");
        while (lane > 0 && static_cast<int>(warp[lane].product_groups.size()) > unfinished) warp[lane].product_groups.pop_front();
    }
    while (static_cast<int>(warp[0].product_groups.size()) > unfinished) {
        carry_out_up_to(warp[0].product_groups.front(), pc);
        warp[0].product_groups.pop_front();
    }
}

}  // namespace

bool happened_before(int other, uint32_t tick) {
    const std::vector<uint32_t>& known = threads[now.thread].known;
    return other == now.thread || (other < static_cast<int>(known.size()) && known[other] >= tick);
}

void forget_barriers() {
    clocked = false;
    barriers.clear();
    warpgroups.clear();
}

}  // namespace klab::emulator

namespace klab {
using namespace emulator;

void barrier_init(uint64_t* barrier, int count) {
    check_aligned(barrier, 8, HERE);
    check_shared(barrier, 8, HERE);
    use_clocks();
    Barrier fresh;
    fresh.count = fresh.left = count;
    barriers[offset_of(barrier)] = fresh;
}
void barrier_init_fence() {}
void barrier_arrive(uint64_t* barrier) { arrive(barrier_at(barrier, HERE)); }
void barrier_wait(uint64_t* barrier, uint32_t parity) {
    Barrier& found = barrier_at(barrier, HERE);
    // The phase of this parity is over unless it is the running one.
    if ((found.phase & 1) == parity) wait(found, found.phase);
    learn(threads[now.thread].known, found.completed);
}
void named_barrier_arrive(int id, int count) { arrive(named_barrier(id, count, HERE)); }
void named_barrier_sync(int id, int count) {
    Barrier& barrier = named_barrier(id, count, HERE);
    uint32_t phase = barrier.phase;
    arrive(barrier);
    wait(barrier, phase);
}
void barrier_arrive_expect(uint64_t* barrier, int bytes) {
    Barrier& found = barrier_at(barrier, HERE);
    found.due += bytes;
    arrive(found);
}
// The bytes are nobody's until the barrier's phase ends: they are NaN before, and belong to what the asking thread had done by its arrival.
void tma_load(void* box, const TensorMap& map, uint64_t* barrier, int column, int row) {
    Barrier& found = barrier_at(barrier, HERE);
    const std::size_t bytes = map.box_rows * 128;
    if (offset_of(box) % 1024) fail(HERE, "a box at byte %zu of shared memory: swizzled boxes start at multiples of 1024", offset_of(box));
    if (row < 0 || column < 0) fail(HERE, "a box at row %d, column %d", row, column);
    check_shared(box, bytes, HERE);
    Thread& self = threads[now.thread];
    const uint32_t tick = self.tick;
    if (tick > 1) self.tick = tick - 1;
    check_write(box, bytes, HERE);
    self.tick = tick;
    ++self.fences;  // what the engine writes needs no fence before a product
    for (int64_t r = 0; r < map.box_rows && row + r < map.rows && column < map.columns; ++r)
        check_read(static_cast<const char*>(map.base) + (row + r) * map.row_bytes + column * 2,
                   static_cast<std::size_t>(std::min<int64_t>(64, map.columns - column)) * 2, HERE);
    std::memset(box, 0xff, bytes);
    found.boxes.push_back(Box{static_cast<char*>(box), map, column, row});
    if (land_early || !found.waiting.empty()) land_all(found);
}
void fence_async_proxy() { ++threads[now.thread].fences; }

void wgmma_fence() {}
void wgmma_commit() { threads[now.thread].product_groups.push_back(threads[now.thread].products); }
void wgmma_wait_groups(int unfinished) {
    Call call;
    call.lane = unfinished;
    collective(At::warpgroup, call, wait_as_a_warp, HERE);
}

static void issue(float* d, const uint32_t* registers, Product product, const void* pc) {
    use_clocks();
    if (threads.size() % WARPGROUP) fail(pc, "wgmma in a block that is not made of warpgroups");
    Thread& self = threads[now.thread];
    const int first = now.thread / WARPGROUP * WARPGROUP;
    self.call.d = d;
    self.call.a = registers;
    self.at = At::warpgroup;
    ++self.products;
    Warpgroup& group = warpgroups[first / WARPGROUP];
    if (++group.arrived < WARPGROUP) return wait_for_others();
    group.arrived = 0;
    for (int i = 0; i < WARPGROUP; ++i) {
        Thread& thread = threads[first + i];
        if (thread.at != At::warpgroup || thread.products != self.products) fail(pc, "a warpgroup's threads issue different products");
        product.d[i] = thread.call.d;
        product.registers[i] = thread.call.a;
        thread.at = At::ready;
    }
    group.open.push_back(product);
    if (land_early) carry_out_up_to(self.products, pc);
}
void wgmma_issue(float* d, int n, bool half, const uint32_t* registers, uint64_t a, uint64_t b, bool transposed, bool accumulate) {
    issue(d, registers, Product{n, half, transposed, accumulate, registers != nullptr, a, b, Product::BITS_16, {}, {}}, HERE);
}
// Of 8-bit elements: d is int32_t for integers, else float.
void wgmma8_issue(void* d, int n, bool integers, uint64_t a, uint64_t b, bool accumulate) {
    const auto elements = integers ? Product::INT8 : Product::E4M3;
    issue(static_cast<float*>(d), nullptr, Product{n, false, false, accumulate, false, a, b, elements, {}, {}}, HERE);
}

}  // namespace klab
