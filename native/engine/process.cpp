#include "process.h"

#include "error.h"
#include "ggml.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace toy {

static volatile sig_atomic_t g_stop = 0;

static void on_stop_signal(int) {
    g_stop = 1;
}

std::string env(const char * key, const char * def) {
    const char * v = getenv(key);
    return v && *v ? v : def;
}

int64_t env_int(const char * key, int64_t def) {
    const std::string v = env(key);
    return v.empty() ? def : atoll(v.c_str());
}

bool stop_requested() {
    return g_stop;
}

void say(const std::string & line) {
    if (printf("%s\n", line.c_str()) < 0 || fflush(stdout) != 0) {
        throw error("runner_failed", EXIT_FAILED, "cannot write to stdout", "the reader of this runner has gone away");
    }
}

int runner_main(const std::function<int()> & body) {
    struct sigaction sa = {};
    sa.sa_handler       = on_stop_signal;
    sigaction(SIGINT, &sa, nullptr);
    sigaction(SIGTERM, &sa, nullptr);
    signal(SIGPIPE, SIG_IGN);
    // of what ggml and a device's driver say of themselves, what matters
    ggml_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
                fputs(text, stderr);
            }
        },
        nullptr);
    try {
        return body();
    } catch (const error & e) {
        fprintf(stderr, "error: %s\nhint: %s\nkind: %s\n", e.what(), e.hint.c_str(), e.kind.c_str());
        return e.exit_code;
    } catch (const std::bad_alloc & e) {
        // a device's library says how much it wanted
        fprintf(stderr, "error: out of memory (%s)\nhint: a smaller model or a shorter context needs less\nkind: oom\n", e.what());
        return EXIT_FAILED;
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\nhint: please report this with the names of the model and the data\n", e.what());
        return EXIT_FAILED;
    }
}

}   // namespace toy
