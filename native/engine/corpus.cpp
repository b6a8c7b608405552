#include "corpus.h"

#include "error.h"
#include "rng.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

namespace toy {

token_file::token_file(const std::string & path) : path(path) {
    const int   fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) {
        const int e = errno;
        if (fd >= 0) {
            close(fd);
        }
        throw error("missing_file", EXIT_BAD_INPUT, format("cannot open the packed corpus %s: %s", path.c_str(), strerror(e)),
                    "name a corpus that exists with --corpus");
    }
    if (st.st_size == 0 || st.st_size % sizeof(int32_t) != 0) {
        close(fd);
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has %lld bytes: not whole int32 tokens", path.c_str(), (long long) st.st_size),
                    "pack the corpus again");
    }
    void * p = mmap(nullptr, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) {
        throw error("bad_file", EXIT_BAD_INPUT, format("cannot map %s: %s", path.c_str(), strerror(errno)), "pack the corpus again");
    }
    tokens = (const int32_t *) p;
    n      = st.st_size / sizeof(int32_t);
}

token_file::~token_file() {
    munmap((void *) tokens, n * sizeof(int32_t));
}

int32_t token_file::max_token() const {
    int32_t hi = 0;
    for (size_t i = 0; i < n; i++) {
        hi = std::max(hi, tokens[i] < 0 ? INT32_MAX : tokens[i]);
    }
    return hi;
}

window_reader::window_reader(const int32_t * tokens, size_t n, int T, uint64_t seed, bool shuffle)
    : tokens(tokens), n(n), T(T), seed(seed), shuffle(shuffle) {
    if (n < (size_t) T + 1) {
        throw error("bad_file", EXIT_BAD_INPUT, format("the training part of the corpus has %zu tokens, fewer than one window of %d", n, T + 1),
                    "give a longer corpus, a smaller model.context or a smaller data.val_fraction");
    }
    begin_epoch();
}

void window_reader::begin_epoch() {
    const rng r(seed, "data.epoch." + std::to_string(at.epoch));
    offset = shuffle ? r.below(0, std::min((size_t) T, n - T)) : 0;
    order.resize((n - 1 - offset) / T);
    std::iota(order.begin(), order.end(), 0);
    if (shuffle) {
        for (size_t i = order.size() - 1; i > 0; i--) {
            std::swap(order[i], order[r.below(i, i + 1)]);
        }
    }
}

void window_reader::next(int n_seq, batch & out) {
    out.tokens.resize((size_t) n_seq * T);
    out.labels.resize((size_t) n_seq * T);
    out.n_labels = (int64_t) n_seq * T;
    for (int s = 0; s < n_seq; s++) {
        if (at.index == order.size()) {
            at = { at.epoch + 1, 0 };
            begin_epoch();
        }
        const int32_t * w = tokens + offset + (size_t) order[at.index++] * T;
        std::copy(w, w + T, out.tokens.begin() + (size_t) s * T);
        std::copy(w + 1, w + T + 1, out.labels.begin() + (size_t) s * T);
    }
}

void window_reader::seek(const state & to) {
    at = to;
    begin_epoch();
}

void eval_reader::read(int64_t first, int64_t stride, int64_t end, int n_seq, batch & out) const {
    out.tokens.assign((size_t) n_seq * T, 0);
    out.labels.assign((size_t) n_seq * T, -1);
    out.n_labels = 0;
    for (int s = 0; s < n_seq && first + s * stride < end; s++) {
        const size_t from = (size_t) (first + s * stride) * T;
        const size_t len  = std::min((size_t) T, n - 1 - from);
        std::copy(tokens + from, tokens + from + len, out.tokens.begin() + (size_t) s * T);
        std::copy(tokens + from + 1, tokens + from + len + 1, out.labels.begin() + (size_t) s * T);
        out.n_labels += len;
    }
}

}   // namespace toy
