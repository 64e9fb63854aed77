/* A quantized matrix times a few tokens.
 *
 * x becomes whole multiples of a step, so that products with codes are exact, and an instruction makes several times as many as in
 * fp32. For a matrix in 8 bits, x has 16 bits and one step per token. For one in 4 bits, x has 8 bits and a step for every group
 * of columns: its rounding error is a tenth of the matrix's. */

#include "native.h"

#ifdef HF_NATIVE

#include <sched.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

enum { MATRIX_ROWS = 64, FEW_ROWS = 8 }; /* rows that a thread takes at a time, of a matrix with many rows, and with few */
enum { TOKENS = 4 };                     /* tokens that a row is multiplied with at once */
enum { SUMS_IN_16_BITS = 8 };            /* products of 32 columns that fit into sums of 16 bits: 2 * 15 * 127 each */
enum { FEW_COLUMNS = 512 };              /* up to so many columns, eight rows are computed at once: sums fit into 32 bits */

/* From one token of `x_codes` to the next: whole cache lines, but no power of two, so that tokens do not compete for lines. */
static int64_t stride(const ProductJob *job) { return (job->columns + 63) / 64 * 64 + 64; }

/* --- some rows times some tokens */

/* A row in 4 bits is the sum over the groups of scale * (codes . x) * step + (zero - 8 scale) * (sum of x).
 *
 * This computes scale * step of every group and token, and the sum of the second terms: in `rest` for groups after whole vectors. */
INLINE void int4_scales(const ProductJob *job, int64_t row, int64_t token, int tokens, float *steps, __m256 *all, float *rest) {
    const int64_t groups = job->columns / job->group;
    const uint16_t *scales = job->scales + row * groups, *zeros = job->zeros + row * groups;
    const float *x_step = job->x_step + token * groups, *x_sum = job->x_sum + token * groups;
    int64_t g = 0;
    UNROLLED(int t = 0; t < tokens; t++) {
        all[t] = _mm256_setzero_ps();
        rest[t] = 0.0f;
    }
    for (; g + 8 <= groups; g += 8) {
        const __m256 scale = load(scales, g, BF16), offset = _mm256_fmadd_ps(_mm256_set1_ps(-8.0f), scale, load(zeros, g, BF16));
        UNROLLED(int t = 0; t < tokens; t++) {
            _mm256_storeu_ps(steps + t * groups + g, _mm256_mul_ps(scale, _mm256_loadu_ps(x_step + t * groups + g)));
            all[t] = _mm256_fmadd_ps(offset, _mm256_loadu_ps(x_sum + t * groups + g), all[t]);
        }
    }
    for (; g < groups; g++) {
        const float scale = one(scales, g, BF16), offset = __builtin_fmaf(-8.0f, scale, one(zeros, g, BF16));
        UNROLLED(int t = 0; t < tokens; t++) {
            steps[t * groups + g] = scale * x_step[t * groups + g];
            rest[t] = __builtin_fmaf(offset, x_sum[t * groups + g], rest[t]);
        }
    }
}

#define VNNI 0
#include "product_rows.h"
#undef VNNI

#define VNNI 1
#include "product_rows.h"
#undef VNNI

static int has_vnni(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"); }

/* --- eight rows times one token */

/* Eight rows of few columns. Codes that the last step reads beyond a row are multiplied by zero. */
INLINE __m256 int8_rows(const ProductJob *job, int64_t row, int64_t token) {
    const int64_t columns = job->columns;
    const int8_t *codes = (const int8_t *)job->codes + row * columns;
    const int16_t *x = (const int16_t *)job->x_codes + token * stride(job);
    __m256i sums[8] = {0};
    for (int64_t i = 0; i < columns; i += 16) {
        const __m256i some = _mm256_loadu_si256((const __m256i *)(x + i));
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + r * columns + i)));
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(code, some));
        }
    }
    __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[4], sums[5]), _mm256_hadd_epi32(sums[6], sums[7]));
    __m256i all = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    __m256 scales = _mm256_mul_ps(load(job->scales, row, BF16), _mm256_set1_ps(job->x_step[token]));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(all), scales);
}

/* --- x as multiples of a step */

/* Turn columns `begin` to before `end` of a token into multiples of a step. Returns the step; `sum` gets the sum of the multiples.
 * For 4 bits the even columns of a chunk come before the odd ones. If a number is not finite, the step is NaN. */
