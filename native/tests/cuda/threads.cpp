#include "threads.h"

#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace cuda_threads {

index3 thread, block, block_dim, grid_dim;

enum state { READY, IN_WARP, IN_BLOCK, ENDED };

// where a thread goes on, or the one that runs them all
struct spot {
    ucontext_t context;
    jmp_buf    jump;
    bool       begun = false;   // jump is set
};

struct fiber {
    spot                    place;
    std::unique_ptr<char[]> stack;
    state                   at;
    call                    what;
    uint64_t                value;                               // that it comes with
    uint64_t                seen;                                // what the last meeting of its warp or block left: its own value there
    uint32_t                values[WORDS], seen_values[WORDS];   // likewise

    struct copy {
        void *       dst;
        const void * src;
    };
    std::vector<copy> copies;   // under way
};

static const size_t STACK = 64 * 1024;

static std::vector<std::unique_ptr<fiber>> fibers;   // of one block, kept from launch to launch
static unsigned                            n_threads;
static unsigned                            current;
static spot                                scheduler;
static const std::function<void()> *       body;
static bool                                any_of_block;
static unsigned                            n_launches;
static std::vector<char>                   shared;   // of the block, with a gap behind it in which nothing may be written
static size_t                              n_shared;

static const size_t        GAP = 256, MOST_SHARED = 227 * 1024;
static const unsigned char EMPTY = 0x7f;

[[noreturn]] static void fail(const char * why) {
    fprintf(stderr, "CUDA would not compute this: %s (thread %u of block %u %u %u)\n", why, current, block.x, block.y, block.z);
    abort();
}

// swapcontext() asks the kernel each time: it is for the first time, and for a sanitizer that follows stacks by it
static void switch_to(spot & from, const spot & to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.jump) == 0) {
        from.begun = true;
        if (to.begun) {
            _longjmp(const_cast<spot &>(to).jump, 1);
        }
        setcontext(&to.context);
    }
#endif
}

static void fiber_main() {
    for (;;) {
        (*body)();
        fibers[current]->at = ENDED;
        switch_to(fibers[current]->place, scheduler);
    }
}

static void wait(state at, call what, uint64_t value) {
    fiber & f = *fibers[current];
    f.at      = at;
    f.what    = what;
    f.value   = value;
    switch_to(f.place, scheduler);
}

uint64_t meet_warp(call what, uint64_t value, unsigned lane) {
    wait(IN_WARP, what, value);
    const unsigned other = current / WARP * WARP + lane;
    if (lane >= WARP || other >= n_threads) {
        fail("a lane beyond the warp");
    }
    return fibers[other]->seen;
}

uint32_t ballot_warp(bool value) {
    wait(IN_WARP, BALLOT, value);
    uint32_t bits = 0;
    for (unsigned i = 0; i < WARP; i++) {
        bits |= (uint32_t) fibers[current / WARP * WARP + i]->seen << i;
    }
    return bits;
}

void meet_warp(call what, const uint32_t * values, unsigned n, lanes & all) {
    memcpy(fibers[current]->values, values, n * sizeof(uint32_t));
    wait(IN_WARP, what, 0);
    for (unsigned i = 0; i < WARP; i++) {
        memcpy(all.x[i], fibers[current / WARP * WARP + i]->seen_values, sizeof(all.x[i]));
    }
}

char * shared_memory() {
    return (char *) (((uintptr_t) shared.data() + 127) / 128 * 128);
}

bool is_shared(const void * p, size_t n) {
    return (const char *) p >= shared_memory() && (const char *) p + n <= shared_memory() + n_shared;
}

void copy_later(void * dst, const void * src) {
    if (!is_shared(dst, 16) || is_shared(src, 1) || (uintptr_t) dst % 16 != 0 || (uintptr_t) src % 16 != 0) {
        fail("an asynchronous copy that is not one of 16 aligned bytes into shared memory");
    }
    fibers[current]->copies.push_back({ dst, src });
}

void wait_for_copies() {
    for (const fiber::copy & c : fibers[current]->copies) {
        memcpy(c.dst, c.src, 16);
    }
    fibers[current]->copies.clear();
}

bool meet_block(bool value) {
    wait(IN_BLOCK, BARRIER, value);
    return any_of_block;
}

