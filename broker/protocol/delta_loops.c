/* The inner loops of deltas, for `delta_loops.py`, which says what the arguments are and does the same without this.

   What each number of a delta means is in delta_records.py. Nothing here allocates, and no argument is believed to be
   aligned. All that a number leads to is checked before it is touched: what these loops read may come from the network.
   Numbers are little-endian in memory, as they are on the wire. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "deltas are little-endian, and so must be what makes them"
#endif

#define INLINE static inline __attribute__((always_inline))
#define LINE 64   /* bytes that are compared at once: most are the same */
#define PASS 0xFFFF
#define AHEAD 24  /* gaps between asking for an element's memory and using it */

/* What has been found in a block so far; as three u64 in an array. */
struct found {
    uint64_t passed; /* elements since the last changed one */
    uint64_t num_values;
    uint64_t num_gaps;
};

/* Where it goes: the two planes of the gaps, and those of the differences, `stride` bytes apart. */
struct planes {
    uint8_t *low, *high, *values;
    size_t stride;
};

INLINE void emit(struct found *found, const struct planes *out, uint64_t gap, uint64_t before, uint64_t after,
                 unsigned width)
{
    for (; gap >= PASS; gap -= PASS) {
        out->low[found->num_gaps] = out->high[found->num_gaps] = 0xFF;
        found->num_gaps++;
    }
    out->low[found->num_gaps] = (uint8_t)gap;
    out->high[found->num_gaps] = (uint8_t)(gap >> 8);
    found->num_gaps++;
    const unsigned unused = 64 - 8 * width;
    const uint64_t difference = (after - before) << unused; /* its sign is the highest bit now */
    const uint64_t sign = 0 - (difference >> 63);
    const uint64_t zigzag = (difference >> unused) << 1 ^ sign;
    for (unsigned k = 0; k < width; k++)
        out->values[k * out->stride + found->num_values] = (uint8_t)(zigzag >> 8 * k);
    found->num_values++;
}

INLINE void scan(uint8_t *base, const uint8_t *fresh, size_t num_bytes, unsigned width, struct found *so_far,
                 const struct planes *out)
{
    struct found found = *so_far;
    const unsigned bits = 8 * width;
    const uint64_t mask = ~(uint64_t)0 >> (64 - bits);
    uint64_t next = 0 - found.passed; /* the element behind the last changed one; of a piece before this, negative */
    size_t at = 0;
    for (; at + LINE <= num_bytes; at += LINE) {
        uint64_t before[LINE / 8], after[LINE / 8], any = 0;
        memcpy(before, base + at, LINE);
        memcpy(after, fresh + at, LINE);
        for (unsigned k = 0; k < LINE / 8; k++)
            any |= before[k] ^ after[k];
        if (__builtin_expect(any == 0, 1))
            continue;
        for (unsigned k = 0; k < LINE / 8; k++) {
            uint64_t differs = before[k] ^ after[k];
            if (differs == 0)
                continue;
            memcpy(base + at + 8 * k, &after[k], 8);
            const uint64_t first = (at + 8 * k) / width;
            do {
                const unsigned element = (unsigned)__builtin_ctzll(differs) / bits;
                const unsigned shift = element * bits;
                emit(&found, out, first + element - next, before[k] >> shift & mask, after[k] >> shift & mask, width);
                next = first + element + 1;
                differs &= ~(mask << shift);
            } while (differs != 0);
        }
    }
    for (; at + width <= num_bytes; at += width) {
        uint64_t before = 0, after = 0;
        memcpy(&before, base + at, width);
        memcpy(&after, fresh + at, width);
        if (before == after)
            continue;
        memcpy(base + at, &after, width);
        emit(&found, out, at / width - next, before, after, width);
        next = at / width + 1;
    }
    found.passed = num_bytes / width - next;
    *so_far = found;
}

/* Compare two versions of a piece of a block, make the first equal to the second, and say what differed. There is room
   for as many values as the block has elements, and for one gap more for every PASS of them. */
void ergon_scan(uint8_t *base, const uint8_t *fresh, size_t num_bytes, unsigned width, struct found *found,
                uint8_t *low, uint8_t *high, uint8_t *values, size_t stride)
{
    const struct planes out = {low, high, values, stride};
    switch (width) {
    case 1: scan(base, fresh, num_bytes, 1, found, &out); break;
    case 2: scan(base, fresh, num_bytes, 2, found, &out); break;
    case 4: scan(base, fresh, num_bytes, 4, found, &out); break;
    case 8: scan(base, fresh, num_bytes, 8, found, &out); break;
    }
}

INLINE uint64_t gap_at(const uint8_t *gaps, size_t num_gaps, size_t index)
{
    return gaps[index] | (uint64_t)gaps[num_gaps + index] << 8;
}

/* How many elements these gaps name. `end`: the element behind the last one that they lead to. */
uint64_t ergon_measure(const uint8_t *gaps, size_t num_gaps, uint64_t *end)
{
    uint64_t sum = 0, num_passes = 0;
    for (size_t i = 0; i < num_gaps; i++) {
        const uint64_t gap = gap_at(gaps, num_gaps, i);
        sum += gap;
        num_passes += gap == PASS;
    }
    *end = sum + num_gaps - num_passes;
    return num_gaps - num_passes;
}

INLINE int add(uint8_t *restrict target, size_t num_elements, unsigned width, const uint8_t *restrict gaps,
               size_t num_gaps, const uint8_t *restrict values, size_t num_values)
{
    size_t place = 0, value = 0, place_ahead = 0, ahead = 0;
    for (size_t i = 0; i < num_gaps; i++) {
        for (; ahead < num_gaps && ahead <= i + AHEAD; ahead++) {
            const uint64_t gap = gap_at(gaps, num_gaps, ahead);
            place_ahead += gap;
            if (place_ahead < num_elements)
                __builtin_prefetch(target + place_ahead * width, 1);
            place_ahead += gap != PASS;
        }
        const uint64_t gap = gap_at(gaps, num_gaps, i);
        place += gap;
        if (gap == PASS)
            continue;
        if (place >= num_elements || value >= num_values)
            return -1;
        uint64_t zigzag = 0, bits = 0;
        for (unsigned k = 0; k < width; k++)
            zigzag |= (uint64_t)values[k * num_values + value] << 8 * k;
        memcpy(&bits, target + place * width, width);
        bits += zigzag >> 1 ^ (0 - (zigzag & 1));
        memcpy(target + place * width, &bits, width);
        place++;
        value++;
    }
    return value == num_values ? 0 : -1;
}

/* Add what a record says to the elements of its block. -1, in the middle, where it leads elsewhere. */
int ergon_add(uint8_t *target, size_t num_elements, unsigned width, const uint8_t *gaps, size_t num_gaps,
              const uint8_t *values, size_t num_values)
{
    switch (width) {
    case 1: return add(target, num_elements, 1, gaps, num_gaps, values, num_values);
    case 2: return add(target, num_elements, 2, gaps, num_gaps, values, num_values);
    case 4: return add(target, num_elements, 4, gaps, num_gaps, values, num_values);
    case 8: return add(target, num_elements, 8, gaps, num_gaps, values, num_values);
    }
    return -1;
}
