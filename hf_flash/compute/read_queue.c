/* The queue of reads: tickets, who does which reads, and what happens to them in a forked process. reading.h has the rules. */

#include "native.h"

#ifdef HF_NATIVE

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "parallel.h"
#include "reading.h"

enum { HELPED_BYTES = 1 << 20 }; /* from so many bytes on, more threads copy from the page cache */

/* --- the process */

static void begin_anew(Reader *reader) {
    reader->owner = getpid();
    reader->running = reader->stopping = 0;
    pthread_mutex_init(&reader->call_lock, NULL);
    pthread_mutex_init(&reader->lock, NULL);
    pthread_cond_init(&reader->work, NULL);
    pthread_cond_init(&reader->finished, NULL);
}

/* In a forked process: reads that were under way belong to the parent, completed batches stay. */
static void after_fork(Reader *reader) {
    if (reader->owner == getpid())
        return;
    const int had_ring = reader->ring.fd >= 0;
    close_ring(&reader->ring);
    if (had_ring)
        open_ring(&reader->ring);
    begin_anew(reader);
    for (Batch *batch = reader->batches; batch; batch = batch->next)
        if (batch->done < batch->n) {
            batch->done = batch->untouched = batch->n;
            batch->error = READ_FORGOTTEN;
        }
}

static void lock_both(Reader *reader) {
    after_fork(reader);
    pthread_mutex_lock(&reader->call_lock);
    pthread_mutex_lock(&reader->lock);
}

static void unlock_both(Reader *reader) {
    pthread_mutex_unlock(&reader->lock);
    pthread_mutex_unlock(&reader->call_lock);
}

/* --- batches */

static Batch *new_batch(Reader *reader, File *file, const Order *order) {
    const int64_t n = order->n, pieces = order->first[n] - order->first[0];
    Batch *batch = malloc(sizeof(Batch) + (size_t)n * sizeof(Read) + (size_t)pieces * sizeof(struct iovec));
    if (!batch)
        return NULL;
    struct iovec *room = (struct iovec *)(batch->reads + n);
    *batch = (Batch){.file = file, .ticket = ++reader->tickets, .n = n};
    memcpy(room, order->pieces + order->first[0], (size_t)pieces * sizeof(struct iovec));
    for (int64_t i = 0; i < n; i++) {
        const int64_t count = order->first[i + 1] - order->first[i];
        batch->reads[i] = (Read){.batch = batch, .pieces = room, .offset = order->offsets[i], .count = (int32_t)count};
        for (int64_t k = 0; k < count; k++)
            batch->reads[i].length += (int64_t)room[k].iov_len;
        room += count;
    }
    return batch;
}

static int64_t bytes_left(const Batch *batch) {
    int64_t nbytes = 0;
    for (int64_t i = batch->untouched; i < batch->n; i++)
        nbytes += batch->reads[i].length;
    return nbytes;
}

/* Whether io_uring reads this batch. It does not if the kernel could not begin the reads at once, because it would then start a
 * thread for every read. */
static int is_for_the_ring(const Reader *reader, const Batch *batch) {
    if (reader->ring.fd < 0 || reader->ring.refuses || !(batch->file->align || batch->file->nowait))
        return 0;
    for (int64_t i = 0; batch->file->align && i < batch->n; i++)
        if (!is_aligned(batch->file, &batch->reads[i]))
            return 0;
    return 1;
}

/* Reads that several threads copy from the page cache, if it has them. */
typedef struct {
    Batch *batch;
    atomic_int next, lacking;
} CachedReads;

enum { MOST_LACKING = 16 }; /* after so many reads that the page cache lacks, no more are tried */

static void copy_cached(void *data) {
    CachedReads *all = data;
    Batch *batch = all->batch;
    for (int64_t i; atomic_load(&all->lacking) < MOST_LACKING && (i = atomic_fetch_add(&all->next, 1)) < batch->n;) {
        Read *read = &batch->reads[i];
        const ssize_t got = preadv2(batch->file->fd, read->pieces, read->count, read->offset, RWF_NOWAIT);
        if (got == read->length)
            read->state = COPIED;
        else if (got < 0 && errno == EOPNOTSUPP)
            batch->file->nowait = 0;
        else
            atomic_fetch_add(&all->lacking, 1);
    }
}

/* Copy the reads that the page cache has, at once. Called with `lock` held. */
static void read_from_page_cache(Reader *reader, Batch *batch, int64_t threads) {
    CachedReads all = {.batch = batch, .next = (int)batch->untouched};
    if (batch->file->nowait)
        run_on_threads(copy_cached, &all, (int)threads);
    for (int64_t i = batch->untouched; i < batch->n; i++) {
        Read read = batch->reads[i];
        if (read.state != COPIED)
            continue;
        batch->reads[i] = batch->reads[batch->untouched]; /* finished reads come first */
        batch->reads[batch->untouched] = read;
        mark_done(reader, &batch->reads[batch->untouched++], 0);
    }
}

