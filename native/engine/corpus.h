// defines: what is trained on — packed files by mmap, the data sets over them, and the seeded order in which a reader visits their items
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace toy {

// A file of little-endian T, mapped read-only.
struct data_file {
    std::string  path;
    const void * data  = nullptr;
    size_t       bytes = 0;

    explicit data_file(const std::string & path, const char * what);   // throws toy::error (missing_file, bad_file)
    virtual ~data_file();
    data_file(const data_file &)             = delete;
    data_file & operator=(const data_file &) = delete;
};

// Packed tokens: int32.
struct token_file : data_file {
    const int32_t * tokens;
    size_t          n;

    explicit token_file(const std::string & path);
    int32_t max_token() const;   // reads the whole file; INT32_MAX when one is negative
};

// One micro-batch. labels[i] = -1: no loss there.
struct batch {
    std::vector<int32_t> tokens;         // [n_seq*T], sequence by sequence; empty for images
    std::vector<float>   patches;        // [n_seq*n_patches*P], image by image
    std::vector<int32_t> labels;         // [n_seq*T]; of images [n_seq]
    std::vector<int32_t> seeds;          // [n_seq*2]: the random stream of each sequence (dropout); -1: none
    int64_t              n_labels = 0;   // not masked
    int64_t              n_tokens = 0;   // without padding
};

// Items by number. An epoch may cut the same data into other items.
struct dataset {
    virtual ~dataset() = default;

    virtual size_t n_items(uint64_t epoch) const                                  = 0;
    virtual void   clear(int n_seq, batch & out) const                            = 0;   // n_seq sequences, all padding
    virtual void   read(uint64_t epoch, size_t item, int slot, batch & out) const = 0;   // into sequence `slot`
};

// Windows of T + 1 tokens. In each epoch they tile the corpus from a seeded offset, so that the borders fall elsewhere each time.
struct window_set : dataset {
    const int32_t * tokens;
    size_t          n;
    int             T;
    uint64_t        seed;
    bool            shift;       // the offset; without it the windows begin at 0
    bool            with_rest;   // a last window of fewer tokens

    window_set(const int32_t * tokens, size_t n, int T, uint64_t seed, bool shift, bool with_rest)
        : tokens(tokens), n(n), T(T), seed(seed), shift(shift), with_rest(with_rest) {}

    size_t n_items(uint64_t epoch) const override;
    void   clear(int n_seq, batch & out) const override;
    void   read(uint64_t epoch, size_t item, int slot, batch & out) const override;

  private:
    size_t offset(uint64_t epoch) const;
};

// Examples of their own lengths, padded to T; a mask says which tokens are learned. What is beyond T is cut off, and an example with
// nothing learned before the cut is left out.
struct example_set : dataset {
    const int32_t * tokens;
    const int64_t * offsets;
    const uint8_t * mask;
    int             T;

    example_set(const int32_t * tokens, const int64_t * offsets, const uint8_t * mask, size_t first, size_t end, int T);

    size_t n_items(uint64_t) const override { return usable.size(); }
    void   clear(int n_seq, batch & out) const override;
    void   read(uint64_t epoch, size_t item, int slot, batch & out) const override;

  private:
    std::vector<uint32_t> usable;
};

// Visits the items of a data set, each once an epoch, in a seeded order. Where it stands is two numbers.
struct data_reader {
    struct state {
        uint64_t epoch = 0;
        uint64_t index = 0;   // items of this epoch that are used up
    };

    const dataset & data;
    uint64_t        seed;
    bool            shuffle;
    double          seconds = 0;   // spent in next()

    data_reader(const dataset & data, uint64_t seed, bool shuffle);   // the set must not be empty

    void  next(int n_seq, batch & out);   // goes on into the next epoch
    state tell() const { return at; }
    void  seek(const state & to);

  private:
    state                 at;
    std::vector<uint32_t> order;   // the permutation of this epoch, rebuilt from (seed, epoch)

    void begin_epoch();
};

// For evaluation: items first, first + stride, … below end, without random streams.
void read_in_order(const dataset & data, int64_t first, int64_t stride, int64_t end, int n_seq, batch & out);

}   // namespace toy
