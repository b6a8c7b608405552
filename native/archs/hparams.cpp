#include "hparams.h"

#include "arch.h"
#include "engine/error.h"

namespace toy {

hparams hparams::from_config(const config & cfg) {
    const auto & m = cfg.model;
    hparams      hp;
    hp.arch           = cfg.run.arch;
    hp.n_layer        = m.n_layer;
    hp.n_embd         = m.n_embd;
    hp.n_head         = m.n_head;
    hp.n_head_kv      = m.n_head_kv;
    hp.n_ff           = m.n_ff;
    hp.n_vocab        = hp.arch == "vit" ? m.n_class : m.vocab_size;
    hp.n_ctx          = m.context;
    hp.head_dim       = m.n_embd / m.n_head;
    hp.n_rot          = hp.head_dim;
    hp.rope_type      = GGML_ROPE_TYPE_NORMAL;
    hp.rope_freq_base = m.rope_freq_base;
    hp.norm_eps       = m.norm_eps;
    hp.tied           = m.tie_embeddings;
    hp.image_size     = m.image_size;
    hp.patch_size     = m.patch_size;
    hp.n_channel      = m.n_channel;
    hp.pool_cls       = m.pool == "cls";
    if (hp.arch == "vit") {
        if (hp.patch_size < 1 || hp.n_channel < 1 || hp.n_vocab < 1 || hp.image_size < hp.patch_size || hp.image_size % hp.patch_size != 0) {
            throw error("bad_config", EXIT_BAD_INPUT,
                        format("images of %d pixels with %d channels do not cut into patches of %d", hp.image_size, hp.n_channel, hp.patch_size),
                        "model.patch_size divides model.image_size");
        }
        hp.n_ctx = hp.n_patches() + hp.pool_cls;
    }
    return hp;
}

static error bad(const gguf_file & file, const std::string & what, const char * hint) {
    return error("bad_file", EXIT_BAD_INPUT, file.path + what, hint);
}

static const ggml_tensor * need_tensor(const gguf_file & file, const std::string & name, int64_t ne0, int64_t ne1) {
    const ggml_tensor * t = file.tensor(name);
    if (!t) {
        throw bad(file, " has no tensor " + name, "the file is not a complete model: export it again from where it came");
    }
    if (t->ne[0] != ne0 || t->ne[1] != ne1 || t->ne[2] != 1 || t->ne[3] != 1) {
        throw bad(file,
                  format(": tensor %s is %lld x %lld where its metadata says %lld x %lld", name.c_str(), (long long) t->ne[0], (long long) t->ne[1],
                         (long long) ne0, (long long) ne1),
                  "the file is damaged or of a variant that toy does not know");
    }
    return t;
}

// A tensor that the graphs would not use: leaving it out would give a model that is not this one.
static void refuse_tensor(const gguf_file & file, const std::string & name, const char * what) {
    if (file.tensor(name)) {
        throw bad(file, format(" has %s (%s)", what, name.c_str()), "toy does not run this variant");
    }
}

hparams hparams::from_gguf(const gguf_file & file) {
    hparams hp;
    hp.arch           = file.get_str("general.architecture", "");
    const bool llama  = hp.arch == "llama" || hp.arch == "qwen2";
    const bool vit    = hp.arch == "vit";
    const bool linear = hp.arch == "gpt2" || vit;   // LayerNorm, biases, GELU
    if (!llama && !linear) {
        throw bad(file, " has architecture '" + hp.arch + "'", "toy runs architectures llama, qwen2, gpt2 and vit");
    }
    const std::string a = vit ? "toy.vit." : hp.arch + ".";
    hp.n_layer          = file.need_int(a + "block_count");
    hp.n_embd           = file.need_int(a + "embedding_length");
    hp.n_head           = file.need_int(a + "attention.head_count");
    hp.n_head_kv        = llama ? file.get_int(a + "attention.head_count_kv", hp.n_head) : hp.n_head;
    hp.n_ff             = file.need_int(a + "feed_forward_length");
    hp.rope_freq_base   = file.get_num(a + "rope.freq_base", 10000.0);
    hp.rope_type        = hp.arch == "qwen2" ? GGML_ROPE_TYPE_NEOX : GGML_ROPE_TYPE_NORMAL;
    hp.norm_eps         = file.get_num(a + (llama ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon"), 1e-5);
    if (vit) {
        hp.image_size = file.need_int(a + "image_size");
        hp.patch_size = file.need_int(a + "patch_size");
        hp.n_channel  = file.need_int(a + "channel_count");
        hp.n_vocab    = file.need_int(a + "class_count");
        hp.pool_cls   = file.get_str(a + "pooling", "cls") == "cls";
        if (hp.patch_size < 1 || hp.n_channel < 1 || hp.n_vocab < 1 || hp.image_size < hp.patch_size || hp.image_size % hp.patch_size != 0) {
            throw bad(file, ": its vit metadata does not fit together", "the file is damaged: copy or download it again");
        }
        hp.n_ctx = hp.n_patches() + hp.pool_cls;
    } else {
        hp.n_ctx = file.need_int(a + "context_length");
    }
    const bool positive = hp.n_layer > 0 && hp.n_embd > 0 && hp.n_head > 0 && hp.n_head_kv > 0 && hp.n_ff > 0 && hp.n_ctx > 0;
    if (!positive || hp.n_head % hp.n_head_kv != 0 || (hp.n_embd % hp.n_head != 0 && !file.has(a + "attention.key_length"))) {
        throw bad(file, ": its " + hp.arch + " metadata does not fit together", "the file is damaged: copy or download it again");
    }
    hp.head_dim = llama ? file.get_int(a + "attention.key_length", hp.n_embd / hp.n_head) : hp.n_embd / hp.n_head;
    hp.n_rot    = file.get_int(a + "rope.dimension_count", hp.head_dim);
    if (llama && file.get_int(a + "attention.value_length", hp.head_dim) != hp.head_dim) {
        throw bad(file, " has keys and values of different widths", "toy does not run this variant");
    }
    if (file.get_int(a + "expert_count", 0) > 0) {
        throw bad(file, " uses experts", "toy runs dense models");
    }
    if (file.has(a + "rope.scaling.type") && file.get_str(a + "rope.scaling.type", "none") != "none") {
        throw bad(file, " uses scaled rotary positions", "toy runs models without rope scaling");
    }

    if (!vit) {
        const ggml_tensor * embd = file.tensor("token_embd.weight");
        hp.n_vocab               = embd ? embd->ne[1] : 0;
        need_tensor(file, "token_embd.weight", hp.n_embd, hp.n_vocab);
    }
    hp.tied = !file.tensor("output.weight");
    if (!hp.tied) {
        need_tensor(file, "output.weight", hp.n_embd, hp.n_vocab);
    }

    const int  n_q = hp.head_dim * hp.n_head, n_kv = hp.head_dim * hp.n_head_kv, C = hp.n_embd, F = hp.n_ff;
    const auto matrix = [&](const std::string & name, int in, int out) {
        need_tensor(file, name + ".weight", in, out);
        if (linear) {
            need_tensor(file, name + ".bias", out, 1);
        } else if (file.tensor(name + ".bias")) {
            need_tensor(file, name + ".bias", out, 1);   // qwen2 has them at q, k and v
        }
    };
    const auto norm = [&](const std::string & name) {
        need_tensor(file, name + ".weight", C, 1);
        if (linear) {
            need_tensor(file, name + ".bias", C, 1);
        }
    };
    if (linear) {
        need_tensor(file, "position_embd.weight", C, hp.n_ctx);
    }
    if (vit) {
        matrix("patch_embd", hp.patch_dim(), C);
        matrix("output", C, hp.n_vocab);
        if (hp.pool_cls) {
            need_tensor(file, "cls_embd.weight", C, 1);
        }
    }
    norm("output_norm");
    for (int il = 0; il < hp.n_layer; il++) {
        const std::string b = "blk." + std::to_string(il) + ".";
        norm(b + "attn_norm");
        norm(b + "ffn_norm");
        if (llama) {
            matrix(b + "attn_q", C, n_q);
            matrix(b + "attn_k", C, n_kv);
            matrix(b + "attn_v", C, n_kv);
            matrix(b + "ffn_gate", C, F);
            refuse_tensor(file, b + "attn_q_norm.weight", "normalised queries");
            refuse_tensor(file, b + "attn_qkv.weight", "a fused query, key and value matrix");
        } else {
            matrix(b + "attn_qkv", C, 3 * C);
        }
        matrix(b + "attn_output", n_q, C);
        matrix(b + "ffn_up", C, F);
        matrix(b + "ffn_down", F, C);
    }
    return hp;
}

}   // namespace toy