/* Let threads read; the caller helps when it waits. Called with `lock` held. */
static void start_threads(Reader *reader, Batch *batch, int background) {
    batch->threaded = 1;
    const int64_t left = batch->n - batch->untouched, nbytes = bytes_left(batch);
    for (int64_t i = batch->untouched; !batch->file->align && i < batch->n; i++) /* starts readahead of missing pages */
        (void)posix_fadvise(batch->file->fd, batch->reads[i].offset, batch->reads[i].length, POSIX_FADV_WILLNEED);
    if (batch->file->align)
        wake_threads(reader, background ? left : left - 1); /* each thread waits for the disk */
    else if (background || nbytes >= HELPED_BYTES)
        wake_threads(reader, left ? 1 : 0); /* these threads mostly copy */
}

/* Complete a batch. Called with `lock` held. */
static void complete(Reader *reader, Batch *batch) {
    complete_in_ring(reader, batch);
    for (Read *read; (read = take_read(batch));)
        do_read(reader, read, &reader->bounce);
    while (batch->done < batch->n)
        pthread_cond_wait(&reader->finished, &reader->lock);
}

/* Whether a file has changed since it was opened. */
static int is_changed(const File *file) {
    struct stat now;
    return fstat(file->fd, &now) || now.st_size != file->size || now.st_mtim.tv_sec != file->modified_s ||
           now.st_mtim.tv_nsec != file->modified_ns ||
           (!file->only_contents && (now.st_ctim.tv_sec != file->changed_s || now.st_ctim.tv_nsec != file->changed_ns));
}

/* --- the functions of native.h */

/* Whether a ring that was set up can read from this file. */
static int ring_works(Reader *reader, File *file) {
    char *page = NULL;
    if (posix_memalign((void **)&page, PAGE_BYTES, PAGE_BYTES))
        return 0;
    const int64_t offset = 0, first[] = {0, 1};
    const struct iovec piece = {page, PAGE_BYTES};
    Batch *batch = new_batch(reader, file, &(Order){.offsets = &offset, .first = first, .pieces = &piece, .n = 1});
    pthread_mutex_lock(&reader->lock);
    if (batch) { /* the read may be cut short, if the file is small */
        submit_to_ring(reader, batch, 0);
        complete_in_ring(reader, batch);
    }
    const int works = batch && batch->untouched && !reader->ring.refuses;
    pthread_mutex_unlock(&reader->lock);
    free(batch);
    free(page);
    return works;
}

Reader *hf_reader_open(int32_t threads, int32_t use_ring, File *file) {
    Reader *reader = calloc(1, sizeof(Reader));
    if (!reader)
        return NULL;
    reader->most = threads < MOST_READERS ? threads : MOST_READERS;
    reader->ring.fd = -1;
    begin_anew(reader);
    if (use_ring)
        open_ring(&reader->ring);
    if (reader->ring.fd >= 0 && !ring_works(reader, file))
        close_ring(&reader->ring);
    return reader;
}

int32_t hf_reader_has_ring(const Reader *reader) { return reader->ring.fd >= 0 && !reader->ring.refuses; }

int64_t hf_read_start(Reader *reader, File *file, const Order *order) {
    lock_both(reader);
    Batch *batch = new_batch(reader, file, order), **last = &reader->batches;
    if (batch) {
        while (*last)
            last = &(*last)->next;
        *last = batch;
        const int64_t threads = bytes_left(batch) >= HELPED_BYTES ? order->threads : 1;
        if (!file->align && (threads > 1 || !(order->background || is_for_the_ring(reader, batch))))
            read_from_page_cache(reader, batch, threads);
        if (is_for_the_ring(reader, batch))
            submit_to_ring(reader, batch, (int)order->background);
        if (batch->untouched < batch->n && !is_for_the_ring(reader, batch))
            start_threads(reader, batch, (int)order->background);
    }
    unlock_both(reader);
    return batch ? batch->ticket : 0;
}

int32_t hf_read_wait(Reader *reader, int64_t ticket) {
    int32_t error = READ_FORGOTTEN;
    lock_both(reader);
    for (Batch **link = &reader->batches; *link; link = &(*link)->next) {
        Batch *batch = *link;
        if (batch->ticket != ticket)
            continue;
        complete(reader, batch);
        error = batch->error ? batch->error : is_changed(batch->file) ? FILE_CHANGED : 0;
        *link = batch->next;
        free(batch);
        break;
    }
    unlock_both(reader);
    return error;
}

void hf_read_settle(Reader *reader, int32_t forget) {
    lock_both(reader);
    for (Batch *batch = reader->batches; batch; batch = batch->next)
        complete(reader, batch);
    while (forget && reader->batches) {
        Batch *batch = reader->batches;
        reader->batches = batch->next;
        free(batch);
    }
    unlock_both(reader);
}

void hf_reader_close(Reader *reader) {
    hf_read_settle(reader, 1);
    pthread_mutex_lock(&reader->lock);
    reader->stopping = 1;
    pthread_cond_broadcast(&reader->work);
    pthread_mutex_unlock(&reader->lock);
    for (int32_t i = 0; i < reader->running; i++)
        pthread_join(reader->threads[i], NULL);
    close_ring(&reader->ring);
    free(reader->bounce);
    free(reader);
}

#endif
