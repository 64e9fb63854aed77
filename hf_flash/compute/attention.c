/* Attention of a few tokens, as in decoding: its cost is to fetch keys and values, which happens once.
 *
 * Queries that share a head of keys are rows that are multiplied together. Keys are cut into pieces of fixed length. A piece
 * yields, for each row, the highest score, the sum of weights, and the weighted sum of values; at the end the results of a row are
 * merged in the order of the pieces. So the bits of a row depend neither on other rows nor on the number of threads. */

#include "native.h"

#ifdef HF_NATIVE

#include <math.h>
#include <stdlib.h>

#include "numbers.h"
#include "parallel.h"

enum { PIECE = 256 };                  /* keys of a piece */
enum { TILE_KEYS = 4, TILE_ROWS = 4 }; /* a tile is multiplied in registers */
enum { STRIP_VECTORS = 4 };            /* vectors of a value that are summed in registers */

/* The result of a piece for a row: highest score, sum of weights, then `value_width` weighted sums of values. */
enum { HIGHEST, SUM, VALUES };

INLINE int64_t pieces_of(const AttentionJob *job) { return (job->length + PIECE - 1) / PIECE; }

INLINE int64_t keys_of(const AttentionJob *job, int64_t piece) {
    const int64_t begin = piece * PIECE;
    return begin + PIECE < job->length ? PIECE : job->length - begin;
}

/* The first head of queries that uses a head of keys. */
INLINE int64_t first_head(const AttentionJob *job, int64_t key_head) { return key_head * (job->heads / job->key_heads); }

/* How many rows share a head of keys. */
INLINE int64_t rows_of(const AttentionJob *job) { return job->heads / job->key_heads * job->tokens; }

INLINE const char *at(const void *begin, const int64_t *steps, int64_t batch, int64_t head, int64_t token, int dtype) {
    return (const char *)begin + (batch * steps[0] + head * steps[1] + token * steps[2]) * size_of(dtype);
}

/* The mask of a row, beginning at a key. */
INLINE const char *mask_of(const AttentionJob *job, int64_t batch, int64_t head, int64_t token, int64_t key) {
    const int64_t *steps = job->mask_steps;
    const int64_t size = job->mask_dtype == BYTES ? 1 : size_of(job->mask_dtype);
    return (const char *)job->mask + (batch * steps[0] + head * steps[1] + token * steps[2] + key * steps[3]) * size;
}

/* Add the mask of a row to its scores. */
INLINE void add_mask(const AttentionJob *job, const char *mask, int64_t keys, float *scores) {
    const int64_t step = job->mask_steps[3];
    for (int64_t k = 0; k < keys; k++)
        if (job->mask_dtype == BYTES)
            scores[k] = mask[k * step] ? scores[k] : -INFINITY;
        else
            scores[k] += one(mask, k * step, job->mask_dtype);
}

/* Whether no row of a head of keys sees any key of a piece, as in the unfilled part of a KV cache. */
INLINE int is_hidden(const AttentionJob *job, int64_t batch, int64_t head, int64_t piece) {
    if (!job->mask || job->mask_dtype != BYTES)
        return 0;
    for (int64_t row = 0; row < rows_of(job); row++) {
        const char *mask = mask_of(job, batch, head + row / job->tokens, row % job->tokens, piece * PIECE);
        for (int64_t k = 0; k < keys_of(job, piece); k++)
            if (mask[k * job->mask_steps[3]])
                return 0;
    }
    return 1;
}

/* Where the result of a piece for a row is stored. */
INLINE float *found_of(const AttentionJob *job, int64_t row, int64_t piece) {
    const int64_t rows = job->batch * job->heads * job->tokens;
    return job->room + rows * job->width + (row * pieces_of(job) + piece) * (job->value_width + VALUES);
}

#define LANES 8
#include "attention_width.h"
#undef LANES

#define LANES 16
#include "attention_width.h"
#undef LANES

/* Merge the results of a row's pieces, and round. */
static FAST void put_together(const AttentionJob *job, int64_t row, int64_t out) {
    const int64_t pieces = pieces_of(job), stride = job->value_width + VALUES;
    const float *found = found_of(job, row, 0);
    float highest = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < pieces; p++)
        if (found[p * stride + SUM] != 0.0f && found[p * stride + HIGHEST] > highest)
            highest = found[p * stride + HIGHEST];
    float values[job->value_width];
    memset(values, 0, sizeof values);
    for (int64_t p = 0; p < pieces; p++) {
        const float *piece = found + p * stride;
        if (piece[SUM] == 0.0f)
            continue;
        const float part = expf(piece[HIGHEST] - highest);
        sum += part * piece[SUM];
        for (int64_t i = 0; i < job->value_width; i++)
            values[i] += part * piece[VALUES + i];
    }
    for (int64_t i = 0; i < job->value_width; i++)
        put(job->out, out + i, sum == 0.0f ? 0.0f : values[i] / sum, job->dtype);
}

static FAST void widen_queries(const AttentionJob *job, float *wide) {
    for (int64_t b = 0; b < job->batch; b++)
        for (int64_t h = 0; h < job->heads; h++)
            for (int64_t t = 0; t < job->tokens; t++) {
                const char *row = at(job->query, job->query_steps, b, h, t, job->dtype);
                for (int64_t i = 0; i < job->width; i++)
                    *wide++ = one(row, i, job->dtype) * job->scale;
            }
}

FAST int hf_attention(AttentionJob *job) {
    const int64_t rows = job->batch * job->heads * job->tokens;
    const int64_t numbers = rows * (job->width + pieces_of(job) * (job->value_width + VALUES));
    job->room = malloc((size_t)numbers * sizeof(float));
    if (!job->room)
        return 0;
    widen_queries(job, job->room);
    atomic_store(&job->next, 0);
    run_on_threads(job->no_avx512 || !has_avx512() ? attention_body_of_8 : attention_body_of_16, job, job->threads);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = row % job->tokens, head = row / job->tokens % job->heads, batch = row / job->tokens / job->heads;
        const int64_t out = ((batch * job->tokens + token) * job->heads + head) * job->value_width;
        put_together(job, row, out);
    }
    free(job->room);
    return 1;
}

#endif
