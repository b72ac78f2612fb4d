// The exercises of docs/exercises: each check fails on these sources, because what it asks for is not
// there, and passes with the solution's patch. Both run on copies of the tree, under build/.
#include "common.hpp"

#include <future>

namespace {

namespace fs = std::filesystem;

// Copies what the checks need to build/exercises/NAME. What is there stays if it is the same, so that
// make builds again only what is old.
std::string copy_tree(const std::string& name) {
    std::string to = "build/exercises/" + name;
    fs::remove_all(to + "/docs");
    fs::create_directories(to + "/docs");
    for (const char* file : {"Makefile", "nano.cu", "model.hpp", "cache.hpp", "sampler.hpp"}) {
        fs::copy_file(file, to + "/" + file, fs::copy_options::overwrite_existing);
        fs::last_write_time(to + "/" + file, fs::last_write_time(file));
    }
    for (const char* folder : {"docs/forks", "docs/exercises"}) {
        fs::copy(folder, to + "/" + folder, fs::copy_options::recursive);
        for (const auto& entry : fs::recursive_directory_iterator(folder))
            fs::last_write_time(to + "/" + entry.path().string(), entry.last_write_time());
    }
    for (const char* link : {"models", "tests"})
        if (!fs::exists(to + "/" + link)) fs::create_directory_symlink(fs::absolute(link), to + "/" + link);
    return to;
}

// The exercise's check on a copy of the tree, with the solution or without it.
Ran check_exercise(const std::string& name, bool solved) {
    std::string folder = copy_tree(solved ? name : "unsolved"), number = name.substr(0, 1);
    std::string patch = "docs/exercises/" + name + "/solution.patch";
    if (solved) {
        Ran patched = shell("cd " + folder + " && patch -p1 -s -f --no-backup-if-mismatch <" + patch);
        if (patched.exit) return {-1, "the patch does not apply: " + patched.out, ""};
    }
    return shell("cd " + folder + " && docs/exercises/check " + number);
}

// reason: what the check says of the unsolved tree.
void check_both(const std::string& name, const std::string& reason) {
    auto unsolved = std::async(std::launch::async, [&] { return check_exercise(name, false); });
    Ran solved = check_exercise(name, true), before = unsolved.get();
    CAPTURE(before.out);
    CAPTURE(before.err);
    CHECK(before.exit == 1);
    CHECK(before.out.find("\nFAIL: 1 of what was expected did not come\n") != std::string::npos);
    CHECK(before.out.find(reason) != std::string::npos);
    CAPTURE(solved.out);
    CAPTURE(solved.err);
    CHECK(solved.exit == 0);
    CHECK(solved.out.ends_with("\nPASS\n"));
    CHECK(solved.out.find("  wrong ") == std::string::npos);
}

}  // namespace

TEST_CASE("exercise 1, candidates: the check fails, and passes with the solution") {
    check_both("1-candidates", "not expected: 10 --candidates;");
}
