/* One token through one layer in one call. Included by _native.c, after _native_read.h.
 *
 * What runtime/layer.py does step by step for any call, done for the one that decoding consists of: a token whose neurons fit into the
 * window. In Python the same takes ten times as long as it needs, because attention has emptied the caches each time. The rules
 * are those of runtime/window.py (who goes when room is needed) and reading/layer_files.py (neighbours on flash are one read); tests hold both
 * against the same model. Whatever is not as it mostly is, is refused before anything is changed, and done there. */

typedef struct { /* runtime/window.py: ResidentWindow */
    int64_t *slot_of, *pointer, *last_used, *unused;
    double *worth;
    int64_t d_ff, capacity, window, clock, free;
    double gain, growth, renew;
} Window;

typedef struct {
    int64_t at, slot; /* a neuron's place on flash, and the slot that it goes to */
} Pair;

struct Step {
    Job job;
    Window window;
    Reader *reader;          /* null: nothing can be read here */
    File *file;
    const uint8_t *selected; /* [d_ff] */
    const int32_t *place;    /* [d_ff] or null */
    int64_t *ids, *rows, *there, *away; /* [most] room */
    Pair *pairs;             /* [reads] room, first for what has to go */
    int64_t *offsets, *first; /* [reads], [reads + 1] room, */
    struct iovec *parts;     /* and [reads]: an `Order` */
    int64_t most, reads;     /* neurons, and missing ones, that fit into these */
    int64_t offset, bundle, longest; /* where bundles begin in the file, their size, the most that are one read */
    int64_t unit;            /* bytes, a power of two: so many are read at once, and counted so */
    int64_t ticket, failed;  /* failed, out: a read did not bring what it should have */
    int64_t used, missing, nbytes, chunks; /* out */
    double managed;          /* out: seconds that the window took; `job.waited`: that reading took the calling thread */
};

/* --- the window */

static void note_use(Window *w, const int64_t *ids, int64_t n) {
    w->clock++;
    w->gain *= w->growth;
    if (w->gain > w->renew) {
        for (int64_t i = 0; i < w->d_ff; i++)
            w->worth[i] /= w->gain;
        w->gain = 1.0;
    }
    for (int64_t k = 0; k < n; k++) {
        w->last_used[ids[k]] = w->clock;
        w->worth[ids[k]] += w->gain;
    }
}

typedef struct {
    double rank;
    int64_t id;
} Idle;

_Static_assert(sizeof(Idle) == sizeof(Pair), "they share their room");

static int before(Idle a, Idle b) { return a.rank < b.rank || (a.rank == b.rank && a.id > b.id); }

/* Free `excess` slots of those that the token does not use. `heap` holds those to go, the last of them on top. */
static void evict(Window *w, const uint8_t *selected, int64_t excess, Idle *heap) {
    int64_t size = 0;
    for (int64_t slot = 0; slot < w->capacity; slot++) {
        const int64_t id = w->pointer[slot];
        if (id < 0 || selected[id])
            continue;
        const int64_t last = w->last_used[id];
        const Idle idle = {last > w->clock - w->window ? 1e30 * (double)last : w->worth[id], id};
        int64_t at;
        if (size < excess) {
            for (at = size++; at && before(heap[(at - 1) / 2], idle); at = (at - 1) / 2)
                heap[at] = heap[(at - 1) / 2];
        } else if (before(idle, heap[0])) {
            at = 0;
            for (int64_t child; (child = 2 * at + 1) < size; at = child) {
                if (child + 1 < size && before(heap[child], heap[child + 1]))
                    child++;
                if (!before(idle, heap[child]))
                    break;
                heap[at] = heap[child];
            }
        } else {
            continue;
        }
        heap[at] = idle;
    }
    for (int64_t k = 0; k < size; k++) {
        const int64_t slot = w->slot_of[heap[k].id];
        w->slot_of[heap[k].id] = w->pointer[slot] = -1;
        w->unused[w->free++] = slot;
    }
}

/* --- reading */

static int by_slot(const void *a, const void *b) {
    const int64_t x = ((const Pair *)a)->slot, y = ((const Pair *)b)->slot;
    return (x > y) - (x < y);
}

static int by_place(const void *a, const void *b) {
    const int64_t x = ((const Pair *)a)->at, y = ((const Pair *)b)->at;
    return (x > y) - (x < y);
}

