/* A feed-forward layer over scattered rows, for tokens that each use a few of them, products with quantized matrices, and
 * products of a few tokens at memory speed: what torch has no operator for, or a slow one.
 *
 * torch gathers rows into a buffer before it multiplies, starts a parallel region for each step, and lets its second thread spin
 * while the first waits for the disk. Here rows are multiplied where they lie, and whoever waits for the disk leaves its core to
 * the kernel. Threads are torch's own: the caller hands over `GOMP_parallel` of the OpenMP runtime that torch runs on.
 *
 * Arithmetic, which no thread count and no place of a row can change: a row's dot product is 4 x 8 partial sums in fp32, added in
 * one order; an output column is one sum in fp32, in the order of the neurons. Hidden values are rounded to the dtype of the
 * weights, as the stock layer does.
 *
 * Built where there is a compiler, x86-64 and Linux; `hf_supported` says whether this CPU has AVX2, FMA and F16C. Everything
 * else takes the torch way. Loaded with ctypes (compute/library.py): no Python headers are needed.
 */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

#define _GNU_SOURCE /* preadv2 */

#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FAST __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

enum { F32, BF16, F16 };
enum { TILE_ROWS = 4, TILE_TOKENS = 4, LINEAR_ROWS = 32 };
enum { SHARE = 256, GROUP = 128, TILE_PARTS = 8, TILE_BYTES = 512, AHEAD = 4, PACKED_USES = 4 };
enum { UP_ROWS = 16, MATRIX_ROWS = 64, COPY_ROWS = 16, FEW_ROWS = 8, FEW_COLUMNS = 512, COLUMNS = 64 };

/* Calls an inlined function with its last argument, the dtype, known when it is compiled. */
#define BY_DTYPE(dtype, function, ...)        \
    do {                                      \
        if ((dtype) == F32)                   \
            function(__VA_ARGS__, F32);       \
        else if ((dtype) == BF16)             \
            function(__VA_ARGS__, BF16);      \
        else                                  \
            function(__VA_ARGS__, F16);       \
    } while (0)

typedef void (*Body)(void *);
typedef void (*Parallel)(Body, void *, unsigned threads, unsigned flags);

static Parallel parallel;      /* GOMP_parallel */
static int (*thread_number)(void); /* omp_get_thread_num */

int hf_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

void hf_use_threads_of(Parallel start, int (*number)(void)) {
    parallel = start;
    thread_number = number;
}

static void run(Body body, void *job, int threads) {
    if (threads > 1 && parallel)
        parallel(body, job, (unsigned)threads, 0);
    else
        body(job);
}

static int me(int threads) { return threads > 1 && parallel ? thread_number() : 0; }

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* --- numbers */

