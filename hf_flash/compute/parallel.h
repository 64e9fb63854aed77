/* Threads to compute on. */

#ifndef HF_PARALLEL_H
#define HF_PARALLEL_H

#include "native.h"

#pragma GCC visibility push(hidden)

/* Run `body(job)` on so many threads at once, this one among them. Returns when all are done. */
void run_on_threads(Body body, void *job, int threads);

/* Which of these threads runs this: 0 is the one that called `run_on_threads`. */
int thread_index(int threads);

/* What a thread calls before it computes, and when it has nothing more to compute. */
void begin_meanwhile(Meanwhile *meanwhile, int caller);
void end_meanwhile(Meanwhile *meanwhile, int caller);

/* Seconds since some moment. */
double now_s(void);

#pragma GCC visibility pop

#endif