/* Begin to read the missing neurons: neighbours on flash are one read, and one piece of it if they are in memory, too. */
static void submit(Step *s) {
    const int64_t bundle = s->bundle;
    struct iovec *part = s->parts;
    s->chunks = 0;
    for (int64_t i = 0, end; i < s->missing; i = end) {
        s->offsets[s->chunks] = s->offset + s->pairs[i].at * bundle;
        s->first[s->chunks++] = part - s->parts;
        for (end = i; end < s->missing && end - i < s->longest && s->pairs[end].at == s->pairs[i].at + end - i; end++) {
            char *address = (char *)s->job.matrix + s->pairs[end].slot * bundle;
            if (end > i && (char *)part[-1].iov_base + part[-1].iov_len == address)
                part[-1].iov_len += (size_t)bundle;
            else
                *part++ = (struct iovec){address, (size_t)bundle};
        }
        const int64_t begin = s->offsets[s->chunks - 1], stop = begin + (end - i) * bundle;
        s->nbytes += ((stop + s->unit - 1) & -s->unit) - (begin & -s->unit);
    }
    s->first[s->chunks] = part - s->parts;
    s->ticket = hf_read_start(s->reader, s->file, &(Order){s->offsets, s->first, s->parts, s->chunks, 0});
    s->failed = !s->ticket;
}

/* Wait for what was submitted, whatever happens: until then it is written to memory. */
static void settle(Step *s) { s->failed = s->failed || hf_read_wait(s->reader, s->ticket); }

/* --- the whole */

/* Neurons, who of them are there, and slots for the others. Returns 0, with nothing changed, where that is not for here. */
static int arrange(Step *s) {
    Window *w = &s->window;
    int64_t n = 0, there = 0, away = 0;
    for (int64_t id = 0; id < w->d_ff; id++)
        if (s->selected[id]) {
            if (n == s->most)
                return 0;
            const int64_t slot = w->slot_of[id];
            s->ids[n] = id;
            s->rows[n] = slot;
            if (slot < 0)
                s->away[away++] = n++;
            else
                s->there[there++] = n++;
        }
    if (n > w->capacity || (away && (!s->reader || away > s->reads)))
        return 0;
    s->used = s->job.n = n;
    s->missing = away;
    note_use(w, s->ids, n);
    if (away > w->free)
        evict(w, s->selected, away - w->free, (Idle *)s->pairs);
    w->free -= away;
    for (int64_t k = 0; k < away; k++)
        s->pairs[k].slot = w->unused[w->free + k];
    qsort(s->pairs, (size_t)away, sizeof *s->pairs, by_slot);
    for (int64_t k = 0; k < away; k++) {
        const int64_t id = s->ids[s->away[k]];
        s->rows[s->away[k]] = s->pairs[k].slot;
        s->pairs[k].at = s->place ? s->place[id] : id;
    }
    if (s->place)
        qsort(s->pairs, (size_t)away, sizeof *s->pairs, by_place);
    return 1;
}

/* The slots of missing neurons hold them now; or, after a failure, nothing. */
static void take_in(Step *s) {
    Window *w = &s->window;
    for (int64_t k = 0; k < s->missing; k++) {
        const int64_t id = s->ids[s->away[k]], slot = s->rows[s->away[k]];
        if (s->failed) {
            w->unused[w->free++] = slot;
        } else {
            w->pointer[slot] = id;
            w->slot_of[id] = slot;
        }
    }
}

/* Returns whether it is done. If not, nothing was changed, or (`failed`) the window lacks what it lacked before and some more. */
int FAST hf_step(Step *s) {
    Job *job = &s->job;
    double start = seconds();
    s->failed = 0;
    s->chunks = s->nbytes = 0;
    job->waited = 0.0;
    if (!arrange(s))
        return 0;
    s->managed = seconds() - start;
    job->rows = s->rows;
    job->ids = s->ids;
    job->which = s->there;
    job->todo = job->n - s->missing;
    job->step = s->missing ? s : NULL;
    hf_up(job);
    job->step = NULL;
    if (s->missing)
        take_in(s);
    if (s->failed)
        return 0;
    if (s->missing) {
        job->which = s->away;
        job->todo = s->missing;
        hf_up(job);
    }
    memset(job->out, 0, (size_t)job->d * sizeof(float));
    hf_down(job);
    return 1;
}
