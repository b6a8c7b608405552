// libexec/toy-train-gpt2: trains a GPT-2 on the cpu. The loop is in train/loop.cpp, the graph in archs/gpt2.cpp.
#include "train/loop.h"

int main() {
    return toy::train_main("gpt2", { "from-scratch", "warm-start" });
}
