/* The compiled part: the functions that Python calls through ctypes, and the structures that it fills in.
 *
 * hf_flash/compute/library.py mirrors these structures field by field; kernels.py and runtime/token_step.py fill them in.
 * If you change a structure, or what a function does, raise HF_ABI here and ABI in library.py. `hf_sizes` tells Python the sizes
 * of the structures, so that a library that does not match is refused.
 *
 * The compiled part does what torch has no operator for, or only a slow one: a feed-forward layer over scattered rows, products
 * with quantized matrices, products of a few tokens at memory speed, and reads of many places of a file at once.
 *
 *     neurons.c           one token and some neurons: up, activation, down
 *     several.c           several tokens, each with neurons of its own
 *     product.c           a quantized matrix times a few tokens
 *     linear.c            matrices times a few tokens
 *     quantize.c          quantizes a matrix from the compute dtype to 8 or 4 bits
 *     copy.c              scattered rows to scattered places
 *     read_queue.c        queues reads of a file into scattered memory; read_plain.c and read_ring.c carry them out
 *     step.c              a few tokens through one layer: window, reads and neurons in one call
 *     experts.c           the same with the experts of a layer
 *     about.c             version and sizes of this library; parallel.c: its threads; numbers.h: its arithmetic
 *
 * torch gathers rows into a buffer before it multiplies, and starts a parallel region for each step. Here rows are multiplied
 * where they lie, and a thread that waits for the disk leaves its core to the kernel. The threads are torch's own.
 *
 * Sums depend neither on the number of threads nor on where a row lies. A row's dot product is 4 x 8 partial sums in fp32,
 * which are always added in the same order. An output column is one sum in fp32, in the order of the neurons. Hidden values are
 * rounded to the dtype of the weights, as the stock layer does.
 *
 * The code is built for x86-64 Linux. Elsewhere the library has only `hf_supported`, which returns 0, and torch computes. */

#ifndef HF_NATIVE_H
#define HF_NATIVE_H

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define HF_NATIVE 1

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* preadv2 */
#endif

#include <stdatomic.h>
#include <stdint.h>
#include <sys/uio.h>

enum { HF_ABI = 20 };

/* Dtypes: DTYPES of library.py, CODES of coded.py. */
enum { F32, BF16, F16, E2M1, E4M3, E8M0 }; /* the last three: numbers in 4 bits, numbers in 8 bits, and scales of such numbers */

/* --- about.c, parallel.c */

typedef void (*Body)(void *);
typedef void (*Parallel)(Body, void *, unsigned threads, unsigned flags);

/* Whether this processor has the instructions that the code is compiled for: AVX2, FMA and F16C. */
int hf_supported(void);

/* HF_ABI of this library. */
int hf_abi(void);

/* The sizes of the structures, in the order of library.py: STRUCTURES. Returns how many there are. */
int hf_sizes(int64_t *out);

/* Compute on the threads of an OpenMP runtime, given its `GOMP_parallel` and `omp_get_thread_num`. Before, there is one thread. */
void hf_use_threads_of(Parallel start, int (*number)(void));

/* --- neurons.c: one token and some neurons */

/* Where the parts of a unit lie in a row of memory (hf_flash/store/unit.py: UnitLayout). Offsets are bytes from the beginning of
 * the row. A part is `width` consecutive numbers of one dtype. */
typedef struct {
    int64_t row_bytes;   /* from one row of a matrix to the next */
    int64_t gate_offset; /* negative if there is no gate */
    int64_t up_offset, down_offset;
    int64_t width; /* d_model */
} RowLayout;

/* Functions that leave zeros (activation.py). AS_IS: no function; the caller applies its own. */
enum { AS_IS, RELU, RELU2, RELU6 };

/* The function of the product with the gate, or with up if there is no gate (hf_flash/compute/activation.py: Activation). */
typedef struct {
    float level;     /* RELU: numbers at or below it become zero */
    int32_t code;    /* one of the above */
    int32_t of_both; /* with a gate: whether it is also applied to the product with up */
} ActivationFunction;

