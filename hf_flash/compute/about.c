/* Whether this library can be used on this processor, and whether it matches the Python code. */

#include "native.h"

#ifdef HF_NATIVE

#include <string.h>

int hf_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

int hf_abi(void) { return HF_ABI; }

int hf_sizes(int64_t *out) {
    const int64_t sizes[] = {
        sizeof(RowLayout), sizeof(TokenJob), sizeof(TokensJob), sizeof(ProductJob), sizeof(LinearJob), sizeof(CopyJob),
        sizeof(File),      sizeof(Order),    sizeof(Window),    sizeof(Step),       sizeof(QuantizeJob), sizeof(LinearsJob),
        sizeof(ExpertWindow), sizeof(ExpertGate), sizeof(ExpertPiece), sizeof(ExpertStep), sizeof(AttentionJob),
    };
    memcpy(out, sizes, sizeof sizes);
    return sizeof sizes / sizeof *sizes;
}

#else

int hf_supported(void) { return 0; }

#endif
