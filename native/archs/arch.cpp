#include "arch.h"

#include "engine/error.h"

namespace toy {

const arch & arch_of(const std::string & name) {
    for (const arch * a : { &ARCH_LLAMA, &ARCH_GPT2, &ARCH_VIT }) {
        if (name == a->name || (name == "qwen2" && a == &ARCH_LLAMA)) {
            return *a;
        }
    }
    throw error("not_available", EXIT_BAD_INPUT, "no architecture '" + name + "'", "toy computes llama, qwen2, gpt2 and vit");
}

}   // namespace toy
