// libexec/toy-train: trains a llama on the cpu. The loop is in train/loop.cpp, the graph in archs/llama.cpp.
#include "archs/arch.h"
#include "train/loop.h"

int main() {
    return toy::train_main(toy::ARCH_LLAMA);
}
