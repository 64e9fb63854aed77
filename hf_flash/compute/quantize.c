/* Quantizes a matrix from the compute dtype to 8 or 4 bits.
 *
 * hf_flash/predictors/low_bit.py does the same with torch, and both give the same bits. So every step here is also a step of
 * torch, in fp32 and rounded once: a division is not replaced by a product with an inverse, and sums have the same order. */

#include "native.h"

#ifdef HF_NATIVE

#include <string.h>

#include "numbers.h"
#include "parallel.h"

enum { QUANTIZED_ROWS = 16 }; /* rows that a thread takes at a time */

/* Candidate scales, as shares of the full range of a group (_SHRINK of low_bit.py). */
static const float SHRINK[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};

/* Some columns of a row, and how they are stored: `w = code * scale + zero`. */
typedef struct {
    const void *row;
    int64_t begin, end;
    float scale, zero, lowest, highest; /* lowest, highest: of the codes */
    float loss;                         /* the sum of squared errors */
} Group;

/* a * b, rounded before anything is added to it. Without the barrier, compilers may fuse the product and the sum. */
INLINE __m256 product(__m256 a, __m256 b) {
    __m256 all = _mm256_mul_ps(a, b);
    __asm__("" : "+x"(all));
    return all;
}

/* --- eight numbers of a group */

/* `count` numbers from index `i` on, fewer than eight, followed by zeros. */
INLINE __m256 load_last(const void *row, int64_t i, int64_t count, int dtype) {
    char padded[32] = {0};
    memcpy(padded, (const char *)row + i * size_of(dtype), (size_t)(count * size_of(dtype)));
    return load(padded, 0, dtype);
}

/* All bits set in the first `count` of eight numbers. */
INLINE __m256 first_lanes(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lanes));
}

/* Codes of eight numbers, as fp32. NaN gets the lowest code, because a maximum with NaN returns its second operand. */
INLINE __m256 codes_of(const Group *group, __m256 some) {
    __m256 steps = _mm256_div_ps(_mm256_sub_ps(some, _mm256_set1_ps(group->zero)), _mm256_set1_ps(group->scale));
    steps = _mm256_round_ps(steps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_min_ps(_mm256_max_ps(steps, _mm256_set1_ps(group->lowest)), _mm256_set1_ps(group->highest));
}

/* The rounding error of eight numbers. */
INLINE __m256 error_of(const Group *group, __m256 some) {
    __m256 back = product(codes_of(group, some), _mm256_set1_ps(group->scale));
    return _mm256_sub_ps(_mm256_add_ps(back, _mm256_set1_ps(group->zero)), some);
}

/* Store eight whole numbers as nibbles in four bytes, even ones in the low nibble. */
INLINE void store_nibbles(uint8_t *out, __m256i codes) {
    const __m256i low_bytes = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                               0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i pairs = _mm256_shuffle_epi8(_mm256_or_si256(codes, _mm256_srli_epi64(codes, 28)), low_bytes);
    uint32_t first = (uint32_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(pairs));
    uint32_t bytes = first | (uint32_t)_mm_cvtsi128_si32(_mm256_extracti128_si256(pairs, 1)) << 16;
    memcpy(out, &bytes, 4);
}

/* Store eight whole numbers as bytes. */
INLINE void store_bytes(uint8_t *out, __m256i codes) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((__m128i *)out, _mm_packs_epi16(words, words));
}

/* Store `count` of eight codes of a row, from column `i` on. The low nibble of a byte is written first. */
INLINE void store_codes(uint8_t *codes, int64_t i, int64_t count, __m256 some, int bits) {
    __m256i whole = _mm256_cvtps_epi32(some);
    if (bits == 4)
        whole = _mm256_add_epi32(whole, _mm256_set1_epi32(8));
    if (bits == 8 && count == 8) {
        store_bytes(codes + i, whole);
    } else if (bits == 4 && count == 8 && i % 2 == 0) {
        store_nibbles(codes + i / 2, whole);
    } else {
        int32_t each[8];
        _mm256_storeu_si256((__m256i *)each, whole);
        for (int64_t k = 0; k < count; k++, i++)
            if (bits == 8)
                codes[i] = (uint8_t)each[k];
            else if (i % 2)
                codes[i / 2] |= (uint8_t)(each[k] << 4);
            else
                codes[i / 2] = (uint8_t)each[k];
    }
}

/* --- a group */

