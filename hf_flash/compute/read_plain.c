/* Reads with preadv: one read at a time, and by threads. */

#include "native.h"

#ifdef HF_NATIVE

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "reading.h"

/* --- one read */

static int is_transient(int error) { return error == EINTR || error == EAGAIN; }

/* Fill `pieces` from `offset` on; returns 0, FILE_SHORT or an error. Changes `pieces`. */
static int read_pieces(int fd, struct iovec *pieces, int count, int64_t offset) {
    while (count) {
        const ssize_t got = preadv(fd, pieces, count, offset);
        if (got < 0 && is_transient(errno))
            continue;
        if (got <= 0)
            return got < 0 ? errno : FILE_SHORT;
        offset += got;
        size_t rest = (size_t)got;
        for (; count && rest >= pieces->iov_len; pieces++, count--)
            rest -= pieces->iov_len;
        if (count) {
            pieces->iov_base = (char *)pieces->iov_base + rest;
            pieces->iov_len -= rest;
        }
    }
    return 0;
}

/* The same for unaligned direct reads: reads the aligned bytes around them, through a buffer. */
static int read_bounced(const File *file, const Read *read, char *bounce) {
    const int64_t align = file->align, end = read->offset + read->length;
    const struct iovec *piece = read->pieces;
    size_t filled = 0; /* bytes of this piece */
    for (int64_t at = read->offset; at < end;) {
        const int64_t begin = at & -align, stop = begin + BOUNCE_BYTES < end ? begin + BOUNCE_BYTES : end;
        const int64_t whole = (stop + align - 1) & -align;
        int64_t got = 0;
        while (got < stop - begin) {
            const ssize_t more = pread(file->fd, bounce + got, (size_t)(whole - begin - got), begin + got);
            if (more < 0 && is_transient(errno))
                continue;
            if (more <= 0)
                return more < 0 ? errno : FILE_SHORT;
            got += more;
        }
        while (at < stop) {
            const size_t left = piece->iov_len - filled, some = left < (size_t)(stop - at) ? left : (size_t)(stop - at);
            memcpy((char *)piece->iov_base + filled, bounce + (at - begin), some);
            at += (int64_t)some;
            filled += some;
            if (filled == piece->iov_len) {
                piece++;
                filled = 0;
            }
        }
    }
    return 0;
}

int is_aligned(const File *file, const Read *read) {
    uint64_t all = (uint64_t)read->offset;
    for (int32_t i = 0; i < read->count; i++)
        all |= (uint64_t)(uintptr_t)read->pieces[i].iov_base | read->pieces[i].iov_len;
    return !(all & (uint64_t)(file->align ? file->align - 1 : 0));
}

int read_now(const File *file, const Read *read, char **bounce) {
    if (is_aligned(file, read))
        return read_pieces(file->fd, read->pieces, read->count, read->offset);
    if (!*bounce && posix_memalign((void **)bounce, PAGE_BYTES, BOUNCE_BYTES))
        return ENOMEM;
    return read_bounced(file, read, *bounce);
}

/* --- threads */

void mark_done(Reader *reader, Read *read, int error) {
    Batch *batch = read->batch;
    if (read->state == DONE)
        return;
    read->state = DONE;
    batch->error = batch->error ? batch->error : error;
    if (++batch->done == batch->n)
        pthread_cond_broadcast(&reader->finished);
}

Read *take_read(Batch *batch) {
    if (!batch->threaded || batch->untouched == batch->n)
        return NULL;
    Read *read = &batch->reads[batch->untouched++];
    read->state = UNDER_WAY;
    return read;
}

void do_read(Reader *reader, Read *read, char **bounce) {
    pthread_mutex_unlock(&reader->lock);
    const int error = read_now(read->batch->file, read, bounce);
    pthread_mutex_lock(&reader->lock);
    mark_done(reader, read, error);
}

static void *thread_body(void *data) {
    Reader *reader = data;
    char *bounce = NULL;
    pthread_mutex_lock(&reader->lock);
    while (!reader->stopping) {
        Read *read = NULL;
        for (Batch *batch = reader->batches; batch && !read; batch = batch->next)
            read = take_read(batch);
        if (read)
            do_read(reader, read, &bounce);
        else
            pthread_cond_wait(&reader->work, &reader->lock);
    }
    pthread_mutex_unlock(&reader->lock);
    free(bounce);
    return NULL;
}

void wake_threads(Reader *reader, int64_t wanted) {
    sigset_t all, before;
    if (wanted > reader->most)
        wanted = reader->most;
    sigfillset(&all); /* signals go to the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (reader->running < wanted && !pthread_create(&reader->threads[reader->running], NULL, thread_body, reader))
        reader->running++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    for (int64_t i = 0; i < wanted && i < reader->running; i++)
        pthread_cond_signal(&reader->work);
}

#endif
