/* A matrix in 4 or 8 bits times a few tokens, for one width of vectors. Included by linear_width.h.
 *
 * The numbers multiplied are those of the stock model after it has decoded its checkpoint. Numbers of E4M3 are multiplied by
 * their scale and rounded to the compute dtype. Numbers of E2M1 times a power of two need no rounding, so a block is summed before
 * it is scaled. */

/* LANES numbers of E4M3. */
OF_WIDTH(VECTOR) NAME(load_e4m3)(const char *at) {
#if LANES == 8
    return TIMES(_mm256_cvtph_ps(e4m3_of_8(at)), FILL(E4M3_UNIT));
#else
    return TIMES(_mm512_cvtph_ps(e4m3_of_16(at)), FILL(E4M3_UNIT));
#endif
}

/* The numbers of E2M1 in LANES bytes: those with even indices go to `low`, the others to `high`. */
OF_WIDTH(void) NAME(load_e2m1)(const char *at, VECTOR *low, VECTOR *high) {
#if LANES == 8
    const __m256 values = _mm256_loadu_ps(E2M1_VALUES);
    const __m256i sign = _mm256_set1_epi32((int)0x80000000), codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
    const __m256i other = _mm256_srli_epi32(codes, 4);
    *low = _mm256_or_ps(_mm256_permutevar8x32_ps(values, codes),
                        _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(codes, 28), sign)));
    *high = _mm256_or_ps(_mm256_permutevar8x32_ps(values, other),
                         _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(other, 28), sign)));
#else
    const __m512 values = _mm512_loadu_ps(E2M1_VALUES);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
    *low = _mm512_permutexvar_ps(codes, values); /* the permutation uses four bits */
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
#endif
}

/* Round to a dtype, to nearest even. A NaN must not have all bits set. */
OF_WIDTH(VECTOR) NAME(round_to)(VECTOR x, int dtype) {
#if LANES == 8
    if (dtype == F16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return dtype == F32 ? x : _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
#else
    if (dtype == F16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return dtype == F32 ? x : _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000)));
#endif
}

/* Prefetch what a tile of rows will take in a step of 16 bytes per row. */
OF_WIDTH(void) NAME(fetch)(const char *weight, int64_t stride, int64_t at, int rows) {
    const int64_t ahead = TILE_ROWS * stride > AHEAD_BYTES ? TILE_ROWS * stride : AHEAD_BYTES;
    if (rows == TILE_ROWS)
        _mm_prefetch(weight + ahead + at * rows, _MM_HINT_T1);
}

OF_WIDTH(void) NAME(e2m1_tile)(const LinearJob *job, int64_t row, int64_t token, int rows, int tokens) {
    const int64_t stride = job->columns / 2, blocks = job->columns / E2M1_BLOCK;
    const char *weight = (const char *)job->weight + row * stride;
    const uint8_t *scales = (const uint8_t *)job->scales.at + row * blocks;
    const float *x = job->x_f32 + token * job->columns; /* in each block even indices come first, then odd ones */
    VECTOR sums[TILE_ROWS][TILE_TOKENS][PARTS];
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++)
            UNROLLED(int p = 0; p < PARTS; p++)
                sums[r][t][p] = ZERO();
    for (int64_t block = 0; block < blocks; block++) {
        NAME(fetch)(weight, stride, block * 16, rows);
        VECTOR scale[TILE_ROWS];
        UNROLLED(int r = 0; r < rows; r++)
            scale[r] = FILL(e8m0(scales[r * blocks + block]));
        UNROLLED(int p = 0; p < PARTS; p++) {
            VECTOR low[TILE_ROWS], high[TILE_ROWS];
            UNROLLED(int r = 0; r < rows; r++)
                NAME(load_e2m1)(weight + r * stride + block * 16 + p * LANES, low + r, high + r);
            UNROLLED(int t = 0; t < tokens; t++) {
                const float *some = x + t * job->columns + block * E2M1_BLOCK + p * LANES;
                const VECTOR even = LOAD(some), odd = LOAD(some + E2M1_BLOCK / 2);
                UNROLLED(int r = 0; r < rows; r++)
                    sums[r][t][p] = FMA(FMA(high[r], odd, TIMES(low[r], even)), scale[r], sums[r][t][p]);
            }
        }
    }
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++)
            put_sum(job, row + r, token + t, SUM_16(sums[r][t]));
}

OF_WIDTH(void) NAME(e4m3_tile)(const LinearJob *job, int64_t row, int64_t token, int rows, int tokens, int dtype) {
    const int64_t stride = job->columns, step = job->scales.block_columns;
    const char *weight = (const char *)job->weight + row * stride;
    const float *x = job->x_f32 + token * job->columns;
    VECTOR sums[TILE_ROWS][TILE_TOKENS][PARTS];
    float rest[TILE_ROWS][TILE_TOKENS] = {{0}};
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++)
            UNROLLED(int p = 0; p < PARTS; p++)
                sums[r][t][p] = ZERO();
    for (int64_t begin = 0; begin < job->columns; begin += step) {
        const int64_t end = begin + step < job->columns ? begin + step : job->columns;
        float scale[TILE_ROWS];
        UNROLLED(int r = 0; r < rows; r++)
            scale[r] = scale_of(&job->scales, row + r, begin);
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) {
            NAME(fetch)(weight, stride, i, rows);
            UNROLLED(int p = 0; p < PARTS; p++) {
                const int64_t at = i + p * LANES;
                VECTOR w[TILE_ROWS];
                UNROLLED(int r = 0; r < rows; r++)
                    w[r] = NAME(round_to)(TIMES(NAME(load_e4m3)(weight + r * stride + at), FILL(scale[r])), dtype);
                UNROLLED(int t = 0; t < tokens; t++) {
                    VECTOR some = LOAD(x + t * job->columns + at);
                    UNROLLED(int r = 0; r < rows; r++)
                        sums[r][t][p] = FMA(w[r], some, sums[r][t][p]);
                }
            }
        }
        for (; i < end; i++)
            UNROLLED(int r = 0; r < rows; r++) {
                const float w = rounded(e4m3((uint8_t)weight[r * stride + i]) * scale[r], dtype);
                UNROLLED(int t = 0; t < tokens; t++)
                    rest[r][t] = __builtin_fmaf(w, x[t * job->columns + i], rest[r][t]);
            }
    }
    UNROLLED(int r = 0; r < rows; r++)
        UNROLLED(int t = 0; t < tokens; t++)
            put_sum(job, row + r, token + t, SUM_16(sums[r][t]) + rest[r][t]);
}
