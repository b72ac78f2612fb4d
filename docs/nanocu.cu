// nanocu: all together. The engine (nano.cu), the chapters that make its devices fast, the commands
// of docs/commands, each of which adds itself. ./nanocu is built from this.
#define NANOCU_NO_MAIN
#include "../nano.cu"

#include "chapters/all.hpp"

#include "commands/attribute.hpp"
#include "commands/batch.hpp"
#include "commands/beam.hpp"
#include "commands/bench.hpp"
#include "commands/compress.hpp"
#include "commands/explain.hpp"
#include "commands/info.hpp"
#include "commands/pick-prompt.hpp"
#include "commands/score.hpp"
#include "commands/teacher.hpp"
#include "commands/tokenize.hpp"
#include "commands/tune.hpp"

int main(int argc, char** argv) { return run_program(argc, argv); }
