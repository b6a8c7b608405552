#include "config.h"

#include "error.h"
#include "rng.h"

#include <charconv>
#include <fstream>
#include <map>
#include <sstream>

namespace toy {

template <typename F>
void config::each(F && f) {
    f("run.recipe", run.recipe);
    f("run.arch", run.arch);
    f("run.device", run.device);
    f("run.seed", run.seed);
    f("run.threads", run.threads);
    f("run.name", run.name);
    f("run.notes", run.notes);
    f("run.build", run.build);
    f("model.n_layer", model.n_layer);
    f("model.n_embd", model.n_embd);
    f("model.n_head", model.n_head);
    f("model.n_head_kv", model.n_head_kv);
    f("model.n_ff", model.n_ff);
    f("model.vocab_size", model.vocab_size);
    f("model.context", model.context);
    f("model.rope_freq_base", model.rope_freq_base);
    f("model.norm_eps", model.norm_eps);
    f("model.tie_embeddings", model.tie_embeddings);
    f("model.init_std", model.init_std);
    f("data.corpus", data.corpus);
    f("data.tokenizer", data.tokenizer);
    f("data.val_fraction", data.val_fraction);
    f("data.val_corpus", data.val_corpus);
    f("data.shuffle", data.shuffle);
    f("train.steps", train.steps);
    f("train.batch", train.batch);
    f("train.micro_batch", train.micro_batch);
    f("train.learning_rate", train.learning_rate);
    f("train.min_learning_rate", train.min_learning_rate);
    f("train.warmup_steps", train.warmup_steps);
    f("train.schedule", train.schedule);
    f("train.optimizer", train.optimizer);
    f("train.beta1", train.beta1);
    f("train.beta2", train.beta2);
    f("train.eps", train.eps);
    f("train.weight_decay", train.weight_decay);
    f("train.grad_clip", train.grad_clip);
    f("train.dtype", train.dtype);
    f("eval.every", eval.every);
    f("eval.batches", eval.batches);
    f("eval.patience", eval.patience);
    f("checkpoint.every", checkpoint.every);
    f("checkpoint.keep", checkpoint.keep);
    f("checkpoint.keep_best", checkpoint.keep_best);
    f("checkpoint.resume", checkpoint.resume);
    f("log.every", log.every);
    f("log.trackers", log.trackers);
}

static const char * HINT = "config.kv is written by `toy train`; build the runners again with `toy install`";

static void read_value(const std::string & key, const std::string & text, std::string & out) {
    (void) key;
    out = text;
}

static void read_value(const std::string & key, const std::string & text, bool & out) {
    if (text != "true" && text != "false") {
        throw error("bad_config", EXIT_BAD_INPUT, format("%s=%s is neither true nor false", key.c_str(), text.c_str()), HINT);
    }
    out = text == "true";
}

template <typename T>
static void read_value(const std::string & key, const std::string & text, T & out) {
    // from_chars: no locale, the whole value, correctly rounded
    const auto res = std::from_chars(text.data(), text.data() + text.size(), out);
    if (res.ec != std::errc() || res.ptr != text.data() + text.size()) {
        throw error("bad_config", EXIT_BAD_INPUT, format("%s=%s is not a number of the right kind", key.c_str(), text.c_str()), HINT);
    }
}

config config::parse(const std::string & text) {
    std::map<std::string, std::string> kv;
    std::istringstream                 in(text);
    for (std::string line; std::getline(in, line);) {
        const size_t eq = line.find('=');
        if (line.empty() || line[0] == '#') {
            continue;
        }
        if (eq == std::string::npos) {
            throw error("bad_config", EXIT_BAD_INPUT, format("config.kv: no '=' in '%s'", line.c_str()), HINT);
        }
        kv[line.substr(0, eq)] = line.substr(eq + 1);
    }
    config c;
    c.each([&](const char * key, auto & field) {
        const auto it = kv.find(key);
        if (it == kv.end()) {
            throw error("bad_config", EXIT_BAD_INPUT, format("config.kv has no %s", key), HINT);
        }
        read_value(it->first, it->second, field);
        kv.erase(it);
    });
    if (!kv.empty()) {
        throw error("bad_config", EXIT_BAD_INPUT, format("unknown key %s in config.kv", kv.begin()->first.c_str()), HINT);
    }
    return c;
}

config config::load(const std::string & path) {
    std::ifstream in(path);
    if (!in) {
        throw error("missing_file", EXIT_BAD_INPUT, format("cannot open %s", path.c_str()), "TOY_CONFIG names the config.kv of the run directory");
    }
    std::stringstream ss;
    ss << in.rdbuf();
    return parse(ss.str());
}

uint64_t config::hash() const {
    uint64_t h = 0;
    const_cast<config *>(this)->each([&](const char * key, auto & field) {
        const std::string k = key;
        if (k.rfind("model.", 0) == 0 || k.rfind("data.", 0) == 0 || (k.rfind("train.", 0) == 0 && k != "train.steps") || k == "run.seed") {
            std::ostringstream os;
            os.precision(17);
            os << k << '=' << field;
            h = hash_bytes(os.str().data(), os.str().size(), h);
        }
    });
    return h;
}

}   // namespace toy
