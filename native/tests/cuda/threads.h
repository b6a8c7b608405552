// defines: CUDA's threads on a CPU. A kernel that is compiled as C++ runs as CUDA would run it: every thread with a stack of its own, a
// block at a time, in an order that changes from launch to launch, so that a result that depends on it shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cuda_threads {

struct index3 {
    unsigned x, y, z;
};

// of the thread that runs
extern index3 thread, block, block_dim, grid_dim;

// Runs `kernel` once for each thread of each block, which has n_shared bytes of memory. Aborts where CUDA would hang or leave the result undefined.
void launch(index3 grid, index3 block, size_t n_shared, const std::function<void()> & kernel);

// of the block that runs: full of huge numbers when it begins
char * shared_memory();
// whether n bytes from p on lie in it
bool   is_shared(const void * p, size_t n);

enum call { SHUFFLE, BALLOT, MATRIX, PRODUCT, WARP_BARRIER, BARRIER };

// Waits until every thread of the warp has come to the same call; then the value that lane `lane` has come with.
uint64_t           meet_warp(call what, uint64_t value, unsigned lane);
uint32_t           ballot_warp(bool value);
// Likewise, with what each of the lanes has come with: n numbers of at most WORDS.
constexpr unsigned WARP = 32, WORDS = 6;
struct lanes {
    uint32_t x[WARP][WORDS];
};
void meet_warp(call what, const uint32_t * values, unsigned n, lanes & all);
// Waits until every thread of the block that has not ended has come here: whether one of them has come with true.
bool meet_block(bool value);

// 16 bytes that reach shared memory when the thread waits for them, and not before
void copy_later(void * dst, const void * src);
void wait_for_copies();

}   // namespace cuda_threads
