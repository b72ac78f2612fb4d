// All tests, one translation unit as the engine itself: build/tests -tc="*sampler*" runs some of them.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "cache.cpp"
#include "sampler.cpp"
#include "tokenizer.cpp"
#include "text.cpp"
#include "loader.cpp"
#include "model.cpp"
#include "engine.cpp"
#include "commands.cpp"
#include "batch.cpp"
#include "explain.cpp"
#include "docs.cpp"
#include "exercises.cpp"