// Lets a warp go on whose threads have all met. False: they have not.
static bool release_warp(unsigned first) {
    const unsigned end  = std::min(first + WARP, n_threads);
    unsigned       here = 0, ended = 0;
    for (unsigned i = first; i < end; i++) {
        here += fibers[i]->at == IN_WARP;
        ended += fibers[i]->at == ENDED;
    }
    if (here > 0 && (ended > 0 || end - first < WARP)) {
        fail("a function of the whole warp without some of its threads");
    }
    if (here < WARP) {
        return false;
    }
    for (unsigned i = first; i < end; i++) {
        if (fibers[i]->what != fibers[first]->what) {
            fail("different functions of the warp in its threads");
        }
        fibers[i]->seen = fibers[i]->value;
        memcpy(fibers[i]->seen_values, fibers[i]->values, sizeof(fibers[i]->values));
        fibers[i]->at = READY;
    }
    return true;
}

// Lets the block go on, likewise. How many of its threads have ended.
static unsigned release_block() {
    unsigned ended = 0, here = 0;
    bool     any = false;
    for (unsigned i = 0; i < n_threads; i++) {
        ended += fibers[i]->at == ENDED;
        here += fibers[i]->at == IN_BLOCK;
        any = any || (fibers[i]->at == IN_BLOCK && fibers[i]->value != 0);
    }
    if (here + ended < n_threads) {
        fail("threads wait for others that do not come");
    }
    any_of_block = any;
    for (unsigned i = 0; i < n_threads; i++) {
        fibers[i]->at = fibers[i]->at == IN_BLOCK ? READY : fibers[i]->at;
    }
    return ended;
}

// One warp after the other goes as far as it can: what they hand over without a barrier shows.
static void run_block() {
    memset(shared_memory(), EMPTY, n_shared + GAP);
    for (unsigned i = 0; i < n_threads; i++) {
        fibers[i]->at = READY;
        fibers[i]->copies.clear();
    }
    const unsigned n_warps = (n_threads + WARP - 1) / WARP;
    unsigned       turn    = n_launches;
    do {
        for (unsigned k = 0; k < n_warps; k++) {
            // forwards and backwards, from another one each time
            const unsigned w = turn % 2 ? n_warps - 1 - (k + turn) % n_warps : (k + turn) % n_warps;
            do {
                for (unsigned j = 0; j < WARP; j++) {
                    const unsigned i = w * WARP + (turn % 2 ? WARP - 1 - j : j);
                    if (i < n_threads && fibers[i]->at == READY) {
                        current = i;
                        thread  = { i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y };
                        switch_to(scheduler, fibers[i]->place);
                    }
                }
            } while (release_warp(w * WARP));
        }
        turn++;
    } while (release_block() < n_threads);
    if (!std::all_of(shared_memory() + n_shared, shared_memory() + n_shared + GAP, [](char c) { return (unsigned char) c == EMPTY; })) {
        fail("written behind the end of shared memory");
    }
}

void launch(index3 grid, index3 dim, size_t n_shared_bytes, const std::function<void()> & kernel) {
    body      = &kernel;
    grid_dim  = grid;
    block_dim = dim;
    n_threads = dim.x * dim.y * dim.z;
    if (n_threads == 0 || n_threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0) {
        fail("a launch without threads, or with too many in a block");
    }
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        fail("a launch of too many blocks in one dimension");
    }
    if (n_shared_bytes > MOST_SHARED) {
        fail("a launch with more shared memory than a block can have");
    }
    n_shared = n_shared_bytes;
    shared.resize(n_shared + GAP + 128);
    while (fibers.size() < n_threads) {
        fibers.push_back(std::make_unique<fiber>());
        fiber & f = *fibers.back();
        f.stack.reset(new char[STACK]);
        getcontext(&f.place.context);
        f.place.context.uc_stack.ss_sp   = f.stack.get();
        f.place.context.uc_stack.ss_size = STACK;
        f.place.context.uc_link          = nullptr;
        makecontext(&f.place.context, fiber_main, 0);
    }
    const uint64_t n_blocks = (uint64_t) grid.x * grid.y * grid.z;
    n_launches++;
    for (uint64_t k = 0; k < n_blocks; k++) {
        const uint64_t from = (k + 61 * n_launches) % n_blocks, i = n_launches % 2 ? n_blocks - 1 - from : from;
        block = { (unsigned) (i % grid.x), (unsigned) (i / grid.x % grid.y), (unsigned) (i / grid.x / grid.y) };
        run_block();
    }
}

}   // namespace cuda_threads