/* The smallest and the largest number of a group; both NaN if any is NaN. */
INLINE void find_range(const Group *group, float *lowest, float *highest, int dtype) {
    const __m256 first = _mm256_set1_ps(one(group->row, group->begin, dtype));
    __m256 low = first, high = first, strange = _mm256_setzero_ps();
    int64_t i = group->begin;
    for (; i + 8 <= group->end; i += 8) {
        __m256 some = load(group->row, i, dtype);
        low = _mm256_min_ps(low, some), high = _mm256_max_ps(high, some);
        strange = _mm256_or_ps(strange, _mm256_cmp_ps(some, some, _CMP_UNORD_Q));
    }
    if (i < group->end) {
        __m256 some = load_last(group->row, i, group->end - i, dtype);
        some = _mm256_blendv_ps(first, some, first_lanes(group->end - i));
        low = _mm256_min_ps(low, some), high = _mm256_max_ps(high, some);
        strange = _mm256_or_ps(strange, _mm256_cmp_ps(some, some, _CMP_UNORD_Q));
    }
    __m128 low_4 = _mm_min_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    __m128 high_4 = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
    low_4 = _mm_min_ps(low_4, _mm_movehl_ps(low_4, low_4)), high_4 = _mm_max_ps(high_4, _mm_movehl_ps(high_4, high_4));
    low_4 = _mm_min_ss(low_4, _mm_movehdup_ps(low_4)), high_4 = _mm_max_ss(high_4, _mm_movehdup_ps(high_4));
    const int all_numbers = !_mm256_movemask_ps(strange);
    *lowest = all_numbers ? _mm_cvtss_f32(low_4) : __builtin_nanf("");
    *highest = all_numbers ? _mm_cvtss_f32(high_4) : __builtin_nanf("");
}

/* The loss of a group: eight partial sums, each over every eighth column, added in the order of `total`. */
INLINE void find_loss(Group *group, int dtype) {
    __m256 sums = _mm256_setzero_ps();
    int64_t i = group->begin;
    for (; i + 8 <= group->end; i += 8) {
        __m256 error = error_of(group, load(group->row, i, dtype));
        sums = _mm256_add_ps(sums, product(error, error));
    }
    if (i < group->end) {
        __m256 error = error_of(group, load_last(group->row, i, group->end - i, dtype));
        sums = _mm256_add_ps(sums, _mm256_and_ps(product(error, error), first_lanes(group->end - i)));
    }
    group->loss = total(sums, _mm256_setzero_ps());
}

INLINE void write_codes(const Group *group, uint8_t *codes, int bits, int dtype) {
    int64_t i = group->begin;
    for (; i + 8 <= group->end; i += 8)
        store_codes(codes, i, 8, codes_of(group, load(group->row, i, dtype)), bits);
    if (i < group->end) {
        int64_t count = group->end - i;
        store_codes(codes, i, count, codes_of(group, load_last(group->row, i, count, dtype)), bits);
    }
}

/* A scale, rounded to the stored dtype; 1 if the group is constant, or the scale is NaN. */
INLINE float safe_scale(float scale) {
    scale = rounded(scale, BF16);
    return scale > 0.0f ? scale : 1.0f;
}

/* Symmetric, in 8 bits. */
INLINE void choose_8_bits(Group *group, int dtype) {
    float low, high;
    find_range(group, &low, &high, dtype);
    float most = -low > high ? -low : high; /* NaN if they are NaN */
    group->scale = safe_scale(most / 127.0f), group->zero = 0.0f;
    group->lowest = -127.0f, group->highest = 127.0f;
    find_loss(group, dtype);
}

/* Asymmetric, in 4 bits: the candidate with the smallest loss, the first of several. */
INLINE void choose_4_bits(Group *group, int dtype) {
    float low, high;
    find_range(group, &low, &high, dtype);
    Group tried = *group;
    tried.lowest = -8.0f, tried.highest = 7.0f;
    for (size_t i = 0; i < sizeof SHRINK / sizeof *SHRINK; i++) {
        tried.scale = safe_scale((high - low) * SHRINK[i] / 15.0f);
        tried.zero = rounded((high + low + (high > low ? tried.scale : 0.0f)) / 2.0f, BF16);
        find_loss(&tried, dtype);
        if (i == 0 || tried.loss < group->loss)
            *group = tried;
    }
}

/* --- rows */

INLINE void quantize_row(const QuantizeJob *job, int64_t row, int dtype) {
    const int64_t groups = job->columns / job->group;
    uint8_t *codes = job->codes + row * (job->bits == 4 ? job->columns / 2 : job->columns);
    float losses[8] = {0};
    for (int64_t g = 0; g < groups; g++) {
        Group group = {
            .row = (const char *)job->weights + row * job->row_bytes, .begin = g * job->group, .end = (g + 1) * job->group};
        if (job->bits == 4) {
            choose_4_bits(&group, dtype);
            write_codes(&group, codes, 4, dtype);
            put(job->zeros, row * groups + g, group.zero, BF16);
        } else {
            choose_8_bits(&group, dtype);
            write_codes(&group, codes, 8, dtype);
        }
        put(job->scales, row * groups + g, group.scale, BF16);
        losses[g % 8] += group.loss;
    }
    float loss = total(_mm256_loadu_ps(losses), _mm256_setzero_ps());
    job->error[row] = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(loss)));
}

static FAST void quantize_body(void *data) {
    QuantizeJob *job = data;
    for (int64_t at; (at = atomic_fetch_add(&job->next, 1) * (int64_t)QUANTIZED_ROWS) < job->rows;)
        for (int64_t row = at; row < at + QUANTIZED_ROWS && row < job->rows; row++)
            BY_DTYPE(job->dtype, quantize_row, job, row);
}

void hf_quantize(QuantizeJob *job) {
    atomic_store(&job->next, 0);
    run_on_threads(quantize_body, job, job->threads);
}

#endif
