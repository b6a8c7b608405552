// libexec/toy-train-vit: trains a vision transformer on the cpu. The loop is in train/loop.cpp, the graph in archs/vit.cpp.
#include "train/loop.h"

int main() {
    return toy::train_main("vit", { "vit-tiny" });
}
