#include "corpus.h"

#include "error.h"
#include "events.h"
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

data_file::data_file(const std::string & path, const char * what) : path(path) {
    const int   fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) {
        const int e = errno;
        if (fd >= 0) {
            close(fd);
        }
        throw error("missing_file", EXIT_BAD_INPUT, format("cannot open the %s %s: %s", what, path.c_str(), strerror(e)),
                    "name a corpus that exists with --corpus");
    }
    bytes    = st.st_size;
    void * p = bytes > 0 ? mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    close(fd);
    if (p == MAP_FAILED) {
        throw error("bad_file", EXIT_BAD_INPUT, format("cannot map %s: %s", path.c_str(), bytes > 0 ? strerror(errno) : "it is empty"),
                    "pack the corpus again");
    }
    data = p;
}

data_file::~data_file() {
    munmap((void *) data, bytes);
}

token_file::token_file(const std::string & path) : data_file(path, "packed corpus") {
    if (bytes % sizeof(int32_t) != 0) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has %zu bytes: not whole int32 tokens", path.c_str(), bytes), "pack the corpus again");
    }
    tokens = (const int32_t *) data;
    n      = bytes / sizeof(int32_t);
}

int32_t token_file::max_token() const {
    int32_t hi = 0;
    for (size_t i = 0; i < n; i++) {
        hi = std::max(hi, tokens[i] < 0 ? INT32_MAX : tokens[i]);
    }
    return hi;
}

//
// windows
//

static void clear_tokens(int n_seq, int T, batch & out) {
    out.tokens.assign((size_t) n_seq * T, 0);
    out.labels.assign((size_t) n_seq * T, -1);
    out.seeds.assign((size_t) n_seq * 2, -1);
    out.n_labels = out.n_tokens = 0;
}

size_t window_set::offset(uint64_t epoch) const {
    return shift ? rng(seed, "data.epoch." + std::to_string(epoch)).below(0, std::min((size_t) T, n - T)) : 0;
}

size_t window_set::n_items(uint64_t epoch) const {
    if (n < 2) {
        return 0;
    }
    const size_t labels = n - 1 - offset(epoch);
    return with_rest ? (labels + T - 1) / T : labels / T;
}

void window_set::clear(int n_seq, batch & out) const {
    clear_tokens(n_seq, T, out);
}

void window_set::read(uint64_t epoch, size_t item, int slot, batch & out) const {
    const size_t    from = offset(epoch) + item * T, len = std::min((size_t) T, n - 1 - from);
    const int32_t * w = tokens + from;
    std::copy(w, w + len, out.tokens.begin() + (size_t) slot * T);
    std::copy(w + 1, w + len + 1, out.labels.begin() + (size_t) slot * T);
    out.n_labels += len;
    out.n_tokens += len;
}

//
// examples
//

example_set::example_set(const int32_t * tokens, const int64_t * offsets, const uint8_t * mask, size_t first, size_t end, int T)
    : tokens(tokens), offsets(offsets), mask(mask), T(T) {
    for (size_t i = first; i < end; i++) {
        const int64_t from = offsets[i] + 1, to = std::min(offsets[i + 1], from + T);   // labels
        if (from < to && memchr(mask + from, 1, to - from)) {
            usable.push_back((uint32_t) i);
        }
    }
}

void example_set::clear(int n_seq, batch & out) const {
    clear_tokens(n_seq, T, out);
}

void example_set::read(uint64_t, size_t item, int slot, batch & out) const {
    const int64_t from = offsets[usable[item]], len = std::min<int64_t>(T, offsets[usable[item] + 1] - 1 - from);
    for (int64_t i = 0; i < len; i++) {
        out.tokens[(size_t) slot * T + i] = tokens[from + i];
        if (mask[from + i + 1]) {
            out.labels[(size_t) slot * T + i] = tokens[from + i + 1];
            out.n_labels++;
        }
    }
    out.n_tokens += len;
}

//
// order
//

data_reader::data_reader(const dataset & data, uint64_t seed, bool shuffle) : data(data), seed(seed), shuffle(shuffle) {
    begin_epoch();
}

void data_reader::begin_epoch() {
    const rng r(seed, "data.epoch." + std::to_string(at.epoch));
    order.resize(data.n_items(at.epoch));
    std::iota(order.begin(), order.end(), 0);
    if (shuffle) {
        for (size_t i = order.size() - 1; i > 0; i--) {
            std::swap(order[i], order[r.below(i, i + 1)]);
        }
    }
}

void data_reader::next(int n_seq, batch & out) {
    const double begun = monotonic_time();
    data.clear(n_seq, out);
    for (int s = 0; s < n_seq; s++) {
        if (at.index == order.size()) {
            at = { at.epoch + 1, 0 };
            begin_epoch();
        }
        const size_t item = order[at.index++];
        data.read(at.epoch, item, s, out);
        const uint64_t bits  = rng(seed, "sequence." + std::to_string(at.epoch)).bits(item);
        out.seeds[2 * s]     = (int32_t) (bits >> 33);   // 31 bits: not negative
        out.seeds[2 * s + 1] = (int32_t) (uint32_t) bits;
    }
    seconds += monotonic_time() - begun;
}

void data_reader::seek(const state & to) {
    at = to;
    begin_epoch();
}

void read_in_order(const dataset & data, int64_t first, int64_t stride, int64_t end, int n_seq, batch & out) {
    data.clear(n_seq, out);
    for (int s = 0; s < n_seq && first + s * stride < end; s++) {
        data.read(0, first + s * stride, s, out);
    }
}

}   // namespace toy
