#include "config.h"

#include "error.h"

#include <charconv>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>
#include <vector>

namespace toy {

// May a resumed run have another value than the checkpoint? FREE: yes. SAME: no, because the losses or the model would not be those of one run.
// Files are FREE by name: what is in them is compared by hash (DATASETS).
enum sharing { SAME, FREE };

const char * const MAY_CHANGE =
    "what may change: train.steps, recompute and offload, eval.*, checkpoint.*, log.*, and threads, name, notes and stop_after of run";

template <typename F>
void config::each(F && f) {
    f("run.recipe", run.recipe, SAME);
    f("run.arch", run.arch, SAME);
    f("run.device", run.device, FREE);
    f("run.seed", run.seed, SAME);
    f("run.threads", run.threads, FREE);
    f("run.name", run.name, FREE);
    f("run.notes", run.notes, FREE);
    f("run.build", run.build, FREE);
    f("run.stop_after", run.stop_after, FREE);
    f("model.n_layer", model.n_layer, SAME);
    f("model.n_embd", model.n_embd, SAME);
    f("model.n_head", model.n_head, SAME);
    f("model.n_head_kv", model.n_head_kv, SAME);
    f("model.n_ff", model.n_ff, SAME);
    f("model.vocab_size", model.vocab_size, SAME);
    f("model.context", model.context, SAME);
    f("model.rope_freq_base", model.rope_freq_base, SAME);
    f("model.norm_eps", model.norm_eps, SAME);
    f("model.tie_embeddings", model.tie_embeddings, SAME);
    f("model.init_std", model.init_std, SAME);
    f("model.image_size", model.image_size, SAME);
    f("model.patch_size", model.patch_size, SAME);
    f("model.n_channel", model.n_channel, SAME);
    f("model.n_class", model.n_class, SAME);
    f("model.pool", model.pool, SAME);
    f("model.init", model.init, SAME);
    f("model.donor", model.donor, FREE);
    f("data.corpus", data.corpus, FREE);
    f("data.tokenizer", data.tokenizer, FREE);
    f("data.val_fraction", data.val_fraction, SAME);
    f("data.val_corpus", data.val_corpus, FREE);
    f("data.shuffle", data.shuffle, SAME);
    f("data.images", data.images, FREE);
    f("data.val_images", data.val_images, FREE);
    f("data.augment_crop", data.augment_crop, SAME);
    f("data.augment_flip", data.augment_flip, SAME);
    f("train.steps", train.steps, FREE);
    f("train.batch", train.batch, SAME);
    f("train.micro_batch", train.micro_batch, SAME);
    f("train.learning_rate", train.learning_rate, SAME);
    f("train.min_learning_rate", train.min_learning_rate, SAME);
    f("train.warmup_steps", train.warmup_steps, SAME);
    f("train.schedule", train.schedule, SAME);
    f("train.optimizer", train.optimizer, SAME);
    f("train.beta1", train.beta1, SAME);
    f("train.beta2", train.beta2, SAME);
    f("train.eps", train.eps, SAME);
    f("train.weight_decay", train.weight_decay, SAME);
    f("train.grad_clip", train.grad_clip, SAME);
    f("train.dtype", train.dtype, SAME);
    f("train.freeze", train.freeze, SAME);
    f("train.embedding_lr_scale", train.embedding_lr_scale, SAME);
    f("train.recompute", train.recompute, FREE);
    f("train.offload", train.offload, FREE);
    f("lora.base", lora.base, FREE);
    f("lora.rank", lora.rank, SAME);
    f("lora.alpha", lora.alpha, SAME);
    f("lora.targets", lora.targets, SAME);
    f("lora.dropout", lora.dropout, SAME);
    f("eval.every", eval.every, FREE);
    f("eval.batches", eval.batches, FREE);
    f("eval.patience", eval.patience, FREE);
    f("checkpoint.every", checkpoint.every, FREE);
    f("checkpoint.keep", checkpoint.keep, FREE);
    f("checkpoint.keep_best", checkpoint.keep_best, FREE);
    f("checkpoint.resume", checkpoint.resume, FREE);
    f("checkpoint.keep_every", checkpoint.keep_every, FREE);
    f("log.every", log.every, FREE);
    f("log.trackers", log.trackers, FREE);
    f("log.profile", log.profile, FREE);
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
    c.text = text;
    c.each([&](const char * key, auto & field, sharing) {
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

std::string config::difference(const config & saved) const {
    const auto values = [](const config & c) {
        std::vector<std::pair<std::string, std::string>> out;
        const_cast<config &>(c).each([&](const char * key, auto & field, sharing s) {
            if (s == SAME) {
                std::ostringstream os;
                os.precision(17);
                os << std::boolalpha << field;
                out.emplace_back(key, os.str());
            }
        });
        return out;
    };
    const auto here = values(*this), there = values(saved);
    for (size_t i = 0; i < here.size(); i++) {
        if (here[i].second != there[i].second) {
            // a value as it was written, not with the seventeen digits that tell two of them apart
            const auto written = [&](const config & c) {
                const std::string line  = here[i].first + "=";
                const size_t      at    = ("\n" + c.text).find("\n" + line);
                const std::string value = at == std::string::npos ? "?" : c.text.substr(at + line.size(), c.text.find('\n', at) - at - line.size());
                return value.empty() ? std::string("empty") : value;
            };
            return format("%s is %s here and %s there", here[i].first.c_str(), written(*this).c_str(), written(saved).c_str());
        }
    }
    return "";
}

}   // namespace toy
