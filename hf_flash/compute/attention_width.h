/* Attention of a few tokens, for one width of vectors. Included by attention.c, once for each width.
 *
 * Whatever the width and the tile, a score is 16 partial sums, and a weighted sum of values is one sum in the order of the keys. */

#include "width.h"

#undef HIGHER
#undef TIMES_POWER
#undef KEEP_FROM

#if LANES == 8
#define HIGHER _mm256_max_ps /* the higher of two; the second if either is NaN */
#define TIMES_POWER(p, t) /* p times 2 to the power of the last bits of t */ \
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)))
#define KEEP_FROM(low, x, p) _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_NLT_UQ), p)
#else
#define HIGHER _mm512_max_ps
#define TIMES_POWER(p, t) \
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)))
#define KEEP_FROM(low, x, p) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), p)
#endif

/* exp(x) for x <= 0, to 2 units in the last place; 0 below -87. Adding 1.5 * 2^23 to x / ln 2 leaves its whole part in the last
 * bits; that goes into the exponent, and a polynomial (Cephes, expf) takes the rest. */
OF_WIDTH(VECTOR) NAME(exp_of)(VECTOR x) {
    const VECTOR low = FILL(-87.0f), magic = FILL(12582912.0f), in = HIGHER(low, x);
    const VECTOR t = FMA(in, FILL(1.44269504f), magic), n = t - magic;
    const VECTOR r = FMA(n, FILL(2.12194440e-4f), FMA(n, FILL(-0.693359375f), in));
    VECTOR p = FILL(1.9875691500e-4f);
    p = FMA(p, r, FILL(1.3981999507e-3f));
    p = FMA(p, r, FILL(8.3334519073e-3f));
    p = FMA(p, r, FILL(4.1665795894e-2f));
    p = FMA(p, r, FILL(1.6666665459e-1f));
    p = FMA(p, r, FILL(5.0000001201e-1f));
    p = FMA(p, TIMES(r, r), r) + FILL(1.0f);
    return KEEP_FROM(low, x, TIMES_POWER(p, t));
}

/* The scores of some rows with some keys. */
OF_WIDTH(void)
NAME(score_tile)(const float *x, const char *key, int64_t stride, int64_t width, int rows, int keys, int dtype, float (*scores)[PIECE]) {
    VECTOR sums[TILE_ROWS][TILE_KEYS][PARTS];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int k = 0; k < keys; k++)
            UNROLLED(int p = 0; p < PARTS; p++)
                sums[r][k][p] = ZERO();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        UNROLLED(int p = 0; p < PARTS; p++) {
            const int64_t begin = i + p * LANES;
            VECTOR some[TILE_KEYS];
            UNROLLED(int k = 0; k < keys; k++)
                some[k] = NAME(load)(key + k * stride, begin, dtype);
            UNROLLED(int r = 0; r < rows; r++) {
                const VECTOR q = LOAD(x + r * width + begin);
                UNROLLED(int k = 0; k < keys; k++)
                    sums[r][k][p] = FMA(some[k], q, sums[r][k][p]);
            }
        }
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int k = 0; k < keys; k++) {
            float rest = 0.0f;
            for (int64_t j = i; j < width; j++)
                rest = __builtin_fmaf(one(key + k * stride, j, dtype), x[r * width + j], rest);
            scores[r][k] = SUM_16(sums[r][k]) + rest;
        }
}

/* The scores of up to TILE_ROWS rows with all keys of a piece. */
OF_WIDTH(void)
NAME(scores)(const float *x, const char *key, int64_t stride, int64_t width, int64_t keys, int rows, int dtype, float (*scores)[PIECE]) {
    int64_t k = 0;
    const int tile = LANES == 16 || rows == 1 ? TILE_KEYS : 2; /* there are 16 registers */
    for (; k + tile <= keys; k += tile)
        NAME(score_tile)(x, key + k * stride, stride, width, rows, tile, dtype, (float(*)[PIECE])(scores[0] + k));
    for (; k < keys; k++)
        NAME(score_tile)(x, key + k * stride, stride, width, rows, 1, dtype, (float(*)[PIECE])(scores[0] + k));
}

/* Turn scores into weights; the highest score gets weight 1. */
OF_WIDTH(void) NAME(weigh)(float *scores, int64_t keys, float *found) {
    float highest = -INFINITY, sum = 0.0f;
    int is_number = 1;
    for (int64_t k = 0; k < keys; k++) {
        highest = scores[k] > highest ? scores[k] : highest;
        is_number &= scores[k] < INFINITY;
    }
    found[HIGHEST] = highest;
    found[SUM] = is_number ? 0.0f : NAN;
    if (highest == -INFINITY || !is_number) {
        memset(scores, 0, (size_t)keys * sizeof *scores);
        return;
    }
    int64_t k = 0;
    for (; k + LANES <= keys; k += LANES)
        STORE(scores + k, NAME(exp_of)(LOAD(scores + k) - FILL(highest)));
    if (k < keys) { /* the row of scores has room for a whole vector here */
        for (int64_t rest = keys; rest < k + LANES; rest++)
            scores[rest] = highest;
        STORE(scores + k, NAME(exp_of)(LOAD(scores + k) - FILL(highest)));
    }
    for (k = 0; k < keys; k++)
        sum += scores[k];
    found[SUM] = sum;
}

