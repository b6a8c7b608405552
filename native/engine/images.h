// defines: toy::image_file — a packed image set by mmap (the format of toy/corpora/images.py) — and toy::image_set, its images as patches
#pragma once

#include "corpus.h"

#include <string>
#include <vector>

namespace toy {

//   0  magic "TOYIMG1\0", then uint32 n_images, n_channel, height, width, n_class, zeros up to byte 64
//  64  int32 labels[n_images], -1: unknown
//   …  uint8 pixels[n_images][n_channel][height][width]
// beside it classes.gguf: metadata with toy.vit.classes, toy.vit.image_mean, toy.vit.image_std
struct image_file {
    data_file          file;
    uint32_t           n_images, n_channel, height, width, n_class;
    const int32_t *    labels;
    const uint8_t *    pixels;
    std::vector<float> mean, std;   // [n_channel], of pixels scaled to 0..1

    explicit image_file(const std::string & folder);   // throws toy::error (missing_file, bad_file)
};

// Images as patches: each is (pixel/255 - mean)/std, in the order column, row, channel within a patch.
struct image_set : dataset {
    const image_file & images;
    size_t             first, end;
    int                patch;
    uint64_t           seed;
    int                crop;   // augmentation: shifted by up to so many pixels each way; what comes in is the mean
    bool               flip;   // augmentation: mirrored left to right, every other one

    image_set(const image_file & images, size_t first, size_t end, int patch, uint64_t seed, int crop, bool flip)
        : images(images), first(first), end(end), patch(patch), seed(seed), crop(crop), flip(flip) {}

    size_t n_items(uint64_t) const override { return end - first; }
    void   clear(int n_seq, batch & out) const override;
    void   read(uint64_t epoch, size_t item, int slot, batch & out) const override;

    size_t floats() const { return (size_t) images.n_channel * images.height * images.width; }
};

}   // namespace toy
