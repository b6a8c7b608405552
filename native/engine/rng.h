// defines: random numbers without state, and the few functions that libm would give, computed by us
//
// A number is a hash of (seed, stream, index): nothing has to be saved to resume, and the order of use does not matter.
// exp, log and cosine come from here because libm differs between machines in the last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace toy {

// splitmix64's finalizer (Steele, Lea, Flood 2014)
inline uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

inline uint64_t hash_bytes(const void * data, size_t n, uint64_t h = 0) {
    for (size_t i = 0; i < n; i++) {
        h = mix64(h ^ ((const uint8_t *) data)[i]);
    }
    return h;
}

struct rng {
    uint64_t key;

    rng(uint64_t seed, const std::string & stream) : key(hash_bytes(stream.data(), stream.size(), mix64(seed))) {}

    uint64_t bits(uint64_t i) const { return mix64(key ^ mix64(i)); }

    double uniform(uint64_t i) const { return ((double) (bits(i) >> 11) + 0.5) * 0x1p-53; }   // in (0, 1)

    uint64_t below(uint64_t i, uint64_t n) const { return bits(i) % n; }   // in [0, n)

    float normal(uint64_t i) const;   // Box-Muller
};

// natural logarithm of a positive normal number: log(m 2^e) = e log 2 + 2 atanh((m - 1)/(m + 1))
inline double det_log(double x) {
    uint64_t u;
    memcpy(&u, &x, 8);
    int e = (int) (u >> 52) - 1023;
    u     = (u & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &u, 8);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e += 1;
    }
    const double s = (m - 1) / (m + 1), s2 = s * s;
    double       p = 0;
    for (int k = 23; k >= 1; k -= 2) {
        p = p * s2 + 1.0 / k;
    }
    return e * 0.6931471805599453 + 2 * s * p;
}

// cosine for x in [0, pi], as a sine's Taylor series on [-pi/2, pi/2]
inline double det_cos(double x) {
    const double t = 1.5707963267948966 - x, t2 = t * t;
    double       p = 1;
    for (int k = 22; k >= 2; k -= 2) {
        p = 1 - p * t2 / (k * (k + 1));
    }
    return t * p;
}

inline float rng::normal(uint64_t i) const {
    const double u = uniform(2 * i), v = uniform(2 * i + 1);
    const double a = 6.283185307179586 * (v < 0.5 ? v : 1 - v);
    return (float) (std::sqrt(-2 * det_log(u)) * det_cos(a));
}

}   // namespace toy
