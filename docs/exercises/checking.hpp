// What the checks in C++ share: the engine itself, and saying what was expected.
#pragma once
#define NANOCU_NO_MAIN
#include "../../nano.cu"

inline int failures = 0;

// Says whether ok, and if not, what was wanted and what came instead.
bool expect(const string& what, bool ok, const auto& wanted, const auto& came) {
    std::cout << (ok ? "  ok    " : "  wrong ") << what << std::endl;
    if (!ok) std::cout << "          expected: " << wanted << "\n          came:     " << came << std::endl;
    failures += !ok;
    return ok;
}

inline int done() {
    std::cout << (failures ? str("FAIL: ", failures, " of what was expected did not come\n") : "PASS\n");
    return failures > 0;
}
