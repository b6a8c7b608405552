#include "threads.h"

#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace cuda_threads {

index3 thread, block, block_dim, grid_dim;

static const unsigned WARP = 32;

enum state { READY, IN_WARP, IN_BLOCK, ENDED };

struct fiber {
    ucontext_t              context;
    std::unique_ptr<char[]> stack;
    state                   at;
    call                    what;
    uint64_t                value;   // that it comes with
    uint64_t                seen;    // what the last meeting of its warp or block left: its own value there
};

static const size_t STACK = 64 * 1024;

static std::vector<std::unique_ptr<fiber>> fibers;   // of one block, kept from launch to launch
static unsigned                            n_threads;
static unsigned                            current;
static ucontext_t                          scheduler;
static const std::function<void()> *       body;
static bool                                any_of_block;
static unsigned                            n_launches;

[[noreturn]] static void fail(const char * why) {
    fprintf(stderr, "CUDA would not compute this: %s (thread %u of block %u %u %u)\n", why, current, block.x, block.y, block.z);
    abort();
}

static void fiber_main() {
    for (;;) {
        (*body)();
        fibers[current]->at = ENDED;
        swapcontext(&fibers[current]->context, &scheduler);
    }
}

static void wait(state at, call what, uint64_t value) {
    fiber & f = *fibers[current];
    f.at      = at;
    f.what    = what;
    f.value   = value;
    swapcontext(&f.context, &scheduler);
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
        fibers[i]->at   = READY;
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
    for (unsigned i = 0; i < n_threads; i++) {
        fibers[i]->at = READY;
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
                        swapcontext(&scheduler, &fibers[i]->context);
                    }
                }
            } while (release_warp(w * WARP));
        }
        turn++;
    } while (release_block() < n_threads);
}

void launch(index3 grid, index3 dim, const std::function<void()> & kernel) {
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
    while (fibers.size() < n_threads) {
        fibers.push_back(std::make_unique<fiber>());
        fiber & f = *fibers.back();
        f.stack.reset(new char[STACK]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link          = nullptr;
        makecontext(&f.context, fiber_main, 0);
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
