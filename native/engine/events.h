// defines: the one writer of events.jsonl (schema toy/v1), and numbers as shortest decimals
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace toy {

std::string shortest(float v);   // the shortest decimal that reads back as the same float32
std::string shortest(double v);
std::string json_string(const std::string & s);

// One JSON object, key by key; a number that is not finite is null.
struct json_object {
    std::string text = "{";

    json_object & raw(const char * key, const std::string & json);
    json_object & str(const char * key, const std::string & v) { return raw(key, json_string(v)); }
    json_object & num(const char * key, double v);
    json_object & num(const char * key, float v);
    json_object & num(const char * key, int64_t v) { return raw(key, std::to_string(v)); }
    json_object & num(const char * key, int v) { return raw(key, std::to_string(v)); }
    json_object & num(const char * key, size_t v) { return raw(key, std::to_string(v)); }
    json_object & flag(const char * key, bool v) { return raw(key, v ? "true" : "false"); }
    json_object & null(const char * key) { return raw(key, "null"); }
    std::string   done() const { return text + "}"; }
};

struct events_writer {
    explicit events_writer(const std::string & path);
    ~events_writer();
    events_writer(const events_writer &)             = delete;
    events_writer & operator=(const events_writer &) = delete;

    json_object begin(const char * kind) const;     // schema, kind and time are in it
    void        write(const json_object & event);   // one line, flushed; throws toy::error (disk_full)

  private:
    std::string path;
    FILE *      file;
};

double unix_time();
double monotonic_time();

}   // namespace toy
