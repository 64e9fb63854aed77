/* Several tokens, each with neurons of its own. Up: a thread takes a share of the neurons, which stays in its core's cache
 * while the tokens go by. Down: a thread takes a tile of columns. */

#include "native.h"

#ifdef HF_NATIVE

#include <stddef.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

enum { SHARE = 256, GROUP = 128 }; /* neurons that stay in a cache, and tokens that go by */
enum { TILE_PARTS = 8 };           /* vectors of a token's output that registers have room for */
enum { AHEAD = 4 };                /* neurons that are fetched ahead */
enum { PACKED_USES = 4 };          /* uses of a neuron that copying its columns together is worth */

_Static_assert(TILE_PARTS * 16 * sizeof(float) <= TILE_BYTES, "a tile fits into the room for it");

static int64_t shares_of(const TokensJob *job) { return (job->n + job->share - 1) / job->share; }

/* What `up` left in shares becomes one list for each token. Returns how long they are in all. */
static int64_t join(const TokensJob *job) {
    const int64_t shares = shares_of(job);
    int64_t all = 0;
    for (int64_t t = 0; t < job->tokens; t++) {
        float *hidden = job->hidden + t * job->n;
        uint16_t *row_of = job->row_of + t * job->n;
        int32_t *count = job->count + t * shares;
        for (int64_t share = 1; share < shares; share++) {
            memmove(hidden + count[0], hidden + share * job->share, (size_t)count[share] * sizeof *hidden);
            memmove(row_of + count[0], row_of + share * job->share, (size_t)count[share] * sizeof *row_of);
            count[0] += count[share];
        }
        all += count[0];
    }
    return all;
}

#define LANES 8
#include "several_width.h"
#undef LANES

#define LANES 16
#include "several_width.h"
#undef LANES

void FAST hf_several(TokensJob *job) {
    if (!job->n)
        return;
    const int avx512 = !job->no_avx512 && has_avx512();
    const int64_t fair = job->n / (4 * job->threads); /* with few tokens, all threads should have something to do */
    job->share = job->tokens > GROUP || fair > SHARE ? SHARE : fair < UP_ROWS ? UP_ROWS : fair;
    atomic_store(&job->next, 0);
    run_on_threads(avx512 ? several_up_of_16 : several_up_of_8, job, job->threads);
    job->pack = join(job) >= PACKED_USES * job->n;
    atomic_store(&job->next, 0);
    run_on_threads(avx512 ? several_down_of_16 : several_down_of_8, job, job->threads);
}

#endif