INLINE __m256 load(const void *row, int64_t i, int dtype) {
    if (dtype == F32)
        return _mm256_loadu_ps((const float *)row + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (dtype == F16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE float one(const void *row, int64_t i, int dtype) {
    if (dtype == F32)
        return ((const float *)row)[i];
    uint16_t half = ((const uint16_t *)row)[i];
    if (dtype == F16)
        return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

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

INLINE float total(__m256 a, __m256 b) {
    __m256 sum = _mm256_add_ps(a, b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* --- one token through the layer */

typedef struct Step Step;

typedef struct {
    const void *x, *matrix, *bias; /* [d], [any, 2 d], [d_ff] or null; all of `dtype` */
    const int64_t *rows, *ids;     /* [n] where the neurons lie in `matrix`, and which they are */
    const int64_t *which;          /* [todo] positions in these two, for `hf_up` */
    float *hidden, *out, *wide;    /* [n], [d], and room for x in fp32 [d] */
    int64_t *active;               /* [n] room */
    int64_t n, d, todo, share;     /* share: columns that a thread takes */
    Step *step;                    /* null, or what is to be read meanwhile (_native_step.h) */
    double waited;                 /* out: seconds that the calling thread spent on that */
    int32_t dtype, threads, relu;
    atomic_int next, settled;
} Job;

INLINE float dot(const void *row, const void *ahead, const float *x, int64_t d, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2;
    __m256 a = _mm256_setzero_ps(), b = a, c = a, e = a;
    int64_t i = 0;
    for (; i + 32 <= d; i += 32) {
        _mm_prefetch((const char *)ahead + i * size, _MM_HINT_T0);
        if (dtype == F32)
            _mm_prefetch((const char *)ahead + i * size + 64, _MM_HINT_T0);
        a = _mm256_fmadd_ps(load(row, i, dtype), _mm256_loadu_ps(x + i), a);
        b = _mm256_fmadd_ps(load(row, i + 8, dtype), _mm256_loadu_ps(x + i + 8), b);
        c = _mm256_fmadd_ps(load(row, i + 16, dtype), _mm256_loadu_ps(x + i + 16), c);
        e = _mm256_fmadd_ps(load(row, i + 24, dtype), _mm256_loadu_ps(x + i + 24), e);
    }
    float rest = 0.0f;
    for (; i < d; i++)
        rest = __builtin_fmaf(one(row, i, dtype), x[i], rest);
    return total(_mm256_add_ps(a, b), _mm256_add_ps(c, e)) + rest;
}

INLINE void up_rows(const Job *job, int64_t begin, int64_t end, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2, stride = 2 * job->d * size;
    for (int64_t k = begin; k < end; k++) {
        int64_t at = job->which[k], ahead = job->which[k + 1 < end ? k + 1 : k];
        const char *row = (const char *)job->matrix + job->rows[at] * stride;
        float sum = dot(row, (const char *)job->matrix + job->rows[ahead] * stride, job->wide, job->d, dtype);
        if (job->bias)
            sum += one(job->bias, job->ids[at], dtype);
        sum = rounded(sum, dtype);
        job->hidden[at] = job->relu && sum < 0.0f ? 0.0f : sum;
    }
}

static FAST void up_of(const Job *job, int64_t begin, int64_t end) {
    BY_DTYPE(job->dtype, up_rows, job, begin, end);
}

static void submit(Step *);
static void settle(Step *);

static void up_body(void *data) {
    Job *job = data;
    const int caller = me(job->threads) == 0;
    if (caller && job->step) {
        double start = seconds();
        submit(job->step);
        job->waited += seconds() - start;
    }
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&job->next, UP_ROWS);
        if (begin >= job->todo)
            break;
        up_of(job, begin, begin + UP_ROWS < job->todo ? begin + UP_ROWS : job->todo);
    }
    if (!job->step)
        return;
    if (caller) {
        double start = seconds();
        settle(job->step);
        job->waited += seconds() - start;
        atomic_store(&job->settled, 1);
        syscall(SYS_futex, &job->settled, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    } else {
        while (!atomic_load(&job->settled)) /* asleep, not spinning: the core is wanted by the kernel's side of the reads */
            syscall(SYS_futex, &job->settled, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
}

/* hidden[at] for every `at` of `which`. What is to be read meanwhile is handed to the kernel first, and waited for at the end. */
void FAST hf_up(Job *job) {
    for (int64_t i = 0; i < job->d; i++)
        job->wide[i] = one(job->x, i, job->dtype);
    atomic_store(&job->next, 0);
    atomic_store(&job->settled, 0);
    run(up_body, job, job->threads);
}

INLINE void down_columns(const Job *job, int64_t begin, int64_t end, int dtype) {
    const int64_t size = dtype == F32 ? 4 : 2, stride = 2 * job->d * size;
    const char *down = (const char *)job->matrix + job->d * size;
    for (int64_t k = 0; k < job->todo; k++) {
        const char *row = down + job->rows[job->active[k]] * stride;
        const char *ahead = down + job->rows[job->active[k + 1 < job->todo ? k + 1 : k]] * stride;
        const float h = job->hidden[job->active[k]];
        const __m256 weight = _mm256_set1_ps(h);
        int64_t i = begin;
        for (; i + 32 <= end; i += 32) {
            _mm_prefetch(ahead + i * size, _MM_HINT_T0);
            if (dtype == F32)
                _mm_prefetch(ahead + i * size + 64, _MM_HINT_T0);
            for (int64_t j = i; j < i + 32; j += 8)
                _mm256_storeu_ps(job->out + j, _mm256_fmadd_ps(load(row, j, dtype), weight, _mm256_loadu_ps(job->out + j)));
        }
        for (; i < end; i++)
            job->out[i] = __builtin_fmaf(one(row, i, dtype), h, job->out[i]);
    }
}

static FAST void down_body(void *data) {
    Job *job = data;
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&job->next, (int)job->share);
        if (begin >= job->d)
            break;
        int64_t end = begin + job->share < job->d ? begin + job->share : job->d;
        BY_DTYPE(job->dtype, down_columns, job, begin, end);
    }
}

/* out += hidden @ down, over the neurons that are not zero. */
void FAST hf_down(Job *job) {
    job->todo = 0;
    for (int64_t at = 0; at < job->n; at++)
        if (job->hidden[at] != 0.0f)
            job->active[job->todo++] = at;
    int64_t share = (job->d + job->threads - 1) / job->threads;
    job->share = (share + COLUMNS - 1) / COLUMNS * COLUMNS;
    atomic_store(&job->next, 0);
    if (job->todo)
        run(down_body, job, job->threads);
}

#include "_native_read.h"
#include "_native_step.h"

/* --- quantized matrices times a few tokens (predictors/low_bit.py)
 *
 * x becomes whole multiples of a step, 16 bits each, so that products with codes are exact and twice as many to an instruction
 * as in fp32. In 4 bits every group of columns has a step, in 8 bits every token. */

typedef struct Matrix {
    const uint8_t *codes;           /* int8 [rows, columns], or nibbles [rows, columns / 2] with the even column low */
    const uint16_t *scales, *zeros; /* bfloat16 [rows, columns / group]; no zeros in 8 bits */
    const float *plus, *times;      /* [rows] added to every token's sums, [tokens] times this; or null: nothing, times 1 */
    const void *bias;               /* [rows] of `bias_dtype`, added after that, or null */
    const void *x;                  /* [tokens, columns] of `dtype` */
    int16_t *steps;                 /* room for x in steps [tokens, columns rounded up to 16], */
    float *step, *sums;             /* for the steps of the groups and the sums of x in them [tokens, columns / group] */
    float *out;                     /* [tokens, rows], or null: only */
    uint8_t *called;                /* [tokens, rows] whether a sum is not at or below zero */
    struct Matrix *first;           /* or null; else x is what comes out of this one */
    int64_t rows, columns, group, tokens;
    int32_t bits, dtype, bias_dtype, threads;
    atomic_int next, done, ready;
} Matrix;

static int64_t stride(const Matrix *m) { return (m->columns + 15) / 16 * 16; } /* of `steps`, from token to token */

INLINE float int8_row(const Matrix *m, int64_t row, int64_t token) {
    const int8_t *codes = (const int8_t *)m->codes + row * m->columns;
    const int16_t *x = m->steps + token * stride(m);
    __m256 all = _mm256_setzero_ps();
    int64_t i = 0;
    while (i + 32 <= m->columns) {
        int64_t end = i + 4096 < m->columns ? i + 4096 : m->columns; /* more might not fit in 32 bits */
        __m256i a = _mm256_setzero_si256(), b = a;
        for (; i + 32 <= end; i += 32) {
            __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
            __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i + 16)));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(first, _mm256_loadu_si256((const __m256i *)(x + i))));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(second, _mm256_loadu_si256((const __m256i *)(x + i + 16))));
        }
        all = _mm256_add_ps(all, _mm256_add_ps(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)));
    }
    if (i + 16 <= m->columns) {
        __m256i last = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
        all = _mm256_add_ps(all, _mm256_cvtepi32_ps(_mm256_madd_epi16(last, _mm256_loadu_si256((const __m256i *)(x + i)))));
        i += 16;
    }
    int32_t rest = 0;
    for (; i < m->columns; i++)
        rest += codes[i] * x[i];
    return (total(all, _mm256_setzero_ps()) + (float)rest) * (one(m->scales, row, BF16) * m->step[token]);
}