/* A strip of the weighted sums of values of some rows. */
OF_WIDTH(void)
NAME(value_tile)(const float (*weights)[PIECE], const char *value, int64_t stride, int64_t keys, int rows, int vectors, int dtype,
                 float *found, int64_t row_stride) {
    VECTOR sums[TILE_ROWS][STRIP_VECTORS];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int v = 0; v < vectors; v++)
            sums[r][v] = ZERO();
    for (int64_t k = 0; k < keys; k++) {
        VECTOR some[STRIP_VECTORS];
        UNROLLED(int v = 0; v < vectors; v++)
            some[v] = NAME(load)(value + k * stride, v * LANES, dtype);
        UNROLLED(int r = 0; r < rows; r++) {
            const VECTOR weight = FILL(weights[r][k]);
            UNROLLED(int v = 0; v < vectors; v++)
                sums[r][v] = FMA(some[v], weight, sums[r][v]);
        }
    }
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int v = 0; v < vectors; v++)
            STORE(found + r * row_stride + v * LANES, sums[r][v]);
}

/* The weighted sums of values of up to TILE_ROWS rows. */
OF_WIDTH(void)
NAME(values)(const float (*weights)[PIECE], const char *value, int64_t stride, int64_t keys, int64_t width, int rows, int dtype,
             float *found, int64_t row_stride) {
    const int64_t size = size_of(dtype), strip = STRIP_VECTORS * LANES;
    int64_t i = 0;
    for (; i + strip <= width; i += strip)
        NAME(value_tile)(weights, value + i * size, stride, keys, rows, STRIP_VECTORS, dtype, found + i, row_stride);
    for (; i + LANES <= width; i += LANES)
        NAME(value_tile)(weights, value + i * size, stride, keys, rows, 1, dtype, found + i, row_stride);
    for (; i < width; i++)
        for (int r = 0; r < rows; r++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < keys; k++)
                sum = __builtin_fmaf(one(value + k * stride, i, dtype), weights[r][k], sum);
            found[r * row_stride + i] = sum;
        }
}

/* Attention of some rows over one piece of their keys. */
OF_WIDTH(void)
NAME(piece_of_rows)(const AttentionJob *job, int64_t batch, int64_t key_head, int64_t first, int rows, int64_t piece, int dtype) {
    const int64_t begin = piece * PIECE, keys = keys_of(job, piece);
    const int64_t head = first_head(job, key_head), size = size_of(dtype);
    const int64_t row = (batch * job->heads + head) * job->tokens + first;
    const int64_t row_stride = found_of(job, 1, 0) - found_of(job, 0, 0);
    float *found = found_of(job, row, piece);
    float scores[TILE_ROWS][PIECE];
    NAME(scores)(job->room + row * job->width, at(job->key, job->key_steps, batch, key_head, begin, dtype), job->key_steps[2] * size,
                 job->width, keys, rows, dtype, scores);
    for (int r = 0; r < rows; r++) {
        const int64_t mine = first + r;
        if (job->mask)
            add_mask(job, mask_of(job, batch, head + mine / job->tokens, mine % job->tokens, begin), keys, scores[r]);
        NAME(weigh)(scores[r], keys, found + r * row_stride);
    }
    NAME(values)((const float(*)[PIECE])scores, at(job->value, job->value_steps, batch, key_head, begin, dtype),
                 job->value_steps[2] * size, keys, job->value_width, rows, dtype, found + VALUES, row_stride);
}

OF_WIDTH(void) NAME(attention_share)(AttentionJob *job, int dtype) {
    const int64_t pieces = pieces_of(job), rows = rows_of(job);
    for (int64_t task; (task = atomic_fetch_add(&job->next, 1)) < job->batch * job->key_heads * pieces;) {
        const int64_t piece = task % pieces, key_head = task / pieces % job->key_heads, batch = task / pieces / job->key_heads;
        const int64_t head = first_head(job, key_head);
        int64_t row = 0;
        if (is_hidden(job, batch, head, piece)) {
            for (; row < rows; row++)
                found_of(job, (batch * job->heads + head) * job->tokens + row, piece)[SUM] = 0.0f;
        }
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            NAME(piece_of_rows)(job, batch, key_head, row, TILE_ROWS, piece, dtype);
        for (; row < rows; row++)
            NAME(piece_of_rows)(job, batch, key_head, row, 1, piece, dtype);
    }
}

BODY NAME(attention_body)(void *data) {
    AttentionJob *job = data;
    BY_DTYPE(job->dtype, NAME(attention_share), job);
}
