/* Values up to 63 are exact; above, each power of two has 64 buckets, so a quantile is at most 1.6 % off. */
#include "loadgen.h"

enum { SUB_BITS = 6, SUB = 1 << SUB_BITS };

static unsigned bucket_of(uint64_t value) {
    if (value < SUB)
        return (unsigned)value;
    unsigned exponent = 63 - (unsigned)__builtin_clzll(value);
    return (exponent - SUB_BITS + 1) * SUB + (unsigned)(value >> (exponent - SUB_BITS)) % SUB;
}

static uint64_t middle_of(unsigned bucket) {
    if (bucket < SUB)
        return bucket;
    unsigned shift = bucket / SUB - 1;
    uint64_t low = (uint64_t)(SUB + bucket % SUB) << shift;
    return low + ((1ull << shift) >> 1);
}

void histogram_add(struct histogram *h, uint64_t value) {
    h->bucket[bucket_of(value)]++;
    h->count++;
    if (value > h->max)
        h->max = value;
}

uint64_t histogram_quantile(const struct histogram *h, double q) {
    uint64_t rank = (uint64_t)(q * (double)h->count), seen = 0;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += h->bucket[i];
        if (seen > rank)
            return middle_of(i) < h->max ? middle_of(i) : h->max;
    }
    return h->max;
}
