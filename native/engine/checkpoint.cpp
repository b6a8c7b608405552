#include "checkpoint.h"

#include "error.h"
#include "files.h"
#include "gguf-file.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <vector>

namespace toy {

namespace fs = std::filesystem;

static std::string step_name(int64_t step) {
    return "step_" + std::to_string(step);
}

static void write_state(const std::string & path, const config & cfg, const weights & w, const train_state & st) {
    gguf_writer out;
    out.set_str("general.architecture", cfg.run.arch);
    out.set_str("general.type", "toy.checkpoint");
    out.set_u32("toy.checkpoint.version", 1);
    out.set_u64("toy.step", st.step);
    out.set_u64("toy.seed", cfg.run.seed);          // the random state: every number is a hash of seed, stream and index
    out.set_u64("toy.data.epoch", st.data.epoch);   // the permutation is that of (seed, epoch)
    out.set_u64("toy.data.index", st.data.index);
    out.set_f64("toy.best_val_loss", st.best_val_loss);
    out.set_u64("toy.best_step", st.best_step);
    out.set_u64("toy.evals_since_best", st.evals_since_best);
    out.set_u64("toy.config_hash", cfg.hash());
    out.set_u64("toy.trainable_hash", w.names_hash());
    for (const param & p : w.params) {
        out.add_tensor(p.w, p.name);
        out.add_tensor(p.m, p.name + ".m");
        out.add_tensor(p.v, p.name + ".v");
    }
    out.write(path);
}

std::string checkpoints::save(const config & cfg, const weights & w, const train_state & st) {
    const std::string final_dir = dir + "/" + step_name(st.step), tmp = final_dir + ".tmp";
    if (has(st.step)) {
        return final_dir;
    }
    const size_t need = w.bytes_weights() + w.bytes_moments() + (1 << 16);
    if (free_bytes(dir) < need) {
        throw error("disk_full", EXIT_FAILED, format("no room for a checkpoint of %zu bytes in %s", need, dir.c_str()),
                    "free some space, or name another place with --out; the checkpoints written before are whole");
    }
    remove_all(tmp);
    remove_all(final_dir);
    try {
        make_dir(tmp);
        write_state(tmp + "/state.gguf", cfg, w, st);
        atomic_file       done(tmp + "/DONE");
        const std::string text = std::to_string(st.step) + "\n";
        done.write(text.data(), text.size());
        done.commit();
        sync_dir(tmp);
    } catch (...) {
        remove_all(tmp);
        throw;
    }
    if (rename(tmp.c_str(), final_dir.c_str()) != 0) {
        throw_io("rename", final_dir);
    }
    sync_dir(dir);
    replace_link(step_name(st.step), dir + "/latest");
    return final_dir;
}

bool checkpoints::has(int64_t step) const {
    return exists(dir + "/" + step_name(step) + "/DONE");
}

void checkpoints::mark_best(int64_t step) {
    replace_link(step_name(step), dir + "/best");
}

void checkpoints::prune(int keep, int64_t best_step) {
    std::vector<int64_t> steps;
    for (const auto & e : fs::directory_iterator(dir)) {
        long long         step;
        int               end  = 0;
        const std::string name = e.path().filename().string();
        if (!e.is_symlink() && sscanf(name.c_str(), "step_%lld%n", &step, &end) == 1 && end == (int) name.size()) {
            steps.push_back(step);
        }
    }
    std::sort(steps.rbegin(), steps.rend());
    for (size_t i = std::max(keep, 1); i < steps.size(); i++) {
        if (steps[i] != best_step) {
            remove_all(dir + "/" + step_name(steps[i]));
        }
    }
}

static void read_tensor(FILE * f, const gguf_file & file, const std::string & name, ggml_tensor * into) {
    const ggml_tensor * t = file.tensor(name);
    if (!t || !ggml_are_same_shape(t, into) || t->type != into->type) {
        throw error("resume_mismatch", EXIT_BAD_INPUT, format("%s: tensor %s is missing or of another shape", file.path.c_str(), name.c_str()),
                    "resume with the configuration that the run was started with");
    }
    std::vector<uint8_t> buf(1 << 20);
    fseek(f, (long) file.tensor_offset(name), SEEK_SET);
    for (size_t at = 0; at < ggml_nbytes(into); at += buf.size()) {
        const size_t len = std::min(buf.size(), ggml_nbytes(into) - at);
        if (fread(buf.data(), 1, len, f) != len) {
            throw error("bad_file", EXIT_BAD_INPUT, format("cannot read %s: %s", file.path.c_str(), strerror(errno)),
                        "resume from another checkpoint");
        }
        ggml_backend_tensor_set(into, buf.data(), at, len);
    }
}

train_state checkpoints::load(const std::string & path, const config & cfg, weights & w) {
    if (!exists(path + "/DONE")) {
        throw error(exists(path) ? "bad_file" : "missing_file", EXIT_BAD_INPUT, format("%s is not a whole checkpoint (no DONE in it)", path.c_str()),
                    "name a directory checkpoints/step_<N> of a run");
    }
    const gguf_file file(path + "/state.gguf");
    if (file.get_str("general.type", "") != "toy.checkpoint") {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s is not a checkpoint of toy", file.path.c_str()),
                    "name a directory checkpoints/step_<N> of a run");
    }
    const auto u64 = [&](const char * key) { return gguf_get_val_u64(file.gguf, gguf_find_key(file.gguf, key)); };
    for (const char * key :
         { "toy.step", "toy.data.epoch", "toy.data.index", "toy.best_step", "toy.evals_since_best", "toy.config_hash", "toy.trainable_hash" }) {
        const int64_t id = gguf_find_key(file.gguf, key);
        if (id < 0 || gguf_get_kv_type(file.gguf, id) != GGUF_TYPE_UINT64) {
            throw error("bad_file", EXIT_BAD_INPUT, format("%s has no %s", file.path.c_str(), key),
                        "the checkpoint is damaged: resume from another one");
        }
    }
    if (u64("toy.trainable_hash") != w.names_hash()) {
        throw error("resume_mismatch", EXIT_BAD_INPUT, format("%s trains other tensors than this configuration", path.c_str()),
                    "resume with the model the run was started with");
    }
    if (u64("toy.config_hash") != cfg.hash()) {
        throw error("resume_mismatch", EXIT_BAD_INPUT, format("%s was made with other model, data or train knobs", path.c_str()),
                    "resume with the run's own config.json");
    }
    FILE * f = fopen(file.path.c_str(), "rb");
    if (!f) {
        throw_io("read", file.path);
    }
    try {
        for (const param & p : w.params) {
            read_tensor(f, file, p.name, p.w);
            read_tensor(f, file, p.name + ".m", p.m);
            read_tensor(f, file, p.name + ".v", p.v);
        }
    } catch (...) {
        fclose(f);
        throw;
    }
    fclose(f);
    train_state st;
    st.step             = (int64_t) u64("toy.step");
    st.data             = { u64("toy.data.epoch"), u64("toy.data.index") };
    st.best_val_loss    = file.get_num("toy.best_val_loss", 1e300);
    st.best_step        = (int64_t) u64("toy.best_step");
    st.evals_since_best = (int64_t) u64("toy.evals_since_best");
    return st;
}

}   // namespace toy
