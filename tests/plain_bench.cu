// The engine of the four files and `bench`, without the chapters: how fast what is read in class is.
// make plain-bench builds it, build/plain-gpu/bench where nvcc is, else build/plain/bench.
#define NANOCU_NO_MAIN
#include "../nano.cu"

#include "../docs/commands/bench.hpp"

int main(int argc, char** argv) { return run_program(argc, argv); }
