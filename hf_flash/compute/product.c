/* A quantized matrix times a few tokens.
 *
 * Every token becomes whole multiples of a step, 16 bits each, so that products with codes are exact and twice as many to an
 * instruction as in fp32. */

#include "native.h"

#ifdef HF_NATIVE

#include <sched.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

enum { MATRIX_ROWS = 64, FEW_ROWS = 8 }; /* that a thread takes at a time, of a matrix with many and with few */
enum { TOKENS = 4 };                     /* that a row is multiplied with at once */
enum { FEW_COLUMNS = 512 };              /* up to here eight rows are worked on at once: their sums fit in 32 bits */

/* From token to token of `x_codes`: whole cache lines. */
static int64_t stride(const ProductJob *job) { return (job->columns + 31) / 32 * 32; }

#define LANES 8
#include "product_width.h"
#undef LANES

#define LANES 16
#include "product_width.h"
#undef LANES

/* --- eight rows times one token */

/* Eight rows of few columns. What a row's last step reads beyond it is multiplied by zero. */
INLINE __m256 int8_rows(const ProductJob *job, int64_t row, int64_t token) {
    const int64_t columns = job->columns;
    const int8_t *codes = (const int8_t *)job->codes + row * columns;
    const int16_t *x = job->x_codes + token * stride(job);
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

/* One token of x; for 4 bits 16 even columns before 16 odd ones. What is not finite stays so, in `x_step`. */
INLINE void quantize_token(const ProductJob *job, int64_t token, int dtype) {
    const int64_t columns = job->columns, groups = columns / job->group, begin = token * columns;
    int16_t *x_codes = job->x_codes + token * stride(job);
    float most = 0.0f, all = 0.0f;
    for (int64_t g = 0; g < groups; g++) {
        float sum = 0.0f;
        for (int64_t i = begin + g * job->group; i < begin + (g + 1) * job->group; i++) {
            float value = one(job->x, i, dtype), size = value < 0.0f ? -value : value;
            most = size > most ? size : most;
            sum += value;
        }
        job->x_sum[token * groups + g] = sum;
        all += sum;
    }
    const float step = most / 32767.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
    job->x_step[token] = all - all == 0.0f ? step : all - all; /* infinite or no number: so is every sum */
    for (int64_t k = 0; k < columns; k++) {
        int64_t place = job->bits == 4 ? k / 32 * 32 + k % 2 * 16 + k % 32 / 2 : k;
        int32_t whole = _mm_cvtss_si32(_mm_set_ss(one(job->x, begin + k, dtype) * inverse));
        x_codes[place] = (int16_t)(whole > 32767 ? 32767 : whole < -32767 ? -32767 : whole);
    }
    memset(x_codes + columns, 0, (size_t)(stride(job) - columns) * sizeof(int16_t));
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

/* One thread's share of the rows. Returns whether it finished the last of them all. */
static FAST int multiply_share(ProductJob *job) {
    const int64_t step = job->rows < 16 * MATRIX_ROWS ? FEW_ROWS : MATRIX_ROWS;
    /* rows that may be worked on by eights: their sums fit in 32 bits, and no read goes beyond the matrix */
    const int by_eights = job->bits == 8 && job->columns <= FEW_COLUMNS;
    const int64_t eights = by_eights ? (job->rows * job->columns - stride(job)) / job->columns + 1 : 0;
    void (*rows_times_tokens)(const ProductJob *, int64_t, int64_t) =
        job->no_avx512 || !has_avx512() ? multiply_rows_of_8 : multiply_rows_of_16;
    int last = 0;
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&job->next, (int)step);
        if (begin >= job->rows)
            return last;
        int64_t end = begin + step < job->rows ? begin + step : job->rows;
        int64_t row = begin;
        for (; row + 8 <= end && row + 8 <= eights; row += 8)
            BY_DTYPE(job->bias_dtype, multiply_eight_rows, job, row);
        if (row < end)
            rows_times_tokens(job, row, end);
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
