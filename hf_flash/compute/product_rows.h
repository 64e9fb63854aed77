/* Rows of a quantized matrix times some tokens, for one kind of instructions. Included by product.c twice, with VNNI defined as 0
 * and as 1: with VNNI, one instruction adds products of bytes or words to sums in 32 bits.
 *
 * A row is unpacked once for all of these tokens. A token's sum has the same order with any number of tokens beside it, and with
 * either kind of instructions: sums of products of codes are whole numbers, and for other sums the code states whether a product
 * and a sum are fused, instead of leaving it to the compiler. */

#undef OF_KIND
#undef OF_TARGET
#undef KIND
#undef ADD_WORDS
#undef ADD_BYTES
#undef IN_32_BITS

#if VNNI

#define KIND(name) name##_vnni
#define OF_TARGET "avx512vnni,avx512vl,avx2,fma,f16c"
#define ADD_WORDS _mm256_dpwssd_epi32
#define ADD_BYTES _mm256_dpbusd_epi32
#define IN_32_BITS(sums) (sums)

#else

#define KIND(name) name##_avx2
#define OF_TARGET "avx2,fma,f16c"
#define ADD_WORDS(sums, codes, x) _mm256_add_epi32(sums, _mm256_madd_epi16(codes, x))
#define ADD_BYTES(sums, codes, x) _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
#define IN_32_BITS(sums) _mm256_madd_epi16(sums, _mm256_set1_epi16(1))

#endif

#define OF_KIND static inline __attribute__((always_inline, target(OF_TARGET)))

/* 8 bits: scale * (codes . x) * step. */
OF_KIND void KIND(int8_row)(const ProductJob *job, int64_t row, int64_t token, int tokens, float *sums) {
    const int8_t *codes = (const int8_t *)job->codes + row * job->columns;
    const int16_t *x = (const int16_t *)job->x_codes + token * stride(job);
    const int64_t next = stride(job);
    __m256 all[TOKENS];
    UNROLLED(int t = 0; t < tokens; t++)
        all[t] = _mm256_setzero_ps();
    int64_t i = 0;
    while (i + 32 <= job->columns) {
        int64_t end = i + 4096 < job->columns ? i + 4096 : job->columns; /* more might not fit in 32 bits */
        __m256i some[TOKENS];
        UNROLLED(int t = 0; t < tokens; t++)
            some[t] = _mm256_setzero_si256();
        for (; i + 32 <= end; i += 32) {
            __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
            __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i + 16)));
            UNROLLED(int t = 0; t < tokens; t++) {
                const __m256i *part = (const __m256i *)(x + t * next + i);
                some[t] = ADD_WORDS(some[t], first, _mm256_loadu_si256(part));
                some[t] = ADD_WORDS(some[t], second, _mm256_loadu_si256(part + 1));
            }
        }
        UNROLLED(int t = 0; t < tokens; t++)
            all[t] = _mm256_add_ps(all[t], _mm256_cvtepi32_ps(some[t]));
    }
    const float scale = one(job->scales, row, BF16);
    UNROLLED(int t = 0; t < tokens; t++) {
        int32_t rest = 0;
        for (int64_t k = i; k < job->columns; k++)
            rest += codes[k] * x[t * next + k];
        sums[t] = (total(all[t], _mm256_setzero_ps()) + (float)rest) * (scale * job->x_step[token + t]);
    }
}

/* A group has a multiple of `chunk` columns, which is 32 or 64. Products of 32 columns make 16 sums in 16 bits; SUMS_IN_16_BITS of
 * these fit, so they are added up in 16 bits first. */
OF_KIND void KIND(int4_row)(const ProductJob *job, int64_t row, int64_t token, int tokens, int chunk, float *sums) {
    const int64_t groups = job->columns / job->group, next = stride(job);
    const uint8_t *codes = job->codes + row * job->columns / 2;
    const int8_t *x = (const int8_t *)job->x_codes + token * next;
    const __m256i low = _mm256_set1_epi8(15);
    __m256 all[TOKENS];
    float rest[TOKENS], steps[TOKENS * groups];
    int4_scales(job, row, token, tokens, steps, all, rest);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t left = job->group; left;) {
            int64_t some_columns = left < 32 * SUMS_IN_16_BITS ? left : 32 * SUMS_IN_16_BITS;
            __m256i some[TOKENS];
            left -= some_columns;
            UNROLLED(int t = 0; t < tokens; t++)
                some[t] = _mm256_setzero_si256();
            for (; some_columns; some_columns -= chunk, codes += chunk / 2, x += chunk) {
                __m256i even, odd = low;
                if (chunk == 64) {
                    const __m256i both = _mm256_loadu_si256((const __m256i *)codes);
                    even = _mm256_and_si256(both, low);
                    odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                } else {
                    const __m128i both = _mm_loadu_si128((const __m128i *)codes);
                    even = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
                    even = _mm256_and_si256(even, low); /* the odd columns are in the high half */
                }
                UNROLLED(int t = 0; t < tokens; t++) {
                    const __m256i *part = (const __m256i *)(x + t * next);
                    some[t] = ADD_BYTES(some[t], even, _mm256_loadu_si256(part));
                    if (chunk == 64)
                        some[t] = ADD_BYTES(some[t], odd, _mm256_loadu_si256(part + 1));
                }
            }
            UNROLLED(int t = 0; t < tokens; t++) {
                const __m256 whole = _mm256_cvtepi32_ps(IN_32_BITS(some[t]));
                all[t] = _mm256_fmadd_ps(whole, _mm256_broadcast_ss(&steps[t * groups + g]), all[t]);
            }
        }
    UNROLLED(int t = 0; t < tokens; t++)
        sums[t] = total(all[t], _mm256_setzero_ps()) + rest[t];
}

OF_KIND void KIND(multiply_row)(const ProductJob *job, int64_t row, int64_t first, int tokens, int chunk) {
    float sums[TOKENS];
    if (chunk)
        KIND(int4_row)(job, row, first, tokens, chunk, sums);
    else
        KIND(int8_row)(job, row, first, tokens, sums);
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

/* The rows stay in a core's cache while the tokens go by, and some tokens while the rows go by. `chunk`: as in `int4_row`; 0 for
 * 8 bits. */
OF_KIND void KIND(multiply_chunks)(const ProductJob *job, int64_t begin, int64_t end, int chunk) {
    int64_t token = 0;
    for (; token + TOKENS <= job->tokens; token += TOKENS)
        for (int64_t row = begin; row < end; row++)
            KIND(multiply_row)(job, row, token, TOKENS, chunk);
    for (; token + 2 <= job->tokens; token += 2)
        for (int64_t row = begin; row < end; row++)
            KIND(multiply_row)(job, row, token, 2, chunk);
    for (int64_t row = begin; token < job->tokens && row < end; row++)
        KIND(multiply_row)(job, row, token, 1, chunk);
}

/* Rows `begin` to before `end` times all tokens. */
static __attribute__((target(OF_TARGET))) void KIND(multiply_rows)(const ProductJob *job, int64_t begin, int64_t end) {
    if (job->bits == 8)
        KIND(multiply_chunks)(job, begin, end, 0);
    else if (job->group % 64 == 0)
        KIND(multiply_chunks)(job, begin, end, 64);
    else
        KIND(multiply_chunks)(job, begin, end, 32);
}
