/* Chunks of a file into scattered memory, while the caller does something else. Included by _native.c.
 *
 * `start` hands reads to the kernel's io_uring, or to a few threads of our own where there is none; `wait` brings them to an end.
 * Everything that has to agree is changed in here, where no signal handler of the caller can interrupt it:
 *
 *     a read is NEW, GOING or DONE; it is done once, whoever brings it to its end
 *     what is under way is what is not done: nothing is counted beside that
 *     a read that io_uring failed, cut short or refused is read again with preadv, which says why
 *     a ring that refuses to work, at any time, is given up: what it did not take goes to the threads
 *
 * A forked process has neither threads nor a ring: it begins with its own when it reads first.
 * Calls of several threads wait for each other (`use`); the threads that read share `pool` with them. */

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

enum { RING_ENTRIES = 1024, MOST_READERS = 256, BOUNCE_BYTES = 1 << 16, PAGE_BYTES = 4096, HELPED_BYTES = 1 << 20 };
enum { CHANGED = -1, SHORT_FILE = -2, FORGOTTEN = -3 }; /* what `hf_read_wait` returns beside 0 and the errors of the system */
enum { NEW, GOING, DONE };

/* The kernel's side of io_uring, as far as it is used here: headers may be older than the kernel. */
enum { RING_SETUP = 425, RING_ENTER = 426, GETEVENTS = 1, OP_READV = 1, OP_READ = 22, IN_THREADS = 16 };
enum { ENTRIES_AT = 0x10000000, ONE_MAPPING = 1, NOTHING_DROPPED = 2, PLAIN_READS = 8, FROM_5_9 = 64 };

typedef struct {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t length, rw_flags;
    uint64_t user_data, rest[3];
} Entry;

typedef struct {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
} Completion;

typedef struct {
    uint32_t entries, completions, flags, cpu, idle, features, wq_fd, rest[3];
    struct {
        uint32_t head, tail, mask, count, flags, dropped, array, rest[3];
    } submitted;
    struct {
        uint32_t head, tail, mask, count, overflow, array, flags, rest[3];
    } completed;
} Params;

_Static_assert(sizeof(Entry) == 64 && sizeof(Completion) == 16 && sizeof(Params) == 120, "as the kernel has them");

typedef struct { /* reading/layer_files.py: a file, as it was when it was opened */
    int64_t size, modified_s, modified_ns, changed_s, changed_ns;
    int32_t fd;
    int32_t align;  /* what offsets, lengths and addresses have to be multiples of; 0: the page cache */
    int32_t nowait; /* page cache: whether a read can be asked to return only what is there */
    int32_t unused;
} File;

typedef struct { /* reading/layer_files.py: `n` reads of one file */
    const int64_t *offsets;     /* [n] */
    const int64_t *first;       /* [n + 1] the pieces of read i are first[i] to before first[i + 1] */
    const struct iovec *pieces; /* where the bytes go; copied by `start` */
    int64_t n, background;      /* background: the caller has something else to do before it waits */
} Order;

struct Batch;

typedef struct {
    struct Batch *batch;
    struct iovec *pieces;
    int64_t offset, length;
    int32_t count, state;
} Read;

typedef struct Batch {
    struct Batch *next; /* the younger ones */
    File *file;
    int64_t ticket, n, untouched; /* reads from `untouched` on are NEW */
    int64_t done;                 /* reads that are DONE */
    int32_t error, threaded;      /* of the first read that failed; whether threads may take its reads */
    Read reads[];
} Batch;

typedef struct {
    Entry *entries;
    Completion *completions;
    _Atomic uint32_t *tail, *head, *end; /* of the entries; of the completions, where they begin and end */
    uint32_t room, completion_room;
    void *shared;
    size_t shared_bytes, entry_bytes;
    int32_t fd;      /* -1: there is none */
    int32_t refuses; /* nothing is submitted any more */
} Ring;

typedef struct {
    pthread_mutex_t use, pool;
    pthread_cond_t work, finished;
    pthread_t readers[MOST_READERS];
    Batch *batches;
    int64_t tickets;
    char *bounce; /* of the caller; the threads have their own */
    Ring ring;
    pid_t owner;
    int32_t running, most, stopping;
} Reader;

/* --- one read, by preadv */

