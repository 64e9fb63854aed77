/* A matrix that stays in memory, in the dtype of compute, times a few tokens. */

#include "native.h"

#ifdef HF_NATIVE

#include <stdlib.h>

#include "numbers.h"
#include "parallel.h"

enum { TILE_ROWS = 4, TILE_TOKENS = 4 }; /* sums that registers have room for */
enum { LINEAR_ROWS = 32 };               /* that a thread takes at a time */

/* One output: bias added, rounded once. */
INLINE void put_sum(const LinearJob *job, int64_t row, int64_t token, float sum, int dtype) {
    put(job->out, token * job->rows + row, job->bias ? sum + one(job->bias, row, dtype) : sum, dtype);
}

#define LANES 8
#include "linear_width.h"
#undef LANES

#define LANES 16
#include "linear_width.h"
#undef LANES

int FAST hf_linear(LinearJob *job) {
    job->x_f32 = malloc((size_t)(job->tokens * job->columns) * sizeof(float));
    if (!job->x_f32)
        return 0;
    for (int64_t i = 0; i < job->tokens * job->columns; i++)
        job->x_f32[i] = one(job->x, i, job->dtype);
    atomic_store(&job->next, 0);
    run_on_threads(job->no_avx512 || !has_avx512() ? linear_body_of_8 : linear_body_of_16, job, job->threads);
    free(job->x_f32);
    return 1;
}

#endif
