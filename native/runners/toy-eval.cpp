// libexec/toy-eval: how likely a GGUF finds given text, or the classes of given images. One line of stdout a window, example, candidate or image.
#include "decode/decoder.h"
#include "decode/scorer.h"
#include "engine/error.h"
#include "engine/events.h"

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>

static volatile sig_atomic_t g_stop = 0;

static std::string env(const char * key) {
    const char * v = getenv(key);
    return v ? v : "";
}

static int64_t env_int(const char * key) {
    return atoll(env(key).c_str());
}

static void say(const std::string & line) {
    if (printf("%s\n", line.c_str()) < 0 || fflush(stdout) != 0) {
        throw toy::error("runner_failed", toy::EXIT_FAILED, "cannot write to stdout", "the reader of this evaluation has gone away");
    }
}

// f(first, end) for the items FIRST … of n, or COUNT of them, BATCH at once; a stop signal is heeded in between.
static void in_batches(int64_t n, const std::function<void(int64_t, int64_t)> & f) {
    const int64_t end = env_int("COUNT") > 0 ? std::min(n, env_int("FIRST") + env_int("COUNT")) : n, size = std::max<int64_t>(1, env_int("BATCH"));
    for (int64_t i = env_int("FIRST"); i < end && !g_stop; i += size) {
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
            say(toy::format("%s %lld tokens=%lld nll=%s%s", word, (long long) first++, (long long) r.n, toy::shortest(r.nll).c_str(), cut));
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
            say(line);
        }
    });
}

static void evaluate(const std::string & mode) {
    toy::scorer s(env("GGUF"), env("ADAPTER"), (int) env_int("THREADS"));
    const int   context = env_int("CONTEXT") > 0 ? (int) env_int("CONTEXT") : std::min(s.hp.n_ctx, 1024), n_top = (int) env_int("TOP_K");
    if (mode == "images") {
        toy::image_file images(env("IMG_DIR"));
        classify(s, images, n_top);
    } else if (mode == "examples") {
        const toy::example_files examples(env("CORPUS"), env("OFFSETS"), env("MASK"));
        score(s, "example", examples.n, [&](int64_t i) { return examples.example(i, context); });
    } else if (mode == "next") {
        const toy::token_file prompt(env("CORPUS"));
        for (const toy::candidate & c : toy::top_logprobs(s.next(prompt.tokens, (int) prompt.n), n_top)) {
            say(toy::format("token %d %s", c.id, toy::shortest(c.logprob).c_str()));
        }
    } else {
        const toy::token_file  corpus(env("CORPUS"));
        const toy::window_plan plan = { (int64_t) corpus.n, context, (int) std::min<int64_t>(env_int("STRIDE"), context) };
        score(s, "window", plan.n_windows(), [&](int64_t i) { return plan.window(corpus.tokens, i); });
    }
}

int main() {
    for (const int number : { SIGINT, SIGTERM }) {
        signal(number, [](int) { g_stop = 1; });
    }
    signal(SIGPIPE, SIG_IGN);
    try {
        evaluate(env("MODE"));
        return g_stop ? toy::EXIT_INTERRUPTED : toy::EXIT_DONE;
    } catch (const toy::error & e) {
        fprintf(stderr, "error: %s\nhint: %s\n", e.what(), e.hint.c_str());
        return e.exit_code;
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\nhint: please report this with the name of the model\n", e.what());
        return toy::EXIT_FAILED;
    }
}
