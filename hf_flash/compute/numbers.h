/* Arithmetic that all files share: numbers of three dtypes as fp32, one or eight at a time. */

#ifndef HF_NUMBERS_H
#define HF_NUMBERS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

#define FAST __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define UNROLLED(...) _Pragma("GCC unroll 8") for (__VA_ARGS__)

/* Call an inlined function with a dtype that is known at compile time, as its last argument. */
#define BY_DTYPE(dtype, function, ...)        \
    do {                                      \
        if ((dtype) == F32)                   \
            function(__VA_ARGS__, F32);       \
        else if ((dtype) == BF16)             \
            function(__VA_ARGS__, BF16);      \
        else                                  \
            function(__VA_ARGS__, F16);       \
    } while (0)

/* Bytes of a number. */
INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

/* Eight numbers from index `i` on. */
INLINE __m256 load(const void *row, int64_t i, int dtype) {
    if (dtype == F32)
        return _mm256_loadu_ps((const float *)row + i);
    __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (dtype == F16)
        return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* The number at index `i`. A row may begin at any byte, because files that others wrote align matrices arbitrarily. */
INLINE float one(const void *row, int64_t i, int dtype) {
    float value;
    uint16_t half;
    if (dtype == F32) {
        memcpy(&value, (const char *)row + 4 * i, 4);
        return value;
    }
    memcpy(&half, (const char *)row + 2 * i, 2);
    if (dtype == F16)
        return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to a dtype, to nearest even. */
INLINE float rounded(float value, int dtype) {
    if (dtype == F32 || value != value)
        return value;
    if (dtype == F16)
        return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    memcpy(&value, &bits, 4);
    return value;
}

/* Store a number at index `i`, rounded to nearest even. */
INLINE void put(void *row, int64_t i, float value, int dtype) {
    if (dtype == F32) {
        ((float *)row)[i] = value;
    } else if (dtype == F16) {
        ((uint16_t *)row)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
        uint32_t bits;
        value = rounded(value, dtype);
        memcpy(&bits, &value, 4);
        ((uint16_t *)row)[i] = (uint16_t)(bits >> 16);
    }
}

/* The activation of a number that has been rounded to a dtype, rounded as well. NaN stays NaN. */
INLINE float activated(float x, const ActivationFunction *function, int dtype) {
    if (function->code == AS_IS)
        return x;
    if (x <= rounded(function->level, dtype))
        return 0.0f;
    if (function->code == RELU2)
        return rounded(x * x, dtype);
    return function->code == RELU6 && x > 6.0f ? 6.0f : x;
}

/* The sum of sixteen numbers. */
INLINE float total(__m256 a, __m256 b) {
    __m256 sum = _mm256_add_ps(a, b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

#endif
