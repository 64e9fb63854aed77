/* Vectors of one width. A file that is compiled once for each width includes this first, with LANES defined: 8 (AVX2) or 16
 * (AVX-512). There is no include guard, because every inclusion defines the names again.
 *
 *     VECTOR    LANES numbers in fp32; NARROW_VECTOR: LANES numbers in 16 bits
 *     PARTS     how many vectors make 16 columns
 *     NAME(f)   the name of function f for this width
 *     OF_WIDTH  an inlined function for this width; BODY: one that threads run */

#include "numbers.h"

#undef TARGET
#undef NAME
#undef VECTOR
#undef NARROW_VECTOR
#undef PARTS
#undef LOAD
#undef LOAD_NARROW
#undef FROM_F16
#undef FROM_BF16
#undef ZERO
#undef FMA
#undef TIMES
#undef SUM_16
#undef SUM_32
#undef FILL
#undef STORE
#undef OF_WIDTH
#undef BODY

#if LANES == 8

#define TARGET "avx2,fma,f16c"
#define NAME(name) name##_of_8
#define VECTOR __m256
#define NARROW_VECTOR __m128i
#define PARTS 2
#define LOAD _mm256_loadu_ps
#define LOAD_NARROW _mm_loadu_si128
#define FROM_F16 _mm256_cvtph_ps
#define FROM_BF16(bits) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))
#define ZERO _mm256_setzero_ps
#define FMA _mm256_fmadd_ps
#define TIMES _mm256_mul_ps
#define SUM_16(sum) total((sum)[0], (sum)[1])
#define SUM_32(sum) total(_mm256_add_ps((sum)[0], (sum)[1]), _mm256_add_ps((sum)[2], (sum)[3]))
#define FILL _mm256_set1_ps
#define STORE _mm256_storeu_ps

#else

#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define NAME(name) name##_of_16
#define VECTOR __m512
#define NARROW_VECTOR __m256i
#define PARTS 1
#define LOAD _mm512_loadu_ps
#define LOAD_NARROW _mm256_loadu_si256
#define FROM_F16 _mm512_cvtph_ps
#define FROM_BF16(bits) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
#define ZERO _mm512_setzero_ps
#define FMA _mm512_fmadd_ps
#define TIMES _mm512_mul_ps
#define LOW_PLUS_HIGH(sum) _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1))
#define SUM_16(sum) total(_mm512_castps512_ps256((sum)[0]), _mm512_extractf32x8_ps((sum)[0], 1))
#define SUM_32(sum) total(LOW_PLUS_HIGH((sum)[0]), LOW_PLUS_HIGH((sum)[1]))
#define FILL _mm512_set1_ps
#define STORE _mm512_storeu_ps

#endif

#define OF_WIDTH(type) static inline __attribute__((always_inline, target(TARGET))) type
#define BODY static __attribute__((target(TARGET))) void

/* LANES numbers from index `i` on. */
OF_WIDTH(VECTOR) NAME(load)(const char *row, int64_t i, int dtype) {
    if (dtype == F32)
        return LOAD((const float *)row + i);
    NARROW_VECTOR bits = LOAD_NARROW((const NARROW_VECTOR *)((const uint16_t *)row + i));
    return dtype == F16 ? FROM_F16(bits) : FROM_BF16(bits);
}
