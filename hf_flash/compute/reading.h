/* What read_queue.c, read_plain.c and read_ring.c share.
 *
 * `hf_read_start` hands reads to the kernel's io_uring, or to a few threads of our own if there is none; `hf_read_wait` completes
 * them. All shared state is changed here in C, where no signal handler of the caller can interrupt it. The rules:
 *
 *     A read is NEW, UNDER_WAY or DONE; or COPIED for a moment, if the page cache had it. It becomes DONE once, whoever completes
 *     it.
 *     Reads under way are those taken and not done; they have no counter of their own.
 *     A read that io_uring failed, cut short or refused is repeated with preadv, which tells the reason.
 *     A ring that refuses to work, at any time, is given up: reads that it did not take go to the threads.
 *
 * A forked process has neither the threads nor the ring: it gets its own with its first call.
 * Calls of several threads wait for each other (`call_lock`). The threads that read share `lock` with them. */

#ifndef HF_READING_H
#define HF_READING_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "native.h"

enum { MOST_READERS = 256, PAGE_BYTES = 4096 };
enum { NEW, COPIED, UNDER_WAY, DONE };

struct Batch;

typedef struct {
    struct Batch *batch;
    struct iovec *pieces;
    int64_t offset, length;
    int32_t count, state; /* count: number of pieces */
} Read;

/* The reads of one ticket. */
typedef struct Batch {
    struct Batch *next; /* the batch that was started after this one */
    File *file;
    int64_t ticket, n, untouched; /* reads from `untouched` on are NEW */
    int64_t done;                 /* how many reads are DONE */
    int32_t error, threaded;      /* the error of the first read that failed; whether threads may take the reads */
    Read reads[];
} Batch;

struct RingEntry;
struct RingCompletion;

typedef struct {
    struct RingEntry *entries;
    struct RingCompletion *completions;
    _Atomic uint32_t *tail, *head, *end; /* of the entries; of the completions, where they begin and end */
    uint32_t room, completion_room;
    void *shared;
    size_t shared_bytes, entry_bytes;
    int32_t fd;      /* -1: there is no ring */
    int32_t refuses; /* nothing more may be submitted */
} Ring;

struct Reader {
    pthread_mutex_t call_lock, lock;
    pthread_cond_t work, finished;
    pthread_t threads[MOST_READERS];
    Batch *batches;
    int64_t tickets;
    char *bounce; /* the buffer of callers; the threads have their own */
    Ring ring;
    pid_t owner;
    int32_t running, most, stopping; /* running threads, and the most that there may be */
};

#pragma GCC visibility push(hidden)

/* --- read_plain.c */

/* Whether a direct read can fill these pieces without a buffer. */
int is_aligned(const File *file, const Read *read);

/* Read with preadv. Returns 0, FILE_SHORT or an errno. Changes the pieces of the read.
 * `bounce`: a buffer, allocated when it is first needed. */
int read_now(const File *file, const Read *read, char **bounce);

/* All of these are called with `lock` held. */

/* Note that a read is done. */
void mark_done(Reader *reader, Read *read, int error);

/* Take the next read of a batch, which the caller must then do; null if there is none. */
Read *take_read(Batch *batch);

/* Do a read that was taken. Releases `lock` meanwhile. */
void do_read(Reader *reader, Read *read, char **bounce);

/* Make up to `wanted` threads look for work; fewer if the system refuses to start more. */
void wake_threads(Reader *reader, int64_t wanted);

/* --- read_ring.c */

/* Set up a ring. Returns 0; or an errno, with `fd` -1, if io_uring is missing, forbidden or too old. */
int open_ring(Ring *ring);

void close_ring(Ring *ring);

/* Hand the untouched reads of a batch to the kernel, as far as there is room. Called with `lock` held.
 * `in_background`: the kernel begins at once, with threads of its own. */
void submit_to_ring(Reader *reader, Batch *batch, int in_background);

/* Complete a batch that io_uring reads, as far as the ring takes it: the threads do the rest. Called with `lock` held. */
void complete_in_ring(Reader *reader, Batch *batch);

#pragma GCC visibility pop

#endif
