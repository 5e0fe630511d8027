// Runs a kernel on the host: blocks one after another, the threads of a block as fibers that take turns. A thread runs until it waits
// for others: at sync_threads, sync_warp, a shuffle, ldmatrix or mma. The last to arrive carries the collective operation out.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "device.cuh"
#include "emulator.h"

extern "C" void klab_entry(void** args);

namespace klab::emulator {

Now now;
std::vector<Thread> threads;
bool land_early;

namespace {

constexpr std::size_t STACK_BYTES = 256 << 10;
const char* const NAMES[] = {"running", "sync_threads", "sync_warp", "shfl", "ldmatrix", "mma", "a barrier", "wgmma", "its end"};

std::vector<char*> stacks;
int block_threads, grid[3], block[3], alive, at_barrier;
void** arguments;
jmp_buf scheduler, abandon;
char message[512];
const void* fault_pc;

void finish(Thread& self) {
    const Thread* warp = &threads[now.thread / WARP * WARP];
    for (int lane = 0; lane < WARP; ++lane)
        if (warp[lane].at != At::ready && warp[lane].at != At::done && warp[lane].at != At::sync_threads && warp[lane].at != At::barrier)
            fail(nullptr, "lane %d of warp %d returns while lane %d is at %s: all 32 lanes must reach it together", now.thread % WARP,
                 now.thread / WARP, lane, NAMES[int(warp[lane].at)]);
    self.at = At::done;
    --alive;
    _longjmp(scheduler, 1);
}

void trampoline() {
    klab_entry(arguments);
    finish(threads[now.thread]);
}

void release_block() {
    ++now.epoch;
    at_barrier = 0;
    for (Thread& t : threads)
        if (t.at == At::sync_threads) t.at = At::ready;
}

void resume(int index) {
    Thread& t = threads[index];
    now.thread = index;
    now.sync = t.sync;
    now.stack = t.stack;
    now.stack_bytes = STACK_BYTES;
    if (_setjmp(scheduler)) return;
    if (t.started) _longjmp(t.here, 1);
    t.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = t.stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, trampoline, 0);
    setcontext(&context);
}

Thread* warp_of(int thread) { return &threads[thread / WARP * WARP]; }

// Arrive at a collective; true for the lane that arrives last, which then carries it out and calls release_warp.
bool arrive(At at, const void* pc) {
    Thread* warp = warp_of(now.thread);
    threads[now.thread].at = at;
    bool all = true;
    for (int lane = 0; lane < WARP; ++lane) {
        At other = warp[lane].at;
        if (other == At::ready || other == At::barrier) all = false;
        else if (other != at)
            fail(pc, "lane %d of warp %d is at %s while lane %d is at %s: all 32 lanes must reach it together", now.thread % WARP,
                 now.thread / WARP, NAMES[int(at)], lane, NAMES[int(other)]);
    }
    return all;
}

void release_warp() {
    Thread* warp = warp_of(now.thread);
    for (int lane = 0; lane < WARP; ++lane) warp[lane].at = At::ready;
}

void on_signal(int number, siginfo_t*, void* context) {
#if defined(__x86_64__)
    fault_pc = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
    fault_pc = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc + 1);
#endif
    const char* what = number == SIGSEGV || number == SIGBUS ? "an access to unmapped memory"
                       : number == SIGFPE                    ? "a division by zero"
                                                             : "undefined behaviour: a misaligned access, an array index out of range, "
                                                               "a shift or a signed overflow";
    fail(fault_pc, "%s", what);
}

void report_deadlock() {
    int first = -1;
    for (int i = 0; i < block_threads; ++i) {
        if (threads[i].at == At::done) continue;
        if (first < 0) first = i;
        if (threads[i].at != threads[first].at)
            fail(nullptr, "deadlock: thread %d waits at %s, thread %d at %s", first, NAMES[int(threads[first].at)], i, NAMES[int(threads[i].at)]);
    }
    fail(nullptr, "deadlock: thread %d waits at %s for lanes that have returned", first, NAMES[int(threads[first].at)]);
}

