/* What is faster with wider vectors. Included by _native.c once for each width, which it defines: VEC has LANES numbers in fp32,
 * HALF as many in 16 bits, PARTS of them make 16 columns. */

/* A matrix that stays in memory times a few tokens.
 *
 * A tile of ROWS x TOKENS sums is kept in registers while the columns go by, so that a weight is fetched once and used for
 * every token. A sum is 16 partial sums, whatever the width and the tile: a token gets the same bits beside others and alone. */

#define OF_WIDTH(type) static inline __attribute__((always_inline, target(TARGET))) type

OF_WIDTH(VEC) NAME(load)(const char *row, int64_t i, int dtype) {
    if (dtype == F32)
        return LOAD((const float *)row + i);
    HALF half = LOAD_HALF((const HALF *)((const uint16_t *)row + i));
    return dtype == F16 ? FROM_F16(half) : FROM_BF16(half);
}

/* Several rows are several streams, and the next tile is fetched ahead, in the order in which it lies in memory; one row is one
 * stream, which processors fetch ahead best by themselves. */
OF_WIDTH(void) NAME(tile)(const Linear *m, int64_t row, int64_t token, int rows, int tokens, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2, stride = m->columns * size, ahead = TILE_ROWS * stride;
    const char *weight = (const char *)m->weight + row * stride;
    const float *x = m->wide + token * m->columns;
    VEC sums[TILE_ROWS][TILE_TOKENS][PARTS];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++)
            UNROLLED(int p = 0; p < PARTS; p++)
                sums[r][t][p] = ZERO();
    int64_t i = 0;
    for (; i + 16 <= m->columns; i += 16) {
        if (rows > 1)
            UNROLLED(int line = 0; line < rows * size / 4; line++)
                _mm_prefetch(weight + ahead + i * size * rows + line * 64, _MM_HINT_T1);
        UNROLLED(int p = 0; p < PARTS; p++) {
            const int64_t at = i + p * LANES;
            VEC w[TILE_ROWS];
            UNROLLED(int r = 0; r < rows; r++)
                w[r] = NAME(load)(weight + r * stride, at, dtype);
            UNROLLED(int t = 0; t < tokens; t++) {
                VEC some = LOAD(x + t * m->columns + at);
                UNROLLED(int r = 0; r < rows; r++)
                    sums[r][t][p] = FMA(w[r], some, sums[r][t][p]);
            }
        }
    }
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++) {
            float rest = 0.0f;
            for (int64_t k = i; k < m->columns; k++)
                rest = __builtin_fmaf(one(weight + r * stride, k, dtype), x[t * m->columns + k], rest);
            put(m, row + r, token + t, SUM(sums[r][t]) + rest, dtype);
        }
}

/* TILE_ROWS rows, or one: with all tokens. */
OF_WIDTH(void) NAME(tiles)(const Linear *m, int64_t row, int rows, int dtype) {
    int64_t t = 0;
    if (LANES == 16)
        for (; t + 4 <= m->tokens; t += 4)
            NAME(tile)(m, row, t, rows, 4, dtype);
    for (; t + 2 <= m->tokens; t += 2)
        if (LANES == 16 || rows == 1) {
            NAME(tile)(m, row, t, rows, 2, dtype);
        } else { /* there are 16 registers */
            NAME(tile)(m, row, t, 2, 2, dtype);
            NAME(tile)(m, row + 2, t, 2, 2, dtype);
        }
    if (t < m->tokens)
        NAME(tile)(m, row, t, rows, 1, dtype);
}

OF_WIDTH(void) NAME(linear_share)(Linear *m, int dtype) {
    for (;;) {
        int64_t row = (int64_t)atomic_fetch_add(&m->next, LINEAR_ROWS);
        if (row >= m->rows)
            return;
        const int64_t end = row + LINEAR_ROWS < m->rows ? row + LINEAR_ROWS : m->rows;
        for (; m->tokens > 1 && row + TILE_ROWS <= end; row += TILE_ROWS)
            NAME(tiles)(m, row, TILE_ROWS, dtype);
        for (; row < end; row++)
            NAME(tiles)(m, row, 1, dtype);
    }
}

static __attribute__((target(TARGET))) void NAME(linear_body)(void *data) {
    Linear *m = data;
    BY_DTYPE(m->dtype, NAME(linear_share), m);
}

