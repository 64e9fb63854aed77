/* Threads to compute on. */

#ifndef HF_PARALLEL_H
#define HF_PARALLEL_H

#include "native.h"

#pragma GCC visibility push(hidden)

/* Run `body(job)` on `threads` threads at once, the calling one included. Returns when all are done. */
void run_on_threads(Body body, void *job, int threads);

/* The index of the current thread among these; 0 is the one that called `run_on_threads`. */
int thread_index(int threads);

/* Each thread calls the first before it computes, and the second when it has nothing more to compute. */
void begin_meanwhile(Meanwhile *meanwhile, int caller);
void end_meanwhile(Meanwhile *meanwhile, int caller);

/* Seconds of a monotonic clock. */
double now_s(void);

#pragma GCC visibility pop

#endif
