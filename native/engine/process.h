// defines: what every runner's process does — its environment, its stop signals, its lines on stdout, and errors as exit codes
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace toy {

std::string env(const char * key, const char * def = "");   // def where it is unset or empty
int64_t     env_int(const char * key, int64_t def = 0);

bool stop_requested();   // SIGINT or SIGTERM came

void say(const std::string & line);   // on stdout, flushed; throws toy::error when nobody reads it

// A runner's main: handles signals, runs `body`, and turns what it throws into lines `error:`, `hint:` and `kind:` on stderr.
// Returns the exit code.
int runner_main(const std::function<int()> & body);

}   // namespace toy