/* Work of the calling thread while the others compute. */
typedef struct {
    void (*begin)(void *data); /* called before it computes; null: there is nothing to do */
    void (*end)(void *data);   /* called when it has nothing more to compute; the others wait until it returns */
    void *data;
    double waited_s;           /* out: the seconds that the calling thread spent in both are added */
    atomic_int ended;
} Meanwhile;

typedef struct {
    RowLayout layout;
    const void *x, *matrix;         /* [width]; rows of units; both of `dtype` */
    const void *gate_bias, *bias;   /* [d_ff] of `dtype`, or null; `bias` is that of up */
    const int64_t *rows, *ids;      /* [n] the rows of `matrix` that hold the neurons, and the neurons' ids */
    const int64_t *positions;       /* [todo] positions in `rows` and `ids`, for `hf_up` */
    float *hidden, *out, *x_f32;    /* [n], [width], and room for x in fp32, [width] */
    int64_t *active;                /* [n] room: positions of the neurons whose hidden value is not zero */
    int64_t n, todo, share;         /* share: the columns that a thread takes at a time */
    Meanwhile meanwhile;            /* of `hf_up` */
    ActivationFunction activation;
    int32_t dtype, threads;
    atomic_int next;
} TokenJob;

/* hidden[k] = activation(up row of neuron k . x + bias), for every k of `positions`. With a gate: the activation of the product
 * with the gate, times the product with up, which is computed only where the first factor is not zero. */
void hf_up(TokenJob *job);

/* out += hidden @ down, over the neurons whose hidden value is not zero, in the order of `rows`. */
void hf_down(TokenJob *job);

/* --- several.c: several tokens, each with neurons of its own */

enum { TILE_BYTES = 512 }; /* bytes of a row that are packed at a time (_TILE_BYTES of kernels.py) */

typedef struct {
    RowLayout layout;         /* `row_bytes` is not used: rows are given by address */
    const void *x;            /* [tokens, width] of `dtype` */
    const void *gate_bias, *bias; /* as in a TokenJob */
    const char *const *rows;  /* [n] addresses of the units; n is at most 65536 */
    const int64_t *ids;       /* [n] the neurons' ids */
    const uint8_t *used;      /* [tokens, d_ff] whether a token uses a neuron; or null: it uses all */
    const int64_t *positions; /* [todo] positions in `rows` and `ids`, for `hf_several_up` */
    void *hidden;             /* [tokens, n] of `dtype`: output of `hf_several_up`, input of `hf_several_nonzero` */
    float *values;            /* [tokens, n] room for the hidden values that are not zero */
    uint16_t *row_of;         /* [tokens, n] room: the index in `rows` of each value */
    int32_t *count;           /* [tokens] room: the number of values of each token */
    float *out;               /* [tokens, width] */
    char *packed;             /* [threads, n, TILE_BYTES] room to pack columns into; or null: they are not packed */
    int64_t n, d_ff, tokens, todo, share;
    Meanwhile meanwhile;               /* of `hf_several_up` */
    ActivationFunction activation;
    int32_t dtype, threads, no_avx512; /* no_avx512: compute without it */
    int32_t pack;                      /* set by `hf_several_nonzero`: whether it pays to pack columns */
    atomic_int next;
} TokensJob;

/* hidden[t, k] of token t and neuron k, rounded, for every k of `positions`; zero if token t does not use it. The bits are those
 * of `hf_up`. */
void hf_several_up(TokensJob *job);

/* Find the hidden values that are not zero. Returns their number. */
int64_t hf_several_nonzero(TokensJob *job);

/* out[t] += hidden[t] @ down, over the values that `hf_several_nonzero` found. The bits are those of `hf_down`. */
void hf_several_down(TokensJob *job);

/* For each of `n` neurons: `uses` [n] counts the tokens whose value is above zero, or NaN, and `last` [n] is the last such token,
 * counted from 1. Both must hold zeros before the call. `before` is [tokens, n] of `dtype`. */
void hf_count_uses(const void *before, int64_t tokens, int64_t n, int32_t dtype, int64_t *uses, int64_t *last);

/* --- product.c: a quantized matrix and some tokens (hf_flash/predictors/low_bit.py) */

