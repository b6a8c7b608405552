// defines: toy::profiler — time by operation over a few steps, and how near the products come to what this machine can do (`toy train --profile`)
#pragma once

#include "engine/backend.h"
#include "engine/config.h"
#include "engine/corpus.h"
#include "engine/events.h"

#include <unordered_map>
#include <vector>

namespace toy {

// Does nothing, and costs nothing, unless log.profile says for how many steps. The first steps warm up and do not count; a run that is too short
// for that is profiled from its first step. Times are medians over the steps, operation by operation: what another program did to one is no finding.
struct profiler {
    profiler(const config & cfg, backend & be, const data_reader & reader);
    ~profiler();
    profiler(const profiler &)             = delete;
    profiler & operator=(const profiler &) = delete;

    void begin_step(int64_t steps_left);   // this one included
    void end_step(double seconds);
    bool has_result() const { return !steps.empty(); }
    void write(json_object & event);   // measures the roof once more

  private:
    struct step_time {
        double total, data;   // seconds
    };
    struct node_time {
        std::vector<double> seconds;   // of each step
        int64_t             calls = 0;
    };

    backend &              be;
    const data_reader &    reader;
    const int              n_wanted;
    int                    n_warm = -1;
    std::vector<step_time> steps;
    double                 reader_before = 0;
    double                 last          = 0;          // when the node before this one was done
    int                    precision     = -1;         // of the run's own products: enum ggml_prec
    double                 roofs[2]      = { 0, 0 };   // GFLOP/s before and after

    std::unordered_map<const ggml_tensor *, node_time> nodes;

    static void on_node(const ggml_tensor * node, void * self);
    double      measure_roof();
};

}   // namespace toy
