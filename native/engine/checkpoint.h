// defines: checkpoints — everything a resume needs, whole or absent
//
//   checkpoints/step_<N>/state.gguf   weights, both moments, and as metadata: step, place in the data, seed, hashes, best metric
//   checkpoints/step_<N>/DONE         written last
//   checkpoints/latest, best          links
#pragma once

#include "config.h"
#include "corpus.h"
#include "weights.h"

#include <string>

namespace toy {

struct train_state {
    int64_t            step = 0;
    data_reader::state data;
    double             best_val_loss    = 1e300;
    int64_t            best_step        = 0;
    int64_t            evals_since_best = 0;
    int64_t            last_eval_step   = 0;   // an evaluation that was due at `step` and is not in here has yet to be made
};

// Where checkpoints of a run go, and which of them stay: checkpoint.keep last ones, every keep_every steps, and the best.
struct checkpoints {
    std::string dir;        // runs/<id>/checkpoints
    std::string datasets;   // identities of what the run reads: name=sha256, …

    // Returns the checkpoint's directory. Throws toy::error (disk_full) before anything is written when there is no room.
    std::string save(const config & cfg, const weights & w, const train_state & st);
    bool        has(int64_t step) const;
    void        mark_best(int64_t step);
    void        prune(const config & cfg, int64_t best_step);

    // Fills weights, moments and state. Throws toy::error: missing_file, bad_file (torn or foreign), resume_mismatch (names what differs).
    static train_state load(const std::string & path, const config & cfg, const std::string & datasets, weights & w);
};

}   // namespace toy
