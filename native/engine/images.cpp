#include "images.h"

#include "error.h"
#include "gguf-file.h"
#include "rng.h"

#include <algorithm>
#include <cstring>

namespace toy {

static std::vector<float> need_floats(const gguf_file & meta, const char * key, size_t n) {
    const int64_t id = gguf_find_key(meta.gguf, key);
    if (id < 0 || gguf_get_kv_type(meta.gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta.gguf, id) != GGUF_TYPE_FLOAT32 ||
        gguf_get_arr_n(meta.gguf, id) != n) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has no %s for %zu channels", meta.path.c_str(), key, n), "pack the images again");
    }
    const float * data = (const float *) gguf_get_arr_data(meta.gguf, id);
    return std::vector<float>(data, data + n);
}

image_file::image_file(const std::string & folder) : file(folder + "/images.bin", "packed images") {
    static const char MAGIC[8] = "TOYIMG1";
    const uint8_t *   p        = (const uint8_t *) file.data;
    uint32_t          header[5];
    if (file.bytes < 64 || memcmp(p, MAGIC, 8) != 0) {
        throw error("bad_file", EXIT_BAD_INPUT, file.path + " is not a packed image set", "pack the images again");
    }
    memcpy(header, p + 8, sizeof(header));
    n_images            = header[0];
    n_channel           = header[1];
    height              = header[2];
    width               = header[3];
    n_class             = header[4];
    const uint32_t most = 65535;   // the knobs stop far below; above, the product of all could begin again at zero
    const bool     sane = n_images > 0 && std::min({ n_channel, height, width }) > 0 && std::max({ n_channel, height, width }) <= most;
    const uint64_t each = 4 + (uint64_t) n_channel * height * width, rest = file.bytes - 64;
    if (!sane || rest % n_images != 0 || rest / n_images != each) {
        throw error("bad_file", EXIT_BAD_INPUT,
                    format("%s has %zu bytes, which are not the %u images of %u x %u x %u that its header says", file.path.c_str(), file.bytes,
                           n_images, width, height, n_channel),
                    "pack the images again");
    }
    labels = (const int32_t *) (p + 64);
    pixels = p + 64 + 4 * (size_t) n_images;
    for (uint32_t i = 0; i < n_images; i++) {
        if (labels[i] < -1 || labels[i] >= (int32_t) n_class) {
            throw error("bad_file", EXIT_BAD_INPUT, format("%s: image %u has label %d of %u classes", file.path.c_str(), i, labels[i], n_class),
                        "pack the images again");
        }
    }
    const gguf_file meta(folder + "/classes.gguf");
    mean = need_floats(meta, "toy.vit.image_mean", n_channel);
    std  = need_floats(meta, "toy.vit.image_std", n_channel);
}

void image_set::clear(int n_seq, batch & out) const {
    out.tokens.clear();
    out.patches.assign(n_seq * floats(), 0.0f);
    out.labels.assign(n_seq, -1);
    out.seeds.assign((size_t) n_seq * 2, -1);
    out.n_labels = out.n_tokens = 0;
}

void image_set::read(uint64_t epoch, size_t item, int slot, batch & out) const {
    const int       W = images.width, H = images.height, n_channel = images.n_channel, columns = W / patch;
    const size_t    image = first + item;
    const uint8_t * src   = images.pixels + image * floats();
    float *         dst   = out.patches.data() + slot * floats();

    const rng  r(seed, "augment." + std::to_string(epoch));
    const int  dx       = crop > 0 ? (int) r.below(3 * image + 0, 2 * crop + 1) - crop : 0;
    const int  dy       = crop > 0 ? (int) r.below(3 * image + 1, 2 * crop + 1) - crop : 0;
    const bool mirrored = flip && r.below(3 * image + 2, 2);

    std::vector<float> row(W);
    for (int c = 0; c < n_channel; c++) {
        const float scale = 1.0f / (255.0f * images.std[c]), shift = images.mean[c] / images.std[c];
        for (int y = 0; y < H; y++) {
            const int from_y = y + dy;
            if (from_y < 0 || from_y >= H) {
                continue;   // clear() left zeros
            }
            for (int x = 0; x < W; x++) {
                const int from_x = (mirrored ? W - 1 - x : x) + dx;
                row[x]           = from_x >= 0 && from_x < W ? (float) src[((size_t) c * H + from_y) * W + from_x] * scale - shift : 0.0f;
            }
            for (int column = 0; column < columns; column++) {
                const size_t p = (size_t) (y / patch) * columns + column;
                std::copy_n(row.data() + column * patch, patch, dst + (p * n_channel + c) * patch * patch + (y % patch) * patch);
            }
        }
    }
    out.labels[slot] = images.labels[image];
    out.n_labels += images.labels[image] >= 0;
    out.n_tokens += (H / patch) * columns;
}

}   // namespace toy
