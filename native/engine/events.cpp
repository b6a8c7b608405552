#include "events.h"

#include "error.h"
#include "files.h"

#include <charconv>
#include <cmath>
#include <ctime>

namespace toy {

template <typename T>
static std::string to_shortest(T v) {
    char       buf[64];
    const auto res = std::to_chars(buf, buf + sizeof(buf), v);
    return std::string(buf, res.ptr);
}

std::string shortest(float v) {
    return to_shortest(v);
}
std::string shortest(double v) {
    return to_shortest(v);
}

std::string json_string(const std::string & s) {
    std::string out = "\"";
    for (const char c : s) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if ((unsigned char) c < 0x20) {
            out += format("\\u%04x", c);
        } else {
            out += c;
        }
    }
    return out + "\"";
}

json_object & json_object::raw(const char * key, const std::string & json) {
    text += (text.size() > 1 ? "," : "") + json_string(key) + ":" + json;
    return *this;
}

json_object & json_object::num(const char * key, double v) {
    return raw(key, std::isfinite(v) ? shortest(v) : "null");
}
json_object & json_object::num(const char * key, float v) {
    return raw(key, std::isfinite(v) ? shortest(v) : "null");
}

static double clock_time(clockid_t id) {
    struct timespec ts;
    clock_gettime(id, &ts);
    return ts.tv_sec + 1e-9 * ts.tv_nsec;
}

double unix_time() {
    return clock_time(CLOCK_REALTIME);
}
double monotonic_time() {
    return clock_time(CLOCK_MONOTONIC);
}

events_writer::events_writer(const std::string & path) : path(path), file(fopen(path.c_str(), "ae")) {
    if (!file) {
        throw_io("write", path);
    }
}

events_writer::~events_writer() {
    fclose(file);
}

json_object events_writer::begin(const char * kind) const {
    json_object e;
    e.str("schema", "toy/v1").str("kind", kind).raw("time", format("%.3f", unix_time()));
    return e;
}

void events_writer::write(const json_object & event) {
    const std::string line = event.done() + "\n";
    if (fwrite(line.data(), 1, line.size(), file) != line.size() || fflush(file) != 0) {
        throw_io("write", path);
    }
}

}   // namespace toy