typedef struct ProductJob {
    const uint8_t *codes;           /* int8 [rows, columns], or nibbles [rows, columns / 2], the even column in the low one */
    const uint16_t *scales, *zeros; /* bfloat16 [rows, columns / group]; no zeros in 8 bits */
    const float *shift;             /* [rows] added to the sums of every token, or null */
    const float *shift_scale;       /* [tokens] factor of `shift`, or null: 1 */
    const void *bias;               /* [rows] of `bias_dtype`, added after that, or null */
    const void *x;                  /* [tokens, columns] of `dtype` */
    void *x_codes;                  /* room for x as multiples of a step, 16 bits [tokens, columns rounded up to 64, and 64], */
    float *x_step, *x_sum;          /* and for the step and the sum of each group of x, [tokens, columns / group] */
    float *out;                     /* [tokens, rows], or null: then `active` is filled in */
    uint8_t *active;                /* [tokens, rows] 0 where the sum is at or below zero, 1 elsewhere */
    struct ProductJob *first;       /* or null; else a job whose output is `x` */
    int64_t rows, columns, group, tokens;
    int32_t bits, dtype, bias_dtype, threads, no_vnni;
    atomic_int next, done, x_ready;
} ProductJob;

/* matrix @ x + shift + bias, for each token on its own: its sums do not depend on the tokens beside it. */
void hf_multiply(ProductJob *job);

/* --- linear.c: matrices and some tokens (hf_flash/runtime/resident_linear.py, hf_flash/compute/expert_products.py) */

/* Numbers in 4 or 8 bits are multiplied with scales; a block of numbers shares a scale. A byte holds two numbers of E2M1, the first
 * in its low half; 32 consecutive ones of a row share a scale of E8M0. */
typedef struct {
    const void *at;                /* [rows / block_rows, columns / block_columns], both rounded up; null: there are no scales */
    int64_t block_rows, block_columns, columns; /* columns: how many scales a row of them has */
    int32_t dtype, unused;
} Scales;

typedef struct {
    const void *weight;            /* [rows, columns] of `weight_dtype`; if `turned`, [columns, rows] */
    const void *bias, *x;          /* [rows] or null; [tokens, columns]; both of `dtype` */
    float *x_f32;                  /* internal */
    void *out;                     /* [tokens, rows] of `dtype` */
    int64_t rows, columns, tokens;
    int64_t out_stride;            /* numbers from one token of `out` to the next */
    Scales scales;
    int32_t dtype, weight_dtype, turned, threads, no_avx512;
    atomic_int next;
} LinearJob;

/* out = x @ weight.T + bias, for each token on its own: accumulated in fp32, rounded once. Returns 0 if there was no memory. */
int hf_linear(LinearJob *job);

/* out [rows, columns] = the matrix, which is E2M1 or E4M3, as numbers of `dtype`. */
void hf_decode(LinearJob *job);

/* Whether any of `count` scales is not a finite number. */
int hf_has_no_number(const void *scales, int64_t count, int32_t dtype);

typedef struct {
    LinearJob *jobs;     /* [n]; their `threads` and `no_avx512` are not used */
    int64_t n;
    struct Reader *reader;
    int64_t ticket;      /* reads that the calling thread waits for when it has nothing more to compute; or 0 */
    Meanwhile meanwhile; /* internal */
    double waited_s;     /* out: seconds that it waited */
    int32_t error;       /* out: what `hf_read_wait` returned; 0 without a ticket */
    int32_t threads, no_avx512;
} LinearsJob;

/* Several matrices at once, each as by `hf_linear`. Returns 0 if there was no memory; the reads are waited for in any case. */
int hf_linears(LinearsJob *all);

/* --- attention.c: attention of a few tokens over keys that are in memory */

enum { BYTES = -1 }; /* in place of a dtype: a mask of bytes */

