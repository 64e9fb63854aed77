/* Numbers of a matrix in 4 or 8 bits, and their scales. */

#ifndef HF_CODED_H
#define HF_CODED_H

#include "numbers.h"

enum { E2M1_BLOCK = 32 }; /* numbers of E2M1 that share a scale */

/* Shifting bits turns a number of E4M3 into one of F16 that is smaller by this factor; denormal numbers need no special case. */
#define E4M3_UNIT 256.0f

static const float E2M1_VALUES[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/* Bytes that `count` numbers of a row take. */
INLINE int64_t coded_bytes(int64_t count, int dtype) { return dtype == E2M1 ? count / 2 : count; }

/* A scale of E8M0, a power of two: its byte is the exponent field of F32. */
INLINE float e8m0(uint8_t byte) {
    const uint32_t bits = byte == 0xff ? 0x7fc00000 : byte ? (uint32_t)byte << 23 : 0x00400000;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The scale of the number at a row and a column. */
INLINE float scale_of(const Scales *scales, int64_t row, int64_t column) {
    const int64_t i = row / scales->block_rows * scales->columns + column / scales->block_columns;
    return scales->dtype == E8M0 ? e8m0(((const uint8_t *)scales->at)[i]) : one(scales->at, i, scales->dtype);
}

/* Eight or sixteen numbers of E4M3 as F16, still to be multiplied by `E4M3_UNIT`. */
INLINE __m128i e4m3_of_8(const char *at) {
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)at)), 7);
    const __m128i number = _mm_and_si128(shifted, _mm_set1_epi16(0x3f80));
    const __m128i none = _mm_and_si128(_mm_cmpeq_epi16(number, _mm_set1_epi16(0x3f80)), _mm_set1_epi16(0x7e00));
    const __m128i sign = _mm_and_si128(shifted, _mm_set1_epi16(0x4000));
    return _mm_or_si128(_mm_add_epi16(shifted, sign), none); /* the sign moves up by one */
}

INLINE __m256i e4m3_of_16(const char *at) {
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at)), 7);
    const __m256i number = _mm256_and_si256(shifted, _mm256_set1_epi16(0x3f80));
    const __m256i none = _mm256_and_si256(_mm256_cmpeq_epi16(number, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x7e00));
    const __m256i sign = _mm256_and_si256(shifted, _mm256_set1_epi16(0x4000));
    return _mm256_or_si256(_mm256_add_epi16(shifted, sign), none);
}

INLINE float e4m3(uint8_t byte) {
    const uint16_t none = (byte & 0x7f) == 0x7f ? 0x7e00 : 0;
    return _cvtsh_ss((uint16_t)((byte & 0x80) << 8 | (byte & 0x7f) << 7 | none)) * E4M3_UNIT;
}

/* The eight numbers of E2M1 in 32 bits; the low half of each byte comes first. */
INLINE __m256 e2m1_of_8(const char *at) {
    int32_t bits;
    memcpy(&bits, at, 4);
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(bits), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256 size = _mm256_permutevar8x32_ps(_mm256_loadu_ps(E2M1_VALUES), codes); /* the permutation uses three bits */
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), _mm256_set1_epi32((int)0x80000000));
    return _mm256_or_ps(size, _mm256_castsi256_ps(sign));
}

#endif
