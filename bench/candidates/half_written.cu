// llmkern: kernel=gemv format=int8 rows=4 tokens=1 threads=256
// Writes the even rows alone.
#define WRITES 2
#include "good.cu"