/* Eight rows of few columns. What a row's last step reads beyond it is multiplied by zero. */
INLINE __m256 int8_rows(const Matrix *m, int64_t row, int64_t token) {
    const int64_t columns = m->columns;
    const int8_t *codes = (const int8_t *)m->codes + row * columns;
    const int16_t *x = m->steps + token * stride(m);
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
    __m256 scales = _mm256_mul_ps(load(m->scales, row, BF16), _mm256_set1_ps(m->step[token]));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(all), scales);
}

/* The sum over the groups of scale * (codes . x) + (zero - 8 scale) * (sum of x). A group has 32 columns or a multiple. */
INLINE float int4_row(const Matrix *m, int64_t row, int64_t token) {
    const int64_t groups = m->columns / m->group;
    const uint8_t *codes = m->codes + row * m->columns / 2;
    const int16_t *x = m->steps + token * stride(m);
    const float *step = m->step + token * groups, *sum = m->sums + token * groups;
    const uint16_t *scales = m->scales + row * groups, *zeros = m->zeros + row * groups;
    const __m128i low = _mm_set1_epi8(15);
    __m256 all = _mm256_setzero_ps();
    float rest = 0.0f;
    for (int64_t g = 0; g < groups; g++) {
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int64_t i = 0; i < m->group; i += 32, codes += 16, x += 32) {
            __m128i both = _mm_loadu_si128((const __m128i *)codes);
            __m256i even = _mm256_cvtepu8_epi16(_mm_and_si128(both, low));
            __m256i odd = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), low));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(even, _mm256_loadu_si256((const __m256i *)x)));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(odd, _mm256_loadu_si256((const __m256i *)(x + 16))));
        }
        float scale = one(scales, g, BF16);
        all = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), _mm256_set1_ps(scale * step[g]), all);
        rest += (one(zeros, g, BF16) - 8.0f * scale) * sum[g];
    }
    return total(all, _mm256_setzero_ps()) + rest;
}

