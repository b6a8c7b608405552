// defines: toy::corpus — a packed-token file by mmap, its training windows in seeded order, its validation windows
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace toy {

// Little-endian int32 tokens, mapped read-only.
struct token_file {
    std::string     path;
    const int32_t * tokens = nullptr;
    size_t          n      = 0;

    explicit token_file(const std::string & path);   // throws toy::error (missing_file, bad_file)
    ~token_file();
    token_file(const token_file &)             = delete;
    token_file & operator=(const token_file &) = delete;

    int32_t max_token() const;   // reads the whole file
};

// One batch: n_seq windows of T inputs and T labels. labels[i] = -1: masked, no loss there.
struct batch {
    std::vector<int32_t> tokens, labels;   // [n_seq*T], sequence by sequence
    int64_t              n_labels = 0;     // unmasked
};

// Windows of T + 1 tokens. In each epoch the windows tile the training part from a seeded offset, in a seeded order, so that
// every token is seen once an epoch and the borders fall elsewhere each time. Where the reader stands is two numbers.
struct window_reader {
    struct state {
        uint64_t epoch = 0;
        uint64_t index = 0;   // windows of this epoch that are used up
    };

    const int32_t * tokens;
    size_t          n;   // tokens in the training part
    int             T;
    uint64_t        seed;
    bool            shuffle;

    window_reader(const int32_t * tokens, size_t n, int T, uint64_t seed, bool shuffle);

    void  next(int n_seq, batch & out);   // goes on into the next epoch
    state tell() const { return at; }
    void  seek(const state & to);

  private:
    state                 at;
    size_t                offset = 0;
    std::vector<uint32_t> order;   // the permutation of this epoch, rebuilt from (seed, epoch)

    void begin_epoch();
};

// The validation part in order: window w covers inputs [w*T, w*T + T), the last one is padded with masked labels.
struct eval_reader {
    const int32_t * tokens;
    size_t          n;
    int             T;

    int64_t n_windows() const { return n > 1 ? (int64_t) ((n - 1 + T - 1) / T) : 0; }
    void    read(int64_t first, int64_t stride, int64_t end, int n_seq, batch & out) const;   // windows first, first + stride, … below end
};

}   // namespace toy
