/* Several tokens, each with neurons of its own, for one width of vectors. Included by several.c, once for each width.
 * Sums are made as for one token, in the order of the neurons. */

#include "width.h"

/* --- up */

/* One or two rows times x: 32 partial sums, added as `dot` of neurons.c adds them. */
OF_WIDTH(void)
NAME(dots)(const char **row, const char **ahead, int rows, const float *x, int64_t width, int dtype, float *sums) {
    const int64_t size = size_of(dtype);
    VECTOR part[2][32 / LANES];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int p = 0; p < 32 / LANES; p++)
            part[r][p] = ZERO();
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
        UNROLLED(int r = 0; r < rows; r++) {
            _mm_prefetch(ahead[r] + i * size, _MM_HINT_T0);
            if (dtype == F32)
                _mm_prefetch(ahead[r] + i * size + 64, _MM_HINT_T0);
        }
        UNROLLED(int p = 0; p < 32 / LANES; p++) {
            VECTOR some = LOAD(x + i + p * LANES);
            UNROLLED(int r = 0; r < rows; r++)
                part[r][p] = FMA(NAME(load)(row[r], i + p * LANES, dtype), some, part[r][p]);
        }
    }
    UNROLLED(int r = 0; r < rows; r++) {
        float rest = 0.0f;
        for (int64_t k = i; k < width; k++)
            rest = __builtin_fmaf(one(row[r], k, dtype), x[k], rest);
        sums[r] = SUM_32(part[r]) + rest;
    }
}

/* Products of x with one part of the first `named` neurons in `row_of`, plus its bias, rounded. */
OF_WIDTH(void)
NAME(products)(const TokensJob *job, int64_t offset, const void *bias, const float *x, const uint16_t *row_of, int64_t named,
               int dtype, float *found) {
    for (int64_t j = 0; j < named; j += 2) {
        const int64_t last = named - 1, second = j + 1 < named ? j + 1 : j;
        const int64_t third = j + 2 < last ? j + 2 : last, fourth = j + 3 < last ? j + 3 : last;
        const char *row[2] = {job->rows[row_of[j]] + offset, job->rows[row_of[second]] + offset};
        const char *ahead[2] = {job->rows[row_of[third]] + offset, job->rows[row_of[fourth]] + offset};
        float sums[2];
        if (second > j)
            NAME(dots)(row, ahead, 2, x, job->layout.width, dtype, sums);
        else
            NAME(dots)(row, ahead, 1, x, job->layout.width, dtype, sums);
        for (int64_t i = j; i <= second; i++)
            found[i] = rounded(bias ? sums[i - j] + one(bias, job->ids[row_of[i]], dtype) : sums[i - j], dtype);
    }
}

/* Hidden values of the first `named` neurons in `row_of`, for one token; only non-zero ones are stored. */
OF_WIDTH(void)
NAME(up_token)(const TokensJob *job, const float *x, int64_t t, uint16_t *row_of, int64_t named, int dtype) {
    const RowLayout *layout = &job->layout;
    const int gated = layout->gate_offset >= 0;
    const int64_t first = gated ? layout->gate_offset : layout->up_offset;
    float value[SHARE], up[SHARE];
    int64_t alive = 0;
    NAME(products)(job, first, gated ? job->gate_bias : job->bias, x, row_of, named, dtype, value);
    for (int64_t j = 0; j < named; j++) {
        const float found = activated(value[j], &job->activation, dtype);
        value[alive] = found;
        row_of[alive] = row_of[j];
        alive += found != 0.0f;
    }
    if (gated)
        NAME(products)(job, layout->up_offset, job->bias, x, row_of, alive, dtype, up);
    for (int64_t j = 0; j < alive; j++) {
        if (gated)
            value[j] *= job->activation.of_both ? activated(up[j], &job->activation, dtype) : up[j];
        put(job->hidden, t * job->n + row_of[j], value[j], dtype);
    }
}

/* The neurons of a share stay in a core's cache while a group of tokens goes by. */
OF_WIDTH(void) NAME(up_share)(TokensJob *job, int64_t share, int64_t first, int64_t last, int dtype) {
    const int64_t size = size_of(dtype), width = job->layout.width, begin = share * job->share;
    const int64_t end = begin + job->share < job->todo ? begin + job->share : job->todo;
    float wide[dtype == F32 ? 1 : width];
    for (int64_t t = first; t < last; t++) {
        const uint8_t *used = job->used + t * job->d_ff;
        const char *x = (const char *)job->x + t * width * size;
        uint16_t *row_of = job->row_of + t * job->n + begin;
        int64_t named = 0, i = 0;
        for (int64_t k = begin; k < end; k++) {
            const int64_t position = job->positions[k];
            row_of[named] = (uint16_t)position;
            named += !job->used || used[job->ids[position]];
            put(job->hidden, t * job->n + position, 0.0f, dtype);
        }
        if (t + 1 < last)
            for (int64_t at = 0; at < width * size; at += 64)
                _mm_prefetch(x + width * size + at, _MM_HINT_T1);
        if (named && dtype != F32) {
            for (; i + LANES <= width; i += LANES)
                STORE(wide + i, NAME(load)(x, i, dtype));
            for (; i < width; i++)
                wide[i] = one(x, i, dtype);
        }
        NAME(up_token)(job, dtype == F32 ? (const float *)x : wide, t, row_of, named, dtype);
    }
}