INLINE float quantize_part(const ProductJob *job, int64_t token, int64_t begin, int64_t end, float *sum, int dtype) {
    const int64_t first = token * job->columns, most_code = job->bits == 4 ? 127 : 32767;
    const int64_t chunk = job->group % 64 == 0 ? 64 : 32;
    int16_t *wide = (int16_t *)job->x_codes + token * stride(job);
    int8_t *narrow = (int8_t *)job->x_codes + token * stride(job);
    float most = 0.0f, all = 0.0f;
    int64_t codes = 0;
    for (int64_t i = begin; i < end; i++) {
        float value = one(job->x, first + i, dtype), size = value < 0.0f ? -value : value;
        most = size > most ? size : most;
        all += value;
    }
    const float step = most / (float)most_code, inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (int64_t i = begin; i < end; i++) {
        int64_t whole = _mm_cvtss_si32(_mm_set_ss(one(job->x, first + i, dtype) * inverse));
        whole = whole > most_code ? most_code : whole < -most_code ? -most_code : whole;
        if (job->bits == 4)
            narrow[i / chunk * chunk + i % 2 * chunk / 2 + i % chunk / 2] = (int8_t)whole;
        else
            wide[i] = (int16_t)whole;
        codes += whole;
    }
    *sum = step * (float)codes; /* not of x itself, so that all terms have the same rounding error */
    return all - all == 0.0f ? step : all - all;
}

INLINE void quantize_token(const ProductJob *job, int64_t token, int dtype) {
    const int64_t columns = job->columns, groups = columns / job->group;
    float sum;
    if (job->bits == 4) {
        for (int64_t g = 0; g < groups; g++)
            job->x_step[token * groups + g] =
                quantize_part(job, token, g * job->group, (g + 1) * job->group, &job->x_sum[token * groups + g], dtype);
        return;
    }
    job->x_step[token] = quantize_part(job, token, 0, columns, &sum, dtype);
    int16_t *codes = (int16_t *)job->x_codes + token * stride(job);
    memset(codes + columns, 0, (size_t)(stride(job) - columns) * sizeof *codes);
}

static FAST void quantize_x(const ProductJob *job) {
    for (int64_t token = 0; token < job->tokens; token++)
        if (job->dtype == F32)
            quantize_token(job, token, F32);
        else
            quantize_token(job, token, BF16);
}

/* --- all rows */

INLINE void multiply_eight_rows(const ProductJob *job, int64_t row, int bias_dtype) {
    for (int64_t token = 0; token < job->tokens; token++) {
        __m256 sum = int8_rows(job, row, token);
        if (job->shift) {
            __m256 shift = _mm256_loadu_ps(job->shift + row);
            sum = _mm256_add_ps(sum, job->shift_scale ? _mm256_mul_ps(shift, _mm256_set1_ps(job->shift_scale[token])) : shift);
        }
        if (job->bias)
            sum = _mm256_add_ps(sum, load(job->bias, row, bias_dtype));
        if (job->out) {
            _mm256_storeu_ps(job->out + token * job->rows + row, sum);
            continue;
        }
        __m256i active = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(sum, _mm256_setzero_ps(), _CMP_NLE_UQ)), 31);
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(active), _mm256_extracti128_si256(active, 1));
        _mm_storel_epi64((__m128i *)(job->active + token * job->rows + row), _mm_packs_epi16(words, words));
    }
}

/* One thread's share of the rows. Returns whether this thread finished the last of all rows. */
static FAST int multiply_share(ProductJob *job) {
    const int64_t step = job->rows < 16 * MATRIX_ROWS ? FEW_ROWS : MATRIX_ROWS;
    /* rows that may be computed eight at a time: their sums fit into 32 bits, and no read goes beyond the matrix */
    const int by_eights = job->bits == 8 && job->columns <= FEW_COLUMNS;
    const int64_t eights = by_eights ? (job->rows * job->columns - stride(job)) / job->columns + 1 : 0;
    const int vnni = has_vnni() && !job->no_vnni;
    int last = 0;
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&job->next, (int)step);
        if (begin >= job->rows)
            return last;
        int64_t end = begin + step < job->rows ? begin + step : job->rows;
        int64_t row = begin;
        for (; row + 8 <= end && row + 8 <= eights; row += 8)
            BY_DTYPE(job->bias_dtype, multiply_eight_rows, job, row);
        (vnni ? multiply_rows_vnni : multiply_rows_avx2)(job, row, end);
        last = atomic_fetch_add(&job->done, (int)(end - begin)) + (end - begin) == job->rows;
    }
}

static FAST void product_body(void *data) {
    ProductJob *job = data;
    if (job->first) {
        if (multiply_share(job->first)) {
            quantize_x(job);
            atomic_store(&job->x_ready, 1);
        }
        for (int turns = 0; !atomic_load(&job->x_ready); turns++) /* some microseconds, unless that thread lost its core */
            if (turns < 1000)
                _mm_pause();
            else
                sched_yield();
    }
    multiply_share(job);
}

static void reset(ProductJob *job) {
    atomic_store(&job->next, 0);
    atomic_store(&job->done, 0);
    atomic_store(&job->x_ready, 0);
}

void FAST hf_multiply(ProductJob *job) {
    reset(job);
    if (job->first)
        reset(job->first);
    quantize_x(job->first ? job->first : job);
    run_on_threads(product_body, job, job->threads);
}

#endif