/* One group of x in steps; for 4 bits 16 even columns before 16 odd ones. What is not finite stays so: in `sum`, or in `step`. */
INLINE void spread(const Matrix *m, int64_t group, int dtype) {
    const int64_t begin = group * m->group, end = begin + m->group;
    int16_t *steps = m->steps + begin + begin / m->columns * (stride(m) - m->columns);
    float most = 0.0f, all = 0.0f;
    for (int64_t i = begin; i < end; i++) {
        float value = one(m->x, i, dtype), size = value < 0.0f ? -value : value;
        most = size > most ? size : most;
        all += value;
    }
    const float step = most / 32767.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
    m->step[group] = all - all == 0.0f ? step : all - all; /* infinite or no number: so is every sum */
    m->sums[group] = all;
    for (int64_t i = begin; i < end; i++) {
        int64_t k = i - begin, place = m->bits == 4 ? k / 32 * 32 + k % 2 * 16 + k % 32 / 2 : k;
        int32_t whole = _mm_cvtss_si32(_mm_set_ss(one(m->x, i, dtype) * inverse));
        steps[place] = (int16_t)(whole > 32767 ? 32767 : whole < -32767 ? -32767 : whole);
    }
    if (end % m->columns == 0)
        memset(steps + m->group, 0, (size_t)(stride(m) - m->columns) * sizeof(int16_t));
}

static FAST void spread_all(const Matrix *m) {
    for (int64_t group = 0; group < m->tokens * m->columns / m->group; group++)
        if (m->dtype == F32)
            spread(m, group, F32);
        else
            spread(m, group, BF16);
}

INLINE void multiply_row(const Matrix *m, int64_t row) {
    for (int64_t token = 0; token < m->tokens; token++) {
        float sum = m->bits == 4 ? int4_row(m, row, token) : int8_row(m, row, token);
        if (m->plus)
            sum += m->times ? m->times[token] * m->plus[row] : m->plus[row];
        if (m->bias)
            sum += one(m->bias, row, m->bias_dtype);
        if (m->out)
            m->out[token * m->rows + row] = sum;
        else
            m->called[token * m->rows + row] = !(sum <= 0.0f);
    }
}

INLINE void multiply_rows(const Matrix *m, int64_t row, int bias_dtype) {
    for (int64_t token = 0; token < m->tokens; token++) {
        __m256 sum = int8_rows(m, row, token);
        if (m->plus) {
            __m256 plus = _mm256_loadu_ps(m->plus + row);
            sum = _mm256_add_ps(sum, m->times ? _mm256_mul_ps(plus, _mm256_set1_ps(m->times[token])) : plus);
        }
        if (m->bias)
            sum = _mm256_add_ps(sum, load(m->bias, row, bias_dtype));
        if (m->out) {
            _mm256_storeu_ps(m->out + token * m->rows + row, sum);
            continue;
        }
        __m256i called = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(sum, _mm256_setzero_ps(), _CMP_NLE_UQ)), 31);
        __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(called), _mm256_extracti128_si256(called, 1));
        _mm_storel_epi64((__m128i *)(m->called + token * m->rows + row), _mm_packs_epi16(half, half));
    }
}

