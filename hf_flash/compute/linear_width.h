/* A matrix times a few tokens, for one width of vectors. Included by linear.c, once for each width.
 *
 * A tile of rows x tokens sums is kept in registers while the columns go by, so that a weight is fetched once and used for every
 * token. A sum is 16 partial sums, whatever the width and the tile: a token gets the same bits beside others and alone. */

#include "width.h"

#include "coded_width.h"

/* TILE_ROWS rows are as many streams: the next tile is prefetched, in the order in which it lies in memory. For two rows at a time,
 * as one token in fp32 takes them, the processor's own prefetching is better. */
OF_WIDTH(void) NAME(plain_tile)(const LinearJob *job, int64_t row, int64_t token, int rows, int tokens, int dtype) {
    const int64_t size = size_of(dtype), stride = job->columns * size;
    const int64_t ahead = TILE_ROWS * stride > AHEAD_BYTES ? TILE_ROWS * stride : AHEAD_BYTES;
    const char *weight = (const char *)job->weight + row * stride;
    const float *x = job->x_f32 + token * job->columns;
    VECTOR sums[TILE_ROWS][TILE_TOKENS][PARTS];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++)
            UNROLLED(int p = 0; p < PARTS; p++)
                sums[r][t][p] = ZERO();
    int64_t i = 0;
    for (; i + 16 <= job->columns; i += 16) {
        if (rows == TILE_ROWS)
            UNROLLED(int line = 0; line < rows * size / 4; line++)
                _mm_prefetch(weight + ahead + i * size * rows + line * 64, _MM_HINT_T1);
        UNROLLED(int p = 0; p < PARTS; p++) {
            const int64_t at = i + p * LANES;
            VECTOR w[TILE_ROWS];
            UNROLLED(int r = 0; r < rows; r++)
                w[r] = NAME(load)(weight + r * stride, at, dtype);
            UNROLLED(int t = 0; t < tokens; t++) {
                VECTOR some = LOAD(x + t * job->columns + at);
                UNROLLED(int r = 0; r < rows; r++)
                    sums[r][t][p] = FMA(w[r], some, sums[r][t][p]);
            }
        }
    }
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++) {
            float rest = 0.0f;
            for (int64_t k = i; k < job->columns; k++)
                rest = __builtin_fmaf(one(weight + r * stride, k, dtype), x[t * job->columns + k], rest);
            put_sum(job, row + r, token + t, SUM_16(sums[r][t]) + rest);
        }
}

OF_WIDTH(void) NAME(tile)(const LinearJob *job, int64_t row, int64_t token, int rows, int tokens, int code) {
    if (code == E2M1)
        NAME(e2m1_tile)(job, row, token, rows, tokens);
    else if (code >= E4M3_AS)
        NAME(e4m3_tile)(job, row, token, rows, tokens, code - E4M3_AS);
    else
        NAME(plain_tile)(job, row, token, rows, tokens, code);
}

/* Some rows, with all tokens. */
OF_WIDTH(void) NAME(tiles)(const LinearJob *job, int64_t row, int rows, int code) {
    int64_t t = 0;
    if (LANES == 16)
        for (; t + 4 <= job->tokens; t += 4)
            NAME(tile)(job, row, t, rows, 4, code);
    for (; t + 2 <= job->tokens; t += 2)
        if (LANES == 16 || rows < TILE_ROWS) {
            NAME(tile)(job, row, t, rows, 2, code);
        } else { /* there are 16 registers */
            NAME(tile)(job, row, t, 2, 2, code);
            NAME(tile)(job, row + 2, t, 2, 2, code);
        }
    if (t < job->tokens)
        NAME(tile)(job, row, t, rows, 1, code);
}

