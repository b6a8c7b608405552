// defines: files that appear whole or not at all, and the errors of a full or read-only disk
#pragma once

#include <cstddef>
#include <string>

namespace toy {

// A file written without a name, or under a temporary one beside its place; commit() fsyncs and renames. Without commit() nothing is left.
// Every failure throws toy::error: disk_full when there is no space, runner_failed otherwise.
struct atomic_file {
    explicit atomic_file(const std::string & path);
    ~atomic_file();
    atomic_file(const atomic_file &)             = delete;
    atomic_file & operator=(const atomic_file &) = delete;

    void write(const void * data, size_t size);
    void commit();

  private:
    std::string path, tmp;
    int         fd       = -1;
    bool        is_named = false;   // `tmp` is there
};

[[noreturn]] void throw_io(const char * doing, const std::string & path);   // from errno

void   make_dir(const std::string & path);                                   // existing is fine
void   sync_dir(const std::string & path);                                   // so that a rename in it survives a power cut
void   remove_all(const std::string & path);                                 // absent is fine
void   replace_link(const std::string & target, const std::string & link);   // atomically
bool   exists(const std::string & path);
size_t free_bytes(const std::string & path);   // space left for this user on the disk of `path`

}   // namespace toy