/* One thread's share of the rows. Returns whether it finished the last of them all. */
static FAST int multiply_share(Matrix *m) {
    const int64_t step = m->rows < 16 * MATRIX_ROWS ? FEW_ROWS : MATRIX_ROWS;
    /* rows that may be worked on by eights: their sums fit in 32 bits, and no read goes beyond the matrix */
    const int64_t eights = m->bits == 8 && m->columns <= FEW_COLUMNS ? (m->rows * m->columns - stride(m)) / m->columns + 1 : 0;
    int last = 0;
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&m->next, (int)step);
        if (begin >= m->rows)
            return last;
        int64_t end = begin + step < m->rows ? begin + step : m->rows;
        int64_t row = begin;
        for (; row + 8 <= end && row + 8 <= eights; row += 8)
            BY_DTYPE(m->bias_dtype, multiply_rows, m, row);
        for (; row < end; row++)
            multiply_row(m, row);
        last = atomic_fetch_add(&m->done, (int)(end - begin)) + (end - begin) == m->rows;
    }
}

static FAST void matrix_body(void *data) {
    Matrix *m = data;
    if (m->first) {
        if (multiply_share(m->first)) {
            spread_all(m);
            atomic_store(&m->ready, 1);
        }
        for (int turns = 0; !atomic_load(&m->ready); turns++) /* some microseconds, unless that thread lost its core */
            if (turns < 1000)
                _mm_pause();
            else
                sched_yield();
    }
    multiply_share(m);
}

static void begin(Matrix *m) {
    atomic_store(&m->next, 0);
    atomic_store(&m->done, 0);
    atomic_store(&m->ready, 0);
}

/* matrix @ x + plus + bias, each token on its own: its sums do not depend on how many are beside it. */
void FAST hf_multiply(Matrix *m) {
    begin(m);
    if (m->first)
        begin(m->first);
    spread_all(m->first ? m->first : m);
    run(matrix_body, m, m->threads);
}

/* --- several tokens, each with neurons of its own (_native_wide.h) */

typedef struct {
    const void *x, *bias;      /* [tokens, d], [d_ff] or null; of `dtype` */
    const char *const *rows;   /* [n] where the neurons are, in memory, up row and down row together; at most 65536 */
    const int64_t *ids;        /* [n] which they are */
    const uint8_t *used;       /* [tokens, d_ff] whether a token uses a neuron */
    float *hidden, *out;       /* [tokens, n] room, for values that are not zero; [tokens, d] */
    uint16_t *place;           /* [tokens, n] room: which of `rows` they are of */
    int32_t *count;            /* [tokens, shares] room: how many, of each `share` neurons */
    char *packed;              /* [threads, n, TILE_BYTES] room */
    int64_t n, d, d_ff, tokens, share;
    int32_t dtype, threads, narrow, pack; /* narrow: do without AVX-512; pack: whether that pays */
    atomic_int next;
} Several;

static int64_t shares_of(const Several *s) { return (s->n + s->share - 1) / s->share; }

/* What `up` left in shares becomes one list for each token. Returns how long they are in all. */
static int64_t join(const Several *s) {
    const int64_t shares = shares_of(s);
    int64_t all = 0;
    for (int64_t t = 0; t < s->tokens; t++) {
        float *hidden = s->hidden + t * s->n;
        uint16_t *place = s->place + t * s->n;
        int32_t *count = s->count + t * shares;
        for (int64_t share = 1; share < shares; share++) {
            memmove(hidden + count[0], hidden + share * s->share, (size_t)count[share] * sizeof *hidden);
            memmove(place + count[0], place + share * s->share, (size_t)count[share] * sizeof *place);
            count[0] += count[share];
        }
        all += count[0];
    }
    return all;
}

/* --- matrices that stay in memory times a few tokens (runtime/resident_linear.py) */

typedef struct {
    const void *weight, *bias, *x; /* [rows, columns], [rows] or null, [tokens, columns]; all of `dtype` */
    float *wide;                   /* x in fp32 */
    void *out;                     /* [tokens, rows] of `dtype` */
    int64_t rows, columns, tokens;
    int32_t dtype, threads, narrow; /* narrow: do without AVX-512 */
    atomic_int next;
} Linear;

INLINE void put(const Linear *m, int64_t row, int64_t token, float sum, int dtype) {
    const int64_t at = token * m->rows + row;
    if (m->bias)
        sum += one(m->bias, row, dtype);
    if (dtype == F32) {
        ((float *)m->out)[at] = sum;
    } else if (dtype == F16) {
        ((uint16_t *)m->out)[at] = _cvtss_sh(sum, _MM_FROUND_TO_NEAREST_INT);
    } else {
        uint32_t bits;
        sum = rounded(sum, dtype);
        memcpy(&bits, &sum, 4);
        ((uint16_t *)m->out)[at] = (uint16_t)(bits >> 16);
    }
}