/* Fill `pieces` from `offset` on; returns 0, SHORT_FILE or an error. Changes `pieces`. */
static int read_pieces(int fd, struct iovec *pieces, int count, int64_t offset) {
    while (count) {
        const ssize_t got = preadv(fd, pieces, count, offset);
        if (got < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (got <= 0)
            return got < 0 ? errno : SHORT_FILE;
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

/* The same for what a direct read cannot fill by itself: the aligned bytes around it, through a buffer. */
static int read_bounced(const File *file, const Read *read, char *bounce) {
    const int64_t align = file->align, end = read->offset + read->length;
    const struct iovec *piece = read->pieces;
    size_t filled = 0; /* of this piece */
    for (int64_t at = read->offset; at < end;) {
        const int64_t begin = at & -align, stop = begin + BOUNCE_BYTES < end ? begin + BOUNCE_BYTES : end;
        const int64_t whole = (stop + align - 1) & -align;
        int64_t got = 0;
        while (got < stop - begin) {
            const ssize_t more = pread(file->fd, bounce + got, (size_t)(whole - begin - got), begin + got);
            if (more < 0 && (errno == EINTR || errno == EAGAIN))
                continue;
            if (more <= 0)
                return more < 0 ? errno : SHORT_FILE;
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

static int fits(const File *file, const Read *read) {
    uint64_t all = (uint64_t)read->offset;
    for (int32_t i = 0; i < read->count; i++)
        all |= (uint64_t)(uintptr_t)read->pieces[i].iov_base | read->pieces[i].iov_len;
    return !(all & (uint64_t)(file->align ? file->align - 1 : 0));
}

/* `bounce`: a buffer that is made when it is first needed. Changes the pieces of the read. */
static int read_whole(const File *file, const Read *read, char **bounce) {
    if (fits(file, read))
        return read_pieces(file->fd, read->pieces, read->count, read->offset);
    if (!*bounce && posix_memalign((void **)bounce, PAGE_BYTES, BOUNCE_BYTES))
        return ENOMEM;
    return read_bounced(file, read, *bounce);
}

/* --- threads. All of these with `pool` held */

static void finish(Reader *r, Read *read, int error) {
    Batch *b = read->batch;
    if (read->state == DONE)
        return;
    read->state = DONE;
    b->error = b->error ? b->error : error;
    if (++b->done == b->n)
        pthread_cond_broadcast(&r->finished);
}

/* The next read of a batch, now the caller's to read; or null. */
static Read *take(Batch *b) {
    if (!b->threaded || b->untouched == b->n)
        return NULL;
    Read *read = &b->reads[b->untouched++];
    read->state = GOING;
    return read;
}

static void take_and_read(Reader *r, Read *read, char **bounce) {
    pthread_mutex_unlock(&r->pool);
    const int error = read_whole(read->batch->file, read, bounce);
    pthread_mutex_lock(&r->pool);
    finish(r, read, error);
}

static void *reader_body(void *data) {
    Reader *r = data;
    char *bounce = NULL;
    pthread_mutex_lock(&r->pool);
    while (!r->stopping) {
        Read *read = NULL;
        for (Batch *b = r->batches; b && !read; b = b->next)
            read = take(b);
        if (read)
            take_and_read(r, read, &bounce);
        else
            pthread_cond_wait(&r->work, &r->pool);
    }
    pthread_mutex_unlock(&r->pool);
    free(bounce);
    return NULL;
}

/* Have so many threads look for work; fewer where the system has no more. */
static void wake(Reader *r, int64_t wanted) {
    sigset_t all, before;
    if (wanted > r->most)
        wanted = r->most;
    sigfillset(&all); /* signals are for the threads of the program */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (r->running < wanted && !pthread_create(&r->readers[r->running], NULL, reader_body, r))
        r->running++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    for (int64_t i = 0; i < wanted && i < r->running; i++)
        pthread_cond_signal(&r->work);
}

/* --- io_uring */

static long enter(const Ring *ring, uint32_t submit, uint32_t wait) {
    const long got = syscall(RING_ENTER, ring->fd, submit, wait, wait ? GETEVENTS : 0, NULL, 0);
    return got < 0 ? -errno : got;
}

static int comes_again(long error) { return error == -EINTR || error == -EAGAIN || error == -EBUSY; }

static void close_ring(Ring *ring) {
    if (ring->fd < 0)
        return;
    if (ring->entries)
        munmap(ring->entries, ring->entry_bytes);
    if (ring->shared)
        munmap(ring->shared, ring->shared_bytes);
    close(ring->fd);
    ring->fd = -1;
}

static void *mapped(int fd, size_t nbytes, int64_t at) {
    void *found = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, at);
    return found == MAP_FAILED ? NULL : found;
}

/* Set up a ring. Returns 0 or an error, with `fd` -1: there is no io_uring, it is forbidden, or an old one. */
static int open_ring(Ring *ring) {
    const uint32_t needed = ONE_MAPPING | NOTHING_DROPPED | PLAIN_READS | FROM_5_9; /* from then on reads come whole */
    Params p = {0};
    *ring = (Ring){.fd = (int32_t)syscall(RING_SETUP, RING_ENTRIES, &p)};
    if (ring->fd < 0)
        return errno;
    const size_t entries = p.submitted.array + p.entries * sizeof(uint32_t);
    const size_t completions = p.completed.array + p.completions * sizeof(Completion);
    ring->shared_bytes = entries > completions ? entries : completions;
    ring->entry_bytes = p.entries * sizeof(Entry);
    char *shared = ring->shared = mapped(ring->fd, ring->shared_bytes, 0);
    ring->entries = mapped(ring->fd, ring->entry_bytes, ENTRIES_AT);
    if (!ring->shared || !ring->entries || (p.features & needed) != needed) {
        close_ring(ring);
        return ENOSYS;
    }
    ring->tail = (_Atomic uint32_t *)(shared + p.submitted.tail);
    ring->head = (_Atomic uint32_t *)(shared + p.completed.head);
    ring->end = (_Atomic uint32_t *)(shared + p.completed.tail);
    ring->completions = (Completion *)(shared + p.completed.array);
    ring->room = p.entries;
    ring->completion_room = p.completions;
    for (uint32_t i = 0; i < p.entries; i++)
        ((uint32_t *)(shared + p.submitted.array))[i] = i;
    return 0;
}

/* Whether this process may use io_uring: 0, or the error that says why not. */
int32_t hf_try_ring(void) {
    Ring ring;
    long error = open_ring(&ring);
    if (!error)
        error = -enter(&ring, 0, 0);
    close_ring(&ring);
    return (int32_t)error;
}

/* Reads that the kernel has: completions for more of them might find no room. */
static uint32_t under_way(const Reader *r) {
    int64_t count = 0;
    for (const Batch *b = r->batches; b; b = b->next)
        count += b->threaded ? 0 : b->untouched - b->done;
    return (uint32_t)count;
}

/* Take in the results that are there. With `pool` held. */
static void reap(Reader *r) {
    Ring *ring = &r->ring;
    uint32_t head = atomic_load(ring->head);
    for (; head != atomic_load(ring->end); head++) {
        const Completion *one = &ring->completions[head & (ring->completion_room - 1)];
        Read *read = (Read *)(uintptr_t)one->user_data;
        const int whole = one->result == read->length;
        finish(r, read, whole ? 0 : read_whole(read->batch->file, read, &r->bounce)); /* once more, to hear why */
    }
    atomic_store(ring->head, head);
}

/* Hand what is untouched of a batch to the kernel, as far as there is room. With `pool` held. */
static void submit_batch(Reader *r, Batch *b, int flags) {
    Ring *ring = &r->ring;
    const uint32_t begin = atomic_load(ring->tail), free = ring->completion_room - under_way(r);
    const uint32_t room = free < ring->room ? free : ring->room;
    uint32_t tail = begin;
    for (; b->untouched < b->n && tail - begin < room; b->untouched++, tail++) {
        Read *read = &b->reads[b->untouched];
        const int alone = read->count == 1; /* the kernel looks at every piece of a vectored read */
        read->state = GOING;
        ring->entries[tail & (ring->room - 1)] = (Entry){
            .opcode = alone ? OP_READ : OP_READV,
            .flags = (uint8_t)flags,
            .fd = b->file->fd,
            .offset = (uint64_t)read->offset,
            .address = (uint64_t)(uintptr_t)(alone ? read->pieces->iov_base : read->pieces),
            .length = alone ? (uint32_t)read->pieces->iov_len : (uint32_t)read->count,
            .user_data = (uint64_t)(uintptr_t)read,
        };
    }
    atomic_store(ring->tail, tail);
    uint32_t left = tail - begin;
    while (left) {
        const long got = enter(ring, left, 0);
        if (got > 0)
            left -= (uint32_t)got;
        else if (got == 0 || got == -EINTR)
            continue;
        else {
            ring->refuses = !comes_again(got); /* short of something for a moment, or for good */
            break;
        }
    }
    atomic_store(ring->tail, tail - left); /* what the kernel did not take is taken back */
    for (; left; left--)
        b->reads[--b->untouched].state = NEW;
}

/* Wait for a result. With `pool` held. */
static void await(Reader *r) {
    const long got = r->ring.refuses ? -EPERM : enter(&r->ring, 0, 1);
    if (got < 0 && got != -EINTR) { /* it comes all the same, and is seen in the shared memory */
        const struct timespec moment = {.tv_nsec = 50000};
        r->ring.refuses |= !comes_again(got);
        nanosleep(&moment, NULL);
    }
}

/* Bring a batch that io_uring reads to its end, or to where only threads can go on. With `pool` held. */
static void complete_in_ring(Reader *r, Batch *b) {
    while (!b->threaded && b->done < b->n) {
        reap(r);
        if (b->untouched < b->n && !r->ring.refuses)
            submit_batch(r, b, 0);
        if (b->done == b->untouched && b->done < b->n) /* nothing of it is under way: the ring does not take it */
            b->threaded = 1;
        else if (b->done < b->untouched)
            await(r);
    }
}

/* --- batches */

static void begin_own(Reader *r) {
    r->owner = getpid();
    r->running = r->stopping = 0;
    pthread_mutex_init(&r->use, NULL);
    pthread_mutex_init(&r->pool, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->finished, NULL);
}

/* In a forked process: what was under way is its parent's. Results that were there stay. */
static void after_fork(Reader *r) {
    if (r->owner == getpid())
        return;
    const int had_ring = r->ring.fd >= 0;
    close_ring(&r->ring);
    if (had_ring)
        open_ring(&r->ring);
    begin_own(r);
    for (Batch *b = r->batches; b; b = b->next)
        if (b->done < b->n) {
            b->done = b->untouched = b->n;
            b->error = FORGOTTEN;
        }
}

static void lock_both(Reader *r) {
    after_fork(r);
    pthread_mutex_lock(&r->use);
    pthread_mutex_lock(&r->pool);
}

static void unlock_both(Reader *r) {
    pthread_mutex_unlock(&r->pool);
    pthread_mutex_unlock(&r->use);
}

static Batch *new_batch(Reader *r, File *file, const Order *order) {
    const int64_t n = order->n, pieces = order->first[n] - order->first[0];
    Batch *b = malloc(sizeof(Batch) + (size_t)n * sizeof(Read) + (size_t)pieces * sizeof(struct iovec));
    if (!b)
        return NULL;
    struct iovec *room = (struct iovec *)(b->reads + n);
    *b = (Batch){.file = file, .ticket = ++r->tickets, .n = n};
    memcpy(room, order->pieces + order->first[0], (size_t)pieces * sizeof(struct iovec));
    for (int64_t i = 0; i < n; i++) {
        const int64_t count = order->first[i + 1] - order->first[i];
        b->reads[i] = (Read){.batch = b, .pieces = room, .offset = order->offsets[i], .count = (int32_t)count};
        for (int64_t k = 0; k < count; k++)
            b->reads[i].length += (int64_t)room[k].iov_len;
        room += count;
    }
    return b;
}

/* Whether io_uring reads this batch: as many threads of the kernel as reads would come of those that it cannot begin at once. */
static int for_the_ring(const Reader *r, const Batch *b) {
    if (r->ring.fd < 0 || r->ring.refuses || !(b->file->align || b->file->nowait))
        return 0;
    for (int64_t i = 0; b->file->align && i < b->n; i++)
        if (!fits(b->file, &b->reads[i]))
            return 0;
    return 1;
}

/* What the page cache has is read at once; what it lacks, it is asked for. With `pool` held. */
static void from_page_cache(Reader *r, Batch *b, int at_once) {
    File *file = b->file;
    for (int64_t i = 0; at_once && file->nowait && i < b->n; i++) {
        Read read = b->reads[i];
        const ssize_t got = preadv2(file->fd, read.pieces, read.count, read.offset, RWF_NOWAIT);
        if (got < 0 && errno == EOPNOTSUPP)
            file->nowait = 0;
        if (got != read.length)
            continue;
        b->reads[i] = b->reads[b->untouched]; /* the done ones come first */
        b->reads[b->untouched] = read;
        finish(r, &b->reads[b->untouched++], 0);
    }
    for (int64_t i = b->untouched; i < b->n; i++)
        (void)posix_fadvise(file->fd, b->reads[i].offset, b->reads[i].length, POSIX_FADV_WILLNEED);
}

/* Let threads read, beside the caller when it waits. With `pool` held. */
static void start_threads(Reader *r, Batch *b, int background) {
    if (!b->file->align)
        from_page_cache(r, b, !background);
    b->threaded = 1;
    int64_t left = b->n - b->untouched, nbytes = 0;
    for (int64_t i = b->untouched; i < b->n; i++)
        nbytes += b->reads[i].length;
    if (b->file->align)
        wake(r, background ? left : left - 1); /* each waits for the disk */
    else if (background || nbytes >= HELPED_BYTES)
        wake(r, left ? 1 : 0); /* and these copy, mostly */
}

static void complete(Reader *r, Batch *b) {
    complete_in_ring(r, b);
    for (Read *read; (read = take(b));)
        take_and_read(r, read, &r->bounce);
    while (b->done < b->n)
        pthread_cond_wait(&r->finished, &r->pool);
}

static int differs(const File *file) {
    struct stat now;
    return fstat(file->fd, &now) || now.st_size != file->size || now.st_mtim.tv_sec != file->modified_s ||
           now.st_mtim.tv_nsec != file->modified_ns || now.st_ctim.tv_sec != file->changed_s ||
           now.st_ctim.tv_nsec != file->changed_ns;
}

/* A reader of at most so many threads; `use_ring`: -1 to find out whether there is io_uring by a read of `file`, 0 for none. */
Reader *hf_reader_open(int32_t threads, int32_t use_ring, File *file) {
    Reader *r = calloc(1, sizeof(Reader));
    if (!r)
        return NULL;
    r->most = threads < MOST_READERS ? threads : MOST_READERS;
    r->ring.fd = -1;
    begin_own(r);
    if (use_ring)
        open_ring(&r->ring);
    if (r->ring.fd >= 0) {
        char *page = NULL;
        struct iovec piece = {.iov_len = PAGE_BYTES};
        const int64_t offset = 0, first[] = {0, 1};
        Batch *b = NULL;
        if (!posix_memalign((void **)&page, PAGE_BYTES, PAGE_BYTES)) {
            piece.iov_base = page;
            b = new_batch(r, file, &(Order){.offsets = &offset, .first = first, .pieces = &piece, .n = 1});
        }
        pthread_mutex_lock(&r->pool);
        if (b) { /* it may be cut short: the file decides */
            submit_batch(r, b, 0);
            complete_in_ring(r, b);
        }
        const int works = b && b->untouched && !r->ring.refuses;
        pthread_mutex_unlock(&r->pool);
        if (!works)
            close_ring(&r->ring);
        free(b);
        free(page);
    }
    return r;
}

int32_t hf_reader_has_ring(const Reader *r) { return r->ring.fd >= 0 && !r->ring.refuses; }

/* Begin to read. Returns a ticket for `hf_read_wait`, or 0 where there is no memory. */
int64_t hf_read_start(Reader *r, File *file, const Order *order) {
    lock_both(r);
    Batch *b = new_batch(r, file, order), **last = &r->batches;
    if (b) {
        while (*last)
            last = &(*last)->next;
        *last = b;
        if (for_the_ring(r, b))
            submit_batch(r, b, order->background ? IN_THREADS : 0);
        if (b->untouched < b->n && !for_the_ring(r, b))
            start_threads(r, b, (int)order->background);
    }
    unlock_both(r);
    return b ? b->ticket : 0;
}

/* Wait for all reads of a ticket, which is worth nothing afterwards. Returns 0; an error of the system; SHORT_FILE, CHANGED (the
 * file is not what it was, and what came may be of either), or FORGOTTEN. */
int32_t hf_read_wait(Reader *r, int64_t ticket) {
    int32_t error = FORGOTTEN;
    lock_both(r);
    for (Batch **link = &r->batches; *link; link = &(*link)->next) {
        Batch *b = *link;
        if (b->ticket != ticket)
            continue;
        complete(r, b);
        error = b->error ? b->error : differs(b->file) ? CHANGED : 0;
        *link = b->next;
        free(b);
        break;
    }
    unlock_both(r);
    return error;
}

/* Wait for everything; nothing is written to memory afterwards. Tickets stay good, or not (`forget`). */
void hf_read_settle(Reader *r, int32_t forget) {
    lock_both(r);
    for (Batch *b = r->batches; b; b = b->next)
        complete(r, b);
    while (forget && r->batches) {
        Batch *b = r->batches;
        r->batches = b->next;
        free(b);
    }
    unlock_both(r);
}

void hf_reader_close(Reader *r) {
    hf_read_settle(r, 1);
    pthread_mutex_lock(&r->pool);
    r->stopping = 1;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->pool);
    for (int32_t i = 0; i < r->running; i++)
        pthread_join(r->readers[i], NULL);
    close_ring(&r->ring);
    free(r->bounce);
    free(r);
}
