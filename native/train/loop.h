// defines: the training loop's entry points
#pragma once

#include "archs/arch.h"

namespace toy {

// A runner's main: environment in, step lines out (the process contract). Returns the exit code; nothing is thrown.
int train_main(const arch & model);

}   // namespace toy