#define UNROLLED(...) _Pragma("GCC unroll 8") for (__VA_ARGS__)

#define TARGET "avx2,fma,f16c"
#define NAME(name) name##_of_8
#define VEC __m256
#define HALF __m128i
#define LANES 8
#define PARTS 2
#define LOAD _mm256_loadu_ps
#define LOAD_HALF _mm_loadu_si128
#define FROM_F16 _mm256_cvtph_ps
#define FROM_BF16(half) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
#define ZERO _mm256_setzero_ps
#define FMA _mm256_fmadd_ps
#define SUM(sum) total((sum)[0], (sum)[1])
#define SUM_32(sum) total(_mm256_add_ps((sum)[0], (sum)[1]), _mm256_add_ps((sum)[2], (sum)[3]))
#define FILL _mm256_set1_ps
#define STORE _mm256_storeu_ps
#include "_native_wide.h"

#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define NAME(name) name##_of_16
#define VEC __m512
#define HALF __m256i
#define LANES 16
#define PARTS 1
#define LOAD _mm512_loadu_ps
#define LOAD_HALF _mm256_loadu_si256
#define FROM_F16 _mm512_cvtph_ps
#define FROM_BF16(half) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
#define ZERO _mm512_setzero_ps
#define FMA _mm512_fmadd_ps
#define HALVES(sum) _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1))
#define SUM(sum) total(_mm512_castps512_ps256((sum)[0]), _mm512_extractf32x8_ps((sum)[0], 1))
#define SUM_32(sum) total(HALVES((sum)[0]), HALVES((sum)[1]))
#define FILL _mm512_set1_ps
#define STORE _mm512_storeu_ps
#include "_native_wide.h"

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

/* out[t] += relu(x[t] @ up + bias) @ down, over the neurons that token t uses. */
void FAST hf_several(Several *s) {
    if (!s->n)
        return;
    const int wide = !s->narrow && has_avx512();
    const int64_t fair = s->n / (4 * s->threads); /* with few tokens, all threads should have something to do */
    s->share = s->tokens > GROUP || fair > SHARE ? SHARE : fair < UP_ROWS ? UP_ROWS : fair;
    atomic_store(&s->next, 0);
    run(wide ? several_up_of_16 : several_up_of_8, s, s->threads);
    s->pack = join(s) >= PACKED_USES * s->n;
    atomic_store(&s->next, 0);
    run(wide ? several_down_of_16 : several_down_of_8, s, s->threads);
}

/* out = x @ weight.T + bias, each token on its own: accumulated in fp32, rounded once. Returns whether there was memory. */
int FAST hf_linear(Linear *m) {
    m->wide = malloc((size_t)(m->tokens * m->columns) * sizeof(float));
    if (!m->wide)
        return 0;
    for (int64_t i = 0; i < m->tokens * m->columns; i++)
        m->wide[i] = one(m->x, i, m->dtype);
    atomic_store(&m->next, 0);
    run(m->narrow || !has_avx512() ? linear_body_of_8 : linear_body_of_16, m, m->threads);
    free(m->wide);
    return 1;
}

/* --- rows from here to there */

typedef struct {
    char **from, **to; /* [n] */
    int64_t n, bytes;  /* rows, and what each has */
    int32_t threads;
    atomic_int next;
} Rows;

static void rows_body(void *job) {
    Rows *r = job;
    for (int64_t at; (at = atomic_fetch_add(&r->next, 1) * (int64_t)COPY_ROWS) < r->n;)
        for (int64_t i = at; i < at + COPY_ROWS && i < r->n; i++)
            memcpy(r->to[i], r->from[i], (size_t)r->bytes);
}

void hf_copy(Rows *r) {
    atomic_store(&r->next, 0);
    run(rows_body, r, r->threads);
}

/* What structures take, in the order of native.STRUCTURES. Returns how many there are. */
int hf_sizes(int64_t *out) {
    const int64_t sizes[] = {
        sizeof(Job), sizeof(Several), sizeof(Matrix), sizeof(Linear), sizeof(Rows), sizeof(File), sizeof(Order), sizeof(Window), sizeof(Step),
    };
    memcpy(out, sizes, sizeof sizes);
    return sizeof sizes / sizeof *sizes;
}

int hf_abi(void) { return 10; } /* compute/library.py: ABI */

#else

int hf_supported(void) { return 0; }

#endif
