// defines: CUDA's threads on a CPU. A kernel that is compiled as C++ runs as CUDA would run it: every thread with a stack of its own, a
// block at a time, in an order that changes from launch to launch, so that a result that depends on it shows.
#pragma once

#include <cstdint>
#include <functional>

namespace cuda_threads {

struct index3 {
    unsigned x, y, z;
};

// of the thread that runs
extern index3 thread, block, block_dim, grid_dim;

// Runs `kernel` once for each thread of each block. Aborts where CUDA would hang or leave the result undefined.
void launch(index3 grid, index3 block, const std::function<void()> & kernel);

enum call { SHUFFLE, BALLOT, BARRIER };

// Waits until every thread of the warp has come to the same call; then the value that lane `lane` has come with.
uint64_t meet_warp(call what, uint64_t value, unsigned lane);
uint32_t ballot_warp(bool value);
// Waits until every thread of the block that has not ended has come here: whether one of them has come with true.
bool     meet_block(bool value);

}   // namespace cuda_threads
