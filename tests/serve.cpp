// `nanocu serve`, by clients of every kind: tests/serve.py, with the PyPI package openai.
#include "common.hpp"

namespace {

void check_serve(const string& name) {
    Ran r = shell("NANOCU=" + binary() + " build/openai/bin/python tests/serve.py " + name);
    CAPTURE(r.err);
    CHECK(r.exit == 0);
}

}  // namespace

TEST_CASE("serve: 64 clients streaming at once get what batch and generate give, to the bit") {
    check_serve("many");
}
TEST_CASE("serve: OpenAI's own client works as it is") { check_serve("client"); }
TEST_CASE("serve: what is wrong, too large or too long is refused in OpenAI's form") {
    check_serve("wrong");
}
TEST_CASE("serve: a client that hangs up frees its blocks") { check_serve("gone"); }
TEST_CASE("serve: clients that do not read, half-open connections, random bytes leave it serving") {
    check_serve("attack");
}
TEST_CASE("serve: listens at this machine's own address only, and says why it cannot") {
    check_serve("listen");
}
