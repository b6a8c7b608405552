#include "files.h"

#include "error.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace toy {

namespace fs = std::filesystem;

void throw_io(const char * doing, const std::string & path) {
    const int e = errno;
    if (e == ENOSPC || e == EDQUOT || e == EFBIG) {
        throw error("disk_full", EXIT_FAILED, format("cannot %s %s: %s", doing, path.c_str(), strerror(e)),
                    "free some space, or name another place with --out; nothing half-written was left");
    }
    throw error("runner_failed", EXIT_FAILED, format("cannot %s %s: %s", doing, path.c_str(), strerror(e)),
                "check that the directory exists and that you may write there");
}

// Linux: a file in the folder of `path` that has no name, of which nothing is left even by SIGKILL; -1 where there is none to be had
static int open_unnamed(const std::string & path) {
#if defined(O_TMPFILE)
    const std::string dir = fs::path(path).parent_path().string();
    return access("/proc/self/fd", X_OK) == 0 ? open(dir.empty() ? "." : dir.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0644) : -1;
#else
    (void) path;
    return -1;
#endif
}

atomic_file::atomic_file(const std::string & path) : path(path), tmp(path + ".tmp") {
    fd       = open_unnamed(path);
    is_named = fd < 0;
    if (is_named) {
        fd = open(tmp.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    }
    if (fd < 0) {
        throw_io("write", path);
    }
}

atomic_file::~atomic_file() {
    if (fd >= 0) {
        close(fd);
        if (is_named) {
            unlink(tmp.c_str());
        }
    }
}

void atomic_file::write(const void * data, size_t size) {
    const char * p = (const char *) data;
    while (size > 0) {
        const ssize_t n = ::write(fd, p, size);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            throw_io("write", path);
        }
        p += n;
        size -= n;
    }
}

void atomic_file::commit() {
    if (fsync(fd) != 0 && errno != EINVAL) {
        throw_io("write", path);
    }
    if (!is_named) {   // a name cannot be taken over from another file but by renaming
        unlink(tmp.c_str());
        if (linkat(AT_FDCWD, format("/proc/self/fd/%d", fd).c_str(), AT_FDCWD, tmp.c_str(), AT_SYMLINK_FOLLOW) != 0) {
            throw_io("write", path);
        }
        is_named = true;
    }
    if (close(fd) != 0) {
        fd = -1;
        unlink(tmp.c_str());
        throw_io("write", path);
    }
    fd = -1;
    if (rename(tmp.c_str(), path.c_str()) != 0) {
        unlink(tmp.c_str());
        throw_io("rename", path);
    }
}

void make_dir(const std::string & path) {
    if (mkdir(path.c_str(), 0755) != 0 && errno != EEXIST) {
        throw_io("make", path);
    }
}

void sync_dir(const std::string & path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

void remove_all(const std::string & path) {
    std::error_code ec;
    fs::remove_all(path, ec);
}

void replace_link(const std::string & target, const std::string & link) {
    const std::string tmp = link + ".tmp";
    unlink(tmp.c_str());
    if (symlink(target.c_str(), tmp.c_str()) != 0 || rename(tmp.c_str(), link.c_str()) != 0) {
        throw_io("link", link);
    }
}

bool exists(const std::string & path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0;
}

size_t free_bytes(const std::string & path) {
    struct statvfs vfs;
    return statvfs(path.c_str(), &vfs) == 0 ? (size_t) vfs.f_bavail * vfs.f_frsize : SIZE_MAX;
}

}   // namespace toy
