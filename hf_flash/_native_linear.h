/* A matrix that stays in memory times a few tokens. Included by _native.c once for each width of vectors, which it defines:
 * VEC has LANES numbers in fp32, HALF as many in 16 bits, PARTS of them make 16 columns.
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
    for (; i + 16 <= m->columns; i += 16)
        UNROLLED(int p = 0; p < PARTS; p++) {
            const int64_t at = i + p * LANES;
            VEC w[TILE_ROWS];
            UNROLLED(int r = 0; r < rows; r++) {
                w[r] = NAME(load)(weight + r * stride, at, dtype);
                if (p == 0)
                    _mm_prefetch(weight + r * stride + at * size + ahead, _MM_HINT_T0);
            }
            UNROLLED(int t = 0; t < tokens; t++) {
                VEC some = LOAD(x + t * m->columns + at);
                UNROLLED(int r = 0; r < rows; r++)
                    sums[r][t][p] = FMA(w[r], some, sums[r][t][p]);
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
        for (; row + TILE_ROWS <= end; row += TILE_ROWS)
            NAME(tiles)(m, row, TILE_ROWS, dtype);
        for (; row < end; row++)
            NAME(tiles)(m, row, 1, dtype);
    }
}

static __attribute__((target(TARGET))) void NAME(linear_body)(void *data) {
    Linear *m = data;
    BY_DTYPE(m->dtype, NAME(linear_share), m);
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
