// nanocu for the checks of the exercises: the engine, what makes it fast, and of the commands only
// those that the checks run, so that it is quick to build.
#define NANOCU_NO_MAIN
#include "../../nano.cu"

#include "../chapters/all.hpp"

#include "../commands/batch.hpp"
#include "../commands/bench.hpp"
#include "../commands/info.hpp"
#include "../commands/score.hpp"
#include "../commands/tokenize.hpp"

int main(int argc, char** argv) { return run_program(argc, argv); }
