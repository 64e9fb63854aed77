/* Threads to compute on: those of the OpenMP runtime that torch runs on, so that there are not twice as many as cores. */

#include "native.h"

#ifdef HF_NATIVE

#include <stddef.h>
#include <time.h>

#include "parallel.h"

static Parallel start_parallel;    /* GOMP_parallel; null: there is one thread */
static int (*number_of_thread)(void); /* omp_get_thread_num */

void hf_use_threads_of(Parallel start, int (*number)(void)) {
    start_parallel = start;
    number_of_thread = number;
}

void run_on_threads(Body body, void *job, int threads) {
    if (threads > 1 && start_parallel)
        start_parallel(body, job, (unsigned)threads, 0);
    else
        body(job);
}

int thread_index(int threads) { return threads > 1 && start_parallel ? number_of_thread() : 0; }

double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
