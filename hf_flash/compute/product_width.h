/* A row of a quantized matrix times some tokens, for one width of vectors. Included by product.c, once for each.
 *
 * A row is unpacked once for all of these tokens. A token's sum is 16 partial sums, whatever the width and however many tokens
 * are beside it: it gets the same bits. Where a compiler might fuse a product and a sum, or not, the code says which. */

#include "width.h"


/* Products of 32 codes, as they are unpacked, with 32 numbers of x: 16 sums in 32 bits, the first eight in the low half. */
#if LANES == 8

typedef struct {
    __m256i low, high;
} NAME(Codes);

OF_WIDTH(NAME(Codes)) NAME(no_sums)(void) { return (NAME(Codes)){_mm256_setzero_si256(), _mm256_setzero_si256()}; }

OF_WIDTH(NAME(Codes)) NAME(widened)(__m128i first, __m128i second, int is_signed) {
    if (is_signed)
        return (NAME(Codes)){_mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(second)};
    return (NAME(Codes)){_mm256_cvtepu8_epi16(first), _mm256_cvtepu8_epi16(second)};
}

OF_WIDTH(NAME(Codes)) NAME(with_products)(NAME(Codes) sums, NAME(Codes) codes, const int16_t *x) {
    const __m256i *part = (const __m256i *)x;
    return (NAME(Codes)){_mm256_add_epi32(sums.low, _mm256_madd_epi16(codes.low, _mm256_loadu_si256(part))),
                         _mm256_add_epi32(sums.high, _mm256_madd_epi16(codes.high, _mm256_loadu_si256(part + 1)))};
}

typedef struct {
    __m256 low, high;
} NAME(Sums);

OF_WIDTH(NAME(Sums)) NAME(zeros)(void) { return (NAME(Sums)){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

OF_WIDTH(NAME(Sums)) NAME(with_scaled)(NAME(Sums) all, NAME(Codes) sums, float scale) {
    return (NAME(Sums)){_mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.low), _mm256_set1_ps(scale), all.low),
                        _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.high), _mm256_set1_ps(scale), all.high)};
}

OF_WIDTH(float) NAME(total)(NAME(Sums) all) { return total(all.low, all.high); }

#else

typedef __m512i NAME(Codes);
typedef __m512 NAME(Sums);

OF_WIDTH(NAME(Codes)) NAME(no_sums)(void) { return _mm512_setzero_si512(); }

OF_WIDTH(NAME(Codes)) NAME(widened)(__m128i first, __m128i second, int is_signed) {
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    return is_signed ? _mm512_cvtepi8_epi16(both) : _mm512_cvtepu8_epi16(both);
}

OF_WIDTH(NAME(Codes)) NAME(with_products)(NAME(Codes) sums, NAME(Codes) codes, const int16_t *x) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(codes, _mm512_loadu_si512(x)));
}

OF_WIDTH(NAME(Sums)) NAME(zeros)(void) { return _mm512_setzero_ps(); }

OF_WIDTH(NAME(Sums)) NAME(with_scaled)(NAME(Sums) all, NAME(Codes) sums, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(scale), all);
}

