/* Copies scattered rows to scattered places. */

#include "native.h"

#ifdef HF_NATIVE

#include <string.h>

#include "parallel.h"

enum { COPY_ROWS = 16 }; /* rows that a thread takes at a time */

static void copy_body(void *data) {
    CopyJob *job = data;
    for (int64_t at; (at = atomic_fetch_add(&job->next, 1) * (int64_t)COPY_ROWS) < job->n;)
        for (int64_t i = at; i < at + COPY_ROWS && i < job->n; i++)
            memcpy(job->to[i], job->from[i], (size_t)job->row_bytes);
}

void hf_copy(CopyJob *job) {
    atomic_store(&job->next, 0);
    run_on_threads(copy_body, job, job->threads);
}

#endif
