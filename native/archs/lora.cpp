// Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), as llama.cpp stores and applies them: W x + alpha/r B (A x).
// The graph term itself is in net::linear.
#include "lora.h"

#include "engine/error.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace toy {

static const std::vector<std::string> TARGETS = { "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down" };

static std::vector<std::string> parse_targets(const std::string & list) {
    if (list == "all") {
        return TARGETS;
    }
    std::vector<std::string> out;
    std::istringstream       in(list);
    for (std::string word; std::getline(in, word, ',');) {
        if (std::find(TARGETS.begin(), TARGETS.end(), word) == TARGETS.end()) {
            throw error("bad_config", EXIT_BAD_INPUT, "lora.targets names '" + word + "', which is no matrix of a block",
                        "targets: attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, or all");
        }
        out.push_back(word);
    }
    return out;
}

void declare_lora(const config & cfg, const hparams & hp, const gguf_file & base, weights & w) {
    const int64_t                  r       = cfg.lora.rank;
    const std::vector<std::string> targets = parse_targets(cfg.lora.targets);
    for (int il = 0; il < hp.n_layer; il++) {
        for (const std::string & target : TARGETS) {   // in forward order, whatever order they are named in
            if (std::find(targets.begin(), targets.end(), target) == targets.end()) {
                continue;
            }
            const std::string   name = block_name(il) + target + ".weight";
            const ggml_tensor * t    = base.tensor(name);
            if (r < 1 || r > std::min(t->ne[0], t->ne[1])) {
                throw error(
                    "bad_config", EXIT_BAD_INPUT,
                    format("lora.rank is %lld, and %s is %lld x %lld", (long long) r, name.c_str(), (long long) t->ne[0], (long long) t->ne[1]),
                    "a rank is between 1 and the smaller side of the matrices");
            }
            w.add_matrix(name + ".lora_a", t->ne[0], r, init::uniform(1.0f / std::sqrt((float) t->ne[0])));
            w.add_matrix(name + ".lora_b", r, t->ne[1], init::zeros());
        }
    }
}

void write_lora_metadata(const config & cfg, const hparams & hp, gguf_writer & out) {
    out.set_str("general.type", "adapter");
    out.set_str("general.architecture", hp.arch);
    out.set_str("adapter.type", "lora");
    out.set_f32("adapter.lora.alpha", (float) cfg.lora.alpha);
    out.set_u32("toy.lora.rank", cfg.lora.rank);
    out.set_str("toy.lora.targets", cfg.lora.targets);
}

static error unfit(const gguf_file & file, const std::string & what) {
    return error("bad_file", EXIT_BAD_INPUT, file.path + what, "name the base that the adapter was trained on");
}

lora_file::lora_file(const std::string & path, const gguf_file & base) : file(path) {
    const gguf_file & f = file.file;
    if (f.get_str("general.type", "") != "adapter" || f.get_str("adapter.type", "") != "lora") {
        throw error("bad_file", EXIT_BAD_INPUT, f.path + " is not a LoRA adapter", "name the adapter.gguf of a lora run");
    }
    const std::string theirs = f.get_str("general.architecture", ""), ours = base.get_str("general.architecture", "");
    if (theirs != ours) {
        throw unfit(f, " adapts a " + theirs + " model, and " + base.path + " is a " + ours);
    }
    int n_pairs = 0;
    for (ggml_tensor * t = ggml_get_first_tensor(f.ctx); t; t = ggml_get_next_tensor(f.ctx, t)) {
        const std::string name = t->name;
        const bool        is_a = name.size() > 7 && name.compare(name.size() - 7, 7, ".lora_a") == 0;
        const bool        is_b = name.size() > 7 && name.compare(name.size() - 7, 7, ".lora_b") == 0;
        if (!is_a && !is_b) {
            throw unfit(f, " holds a tensor that is no part of an adapter: " + name);
        }
        const std::string   target = name.substr(0, name.size() - 7);
        const ggml_tensor * w      = base.tensor(target);
        const ggml_tensor * a      = f.tensor(target + ".lora_a");
        const ggml_tensor * b      = f.tensor(target + ".lora_b");
        if (!w) {
            throw unfit(f, " adapts " + target + ", which " + base.path + " does not have");
        }
        if (target.rfind("blk.", 0) != 0) {
            throw error("bad_file", EXIT_BAD_INPUT, f.path + " adapts " + target, "toy applies adapters of the matrices inside the blocks");
        }
        if (t->type != GGML_TYPE_F32) {
            throw error("bad_file", EXIT_BAD_INPUT, format("%s: %s is %s", f.path.c_str(), t->name, ggml_type_name(t->type)),
                        "toy applies adapters in f32; `toy merge` takes any type");
        }
        if (!a || !b || a->ne[0] != w->ne[0] || b->ne[1] != w->ne[1] || a->ne[1] != b->ne[0]) {
            throw unfit(f,
                        format(": its term for %s does not fit the base's %lld x %lld", target.c_str(), (long long) w->ne[0], (long long) w->ne[1]));
        }
        n_pairs++;
    }
    if (n_pairs == 0) {
        throw unfit(f, " holds no tensors");
    }
    adapter.get   = file.lookup();
    adapter.alpha = f.get_num("adapter.lora.alpha", 0);
}

}   // namespace toy
