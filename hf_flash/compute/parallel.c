/* Threads to compute on: those of torch's OpenMP runtime, so that there are not twice as many threads as cores. */

#include "native.h"

#ifdef HF_NATIVE

#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

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

void begin_meanwhile(Meanwhile *meanwhile, int caller) {
    if (!caller || !meanwhile->begin)
        return;
    const double start = now_s();
    meanwhile->begin(meanwhile->data);
    meanwhile->waited_s += now_s() - start;
}

void end_meanwhile(Meanwhile *meanwhile, int caller) {
    if (!meanwhile->begin)
        return;
    if (caller) {
        const double start = now_s();
        meanwhile->end(meanwhile->data);
        meanwhile->waited_s += now_s() - start;
        atomic_store(&meanwhile->ended, 1);
        syscall(SYS_futex, &meanwhile->ended, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    } else {
        while (!atomic_load(&meanwhile->ended)) /* asleep, not spinning: the kernel needs the core for the reads */
            syscall(SYS_futex, &meanwhile->ended, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
}

double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