/* Several tokens, each with neurons of its own. Sums are made as for one token, in the order of the neurons. */

/* One or two rows times x: 32 partial sums, added as `dot` adds them. */
OF_WIDTH(void) NAME(dots)(const char **row, const char **ahead, int rows, const float *x, int64_t d, int dtype, float *sums) {
    const int64_t size = dtype == F32 ? 4 : 2;
    VEC part[2][32 / LANES];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int p = 0; p < 32 / LANES; p++)
            part[r][p] = ZERO();
    int64_t i = 0;
    for (; i + 32 <= d; i += 32) {
        UNROLLED(int r = 0; r < rows; r++) {
            _mm_prefetch(ahead[r] + i * size, _MM_HINT_T0);
            if (dtype == F32)
                _mm_prefetch(ahead[r] + i * size + 64, _MM_HINT_T0);
        }
        UNROLLED(int p = 0; p < 32 / LANES; p++) {
            VEC some = LOAD(x + i + p * LANES);
            UNROLLED(int r = 0; r < rows; r++)
                part[r][p] = FMA(NAME(load)(row[r], i + p * LANES, dtype), some, part[r][p]);
        }
    }
    UNROLLED(int r = 0; r < rows; r++) {
        float rest = 0.0f;
        for (int64_t k = i; k < d; k++)
            rest = __builtin_fmaf(one(row[r], k, dtype), x[k], rest);
        sums[r] = SUM_32(part[r]) + rest;
    }
}

/* Hidden values of the first `named` neurons in `place`, for one token; those that are not zero stay there. Returns how many. */
OF_WIDTH(int32_t) NAME(up_token)(const Several *s, const float *x, uint16_t *place, int64_t named, float *hidden, int dtype) {
    int32_t kept = 0;
    for (int64_t j = 0; j < named; j += 2) {
        const int64_t last = named - 1, second = j + 1 < named ? j + 1 : j;
        const char *row[2] = {s->rows[place[j]], s->rows[place[second]]};
        const char *ahead[2] = {s->rows[place[j + 2 < last ? j + 2 : last]], s->rows[place[j + 3 < last ? j + 3 : last]]};
        float sums[2];
        if (second > j)
            NAME(dots)(row, ahead, 2, x, s->d, dtype, sums);
        else
            NAME(dots)(row, ahead, 1, x, s->d, dtype, sums);
        for (int64_t i = j; i <= second; i++) {
            float sum = s->bias ? sums[i - j] + one(s->bias, s->ids[place[i]], dtype) : sums[i - j];
            sum = rounded(sum, dtype);
            hidden[kept] = sum < 0.0f ? 0.0f : sum;
            place[kept] = place[i];
            kept += hidden[kept] != 0.0f;
        }
    }
    return kept;
}

/* The neurons of a share stay in a core's cache while a group of tokens goes by. */
OF_WIDTH(void) NAME(up_share)(Several *s, int64_t share, int64_t first, int64_t last, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2, begin = share * s->share, end = begin + s->share < s->n ? begin + s->share : s->n;
    float wide[dtype == F32 ? 1 : s->d];
    for (int64_t t = first; t < last; t++) {
        const uint8_t *used = s->used + t * s->d_ff;
        const char *x = (const char *)s->x + t * s->d * size;
        uint16_t *place = s->place + t * s->n + begin;
        int64_t named = 0, i = 0;
        for (int64_t k = begin; k < end; k++) {
            place[named] = (uint16_t)k;
            named += used[s->ids[k]] != 0;
        }
        if (t + 1 < last)
            for (int64_t at = 0; at < s->d * size; at += 64)
                _mm_prefetch(x + s->d * size + at, _MM_HINT_T1);
        if (named && dtype != F32) {
            for (; i + LANES <= s->d; i += LANES)
                STORE(wide + i, NAME(load)(x, i, dtype));
            for (; i < s->d; i++)
                wide[i] = one(x, i, dtype);
        }
        s->count[t * shares_of(s) + share] =
            NAME(up_token)(s, dtype == F32 ? (const float *)x : wide, place, named, s->hidden + t * s->n + begin, dtype);
    }
}

