// defines: the training loop's entry points
#pragma once

#include <string>
#include <vector>

namespace toy {

// A runner's main: environment in, step lines out (the process contract). Returns the exit code; nothing is thrown.
// `arch` and `recipes` are what this runner was built for.
int train_main(const std::string & arch, const std::vector<std::string> & recipes);

}   // namespace toy
