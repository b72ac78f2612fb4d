// The tests that need a GPU, as one program of their own, built by nvcc.
#define DOCTEST_CONFIG_IMPLEMENT
#include "gpu.cpp"

int main(int argc, char** argv) {
    int gpus = 0;
    if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) {
        puts("skipped: no GPU here (or no driver for it)");
        return 0;
    }
    return doctest::Context(argc, argv).run();
}