OF_WIDTH(void) NAME(up_shares)(Several *s, int dtype) {
    const int64_t groups = (s->tokens + GROUP - 1) / GROUP;
    for (int64_t unit; (unit = atomic_fetch_add(&s->next, 1)) < shares_of(s) * groups;) {
        const int64_t first = unit % groups * GROUP, last = first + GROUP < s->tokens ? first + GROUP : s->tokens;
        NAME(up_share)(s, unit / groups, first, last, dtype);
    }
}

static __attribute__((target(TARGET))) void NAME(several_up)(void *data) {
    Several *s = data;
    BY_DTYPE(s->dtype, NAME(up_shares), s);
}

/* PARTS vectors of a token's output are kept in registers while its neurons go by. `packed`: the columns, if they were copied. */
OF_WIDTH(void) NAME(down_parts)(const Several *s, const char *packed, int64_t t, int64_t column, int parts, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2, offset = (s->d + column) * size, count = s->count[t * shares_of(s)];
    const uint16_t *place = s->place + t * s->n;
    const float *hidden = s->hidden + t * s->n;
    float *out = s->out + t * s->d + column;
    VEC sums[TILE_PARTS];
    UNROLLED(int p = 0; p < parts; p++)
        sums[p] = LOAD(out + p * LANES);
    for (int64_t j = 0; j < count; j++) {
        const char *row = packed ? packed + place[j] * TILE_PARTS * LANES * size : s->rows[place[j]] + offset;
        const VEC weight = FILL(hidden[j]);
        if (!packed) {
            const char *ahead = s->rows[place[j + AHEAD < count ? j + AHEAD : j]] + offset;
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

/* The columns that are left after all whole vectors. */
OF_WIDTH(void) NAME(down_rest)(const Several *s, int64_t t, int64_t column, int dtype) {
    for (int64_t j = 0; j < s->count[t * shares_of(s)]; j++) {
        const char *row = s->rows[s->place[t * s->n + j]] + s->d * (dtype == F32 ? 4 : 2);
        for (int64_t i = column; i < s->d; i++)
            s->out[t * s->d + i] = __builtin_fmaf(one(row, i, dtype), s->hidden[t * s->n + j], s->out[t * s->d + i]);
    }
}

/* The columns of one tile, for all tokens. Copied together when each is used often: rows are some pages apart, and would get into
 * each other's way in a cache. */
OF_WIDTH(void) NAME(down_tile)(const Several *s, int64_t column, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2, columns = TILE_PARTS * LANES, width = columns * size;
    if (column + columns <= s->d) {
        char *packed = s->pack ? s->packed + me(s->threads) * s->n * TILE_BYTES : NULL;
        if (packed)
            for (int64_t k = 0; k < s->n; k++) {
                const char *ahead = s->rows[k + 2 * AHEAD < s->n ? k + 2 * AHEAD : k] + (s->d + column) * size;
                for (int64_t at = 0; at < width; at += 64)
                    _mm_prefetch(ahead + at, _MM_HINT_T0);
                memcpy(packed + k * width, s->rows[k] + (s->d + column) * size, (size_t)width);
            }
        for (int64_t t = 0; t < s->tokens; t++)
            if (packed)
                NAME(down_parts)(s, packed, t, column, TILE_PARTS, dtype);
            else
                NAME(down_parts)(s, NULL, t, column, TILE_PARTS, dtype);
        return;
    }
    for (int64_t t = 0; t < s->tokens; t++) {
        int64_t i = column;
        for (; i + LANES <= s->d; i += LANES)
            NAME(down_parts)(s, NULL, t, i, 1, dtype);
        NAME(down_rest)(s, t, i, dtype);
    }
}

OF_WIDTH(void) NAME(down_tiles)(Several *s, int dtype) {
    const int64_t columns = TILE_PARTS * LANES;
    for (int64_t column; (column = columns * atomic_fetch_add(&s->next, 1)) < s->d;)
        NAME(down_tile)(s, column, dtype);
}

static __attribute__((target(TARGET))) void NAME(several_down)(void *data) {
    Several *s = data;
    BY_DTYPE(s->dtype, NAME(down_tiles), s);
}

#undef OF_WIDTH
#undef TARGET
#undef NAME
#undef VEC
#undef HALF
#undef LANES
#undef PARTS
#undef LOAD
#undef LOAD_HALF
#undef FROM_F16
#undef FROM_BF16
#undef ZERO
#undef FMA
#undef SUM
#undef SUM_32
#undef FILL
#undef STORE
