/* Decodes matrices in 4 or 8 bits to plain numbers, for products with many tokens, which torch computes. */

#include "native.h"

#ifdef HF_NATIVE

#include "coded.h"
#include "parallel.h"

enum { DECODE_ROWS = 16 }; /* rows that a thread takes at a time */

/* Store eight numbers from index `i` on, rounded to nearest even. */
INLINE void put_8(void *row, int64_t i, __m256 x, int dtype) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)row + i, x);
    } else if (dtype == F16) {
        _mm_storeu_si128((__m128i *)((uint16_t *)row + i), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
        _mm_storeu_si128((__m128i *)((uint16_t *)row + i), _mm256_castsi256_si128(narrow));
    }
}

INLINE void decode_row(const LinearJob *job, int64_t row, int from, int to) {
    const int64_t step = job->scales.block_columns, columns = job->columns;
    const char *weight = (const char *)job->weight + row * coded_bytes(columns, from);
    char *out = (char *)job->out + row * columns * size_of(to);
    const __m256 unit = _mm256_set1_ps(E4M3_UNIT);
    for (int64_t begin = 0; begin < columns; begin += step) {
        const int64_t end = begin + step < columns ? begin + step : columns;
        const float scale = scale_of(&job->scales, row, begin);
        int64_t i = begin;
        for (; i + 8 <= end; i += 8) {
            if (from == E2M1)
                put_8(out, i, _mm256_mul_ps(e2m1_of_8(weight + i / 2), _mm256_set1_ps(scale)), to);
            else
                put_8(out, i, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(e4m3_of_8(weight + i)), unit), _mm256_set1_ps(scale)), to);
        }
        for (; i < end; i++) /* a row of E2M1 has whole blocks */
            put(out, i, e4m3((uint8_t)weight[i]) * scale, to);
    }
}

INLINE void decode_share(LinearJob *job, int to) {
    for (;;) {
        const int64_t begin = (int64_t)atomic_fetch_add(&job->next, DECODE_ROWS);
        for (int64_t row = begin; row < begin + DECODE_ROWS && row < job->rows; row++)
            if (job->weight_dtype == E2M1)
                decode_row(job, row, E2M1, to);
            else
                decode_row(job, row, E4M3, to);
        if (begin >= job->rows)
            return;
    }
}

static FAST void decode_body(void *data) {
    LinearJob *job = data;
    BY_DTYPE(job->dtype, decode_share, job);
}

int FAST hf_has_no_number(const void *scales, int64_t count, int32_t dtype) {
    if (dtype == E8M0)
        return memchr(scales, 0xff, (size_t)count) != NULL;
    for (int64_t i = 0; i < count; i++) {
        const float scale = one(scales, i, dtype);
        if (scale - scale != 0.0f) /* infinite, or NaN */
            return 1;
    }
    return 0;
}

void hf_decode(LinearJob *job) {
    atomic_store(&job->next, 0);
    run_on_threads(decode_body, job, job->threads);
}

#endif
