/* Products of matrices with a few tokens. */

#include "native.h"

#ifdef HF_NATIVE

#include <stdlib.h>

#include "coded.h"
#include "numbers.h"
#include "parallel.h"

enum { TILE_ROWS = 4, TILE_TOKENS = 4 }; /* the sums of a tile fit into registers */
enum { AHEAD_BYTES = 1 << 14 };          /* the least distance from the bytes multiplied to those prefetched */
enum { LINEAR_ROWS = 32 };               /* rows that a thread takes at a time */
enum { E4M3_AS = 16 };                   /* plus a dtype: the code for numbers of E4M3 that are rounded to that dtype */
enum { STRIP = 512 };                    /* outputs of a turned matrix that a thread takes at a time */

/* Store one output: add the bias, round once. */
INLINE void put_sum(const LinearJob *job, int64_t row, int64_t token, float sum) {
    const int dtype = job->dtype;
    put(job->out, token * job->out_stride + row, job->bias ? sum + one(job->bias, row, dtype) : sum, dtype);
}

#define LANES 8
#include "linear_width.h"
#undef LANES

#define LANES 16
#include "linear_width.h"
#undef LANES

/* Widen the tokens to fp32. For weights in 4 bits, the even columns of a block come first: they go with the low halves of bytes. */
static FAST void widen(LinearJob *job, float *room) {
    const int64_t n = job->tokens * job->columns, half = E2M1_BLOCK / 2;
    job->x_f32 = room;
    if (job->weight_dtype != E2M1) {
        for (int64_t i = 0; i < n; i++)
            room[i] = one(job->x, i, job->dtype);
        return;
    }
    for (int64_t block = 0; block < n; block += E2M1_BLOCK)
        for (int64_t i = 0; i < half; i++) {
            room[block + i] = one(job->x, block + 2 * i, job->dtype);
            room[block + half + i] = one(job->x, block + 2 * i + 1, job->dtype);
        }
}

int hf_linear(LinearJob *job) {
    float *room = malloc((size_t)(job->tokens * job->columns) * sizeof(float));
    if (!room)
        return 0;
    widen(job, room);
    atomic_store(&job->next, 0);
    run_on_threads(job->no_avx512 || !has_avx512() ? linear_body_of_8 : linear_body_of_16, job, job->threads);
    free(room);
    return 1;
}

static void wait_for_reads(void *data) {
    LinearsJob *all = data;
    all->error = hf_read_wait(all->reader, all->ticket);
}

static void do_nothing(void *data) { (void)data; }

/* Whether two matrices are multiplied with the same tokens. */
static int same_x(const LinearJob *a, const LinearJob *b) {
    return a->x == b->x && a->tokens == b->tokens && a->columns == b->columns && a->dtype == b->dtype &&
           (a->weight_dtype == E2M1) == (b->weight_dtype == E2M1);
}

int hf_linears(LinearsJob *all) {
    int64_t numbers = 0;
    for (int64_t i = 0; i < all->n; i++)
        numbers += i && same_x(all->jobs + i, all->jobs + i - 1) ? 0 : all->jobs[i].tokens * all->jobs[i].columns;
    float *const room = malloc((size_t)(numbers + 1) * sizeof(float));
    const int64_t n = all->n;
    if (!room)
        all->n = 0;
    float *at = room;
    for (int64_t i = 0; i < all->n; i++) {
        LinearJob *job = all->jobs + i;
        atomic_store(&job->next, 0);
        if (i && same_x(job, job - 1)) {
            job->x_f32 = job[-1].x_f32;
        } else {
            widen(job, at);
            at += job->tokens * job->columns;
        }
    }
    all->error = 0;
    all->meanwhile = (Meanwhile){.begin = all->ticket ? do_nothing : NULL, .end = wait_for_reads, .data = all};
    run_on_threads(all->no_avx512 || !has_avx512() ? linears_body_of_8 : linears_body_of_16, all, all->threads);
    all->waited_s = all->meanwhile.waited_s;
    all->n = n;
    free(room);
    return room != NULL;
}

#endif
