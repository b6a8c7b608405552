// How long a cache line takes from one core to another: {"nanoseconds": 27.4}. Where cores share no cache (two chiplets, two sockets, virtual cores
// that a host moves) it is several times as long, and so is what the threads of a small model hand to each other.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif

// The cores that this process may use: on one, either end would wait out its time slice at each turn.
static unsigned usable_cores() {
#ifdef __linux__
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof(usable), &usable) == 0) {
        return CPU_COUNT(&usable);
    }
#endif
    return std::thread::hardware_concurrency();
}

// Two of them, so that both ends do not share one.
static void stay_on(int which) {
#ifdef __linux__
    cpu_set_t usable, one;
    if (sched_getaffinity(0, sizeof(usable), &usable) != 0) {
        return;
    }
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &usable) && which-- == 0) {
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof(one), &one);
            return;
        }
    }
#else
    (void) which;
#endif
}

int main() {
    using clock = std::chrono::steady_clock;
    if (usable_cores() < 2) {
        fprintf(stderr, "bench-cores: needs two cores\n");
        return EXIT_FAILURE;
    }
    static const int                     TURNS = 20000, WARM = 2000;   // there and back
    alignas(128) static std::atomic<int> line{ 0 };

    std::thread other([]() {
        stay_on(1);
        for (int i = 0; i < TURNS; i++) {
            while (line.load(std::memory_order_acquire) != 2 * i + 1) {
            }
            line.store(2 * i + 2, std::memory_order_release);
        }
    });
    stay_on(0);
    clock::time_point begun;
    for (int i = 0; i < TURNS; i++) {
        if (i == WARM) {
            begun = clock::now();
        }
        line.store(2 * i + 1, std::memory_order_release);
        while (line.load(std::memory_order_acquire) != 2 * i + 2) {
        }
    }
    const std::chrono::duration<double, std::nano> took = clock::now() - begun;
    other.join();
    printf("{\"nanoseconds\": %.1f}\n", took.count() / (2.0 * (TURNS - WARM)));
    return EXIT_SUCCESS;
}
