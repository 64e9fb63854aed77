/* What read_queue.c, read_plain.c and read_ring.c share.
 *
 * `hf_read_start` hands reads to the kernel's io_uring, or to a few threads of our own where there is none; `hf_read_wait` brings
 * them to an end. Whatever has to agree is changed in here, where no signal handler of the caller can interrupt it:
 *
 *     A read is NEW, UNDER_WAY or DONE; COPIED in between, where the page cache had it. It is done once, whoever brings it to
 *     its end.
 *     What is under way is what was taken and is not done: nothing is counted beside that.
 *     A read that io_uring failed, cut short or refused is read again with preadv, which says why.
 *     A ring that refuses to work, at any time, is given up: what it did not take goes to the threads.
 *
 * A forked process has neither threads nor a ring: it begins with its own when it reads first.
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
    int32_t count, state; /* count: of pieces */
} Read;

/* The reads of one ticket. */
typedef struct Batch {
    struct Batch *next; /* the one that was started after this */
    File *file;
    int64_t ticket, n, untouched; /* reads from `untouched` on are NEW */
    int64_t done;                 /* reads that are DONE */
    int32_t error, threaded;      /* of the first read that failed; whether threads may take its reads */
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
    int32_t fd;      /* -1: there is none */
    int32_t refuses; /* nothing is submitted any more */
} Ring;

struct Reader {
    pthread_mutex_t call_lock, lock;
    pthread_cond_t work, finished;
    pthread_t threads[MOST_READERS];
    Batch *batches;
    int64_t tickets;
    char *bounce; /* of the caller; the threads have their own */
    Ring ring;
    pid_t owner;
    int32_t running, most, stopping; /* threads that there are, and may be */
};

#pragma GCC visibility push(hidden)

/* --- read_plain.c */

/* Whether a direct read can fill these pieces by itself. */
int is_aligned(const File *file, const Read *read);

/* Read with preadv. Returns 0, FILE_SHORT or an error of the system. Changes the pieces of the read.
 * `bounce`: a buffer, which is made when it is first needed. */
int read_now(const File *file, const Read *read, char **bounce);

/* All of these are called with `lock` held. */

/* Take note that a read is done. */
void mark_done(Reader *reader, Read *read, int error);

/* The next read of a batch, which is the caller's to do from now on; or null. */
Read *take_read(Batch *batch);

/* Do a read that was taken. Gives `lock` up meanwhile. */
void do_read(Reader *reader, Read *read, char **bounce);

/* Have so many threads look for work; fewer where the system has no more. */
void wake_threads(Reader *reader, int64_t wanted);

/* --- read_ring.c */

/* Set up a ring. Returns 0; or an error, with `fd` -1: there is no io_uring, it is forbidden, or an old one. */
int open_ring(Ring *ring);

void close_ring(Ring *ring);

/* Hand what is untouched of a batch to the kernel, as far as there is room. With `lock` held.
 * `in_background`: the kernel begins at once with threads of its own. */
void submit_to_ring(Reader *reader, Batch *batch, int in_background);

/* Bring a batch that io_uring reads to its end, or to where only threads can go on. With `lock` held. */
void complete_in_ring(Reader *reader, Batch *batch);

#pragma GCC visibility pop

#endif
