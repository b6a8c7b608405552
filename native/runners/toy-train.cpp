// libexec/toy-train: trains a llama on the cpu. The loop is in train/loop.cpp, the graph in archs/llama.cpp.
#include "train/loop.h"

int main() {
    return toy::train_main("llama", { "from-scratch", "warm-start" });
}