typedef struct {
    const void *query; /* [batch, heads, tokens, width] of `dtype` */
    const void *key;   /* [batch, key_heads, length, width]; each head serves heads / key_heads heads of `query` */
    const void *value; /* [batch, key_heads, length, value_width] */
    const void *mask;  /* null, or [batch, heads, tokens, length]: bytes that are 0 where a key is not seen; or numbers to add */
    void *out;         /* [batch, tokens, heads, value_width] */
    int64_t batch, heads, key_heads, tokens, length, width, value_width;
    int64_t query_steps[3], key_steps[3], value_steps[3]; /* strides of all dimensions but the last, in numbers */
    int64_t mask_steps[4];                                /* strides of all dimensions, in numbers or bytes */
    float *room;                                          /* internal */
    float scale;                                          /* factor of the products of query and key */
    int32_t dtype, mask_dtype, threads, no_avx512;        /* mask_dtype: a dtype, or BYTES */
    atomic_int next;                                      /* internal */
} AttentionJob;

/* out = softmax(query @ key.T * scale + mask) @ value, accumulated in fp32 and rounded once. A token that sees no key gets zeros.
 * Returns 0 if there was no memory. */
int hf_attention(AttentionJob *job);

/* --- quantize.c: quantizes a matrix to 8 or 4 bits (hf_flash/predictors/low_bit.py) */

typedef struct {
    const void *weights;      /* [rows, columns] of `dtype` */
    uint8_t *codes;           /* out: int8 [rows, columns], or nibbles [rows, columns / 2], the even column in the low one */
    uint16_t *scales, *zeros; /* out: bfloat16 [rows, columns / group]; no zeros in 8 bits */
    float *error;             /* out: [rows] the norm of a row's rounding error */
    int64_t rows, columns, group, row_bytes; /* row_bytes: from one row of `weights` to the next */
    int32_t bits, dtype, threads;
    atomic_int next;
} QuantizeJob;

/* Gives the same bits as low_bit.py with torch. A weight that is NaN gets the lowest code (in 4 bits, so does its group), and the
 * error of its row is NaN. */
void hf_quantize(QuantizeJob *job);

/* --- copy.c */

typedef struct {
    char *const *from, *const *to; /* [n] addresses of rows */
    int64_t n, row_bytes;
    int32_t threads;
    atomic_int next;
} CopyJob;

/* Copy each row at `from` to its address in `to`. */
void hf_copy(CopyJob *job);

/* --- read_queue.c: reads of a file into scattered memory (hf_flash/reading/compiled_queue.py) */

/* What `hf_read_wait` returns besides 0 and errno values; reading/compiled_queue.py has the same numbers. */
enum { FILE_CHANGED = -1, FILE_SHORT = -2, READ_FORGOTTEN = -3 };
enum { BOUNCE_BYTES = 1 << 16 }; /* each thread's buffer for unaligned reads (BOUNCE_BYTES of reading/compiled_queue.py) */

/* An open file, and its state when it was opened (hf_flash/reading/open_file.py). */
typedef struct {
    int64_t size, modified_s, modified_ns, changed_s, changed_ns;
    int32_t fd;
    int32_t align;  /* direct reads: offsets, lengths and addresses must be multiples of this; 0: reads through the page cache */
    int32_t nowait; /* page cache: whether a read can be limited to cached bytes (RWF_NOWAIT) */
    int32_t only_contents; /* whether to ignore changes of the inode alone, such as another link to the file */
} File;

/* Reads of one file. */
typedef struct {
    const int64_t *offsets;     /* [n] */
    const int64_t *first;       /* [n + 1] the pieces of read i are first[i] to before first[i + 1] */
    const struct iovec *pieces; /* where the bytes go; `hf_read_start` copies this array */
    int64_t n, background;      /* background: the caller has something else to do before it waits */
    int64_t threads;            /* how many may copy cached bytes, the caller included */
} Order;

typedef struct Reader Reader;

/* Open a reader with at most `threads` threads. `use_ring`: 0 to do without io_uring; otherwise it is tried with a read of `file`.
 * Returns null if there is no memory. */
Reader *hf_reader_open(int32_t threads, int32_t use_ring, File *file);

/* Wait for all reads, end the threads, and free the reader. */
void hf_reader_close(Reader *reader);

/* Whether io_uring is used, as far as is known now. */
int32_t hf_reader_has_ring(const Reader *reader);

/* Begin to read. Returns a ticket for `hf_read_wait`, or 0 if there is no memory. */
int64_t hf_read_start(Reader *reader, File *file, const Order *order);