OF_WIDTH(void) NAME(linear_share)(LinearJob *job, int code) {
    for (;;) {
        int64_t row = (int64_t)atomic_fetch_add(&job->next, LINEAR_ROWS);
        if (row >= job->rows)
            return;
        const int64_t end = row + LINEAR_ROWS < job->rows ? row + LINEAR_ROWS : job->rows;
        for (; (job->tokens > 1 || code != F32) && row + TILE_ROWS <= end; row += TILE_ROWS)
            NAME(tiles)(job, row, TILE_ROWS, code);
        for (; row + 2 <= end; row += 2) /* with one row at a time, each sum would wait for the one before */
            NAME(tiles)(job, row, 2, code);
        for (; row < end; row++)
            NAME(tiles)(job, row, 1, code);
    }
}

OF_WIDTH(void) NAME(e4m3_share)(LinearJob *job, int dtype) { NAME(linear_share)(job, E4M3_AS + dtype); }

/* Some outputs of a turned matrix, for a few tokens. A row of such a matrix is multiplied by one input. An output is one sum in the
 * order of the inputs, whatever the width. */
OF_WIDTH(void) NAME(strip)(const LinearJob *job, int64_t begin, int64_t outputs, int64_t token, int tokens, int dtype) {
    float sums[TILE_TOKENS][STRIP] = {{0}};
    const int64_t stride = job->rows * size_of(dtype);
    const char *weight = (const char *)job->weight + begin * size_of(dtype);
    const float *x = job->x_f32 + token * job->columns;
    for (int64_t i = 0; i < job->columns; i += 4) {
        const char *row = weight + i * stride;
        const int64_t left = job->columns - i < 4 ? job->columns - i : 4;
        int64_t k = 0;
        if (left == 4)
            for (; k + LANES <= outputs; k += LANES) {
                VECTOR w[4];
                UNROLLED(int r = 0; r < 4; r++) {
                    w[r] = NAME(load)(row + r * stride, k, dtype);
                    _mm_prefetch(row + (r + 4) * stride + k * size_of(dtype), _MM_HINT_T0);
                }
                UNROLLED(int t = 0; t < tokens; t++) {
                    VECTOR sum = LOAD(sums[t] + k);
                    UNROLLED(int r = 0; r < 4; r++)
                        sum = FMA(w[r], FILL(x[t * job->columns + i + r]), sum);
                    STORE(sums[t] + k, sum);
                }
            }
        for (; k < outputs; k++)
            for (int t = 0; t < tokens; t++)
                for (int64_t r = 0; r < left; r++)
                    sums[t][k] = __builtin_fmaf(one(row + r * stride, k, dtype), x[t * job->columns + i + r], sums[t][k]);
    }
    for (int t = 0; t < tokens; t++)
        for (int64_t k = 0; k < outputs; k++)
            put_sum(job, begin + k, token + t, sums[t][k]);
}

OF_WIDTH(void) NAME(turned_share)(LinearJob *job, int dtype) {
    for (;;) {
        const int64_t begin = (int64_t)atomic_fetch_add(&job->next, STRIP);
        if (begin >= job->rows)
            return;
        const int64_t outputs = begin + STRIP < job->rows ? STRIP : job->rows - begin;
        int64_t t = 0;
        for (; t + TILE_TOKENS <= job->tokens; t += TILE_TOKENS)
            NAME(strip)(job, begin, outputs, t, TILE_TOKENS, dtype);
        for (; t < job->tokens; t++)
            NAME(strip)(job, begin, outputs, t, 1, dtype);
    }
}

BODY NAME(linear_body)(void *data) {
    LinearJob *job = data;
    if (job->turned)
        BY_DTYPE(job->weight_dtype, NAME(turned_share), job);
    else if (job->weight_dtype == E2M1)
        NAME(linear_share)(job, E2M1);
    else if (job->weight_dtype == E4M3)
        BY_DTYPE(job->dtype, NAME(e4m3_share), job);
    else
        BY_DTYPE(job->weight_dtype, NAME(linear_share), job);
}

BODY NAME(linears_body)(void *data) {
    LinearsJob *all = data;
    for (int64_t i = 0; i < all->n; i++)
        NAME(linear_body)(all->jobs + i);
    end_meanwhile(&all->meanwhile, thread_index(all->threads) == 0);
}