OF_WIDTH(float) NAME(total)(NAME(Sums) all) {
    return total(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
}

#endif

/* 8 bits: scale * (codes . x) * step. */
OF_WIDTH(void) NAME(int8_row)(const ProductJob *job, int64_t row, int64_t token, int tokens, float *sums) {
    const int8_t *codes = (const int8_t *)job->codes + row * job->columns;
    const int16_t *x = job->x_codes + token * stride(job);
    const int64_t next = stride(job);
    NAME(Sums) all[TOKENS];
    UNROLLED(int t = 0; t < tokens; t++)
        all[t] = NAME(zeros)();
    int64_t i = 0;
    while (i + 32 <= job->columns) {
        int64_t end = i + 4096 < job->columns ? i + 4096 : job->columns; /* more might not fit in 32 bits */
        NAME(Codes) some[TOKENS];
        UNROLLED(int t = 0; t < tokens; t++)
            some[t] = NAME(no_sums)();
        for (; i + 32 <= end; i += 32) {
            const __m128i *part = (const __m128i *)(codes + i);
            NAME(Codes) wide = NAME(widened)(_mm_loadu_si128(part), _mm_loadu_si128(part + 1), 1);
            UNROLLED(int t = 0; t < tokens; t++)
                some[t] = NAME(with_products)(some[t], wide, x + t * next + i);
        }
        UNROLLED(int t = 0; t < tokens; t++)
            all[t] = NAME(with_scaled)(all[t], some[t], 1.0f);
    }
    const float scale = one(job->scales, row, BF16);
    UNROLLED(int t = 0; t < tokens; t++) {
        int32_t rest = 0;
        for (int64_t k = i; k < job->columns; k++)
            rest += codes[k] * x[t * next + k];
        sums[t] = (NAME(total)(all[t]) + (float)rest) * (scale * job->x_step[token + t]);
    }
}

/* 4 bits: the sum over the groups of scale * (codes . x) * step + (zero - 8 scale) * (sum of x). A group has 32 columns or a
 * multiple. */
OF_WIDTH(void) NAME(int4_row)(const ProductJob *job, int64_t row, int64_t token, int tokens, float *sums) {
    const int64_t groups = job->columns / job->group, next = stride(job);
    const uint8_t *codes = job->codes + row * job->columns / 2;
    const uint16_t *scales = job->scales + row * groups, *zeros = job->zeros + row * groups;
    const float *x_sum = job->x_sum + token * groups;
    const int16_t *x = job->x_codes + token * next;
    const __m128i low = _mm_set1_epi8(15);
    NAME(Sums) all[TOKENS];
    float rest[TOKENS];
    UNROLLED(int t = 0; t < tokens; t++) {
        all[t] = NAME(zeros)();
        rest[t] = 0.0f;
    }
    for (int64_t g = 0; g < groups; g++) {
        NAME(Codes) some[TOKENS];
        UNROLLED(int t = 0; t < tokens; t++)
            some[t] = NAME(no_sums)();
        for (int64_t i = 0; i < job->group; i += 32, codes += 16, x += 32) {
            __m128i both = _mm_loadu_si128((const __m128i *)codes);
            NAME(Codes) wide = NAME(widened)(_mm_and_si128(both, low), _mm_and_si128(_mm_srli_epi16(both, 4), low), 0);
            UNROLLED(int t = 0; t < tokens; t++)
                some[t] = NAME(with_products)(some[t], wide, x + t * next);
        }
        const float scale = one(scales, g, BF16), offset = __builtin_fmaf(-8.0f, scale, one(zeros, g, BF16));
        UNROLLED(int t = 0; t < tokens; t++) {
            all[t] = NAME(with_scaled)(all[t], some[t], scale);
            rest[t] = __builtin_fmaf(offset, x_sum[t * groups + g], rest[t]);
        }
    }
    UNROLLED(int t = 0; t < tokens; t++)
        sums[t] = __builtin_fmaf(NAME(total)(all[t]), job->x_step[token + t], rest[t]);
}

OF_WIDTH(void) NAME(multiply_row)(const ProductJob *job, int64_t row, int64_t first, int tokens, int bits) {
    float sums[TOKENS];
    if (bits == 4)
        NAME(int4_row)(job, row, first, tokens, sums);
    else
        NAME(int8_row)(job, row, first, tokens, sums);
    for (int t = 0; t < tokens; t++) {
        const int64_t token = first + t;
        float sum = sums[t];
        if (job->shift)
            sum = __builtin_fmaf(job->shift_scale ? job->shift_scale[token] : 1.0f, job->shift[row], sum);
        if (job->bias)
            sum += one(job->bias, row, job->bias_dtype);
        if (job->out)
            job->out[token * job->rows + row] = sum;
        else
            job->active[token * job->rows + row] = !(sum <= 0.0f);
    }
}

/* These rows stay in a core's cache while the tokens go by, and these tokens while the rows do. */
OF_WIDTH(void) NAME(multiply_by_bits)(const ProductJob *job, int64_t begin, int64_t end, int bits) {
    int64_t token = 0;
    for (; token + TOKENS <= job->tokens; token += TOKENS)
        for (int64_t row = begin; row < end; row++)
            NAME(multiply_row)(job, row, token, TOKENS, bits);
    for (; token + 2 <= job->tokens; token += 2)
        for (int64_t row = begin; row < end; row++)
            NAME(multiply_row)(job, row, token, 2, bits);
    for (int64_t row = begin; token < job->tokens && row < end; row++)
        NAME(multiply_row)(job, row, token, 1, bits);
}

BODY NAME(multiply_rows)(const ProductJob *job, int64_t begin, int64_t end) {
    if (job->bits == 4)
        NAME(multiply_by_bits)(job, begin, end, 4);
    else
        NAME(multiply_by_bits)(job, begin, end, 8);
}