void run_block(std::size_t smem_bytes, int order) {
    now.first_epoch = ++now.epoch;
    forget_barriers();
    fresh_shared_memory(smem_bytes);
    threads.assign(block_threads, Thread{});
    for (int i = 0; i < block_threads; ++i) threads[i].stack = stacks[i];
    alive = block_threads;
    at_barrier = 0;
    // Order 0: ascending. 1: descending. Others seed a permutation.
    std::vector<int> turns(block_threads);
    std::iota(turns.begin(), turns.end(), 0);
    if (order == 1) std::reverse(turns.begin(), turns.end());
    if (order > 1) std::shuffle(turns.begin(), turns.end(), std::mt19937(order));
    while (alive > 0) {
        bool progress = false;
        for (int i : turns) {
            if (threads[i].at != At::ready) continue;
            progress = true;
            resume(i);
        }
        // Threads that have returned no longer count at a barrier.
        if (alive > 0 && at_barrier == alive) {
            release_block();
            progress = true;
        }
        if (!progress) report_deadlock();
    }
}

}  // namespace

void wait_for_others() {
    if (_setjmp(threads[now.thread].here) == 0) _longjmp(scheduler, 1);
}

void collective(At at, const Call& call, void (*carry_out)(Thread* warp, const void* pc), const void* pc) {
    threads[now.thread].call = call;
    if (arrive(at, pc)) {
        carry_out(warp_of(now.thread), pc);
        release_warp();
    } else {
        wait_for_others();
    }
}

void fail(const void* pc, const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::vsnprintf(message, sizeof message, format, list);
    va_end(list);
    fault_pc = pc;
    _longjmp(abandon, 1);
}

}  // namespace klab::emulator

// ------------------------------------------------------------------------------------------- the primitives of device.cuh
#define HERE __builtin_return_address(0)
namespace klab {
using namespace emulator;

int thread_idx() { return now.thread; }
int block_idx_x() { return block[0]; }
int block_idx_y() { return block[1]; }
int block_idx_z() { return block[2]; }
int grid_dim_x() { return grid[0]; }
int grid_dim_y() { return grid[1]; }
int grid_dim_z() { return grid[2]; }
void* shared_memory_base() { return shared_memory_begin(); }

void sync_threads() {
    threads[now.thread].at = At::sync_threads;
    ++at_barrier;
    wait_for_others();
}

void sync_warp() {
    collective(At::sync_warp, Call{}, [](Thread* warp, const void*) {
        for (int lane = 0; lane < WARP; ++lane) ++warp[lane].sync;
    }, HERE);
    now.sync = threads[now.thread].sync;
}

}  // namespace klab

struct Tensor {
    char* base;
    std::size_t bytes;
    const uint8_t* accessible;
    std::size_t item_bytes;
};

// Returns 0, or 1 with the reason in `text` and the offset in this library of the instruction at fault (0 if unknown) in `offset`.
extern "C" int klab_launch(const int* grid_size, int block_size, std::size_t smem_bytes, void** args, int tensors, const Tensor* tensor,
                           int order, int early, char* text, std::size_t text_bytes, std::size_t* offset) {
    using namespace klab::emulator;
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    struct sigaction before[5], action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    static char handler_stack[64 << 10];  // a thread's own stack may be what overflowed
    stack_t handler{}, stack_before;
    handler.ss_sp = handler_stack;
    handler.ss_size = sizeof handler_stack;
    sigaltstack(&handler, &stack_before);
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &action, &before[i]);
    int failed = 0;
    if (_setjmp(abandon) == 0) {
        now = Now{};
        forget_tensors();
        fresh_shared_memory(smem_bytes);
        for (int i = 0; i < tensors; ++i) add_tensor(tensor[i].base, tensor[i].bytes, tensor[i].accessible, tensor[i].item_bytes);
        if (block_size < WARP || block_size % WARP || block_size > 1024) fail(nullptr, "%d threads a block: not a multiple of 32 up to 1024", block_size);
        while (static_cast<int>(stacks.size()) < block_size) {
            void* map = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (map == MAP_FAILED) fail(nullptr, "no memory for the stacks of %d threads", block_size);
            stacks.push_back(static_cast<char*>(map));
        }
        block_threads = block_size;
        std::memcpy(grid, grid_size, sizeof grid);
        land_early = early != 0;
        arguments = args;
        for (block[2] = 0; block[2] < grid[2]; ++block[2])
            for (block[1] = 0; block[1] < grid[1]; ++block[1])
                for (block[0] = 0; block[0] < grid[0]; ++block[0]) run_block(smem_bytes, order);
    } else {
        failed = 1;
        std::snprintf(text, text_bytes, "block (%d, %d, %d): %s", block[0], block[1], block[2], message);
        Dl_info library;
        *offset = fault_pc && dladdr(fault_pc, &library) ? static_cast<const char*>(fault_pc) - static_cast<char*>(library.dli_fbase) : 0;
    }
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    return failed;
}
