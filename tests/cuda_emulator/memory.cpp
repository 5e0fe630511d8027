// Every access of an emulated kernel to memory comes here: the kernel is compiled with -fsanitize=thread, which calls a __tsan_ function
// before each load and store, and those are defined below (libtsan is not linked). So bounds are exact to the byte, and a missing
// barrier is found by rule and not by luck: whatever order the threads happen to run in.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "emulator.h"

namespace klab::emulator {
namespace {

constexpr int NOBODY = -1, SEVERAL = -2;

// What is known of one byte.
struct Cell {
    uint32_t written_epoch = 0, written_sync = 0, read_epoch = 0, read_sync = 0;
    int16_t writer = NOBODY, reader = NOBODY, reading_warp = NOBODY;
    int16_t pending = NOBODY;  // the thread whose cp.async may land here at any moment
    bool accessible = true;
};

// What is known of one byte of shared memory in a block with barriers of its parts: when it was written, and its concurrent readers.
struct Clock {
    struct Reader {
        int16_t thread = NOBODY;
        uint32_t tick = 0;
    };
    uint32_t written = 0, fences = 0;
    Reader readers[4];
    bool crowded = false;  // more concurrent readers than are remembered: no write is ordered behind them but by sync_threads
};

struct Region {
    char* begin;
    std::size_t bytes;
    bool shared;
    std::vector<Cell> cells;
    bool holds(const char* p, std::size_t n) const { return p >= begin && p + n <= begin + bytes; }
    bool touches(const char* p, std::size_t n) const { return p < begin + bytes && p + n > begin; }
};

std::vector<Region> regions;  // [0] is shared memory
std::vector<Clock> clocks;    // of its bytes, if the block is `clocked`
constexpr std::size_t SHARED_LIMIT = 256 << 10;
char* shared_base = nullptr;

const char* what(const Region& region) { return region.shared ? "shared memory" : "a tensor"; }

[[noreturn]] void outside(const char* verb, const char* p, std::size_t n, const void* pc) {
    // The region meant is the nearest one: tensors of a few bytes lie close together on the heap.
    const Region* meant = nullptr;
    std::ptrdiff_t least = 4096;
    for (const Region& region : regions) {
        const std::ptrdiff_t before = region.begin - (p + n), behind = p - (region.begin + region.bytes);
        const std::ptrdiff_t distance = region.touches(p, n) ? -1 : before > behind ? before : behind;
        if (distance < least) least = distance, meant = &region;
    }
    if (meant != nullptr)
        fail(pc, "%s of %zu bytes at byte %td of %s, of which %zu are allowed", verb, n, p - meant->begin, what(*meant), meant->bytes);
    fail(pc, "%s of %zu bytes outside shared memory and every tensor", verb, n);
}

Region& region_of(const char* verb, const void* address, std::size_t n, const void* pc) {
    const char* p = static_cast<const char*>(address);
    for (Region& region : regions) {
        if (!region.holds(p, n)) continue;
        bool allowed = true;
        for (std::size_t i = 0; i < n; ++i) allowed &= region.cells[p - region.begin + i].accessible;
        if (allowed) return region;
    }
    outside(verb, p, n, pc);
}

bool on_stack(const void* address) {
    const char* p = static_cast<const char*>(address);
    return p >= now.stack && p < now.stack + now.stack_bytes;
}

[[noreturn]] void race(const char* mine, const char* theirs, int other, int warp, const Region& region, std::size_t at, const void* pc) {
    char who[32] = "other threads";
    if (other >= 0) std::snprintf(who, sizeof who, "thread %d", other);
    fail(pc, "thread %d %s byte %zu of %s, which %s %s: no %s between", now.thread, mine, at, what(region), who, theirs,
         warp == now.thread / WARP ? "sync_warp" : "sync_threads");
}

[[noreturn]] void race_of_blocks(const char* mine, const char* theirs, const Region& region, std::size_t at, const void* pc) {
    fail(pc, "thread %d %s byte %zu of %s, which another block %s: blocks of one launch have no order", now.thread, mine, at, what(region),
         theirs);
}

[[noreturn]] void not_waited(const char* mine, const Region& region, std::size_t at, int pending, const void* pc) {
    fail(pc, "thread %d %s byte %zu of %s, where a cp.async of thread %d is still under way: no cp_async_wait", now.thread, mine, at,
         what(region), pending);
}

bool unordered(int other, uint32_t epoch, uint32_t sync) {
    return epoch == now.epoch && other != now.thread && (other / WARP != now.thread / WARP || sync == now.sync);
}

bool readers_before(const Clock& clock) {
    if (clock.crowded) return false;
    for (const Clock::Reader& reader : clock.readers)
        if (reader.thread != NOBODY && !happened_before(reader.thread, reader.tick)) return false;
    return true;
}

void note_write(std::size_t at) {
    clocks[at] = Clock{};
    clocks[at].written = threads[now.thread].tick;
    clocks[at].fences = threads[now.thread].fences;
}

void note_read(std::size_t at) {
    Clock& clock = clocks[at];
    for (Clock::Reader& reader : clock.readers)
        if (reader.thread == NOBODY || happened_before(reader.thread, reader.tick)) {
            reader.thread = static_cast<int16_t>(now.thread);
            reader.tick = threads[now.thread].tick;
            return;
        }
    clock.crowded = true;
}

void touch_write(Region& region, std::size_t at, const void* pc) {
    Cell& cell = region.cells[at];
    const bool timed = clocked && region.shared;
    if (cell.pending != NOBODY) not_waited("writes", region, at, cell.pending, pc);
    if (cell.written_epoch && unordered(cell.writer, cell.written_epoch, cell.written_sync) &&
        !(timed && happened_before(cell.writer, clocks[at].written)))
        race("writes", "wrote", cell.writer, cell.writer / WARP, region, at, pc);
    if (cell.read_epoch == now.epoch) {
        bool other_warp = cell.reading_warp != now.thread / WARP;
        bool other_lane = cell.reader != now.thread && cell.read_sync == now.sync;
        if ((other_warp || other_lane) && !(timed && readers_before(clocks[at])))
            race("writes", "read", other_warp ? SEVERAL : cell.reader, cell.reading_warp, region, at, pc);
    }
    if (cell.written_epoch && cell.written_epoch < now.first_epoch) race_of_blocks("writes", "wrote", region, at, pc);
    if (cell.read_epoch && cell.read_epoch < now.first_epoch) race_of_blocks("writes", "read", region, at, pc);
    cell.written_epoch = now.epoch;
    cell.written_sync = now.sync;
    cell.writer = static_cast<int16_t>(now.thread);
    if (timed) note_write(at);
}

void touch_read(Region& region, std::size_t at, const void* pc) {
    Cell& cell = region.cells[at];
    if (cell.pending != NOBODY) not_waited("reads", region, at, cell.pending, pc);
    const bool timed = clocked && region.shared;
    if (cell.written_epoch && unordered(cell.writer, cell.written_epoch, cell.written_sync) &&
        !(timed && happened_before(cell.writer, clocks[at].written)))
        race("reads", "wrote", cell.writer, cell.writer / WARP, region, at, pc);
    if (cell.written_epoch && cell.written_epoch < now.first_epoch) race_of_blocks("reads", "wrote", region, at, pc);
    int warp = now.thread / WARP;
    if (cell.read_epoch != now.epoch) {
        cell.reader = static_cast<int16_t>(now.thread);
        cell.reading_warp = static_cast<int16_t>(warp);
    } else if (cell.reading_warp != warp) {
        cell.reading_warp = SEVERAL;
    } else {
        cell.reader = static_cast<int16_t>(cell.reader == now.thread || cell.read_sync != now.sync ? now.thread : SEVERAL);
    }
    cell.read_epoch = now.epoch;
    cell.read_sync = now.sync;
    if (timed) note_read(at);
}

}  // namespace

void add_tensor(char* base, std::size_t bytes, const uint8_t* accessible, std::size_t item_bytes) {
    Region region{base, bytes, false, std::vector<Cell>(bytes)};
    for (std::size_t i = 0; i < bytes; ++i) region.cells[i].accessible = accessible[i / item_bytes] != 0;
    regions.push_back(std::move(region));
}

void forget_tensors() { regions.clear(); }

void fresh_shared_memory(std::size_t bytes) {
    if (!shared_base) {
        void* map = mmap(nullptr, SHARED_LIMIT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        shared_base = static_cast<char*>(map);
    }
    if (bytes > SHARED_LIMIT) fail(nullptr, "%zu bytes of shared memory: a block has at most 227 KiB", bytes);
    if (regions.empty()) regions.push_back(Region{shared_base, bytes, true, {}});
    regions[0].cells.assign(bytes, Cell{});
    std::memset(shared_base, 0xff, bytes);  // NaN in every floating-point type
}

void* shared_memory_begin() { return shared_base; }

void check_read(const void* address, std::size_t bytes, const void* pc) {
    if (on_stack(address)) return;
    Region& region = region_of("read", address, bytes, pc);
    std::size_t at = static_cast<const char*>(address) - region.begin;
    for (std::size_t i = 0; i < bytes; ++i) touch_read(region, at + i, pc);
}

void check_write(const void* address, std::size_t bytes, const void* pc) {
    if (on_stack(address)) return;
    Region& region = region_of("write", address, bytes, pc);
    std::size_t at = static_cast<const char*>(address) - region.begin;
    for (std::size_t i = 0; i < bytes; ++i) touch_write(region, at + i, pc);
}

void check_aligned(const void* address, std::size_t bytes, const void* pc) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail(pc, "a %zu-byte access at address ...%03zx is not aligned", bytes,
                                                           static_cast<std::size_t>(reinterpret_cast<uintptr_t>(address) % 4096));
}

void check_shared(const void* address, std::size_t bytes, const void* pc) {
    if (!regions[0].holds(static_cast<const char*>(address), bytes)) outside("access to shared memory", static_cast<const char*>(address), bytes, pc);
}

void begin_pending(void* smem, const void* pc) {
    check_shared(smem, 16, pc);
    check_write(smem, 16, pc);
    std::size_t at = static_cast<char*>(smem) - regions[0].begin;
    for (int i = 0; i < 16; ++i) regions[0].cells[at + i].pending = static_cast<int16_t>(now.thread);
}

void end_pending(void* smem) {
    std::size_t at = static_cast<char*>(smem) - regions[0].begin;
    for (int i = 0; i < 16; ++i) {
        Cell& cell = regions[0].cells[at + i];
        cell.pending = NOBODY;
        cell.written_epoch = now.epoch;
        cell.written_sync = now.sync;
        if (clocked) note_write(at + i);
    }
}

void start_clocks() { clocks.assign(regions[0].bytes, Clock{}); }

void check_fenced(const void* address, std::size_t bytes, const void* pc) {
    std::size_t at = static_cast<const char*>(address) - regions[0].begin;
    for (std::size_t i = at; i < at + bytes; ++i) {
        int writer = regions[0].cells[i].writer;
        if (writer != NOBODY && clocks[i].fences >= threads[writer].fences)
            fail(pc, "the tensor cores read byte %zu of shared memory, which thread %d wrote: no fence_async_proxy between", i, writer);
    }
}

}  // namespace klab::emulator

// ----------------------------------------------------------------------------- what the instrumented kernel calls
#define HERE __builtin_return_address(0)
#define HOOKS(n)                                                                                            \
    void __tsan_read##n(void* p) { klab::emulator::check_read(p, n, HERE); }                                \
    void __tsan_write##n(void* p) { klab::emulator::check_write(p, n, HERE); }                              \
    void __tsan_unaligned_read##n(void* p) { klab::emulator::check_read(p, n, HERE); }                      \
    void __tsan_unaligned_write##n(void* p) { klab::emulator::check_write(p, n, HERE); }                    \
    void __tsan_volatile_read##n(void* p) { klab::emulator::check_read(p, n, HERE); }                       \
    void __tsan_volatile_write##n(void* p) { klab::emulator::check_write(p, n, HERE); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, std::size_t n) { klab::emulator::check_read(p, n, HERE); }
void __tsan_write_range(void* p, std::size_t n) { klab::emulator::check_write(p, n, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
