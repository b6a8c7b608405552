// libexec/toy-train-lora: trains an adapter over a frozen llama or qwen2 on the cpu. The loop is in train/loop.cpp, the adapter in archs/lora.cpp.
#include "train/loop.h"

int main() {
    return toy::train_main("llama", { "lora" });
}