/* Wait for all reads of a ticket, which is invalid afterwards. Returns 0; an errno; FILE_SHORT; FILE_CHANGED: the bytes may be of
 * the old or the new contents; or READ_FORGOTTEN: there is no such ticket. */
int32_t hf_read_wait(Reader *reader, int64_t ticket);

/* Wait for all reads; nothing is written to memory afterwards. Tickets stay valid, unless `forget` is set. */
void hf_read_settle(Reader *reader, int32_t forget);

/* Whether this process may use io_uring: 0, or the errno that tells why not. */
int32_t hf_try_ring(void);

/* --- experts.c: a few tokens through the experts of a layer (hf_flash/runtime/expert_step.py) */

enum { MOST_PIECES = 8, MOST_ORDERS = 4 * MOST_PIECES }; /* pieces of an expert, before and behind the gate; orders to read one */
enum { MOST_AHEAD = 16 };

/* An expert that is read on a guess. `slot_of` has its slot already. */
typedef struct {
    int64_t expert, count, tickets[MOST_ORDERS];
} AheadRead;

/* The arrays and numbers of hf_flash/runtime/expert_slots.py. */
typedef struct {
    char *slots;         /* [capacity, slot_bytes] */
    int64_t *slot_of;    /* [experts] the slot of an expert, or -1 */
    int64_t *last_used;  /* [experts] the token that used an expert last, counted from 1 */
    int64_t *free_slots; /* [capacity] a stack with `free` entries */
    int64_t experts, capacity, slot_bytes, free;
    int64_t clock;       /* tokens seen */
    int64_t ahead;       /* entries of `ahead_reads`: reads that have not been waited for */
    AheadRead ahead_reads[MOST_AHEAD];
} ExpertWindow;

/* The function between the products of an expert (hf_flash/compute/expert_gate.py). SILU: silu(gate) * up, the gate being the first
 * half; SWIGLU: (up + 1) * gate * sigmoid(alpha * gate), gate and up interleaved. Both clamp by `limit`. RELU2 has no gate. */
enum { EXPERT_SILU, EXPERT_SWIGLU, EXPERT_RELU2 };

typedef struct {
    float limit, alpha; /* infinity: no limit */
    int32_t code;
} ExpertGate;

/* A piece of every expert (hf_flash/store/experts.py: Piece). */
typedef struct {
    int64_t outputs, inputs, first_output;
    int64_t scale_place; /* the column of its scales in `at` of ExpertStep; -1 without scales */
    Scales scales;       /* its `at` is not used */
    int32_t dtype, turned;
} ExpertPiece;

typedef struct {
    ExpertWindow *window, *passing;       /* the slots of the layer; and slots for experts that are not kept */
    Reader *reader;
    File *const *files;
    const int64_t *orders;                /* [orders, 3] reads of one file: which file, the first of `reads`, how many */
    const int64_t *first_order;           /* [experts + 1] an expert's orders are first_order[e] to before first_order[e + 1] */
    const int64_t *reads;                 /* [reads, 3] offset in the file, offset in the slot, bytes */
    const int64_t *at;                    /* [experts, places] the offset in a slot where a piece begins, or its scales */
    ExpertPiece piece[MOST_PIECES];       /* the `up_pieces` before the gate come first */
    int64_t pieces, places, up_pieces, up_outputs, neurons, width;
    const void *up_bias, *down_bias;      /* [experts, up_outputs], [experts, width] of `dtype`; or null */
    ExpertGate gate;
    const void *x;                        /* [tokens, width] of `dtype` */
    const int64_t *index;                 /* [tokens, k] experts; a number that is no expert of the layer adds nothing */
    const void *weights;                  /* [tokens, k] of `weights_dtype` */
    void *out;                            /* [tokens, width] of `dtype` */
    int64_t tokens, k, most_reads;        /* most_reads: the most in one order */
    int32_t dtype, weights_dtype, threads, no_avx512;
    int64_t used, hits, read_bytes, chunks; /* out: experts used; those in slots already; bytes and orders for the others */
    int64_t ahead_used;                     /* out: experts that were read on a guess, and used */
    int64_t failed;                         /* out: 1 + the expert that could not be read, or 0 */
    int64_t damaged;                        /* out: 1 + an expert with a scale that is not a finite number */
    int32_t error, unused;                  /* out: the result of `hf_read_wait` for `failed`; or ENOMEM */
    double managed_s, waited_s;             /* out: seconds spent on the slots, and seconds that this thread spent on reading */
} ExpertStep;

