// llmkern: kernel=gemv format=int8 rows=4 tokens=1 threads=256
// Reads every other kilobyte of a row: twice as fast, and wrong.
#define STEP 2048
#include "good.cu"
