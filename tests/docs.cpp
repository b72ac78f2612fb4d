// The documentation: its examples, its links, and that the guide names what is there.
#include "common.hpp"

namespace {

Ran docs_check(const string& arguments) { return shell("python3 tests/docs_check.py " + arguments); }

}  // namespace

TEST_CASE("docs: the examples print what they say") {
    Ran r = docs_check("");
    CHECK_MESSAGE(r.exit == 0, r.out, r.err);
    CHECK(r.out.ends_with(" examples, 0 differ\n"));
    CHECK(!r.out.starts_with("0 "));
}

TEST_CASE("docs: an example that prints something else is told, and updated") {
    TempFolder folder;
    string file = folder / "a.md";
    auto check = [&](const string& text, const string& flags = "") {
        folder.write("a.md", text);
        return docs_check(flags + " " + file);
    };
    auto block = [](const string& text) { return "# A\n\n```console\n" + text + "```\n"; };

    CHECK(check(block("$ X=1\n$ echo $X > $TMP/f; cat $TMP/f\n1\n")).exit == 0);
    CHECK(check(block("$ seq 9\n1\n...\n8\n...\n")).exit == 0);
    CHECK(check(block("$ echo 12 tokens in 3 s\n12 ... in ... s\n")).exit == 0);
    CHECK(check(block("$ cat <<E\n> a\n> E\na\n$ echo \\\n> b\nb\n")).exit == 0);
    CHECK(check("```\n$ false\nx\n```\n").out == "0 examples, 0 differ\n");

    Ran r = check(block("$ echo a\na\n$ seq 3\n1\n3\n"));
    CHECK(r.exit == 1);
    CHECK(r.out == file + ":6: $ seq 3\n    1\n  + 2\n    3\n2 examples, 1 differ\n");
    CHECK(check(block("$ echo a >&2\n")).exit == 1);
    CHECK(check(block("$ true\na\n")).exit == 1);
    CHECK(check(block("$ seq 9\n...\n8\n")).exit == 1);
    r = check(block("$ test -e $TMP/none\n"));
    CHECK(r.exit == 1);
    CHECK(r.out.find("printed nothing and ended with status 1") != string::npos);
    r = check(block("$ sleep 9\n$ echo a\na\n"), "--limit 0.2");
    CHECK(r.exit == 1);
    CHECK(r.out.find("did not come to its end") != string::npos);
    CHECK(r.out.ends_with("2 examples, 2 differ\n"));

    r = check(block("$ seq 3; echo 5 of ten\n1\n4\n5 of ...\n\n$ echo 1 of 9\n2 of ...\n"), "--update");
    CHECK(r.exit == 0);
    CHECK(read_file(file) == block("$ seq 3; echo 5 of ten\n1\n2\n3\n5 of ...\n\n$ echo 1 of 9\n1 of ...\n"));
    CHECK(docs_check(file).exit == 0);

    r = check("```console\na\n```\n");
    CHECK(r.exit == 1);
    CHECK(r.err == "docs_check: " + file + ":2: output before the first command ($ ...)\n");
    CHECK(check("```console\n$ true\n").err == "docs_check: " + file + ":1: this block has no end\n");
}