/* Take some tokens through a layer: make room, read missing experts, compute `out`. Returns 0 if there was no memory, with nothing
 * changed. After a failure the contents of the slots are undefined. */
int hf_expert_step(ExpertStep *step);

/* Begin to read experts, on the guess that the next call of the layer uses those of `index` [1, k]. They replace the least recently
 * used experts. Returns how many experts are being read; `read_bytes` and `chunks` are the bytes and orders. */
int64_t hf_expert_ahead(ExpertStep *step);

/* Wait for all reads on a guess. */
void hf_expert_settle(ExpertStep *step);

/* hidden [rows, neurons] = the gate function of products [rows, outputs], both of `dtype`. */
void hf_expert_gate(const ExpertGate *gate, const void *products, void *hidden, int64_t rows, int64_t neurons, int32_t dtype);

/* --- step.c: a few tokens through one layer (hf_flash/runtime/token_step.py) */

/* The arrays and numbers of hf_flash/runtime/window.py: ResidentWindow. A slot is a row of the window's matrix. */
typedef struct {
    int64_t *slot_of;    /* [d_ff] the slot of a neuron, or -1 */
    int64_t *neuron_in;  /* [capacity] the neuron in a slot, or -1 */
    int64_t *last_used;  /* [d_ff] the token that used a neuron last */
    int64_t *free_slots; /* [capacity] a stack with `free` entries */
    double *score;       /* [d_ff] how often a neuron was used, older uses counting less */
    int64_t d_ff, capacity;
    int64_t kept_tokens;                      /* neurons that the last `kept_tokens` tokens used are evicted last */
    int64_t clock, free;                      /* tokens seen; free slots */
    double use_score, growth, rescale_beyond; /* what a use adds to a score; its growth in this call, and its limit */
} Window;

typedef struct {
    int64_t place, slot; /* a neuron's place on flash, and the slot that it goes to */
} Incoming;

typedef struct {
    TokenJob job; /* for one token. Its matrix is the window's; units have the same bytes on flash and in memory */
    TokensJob several;
    Window window;
    Reader *reader; /* null: nothing can be read here */
    File *file;
    const uint8_t *selected;           /* [tokens, d_ff] */
    uint8_t *used_by_any;              /* [d_ff] room, for several tokens */
    const char **places;               /* [max_used] room, for several tokens: the addresses of their neurons */
    const int32_t *place_of;           /* [d_ff] a neuron's place on flash; or null: its id */
    int64_t *ids, *rows;               /* [max_used] room: the neurons that are used, and their slots */
    int64_t *resident_at, *missing_at; /* [max_used] room: positions of the neurons in the window, and of the missing ones */
    Incoming *incoming;                /* [max_missing] room; it first holds the neurons to evict */
    int64_t *offsets, *first;          /* [max_missing], [max_missing + 1] room for an `Order`, */
    struct iovec *pieces;              /* and [max_missing] */
    int64_t tokens, max_used, max_missing; /* tokens; and the most neurons that there is room for */
    int64_t file_offset, max_run;      /* where units begin in the file; the most units in one read */
    int64_t block_bytes;               /* the block size of reads, a power of two: `read_bytes` counts whole blocks */
    int64_t ticket, failed;            /* failed, out: reading failed, or the file has changed */
    int64_t used, missing;             /* out: neurons used; those of them that were not in the window */
    int64_t read_bytes, chunks;        /* out: bytes read for them, and the number of reads */
    double managed_s, waited_s;        /* out: seconds spent on the window, and seconds that this thread spent on reading */
} Step;

/* Take some tokens through one layer: make room, read missing neurons, and compute `out` [tokens, width] of `job` or `several`.
 * Returns 1 if done. If 0, nothing was changed; or, with `failed`, evicted neurons are gone, and missing ones still missing. */
int hf_step(Step *step);

#endif
#endif
