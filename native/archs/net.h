// defines: toy::net — what a forward graph is made with: where its tensors come from, its adapters, its KV cache; and the layers all families share
#pragma once

#include "engine/weights.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "hparams.h"

#include <string>
#include <vector>

namespace toy {

// Keys and values of S slots a layer, as the decoder has seen them.
struct kv_cache {
    std::vector<ggml_tensor *> k, v;         // [D*K, S], f32, or f16 for flash attention; one each a layer
    int                        n_past = 0;   // slots in use
    int                        n_ctx  = 0;   // slots there are

    std::vector<ggml_tensor *> ends, used;   // of the graph built last: views of the slots behind n_past, and of all up to there

    void begin_graph();
    // The graph built last, of T tokens, goes on at n_past: nothing else in it depends on how many there are.
    void move_graph(int T);

    // Other devices than the cpu play a graph back as it is: there it says by an input where new keys and values go, and reads as many for every
    // token.
    ggml_tensor * slots  = nullptr;   // [T] i64
    int           n_read = 0;         // of the first slots; those that are not in use are masked
};

// A low-rank term beside some of the products (Hu et al. 2021, arXiv 2106.09685): W x + alpha / r B A x.
struct lora_adapter {
    tensor_lookup get;                 // <tensor>.lora_a [in, r], <tensor>.lora_b [r, out]
    double        alpha   = 0;         // 0: the term is not scaled, as llama.cpp has it
    float         dropout = 0;         // of x, in the low-rank term only
    ggml_tensor * seeds   = nullptr;   // [2, B] i32: the random stream of each sequence
};

// The inputs of a graph. A family reads those that it knows.
struct inputs {
    ggml_tensor * tokens    = nullptr;   // [T*B] i32
    ggml_tensor * positions = nullptr;   // [T] i32
    ggml_tensor * patches   = nullptr;   // [P, n_patches*B] f32
    bool          last_only = false;     // logits of the last token only
};

struct net {
    ggml_context *       ctx;
    tensor_lookup        get;
    const hparams &      hp;
    const lora_adapter * lora  = nullptr;
    bool                 f32   = true;      // weights of other types: dequantised into f32 products (training), or as ggml decodes with them
    kv_cache *           cache = nullptr;   // decoding: new keys and values are written into it, as part of gf
    ggml_cgraph *        gf    = nullptr;
    bool                 fused = true;      // attention is one operation: see has_attention()
    ggml_tensor *        mask  = nullptr;   // not fused: [S, T], -INFINITY where one of T tokens does not see one of S, else 0. In f16 attention is
                                            // ggml's flash attention, which has no gradient: see has_flash_attention()
    bool                 bf16  = false;     // products of weights and of attention: both sides rounded to bf16, gradients too, sums in f32

    // x [in, N] -> [out, N]: `name`.weight, with `name`.bias and an adapter where they exist
    ggml_tensor * linear(const std::string & name, ggml_tensor * x) const;
    // x [C, N]; `name`.weight, and `name`.bias for layer_norm
    ggml_tensor * rms_norm(const std::string & name, ggml_tensor * x) const;
    ggml_tensor * layer_norm(const std::string & name, ggml_tensor * x) const;
    // q [D, H, T, B], k and v [D, K, T, B] -> [D*H, T*B]; grouped queries: each key head serves H/K of them. causal: no token sees a later one
    ggml_tensor * attention(int il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, bool causal) const;
    // the same of one product: qkv with rows of D*(H + 2*K), the heads of q, then those of k, then those of v
    ggml_tensor * attention_qkv(int il, ggml_tensor * qkv, int64_t T, bool causal) const;

  private:
    ggml_tensor * flash_attention(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v) const;
    ggml_tensor * plain_attention(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, bool causal) const;
    ggml_tensor * product(ggml_tensor * w, ggml_tensor * x) const;
};

// Whether a device has the attention of T tokens of B sequences as one operation; `trained`: and its gradient. If not, a net is not fused.
bool has_attention(ggml_backend_t device, const hparams & hp, int64_t T, int64_t B, bool causal, bool bf16, bool trained);

// Whether a device has flash attention of T tokens that see S keys and values in f16.
bool has_flash_attention(ggml_backend_t device, const hparams & hp, int64_t T, int64_t S);

// A net's mask [S, T]: token i of T is the one behind n_past + i others.
void set_causal_mask(ggml_tensor * mask, int64_t n_past);

std::string block_name(int il);   // "blk.3."

// x [C, T*B] -> the same: a pre-norm block with biases and GELU, as in GPT-2 and in ViT
ggml_tensor * gelu_block(const net & n, int il, ggml_tensor * x, int64_t T, bool causal);
void          declare_gelu_block(const hparams & hp, int il, float std, float std_residual, weights & w);
// multiply-adds of one token in it
double        gelu_block_products(const hparams & hp);

}   // namespace toy
