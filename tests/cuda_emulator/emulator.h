// Inside the emulator: what scheduler.cpp (threads, barriers, warp-collective functions) and memory.cpp (who may touch what) share.
#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace klab::emulator {

constexpr int WARP = 32;

// Where the running thread stands. Two accesses of one block are ordered if their `epoch` differs (a sync_threads lies between), or if
// they are of one warp and their `sync` differs (a sync_warp lies between).
struct Now {
    int thread = 0;
    uint32_t epoch = 0;              // rises at every sync_threads, and from block to block; 0 is before the launch
    uint32_t first_epoch = 0;        // of this block: whatever is older was done by another block of this launch
    uint32_t sync = 0;               // sync_warps that this thread has passed
    const char* stack = nullptr;     // of this thread
    std::size_t stack_bytes = 0;
};
extern Now now;

// Abandon the launch with this message. `pc` is an address in the kernel's code, for the line number.
[[noreturn]] void fail(const void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));

void add_tensor(char* base, std::size_t bytes, const uint8_t* accessible, std::size_t item_bytes);
void forget_tensors();
// Poison the shared memory and forget who touched it.
void fresh_shared_memory(std::size_t bytes);
void* shared_memory_begin();

void check_read(const void* address, std::size_t bytes, const void* pc);
void check_write(const void* address, std::size_t bytes, const void* pc);
void check_aligned(const void* address, std::size_t bytes, const void* pc);
void check_shared(const void* address, std::size_t bytes, const void* pc);
// A cp.async to these 16 bytes begins, or ends: between the two nobody may touch them.
void begin_pending(void* smem, const void* pc);
void end_pending(void* smem);

enum class At { ready, sync_threads, sync_warp, shuffle, ldmatrix, mma, barrier, warpgroup, done };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

// What a lane brings to a collective operation.
struct Call {
    uint32_t* out = nullptr;
    uint32_t value = 0;
    int lane = 0;
    const void* row = nullptr;
    int matrices = 0;
    bool trans = false;
    float* d = nullptr;
    const uint32_t* a = nullptr;
    const uint32_t* b = nullptr;
    float (*to_float)(uint16_t) = nullptr;
};

struct Thread {
    At at = At::ready;
    bool started = false;
    uint32_t sync = 0;
    jmp_buf here;
    char* stack = nullptr;
    Call call;
    std::vector<Copy> open;               // issued, not committed
    std::deque<std::vector<Copy>> groups;  // committed, not waited for
    // For kernels with barriers of part of a block: how often this thread has published what it did, and what it knows of others.
    uint32_t tick = 1;
    std::vector<uint32_t> known;  // known[t]: what thread t did up to its tick of this number happened before
    uint32_t fences = 0;          // fence_async_proxy of this thread
    int products = 0;             // of its warpgroup, issued
    std::deque<int> product_groups;
};

extern std::vector<Thread> threads;  // of the running block
extern bool land_early;              // copies arrive at once, not at the wait
extern bool clocked;                 // this block has barriers beside sync_threads: orders are kept thread by thread (hopper.cpp)

// From here on orders are kept thread by thread in shared memory.
void start_clocks();
// Has what thread `other` did at its tick happened before what this thread does now?
bool happened_before(int other, uint32_t tick);
// Fail unless whoever wrote these bytes of shared memory has fenced them for the tensor cores since.
void check_fenced(const void* address, std::size_t bytes, const void* pc);
void forget_barriers();

// Arrive at a collective operation. The lane that arrives last carries it out for all; `warp` are its 32 threads.
void collective(At at, const Call& call, void (*carry_out)(Thread* warp, const void* pc), const void* pc);
// Leave the processor until somebody makes this thread ready again.
void wait_for_others();

}  // namespace klab::emulator
