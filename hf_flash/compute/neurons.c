/* One token and some neurons, multiplied where they lie. */

#include "native.h"

#ifdef HF_NATIVE

#include <stddef.h>

#include "numbers.h"
#include "parallel.h"

enum { UP_ROWS = 16 }; /* neurons that a thread takes at a time */
enum { COLUMNS = 64 }; /* a thread's share of the output columns is a multiple of this */

/* --- up */

/* The dot product of a row and x. `ahead` is the next row, which is prefetched. */
INLINE float dot(const void *row, const void *ahead, const float *x, int64_t width, int dtype) {
    const int64_t size = size_of(dtype);
    __m256 a = _mm256_setzero_ps(), b = a, c = a, e = a;
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
        _mm_prefetch((const char *)ahead + i * size, _MM_HINT_T0);
        if (dtype == F32)
            _mm_prefetch((const char *)ahead + i * size + 64, _MM_HINT_T0);
        a = _mm256_fmadd_ps(load(row, i, dtype), _mm256_loadu_ps(x + i), a);
        b = _mm256_fmadd_ps(load(row, i + 8, dtype), _mm256_loadu_ps(x + i + 8), b);
        c = _mm256_fmadd_ps(load(row, i + 16, dtype), _mm256_loadu_ps(x + i + 16), c);
        e = _mm256_fmadd_ps(load(row, i + 24, dtype), _mm256_loadu_ps(x + i + 24), e);
    }
    float rest = 0.0f;
    for (; i < width; i++)
        rest = __builtin_fmaf(one(row, i, dtype), x[i], rest);
    return total(_mm256_add_ps(a, b), _mm256_add_ps(c, e)) + rest;
}

/* The product of x with one part of the neuron at `position`, plus its bias. `following`: the position computed next. */
INLINE float product(const TokenJob *job, int64_t offset, const void *bias, int64_t position, int64_t following, int dtype) {
    const char *part = (const char *)job->matrix + offset;
    const char *row = part + job->rows[position] * job->layout.row_bytes;
    const char *ahead = part + job->rows[following] * job->layout.row_bytes;
    float sum = dot(row, ahead, job->x_f32, job->layout.width, dtype);
    if (bias)
        sum += one(bias, job->ids[position], dtype);
    return rounded(sum, dtype);
}

/* Hidden values of the positions from `begin` to before `end`. */
INLINE void up_rows(const TokenJob *job, int64_t begin, int64_t end, int dtype) {
    const RowLayout *layout = &job->layout;
    const int gated = layout->gate_offset >= 0;
    const int64_t first = gated ? layout->gate_offset : layout->up_offset;
    const void *first_bias = gated ? job->gate_bias : job->bias;
    int64_t alive[UP_ROWS], n = 0;
    for (int64_t k = begin; k < end; k++) {
        const int64_t position = job->positions[k], following = job->positions[k + 1 < end ? k + 1 : k];
        const float value = activated(product(job, first, first_bias, position, following, dtype), &job->activation, dtype);
        job->hidden[position] = value;
        alive[n] = position;
        n += value != 0.0f;
    }
    for (int64_t k = 0; gated && k < n; k++) {
        float up = product(job, layout->up_offset, job->bias, alive[k], alive[k + 1 < n ? k + 1 : k], dtype);
        if (job->activation.of_both)
            up = activated(up, &job->activation, dtype);
        job->hidden[alive[k]] = rounded(job->hidden[alive[k]] * up, dtype);
    }
}

static FAST void up_share(const TokenJob *job, int64_t begin, int64_t end) {
    BY_DTYPE(job->dtype, up_rows, job, begin, end);
}

static void up_body(void *data) {
    TokenJob *job = data;
    const int caller = thread_index(job->threads) == 0;
    begin_meanwhile(&job->meanwhile, caller);
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&job->next, UP_ROWS);
        if (begin >= job->todo)
            break;
        up_share(job, begin, begin + UP_ROWS < job->todo ? begin + UP_ROWS : job->todo);
    }
    end_meanwhile(&job->meanwhile, caller);
}

void FAST hf_up(TokenJob *job) {
    for (int64_t i = 0; i < job->layout.width; i++)
        job->x_f32[i] = one(job->x, i, job->dtype);
    atomic_store(&job->next, 0);
    atomic_store(&job->meanwhile.ended, 0);
    run_on_threads(up_body, job, job->threads);
}

/* --- down */

/* Columns `begin` to before `end` of the output. */
INLINE void down_columns(const TokenJob *job, int64_t begin, int64_t end, int dtype) {
    const int64_t size = size_of(dtype), stride = job->layout.row_bytes;
    const char *down = (const char *)job->matrix + job->layout.down_offset;
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
    TokenJob *job = data;
    const int64_t width = job->layout.width;
    for (;;) {
        int64_t begin = (int64_t)atomic_fetch_add(&job->next, (int)job->share);
        if (begin >= width)
            break;
        int64_t end = begin + job->share < width ? begin + job->share : width;
        BY_DTYPE(job->dtype, down_columns, job, begin, end);
    }
}

void FAST hf_down(TokenJob *job) {
    job->todo = 0;
    for (int64_t position = 0; position < job->n; position++)
        if (job->hidden[position] != 0.0f)
            job->active[job->todo++] = position;
    int64_t share = (job->layout.width + job->threads - 1) / job->threads;
    job->share = (share + COLUMNS - 1) / COLUMNS * COLUMNS;
    atomic_store(&job->next, 0);
    if (job->todo)
        run_on_threads(down_body, job, job->threads);
}

#endif
