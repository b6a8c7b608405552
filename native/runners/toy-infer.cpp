// libexec/toy-infer: decodes from a llama, qwen2 or gpt2 GGUF. Token ids in (a file), one `token ID` line out for each one drawn.
// With a vit: images in, one `image I CLASS:P …` line out for each.
#include "decode/decoder.h"
#include "decode/scorer.h"
#include "engine/corpus.h"
#include "engine/error.h"
#include "engine/events.h"
#include "engine/process.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>

static std::vector<int32_t> parse_ids(const std::string & list) {
    std::vector<int32_t> ids;
    std::istringstream   in(list);
    for (std::string item; std::getline(in, item, ',');) {
        ids.push_back(atoi(item.c_str()));
    }
    return ids;
}

static int classify() {
    toy::image_file images(toy::env("IMG_DIR"));
    toy::scorer     model(toy::env("GGUF"), "", (int) toy::env_int("THREADS", 0));
    for (int64_t i = 0; i < images.n_images && !toy::stop_requested(); i++) {
        std::string line = toy::format("image %lld", (long long) i);
        for (const toy::candidate & c : toy::top_logprobs(model.classify(images, i, i + 1)[0].logits, (int) toy::env_int("TOP_K", 5))) {
            line += toy::format(" %d:%s", c.id, toy::shortest((float) std::exp(c.logprob)).c_str());
        }
        toy::say(line);
    }
    return toy::stop_requested() ? toy::EXIT_INTERRUPTED : toy::EXIT_DONE;
}

static int infer() {
    const double               t0 = toy::monotonic_time();
    const toy::token_file      prompt(toy::env("PROMPT_TOKENS"));
    const std::vector<int32_t> stop      = parse_ids(toy::env("STOP_TOKENS"));
    const int                  n_predict = (int) toy::env_int("N_PREDICT", 128), n_top = (int) toy::env_int("LOGPROBS", 0);
    const int                  n_threads = (int) toy::env_int("THREADS", 0), n_ctx = (int) toy::env_int("CONTEXT", 0);
    toy::sampler               sampler = {
        strtof(toy::env("TEMPERATURE", "0").c_str(), nullptr),
        (int) toy::env_int("TOP_K", 0),
        strtof(toy::env("TOP_P", "1").c_str(), nullptr),
        strtoull(toy::env("SEED", "0").c_str(), nullptr, 10),
    };
    // no more cache than this answer can fill: a model's own context may be far larger
    auto          model = std::make_unique<toy::model_file>(toy::env("GGUF"));
    const int64_t limit = n_ctx > 0 ? n_ctx : toy::hparams::from_gguf(model->file).n_ctx;
    const int     slots = (int) std::min<int64_t>(limit, (int64_t) prompt.n + std::max(n_predict, 1));
    if ((int64_t) prompt.n > limit) {
        throw toy::error("bad_flag", toy::EXIT_BAD_INPUT,
                         toy::format("the prompt has %zu tokens, the context holds %lld", prompt.n, (long long) limit),
                         "shorten the prompt or raise --context");
    }
    toy::decoder dec(std::move(model), slots, n_threads > 0 ? n_threads : toy::usable_cores(), toy::env("ADAPTER"));
    for (size_t i = 0; i < prompt.n; i++) {
        if (prompt.tokens[i] < 0 || prompt.tokens[i] >= dec.hp.n_vocab) {
            throw toy::error("bad_flag", toy::EXIT_BAD_INPUT,
                             toy::format("prompt id %d is outside the vocabulary of %d", prompt.tokens[i], dec.hp.n_vocab),
                             "ids run from 0 to the vocabulary size less one");
        }
    }

    const double               t1      = toy::monotonic_time();
    const std::vector<float> * logits  = &dec.eval(prompt.tokens, (int) prompt.n);
    const double               t2      = toy::monotonic_time();
    int                        n_drawn = 0;
    while (n_drawn < n_predict && !toy::stop_requested()) {
        const int32_t id = sampler.sample(*logits);
        if (std::find(stop.begin(), stop.end(), id) != stop.end()) {
            break;
        }
        std::string line = toy::format("token %d", id);
        if (n_top > 0) {
            for (const toy::candidate & c : toy::top_logprobs(*logits, n_top)) {
                line += toy::format(" %d:%s", c.id, toy::shortest(c.logprob).c_str());
            }
        }
        toy::say(line);
        if (++n_drawn == n_predict || dec.cache.n_past == dec.cache.n_ctx) {
            break;
        }
        logits = &dec.eval(&id, 1);
    }
    fprintf(stderr, "timing load_s=%.4f prefill_tokens=%zu prefill_s=%.4f decode_tokens=%d decode_s=%.4f\n", t1 - t0, prompt.n, t2 - t1, n_drawn,
            toy::monotonic_time() - t2);
    return toy::stop_requested() ? toy::EXIT_INTERRUPTED : toy::EXIT_DONE;
}

int main() {
    return toy::runner_main([]() { return toy::env("IMG_DIR").empty() ? infer() : classify(); });
}
