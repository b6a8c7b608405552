// defines: toy::error — the one exception of the engine. It becomes `error:`/`hint:` lines, a run_end event, or a Python exception.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace toy {

constexpr int EXIT_DONE        = 0;
constexpr int EXIT_FAILED      = 1;
constexpr int EXIT_BAD_INPUT   = 2;
constexpr int EXIT_INTERRUPTED = 130;

// Hints of kind oom: the knobs that lower what a training step, and what an answer or a score needs.
constexpr const char * LOWER_STEP =
    "lower train.micro_batch (more rounds, the same update), model.context or model.n_embd; `--dry-run` says what is needed";
constexpr const char * LOWER_CONTEXT = "lower --context or use a smaller model";

struct error : std::runtime_error {
    std::string kind;   // one of toy/errors.py KINDS
    std::string hint;
    int         exit_code;

    error(std::string kind, int exit_code, const std::string & message, std::string hint)
        : std::runtime_error(message), kind(std::move(kind)), hint(std::move(hint)), exit_code(exit_code) {}
};

// printf into a std::string
inline std::string format(const char * fmt, ...) __attribute__((format(printf, 1, 2)));

inline std::string format(const char * fmt, ...) {
    va_list ap, ap2;
    va_start(ap, fmt);
    va_copy(ap2, ap);
    const int   n = vsnprintf(nullptr, 0, fmt, ap);
    std::string s(n > 0 ? n : 0, '\0');
    if (n > 0) {
        vsnprintf(&s[0], n + 1, fmt, ap2);
    }
    va_end(ap2);
    va_end(ap);
    return s;
}

}   // namespace toy