OF_WIDTH(void) NAME(up_shares)(TokensJob *job, int dtype) {
    const int64_t groups = (job->tokens + GROUP - 1) / GROUP;
    for (int64_t task; (task = atomic_fetch_add(&job->next, 1)) < shares_of(job) * groups;) {
        const int64_t first = task % groups * GROUP, last = first + GROUP < job->tokens ? first + GROUP : job->tokens;
        NAME(up_share)(job, task / groups, first, last, dtype);
    }
}

BODY NAME(several_up)(void *data) {
    TokensJob *job = data;
    const int caller = thread_index(job->threads) == 0;
    begin_meanwhile(&job->meanwhile, caller);
    BY_DTYPE(job->dtype, NAME(up_shares), job);
    end_meanwhile(&job->meanwhile, caller);
}

/* --- down */

/* `parts` vectors of a token's output are kept in registers while its neurons go by. `packed`: the packed columns, or null. */
OF_WIDTH(void) NAME(down_parts)(const TokensJob *job, const char *packed, int64_t t, int64_t column, int parts, int dtype) {
    const int64_t size = size_of(dtype), offset = job->layout.down_offset + column * size;
    const int64_t count = job->count[t];
    const uint16_t *row_of = job->row_of + t * job->n;
    const float *values = job->values + t * job->n;
    float *out = job->out + t * job->layout.width + column;
    VECTOR sums[TILE_PARTS];
    UNROLLED(int p = 0; p < parts; p++)
        sums[p] = LOAD(out + p * LANES);
    for (int64_t j = 0; j < count; j++) {
        const char *row = packed ? packed + row_of[j] * TILE_PARTS * LANES * size : job->rows[row_of[j]] + offset;
        const VECTOR weight = FILL(values[j]);
        if (!packed) {
            const char *ahead = job->rows[row_of[j + AHEAD < count ? j + AHEAD : j]] + offset;
            UNROLLED(int p = 0; p < parts; p++)
                if (p * LANES * size % 64 == 0)
                    _mm_prefetch(ahead + p * LANES * size, _MM_HINT_T0);
        }
        UNROLLED(int p = 0; p < parts; p++)
            sums[p] = FMA(NAME(load)(row, p * LANES, dtype), weight, sums[p]);
    }
    UNROLLED(int p = 0; p < parts; p++)
        STORE(out + p * LANES, sums[p]);
}

/* The columns that are left after whole vectors. */
OF_WIDTH(void) NAME(down_rest)(const TokensJob *job, int64_t t, int64_t column, int dtype) {
    const int64_t width = job->layout.width;
    for (int64_t j = 0; j < job->count[t]; j++) {
        const char *row = job->rows[job->row_of[t * job->n + j]] + job->layout.down_offset;
        for (int64_t i = column; i < width; i++)
            job->out[t * width + i] = __builtin_fmaf(one(row, i, dtype), job->values[t * job->n + j], job->out[t * width + i]);
    }
}

/* The columns of one tile, for all tokens. They are packed first if each neuron is used often, because rows that are some pages
 * apart would compete for the same cache lines. */
OF_WIDTH(void) NAME(down_tile)(const TokensJob *job, int64_t column, int dtype) {
    const int64_t size = size_of(dtype), columns = TILE_PARTS * LANES, tile_bytes = columns * size;
    const int64_t width = job->layout.width, offset = job->layout.down_offset + column * size;
    if (column + columns <= width) {
        char *packed = job->pack ? job->packed + thread_index(job->threads) * job->n * TILE_BYTES : NULL;
        if (packed)
            for (int64_t k = 0; k < job->n; k++) {
                const char *ahead = job->rows[k + 2 * AHEAD < job->n ? k + 2 * AHEAD : k] + offset;
                for (int64_t at = 0; at < tile_bytes; at += 64)
                    _mm_prefetch(ahead + at, _MM_HINT_T0);
                memcpy(packed + k * tile_bytes, job->rows[k] + offset, (size_t)tile_bytes);
            }
        for (int64_t t = 0; t < job->tokens; t++)
            if (packed)
                NAME(down_parts)(job, packed, t, column, TILE_PARTS, dtype);
            else
                NAME(down_parts)(job, NULL, t, column, TILE_PARTS, dtype);
        return;
    }
    for (int64_t t = 0; t < job->tokens; t++) {
        int64_t i = column;
        for (; i + LANES <= width; i += LANES)
            NAME(down_parts)(job, NULL, t, i, 1, dtype);
        NAME(down_rest)(job, t, i, dtype);
    }
}

OF_WIDTH(void) NAME(down_tiles)(TokensJob *job, int dtype) {
    const int64_t columns = TILE_PARTS * LANES;
    for (int64_t column; (column = columns * atomic_fetch_add(&job->next, 1)) < job->layout.width;)
        NAME(down_tile)(job, column, dtype);
}

BODY NAME(several_down)(void *data) {
    TokensJob *job = data;
    BY_DTYPE(job->dtype, NAME(down_tiles), job);
}
