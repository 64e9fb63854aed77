/* Several tokens, each with neurons of its own. Up: a thread takes a share of the neurons, which stays in its core's cache
 * while the tokens go by. Down: a thread takes a tile of columns, over the hidden values that are not zero. */

#include "native.h"

#ifdef HF_NATIVE

#include <stddef.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

enum { SHARE = 256, LEAST = 16 };  /* the most and the fewest neurons that a thread takes at a time: they stay in a cache */
enum { GROUP = 128 };              /* tokens that go by a share of neurons */
enum { FEW = 16 };                 /* for at most so many tokens, one thread finds the values that are not zero */
enum { TILE_PARTS = 8 };           /* vectors of a token's output that fit into registers */
enum { AHEAD = 4 };                /* how many neurons ahead are prefetched */
enum { PACKED_USES = 4 };          /* from so many uses per neuron on, packing its columns pays */

_Static_assert(TILE_PARTS * 16 * sizeof(float) <= TILE_BYTES, "a tile fits into the room for it");

static int64_t shares_of(const TokensJob *job) { return (job->todo + job->share - 1) / job->share; }

/* --- the values that are not zero */

/* Sixteen numbers from index `k` on: a bit for each that is not zero. */
INLINE unsigned nonzero_of_16(const void *hidden, int64_t k, int dtype) {
    const __m256 zero = _mm256_setzero_ps(), low = load(hidden, k, dtype), high = load(hidden, k + 8, dtype);
    return (unsigned)(_mm256_movemask_ps(_mm256_cmp_ps(low, zero, _CMP_NEQ_UQ)) |
                      _mm256_movemask_ps(_mm256_cmp_ps(high, zero, _CMP_NEQ_UQ)) << 8);
}

/* The same for numbers above zero, and NaN. */
INLINE unsigned above_zero_of_16(const void *before, int64_t k, int dtype) {
    const __m256 zero = _mm256_setzero_ps(), low = load(before, k, dtype), high = load(before, k + 8, dtype);
    return (unsigned)(_mm256_movemask_ps(_mm256_cmp_ps(low, zero, _CMP_NLE_UQ)) |
                      _mm256_movemask_ps(_mm256_cmp_ps(high, zero, _CMP_NLE_UQ)) << 8);
}

INLINE void nonzero_of_token(const TokensJob *job, int64_t t, int dtype) {
    const char *hidden = (const char *)job->hidden + t * job->n * size_of(dtype);
    float *values = job->values + t * job->n;
    uint16_t *row_of = job->row_of + t * job->n;
    int32_t count = 0;
    int64_t k = 0;
    for (; k + 16 <= job->n; k += 16)
        for (unsigned left = nonzero_of_16(hidden, k, dtype); left; left &= left - 1) {
            const int64_t at = k + __builtin_ctz(left);
            row_of[count] = (uint16_t)at;
            values[count++] = one(hidden, at, dtype);
        }
    for (; k < job->n; k++) {
        row_of[count] = (uint16_t)k;
        values[count] = one(hidden, k, dtype);
        count += values[count] != 0.0f;
    }
    job->count[t] = count;
}

static FAST void nonzero_body(void *data) {
    TokensJob *job = data;
    for (int64_t t; (t = atomic_fetch_add(&job->next, 1)) < job->tokens;)
        BY_DTYPE(job->dtype, nonzero_of_token, job, t);
}

int64_t FAST hf_several_nonzero(TokensJob *job) {
    int64_t all = 0;
    atomic_store(&job->next, 0);
    run_on_threads(nonzero_body, job, job->tokens > FEW ? job->threads : 1);
    for (int64_t t = 0; t < job->tokens; t++)
        all += job->count[t];
    job->pack = job->packed && all >= PACKED_USES * job->n;
    return all;
}

INLINE void count_uses(const void *before, int64_t tokens, int64_t n, int64_t *uses, int64_t *last, int dtype) {
    for (int64_t t = 0; t < tokens; t++) {
        const char *of_token = (const char *)before + t * n * size_of(dtype);
        int64_t k = 0;
        for (; k + 16 <= n; k += 16)
            for (unsigned left = above_zero_of_16(of_token, k, dtype); left; left &= left - 1) {
                const int64_t at = k + __builtin_ctz(left);
                uses[at]++;
                last[at] = t + 1;
            }
        for (; k < n; k++)
            if (!(one(of_token, k, dtype) <= 0.0f)) {
                uses[k]++;
                last[k] = t + 1;
            }
    }
}

void FAST hf_count_uses(const void *before, int64_t tokens, int64_t n, int32_t dtype, int64_t *uses, int64_t *last) {
    BY_DTYPE(dtype, count_uses, before, tokens, n, uses, last);
}

/* --- products */

#define LANES 8
#include "several_width.h"
#undef LANES

#define LANES 16
#include "several_width.h"
#undef LANES

static int avx512(const TokensJob *job) { return !job->no_avx512 && has_avx512(); }

void FAST hf_several_up(TokensJob *job) {
    const int64_t fair = job->todo / (4 * job->threads); /* with few tokens, all threads should have something to do */
    job->share = job->tokens > GROUP || fair > SHARE ? SHARE : fair < LEAST ? LEAST : fair;
    atomic_store(&job->next, 0);
    atomic_store(&job->meanwhile.ended, 0);
    run_on_threads(avx512(job) ? several_up_of_16 : several_up_of_8, job, job->threads);
}

void FAST hf_several_down(TokensJob *job) {
    atomic_store(&job->next, 0);
    run_on_threads(avx512(job) ? several_down_of_16 : several_down_of_8, job, job->threads);
}

#endif
