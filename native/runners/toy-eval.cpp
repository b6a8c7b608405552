// libexec/toy-eval: how likely a GGUF finds given text, or the classes of given images. One line of stdout a window, example, candidate or image.
#include "decode/decoder.h"
#include "decode/scorer.h"
#include "engine/error.h"
#include "engine/events.h"
#include "engine/process.h"

#include <algorithm>
#include <cmath>

// f(first, end) for the items FIRST … of n, or COUNT of them, BATCH at once; a stop signal is heeded in between.
static void in_batches(int64_t n, const std::function<void(int64_t, int64_t)> & f) {
    const int64_t end  = toy::env_int("COUNT") > 0 ? std::min(n, toy::env_int("FIRST") + toy::env_int("COUNT")) : n,
                  size = std::max<int64_t>(1, toy::env_int("BATCH"));
    for (int64_t i = toy::env_int("FIRST"); i < end && !toy::stop_requested(); i += size) {
        f(i, std::min(i + size, end));
    }
}

static void score(toy::scorer & s, const char * word, int64_t n, const std::function<toy::sequence(int64_t)> & get) {
    in_batches(n, [&](int64_t first, int64_t end) {
        std::vector<toy::sequence> sequences;
        for (int64_t i = first; i < end; i++) {
            sequences.push_back(get(i));
        }
        for (const toy::scored & r : s.score(sequences)) {
            const char * cut = r.cut ? " cut=1" : "";
            toy::say(toy::format("%s %lld tokens=%lld nll=%s%s", word, (long long) first++, (long long) r.n, toy::shortest(r.nll).c_str(), cut));
        }
    });
}

static void classify(toy::scorer & s, toy::image_file & images, int n_top) {
    in_batches(images.n_images, [&](int64_t first, int64_t end) {
        for (const toy::classified & c : s.classify(images, first, end)) {
            std::string line = toy::format("image %lld label=%d nll=%s", (long long) first++, c.label, toy::shortest(c.nll).c_str());
            for (const toy::candidate & best : toy::top_logprobs(c.logits, n_top)) {
                line += toy::format(" %d:%s", best.id, toy::shortest(std::exp(best.logprob)).c_str());
            }
            toy::say(line);
        }
    });
}

static int evaluate() {
    const std::string mode = toy::env("MODE");
    toy::scorer       s(toy::env("GGUF"), toy::env("ADAPTER"), (int) toy::env_int("THREADS"));
    const int context = toy::env_int("CONTEXT") > 0 ? (int) toy::env_int("CONTEXT") : std::min(s.hp.n_ctx, 1024), n_top = (int) toy::env_int("TOP_K");
    if (mode == "images") {
        toy::image_file images(toy::env("IMG_DIR"));
        classify(s, images, n_top);
    } else if (mode == "examples") {
        const toy::example_files examples(toy::env("CORPUS"), toy::env("OFFSETS"), toy::env("MASK"));
        const bool               keep_end = toy::env("KEEP") == "end";
        score(s, "example", examples.n, [&](int64_t i) { return examples.example(i, context, keep_end); });
    } else if (mode == "next") {
        const toy::token_file prompt(toy::env("CORPUS"));
        for (const toy::candidate & c : toy::top_logprobs(s.next(prompt.tokens, (int) prompt.n), n_top)) {
            toy::say(toy::format("token %d %s", c.id, toy::shortest(c.logprob).c_str()));
        }
    } else {
        const toy::token_file  corpus(toy::env("CORPUS"));
        const toy::window_plan plan = { (int64_t) corpus.n, context, (int) std::min<int64_t>(toy::env_int("STRIDE"), context) };
        score(s, "window", plan.n_windows(), [&](int64_t i) { return plan.window(corpus.tokens, i); });
    }
    return toy::stop_requested() ? toy::EXIT_INTERRUPTED : toy::EXIT_DONE;
}

int main() {
    return toy::runner_main(evaluate);
}
