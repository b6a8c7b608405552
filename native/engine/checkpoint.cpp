#include "checkpoint.h"

#include "error.h"
#include "files.h"
#include "gguf-file.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <sstream>
#include <vector>

namespace toy {

namespace fs = std::filesystem;

static std::string step_name(int64_t step) {
    return "step_" + std::to_string(step);
}

static void write_state(const std::string & path, const config & cfg, const std::string & datasets, const weights & w, const train_state & st) {
    gguf_writer out;
    out.set_str("general.architecture", cfg.run.arch);
    out.set_str("general.type", "toy.checkpoint");
    out.set_u32("toy.checkpoint.version", 2);
    out.set_u64("toy.step", st.step);
    out.set_u64("toy.seed", cfg.run.seed);          // the random state: every number is a hash of seed, stream and index
    out.set_u64("toy.data.epoch", st.data.epoch);   // the permutation is that of (seed, epoch)
    out.set_u64("toy.data.index", st.data.index);
    out.set_f64("toy.best_val_loss", st.best_val_loss);
    out.set_u64("toy.best_step", st.best_step);
    out.set_u64("toy.evals_since_best", st.evals_since_best);
    out.set_u64("toy.last_eval_step", st.last_eval_step);
    out.set_str("toy.config", cfg.text);
    out.set_str("toy.datasets", datasets);
    for (const param & p : w.params) {
        out.add_tensor(p.w, p.name);
        if (!p.frozen) {   // the trainable set is those with moments
            out.add_tensor(p.m, p.name + ".m");
            out.add_tensor(p.v, p.name + ".v");
        }
    }
    out.write(path);
}

// DONE goes first: what is left of a removal that was cut short is not taken for a checkpoint.
static void remove_checkpoint(const std::string & path) {
    remove_all(path + "/DONE");
    remove_all(path);
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
    remove_checkpoint(final_dir);
    try {
        make_dir(tmp);
        write_state(tmp + "/state.gguf", cfg, datasets, w, st);
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

void checkpoints::prune(const config & cfg, int64_t best_step) {
    const int            keep = cfg.checkpoint.keep, keep_every = cfg.checkpoint.keep_every;
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
        const bool stays = (cfg.checkpoint.keep_best && steps[i] == best_step) || (keep_every > 0 && steps[i] % keep_every == 0);
        if (!stays) {
            remove_checkpoint(dir + "/" + step_name(steps[i]));
        }
    }
}

static error mismatch(const std::string & path, const std::string & what) {
    return error("resume_mismatch", EXIT_BAD_INPUT, path + ": " + what, MAY_CHANGE);
}

static error damaged(const gguf_file & file, const std::string & what) {
    return error("bad_file", EXIT_BAD_INPUT, file.path + " " + what, "the checkpoint is damaged: resume from another one");
}

static void read_tensor(FILE * f, const gguf_file & file, const std::string & name, ggml_tensor * into) {
    std::vector<uint8_t> buf(1 << 16);
    fseek(f, (long) file.tensor_offset(name), SEEK_SET);
    for (size_t at = 0; at < ggml_nbytes(into); at += buf.size()) {
        const size_t len = std::min(buf.size(), ggml_nbytes(into) - at);
        if (fread(buf.data(), 1, len, f) != len) {
            throw damaged(file, feof(f) ? std::string("is cut short") : format("cannot be read: %s", strerror(errno)));
        }
        ggml_backend_tensor_set(into, buf.data(), at, len);
    }
}

static uint64_t need_u64(const gguf_file & file, const char * key) {
    const int64_t id = gguf_find_key(file.gguf, key);
    if (id < 0 || gguf_get_kv_type(file.gguf, id) != GGUF_TYPE_UINT64) {
        throw damaged(file, format("has no %s", key));
    }
    return gguf_get_val_u64(file.gguf, id);
}

// Both are "name=sha256,name=sha256": the first name whose identity differs, "" when all agree.
static std::string differing_dataset(const std::string & here, const std::string & there) {
    const auto parse = [](const std::string & list) {
        std::map<std::string, std::string> out;
        std::istringstream                 in(list);
        for (std::string item; std::getline(in, item, ',');) {
            out[item.substr(0, item.find('='))] = item.substr(std::min(item.size(), item.find('=') + 1));
        }
        return out;
    };
    std::map<std::string, std::string> a = parse(here), b = parse(there);
    for (const auto & list : { a, b }) {
        for (const auto & item : list) {
            if (a[item.first] != b[item.first]) {
                return format("the %s is another one (%.12s here, %.12s there)", item.first.c_str(),
                              a[item.first].empty() ? "none" : a[item.first].c_str(), b[item.first].empty() ? "none" : b[item.first].c_str());
            }
        }
    }
    return "";
}

// The tensors must be the same ones, trained and frozen alike.
static void check_tensors(const std::string & path, const gguf_file & file, const weights & w) {
    size_t n = 0;
    for (const param & p : w.params) {
        const ggml_tensor * t = file.tensor(p.name);
        if (!t) {
            throw mismatch(path, "it has no tensor " + p.name);
        }
        if (!ggml_are_same_shape(t, p.w) || t->type != p.w->type) {
            throw mismatch(path, format("tensor %s is %lld x %lld there and %lld x %lld here", p.name.c_str(), (long long) t->ne[0],
                                        (long long) t->ne[1], (long long) p.w->ne[0], (long long) p.w->ne[1]));
        }
        const ggml_tensor *m = file.tensor(p.name + ".m"), *v = file.tensor(p.name + ".v");
        if (!!m != !p.frozen) {
            throw mismatch(path,
                           format("tensor %s is %s there and %s here", p.name.c_str(), m ? "trained" : "frozen", p.frozen ? "frozen" : "trained"));
        }
        if (m && (!v || !ggml_are_same_shape(m, p.w) || !ggml_are_same_shape(v, p.w) || m->type != p.w->type || v->type != p.w->type)) {
            throw damaged(file, "holds moments of another shape than " + p.name);
        }
        n += m ? 3 : 1;
    }
    if ((int64_t) n != gguf_get_n_tensors(file.gguf)) {
        throw mismatch(path, "it trains tensors that this model does not have");
    }
}

train_state checkpoints::load(const std::string & path, const config & cfg, const std::string & datasets, weights & w) {
    if (!exists(path + "/DONE")) {
        throw error(exists(path) ? "bad_file" : "missing_file", EXIT_BAD_INPUT, format("%s is not a whole checkpoint (no DONE in it)", path.c_str()),
                    "name a directory checkpoints/step_<N> of a run");
    }
    const gguf_file file(path + "/state.gguf");
    if (file.get_str("general.type", "") != "toy.checkpoint") {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s is not a checkpoint of toy", file.path.c_str()),
                    "name a directory checkpoints/step_<N> of a run");
    }
    if (file.get_int("toy.checkpoint.version", 0) != 2) {
        throw mismatch(path, "it was written by another version of toy");
    }
    train_state st;
    st.step             = (int64_t) need_u64(file, "toy.step");
    st.data             = { need_u64(file, "toy.data.epoch"), need_u64(file, "toy.data.index") };
    st.best_val_loss    = file.get_num("toy.best_val_loss", 1e300);
    st.best_step        = (int64_t) need_u64(file, "toy.best_step");
    st.evals_since_best = (int64_t) need_u64(file, "toy.evals_since_best");
    st.last_eval_step   = (int64_t) need_u64(file, "toy.last_eval_step");

    std::string knob;
    try {
        knob = cfg.difference(config::parse(file.get_str("toy.config", "")));
    } catch (const error &) {
        throw mismatch(path, "it was written by another version of toy");
    }
    if (!knob.empty()) {
        throw mismatch(path, knob);
    }
    const std::string data = differing_dataset(datasets, file.get_str("toy.datasets", ""));
    if (!data.empty()) {
        throw mismatch(path, data);
    }
    check_tensors(path, file, w);

    FILE * f = fopen(file.path.c_str(), "rb");
    if (!f) {
        throw_io("read", file.path);
    }
    const std::unique_ptr<FILE, int (*)(FILE *)> closer(f, fclose);
    for (const param & p : w.params) {
        read_tensor(f, file, p.name, p.w);
        if (!p.frozen) {
            read_tensor(f, file, p.name + ".m", p.m);
            read_tensor(f, file, p.name + ".v", p.v);
        }
    }
    return st;
}

}   // namespace toy
