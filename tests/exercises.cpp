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
    for (const char* file : {"Makefile", "nano.cu", "model.hpp", "cache.hpp", "sampler.hpp", "docs/nanocu.cu"}) {
        fs::copy_file(file, to + "/" + file, fs::copy_options::overwrite_existing);
        fs::last_write_time(to + "/" + file, fs::last_write_time(file));
    }
    for (const char* folder : {"docs/chapters", "docs/commands", "docs/exercises"}) {
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


// All text that names may come from: sources, tests, scripts.
std::string all_sources() {
    std::string all;
    for (const char* file : {"nano.cu", "model.hpp", "cache.hpp", "sampler.hpp", "Makefile"})
        all += read_file(file);
    for (const char* folder : {"docs/chapters", "docs/commands", "tests"})
        for (const auto& entry : fs::directory_iterator(folder))
            if (entry.is_regular_file() && entry.path() != "tests/exercises.cpp") all += read_file(entry.path());
    return all;
}

// What stands in backticks outside of code blocks, its line breaks as spaces.
std::vector<std::string> quoted(const std::string& markdown) {
    std::vector<std::string> out;
    std::string text;
    std::istringstream lines(markdown);
    bool block = false;
    for (std::string line; std::getline(lines, line);) {
        if (line.starts_with("```")) block = !block;
        else if (!block && !line.starts_with("    ")) text += line + " ";
    }
    for (size_t begin, end = 0; (begin = text.find('`', end)) != text.npos; end++) {
        end = text.find('`', begin + 1);
        REQUIRE(end != text.npos);
        out.push_back(text.substr(begin + 1, end - begin - 1));
    }
    return out;
}

// The parts of a::b, each of which must be a word of the sources; else the whole.
std::vector<std::string> parts_of(const std::string& name) {
    std::vector<std::string> parts;
    if (name.find_first_of(" .") != name.npos) return {name};
    for (size_t begin = 0, end = 0; end < name.size(); begin = end + 2) {
        end = std::min(name.find("::", begin), name.size());
        parts.push_back(name.substr(begin, end - begin));
    }
    return parts;
}

}  // namespace

TEST_CASE("exercise 1, candidates: the check fails, and passes with the solution") {
    check_both("1-candidates", "--candidates: no such flag;");
}

TEST_CASE("exercise 2, no-repeat n-grams: the check fails, and passes with the solution") {
    check_both("2-no-repeat-ngram", "--no-repeat-ngram: no such flag;");
}

TEST_CASE("exercise 3, block size: the check fails, and passes with the solution") {
    check_both("3-block-size", "no room for a block");
}

TEST_CASE("exercise 4, eviction: the check fails, and passes with the solution") {
    check_both("4-eviction", "no such constructor");
}

TEST_CASE("exercise 5, RoPE scaling: the check fails, and passes with the solution") {
    check_both("5-rope-scaling", "rope type yarn is not supported");
}

TEST_CASE("exercise 6, prompt lookup: the check fails, and passes with the solution") {
    check_both("6-prompt-lookup", "no such member");
}

TEST_CASE("exercise 7, int8 weights: the check fails, and passes with the solution") {
    check_both("7-int8-weights", "no such constructor");
}

TEST_CASE("exercise 8, sliding window: the check fails, and passes with the solution") {
    check_both("8-sliding-window", "sliding_window 24 is not supported");
}

TEST_CASE("what docs/easy-to-get-wrong.md and docs/models.md name is there") {
    std::string all = all_sources();
    int names = 0, tests = 0;
    for (const char* file : {"docs/easy-to-get-wrong.md", "docs/models.md"})
        for (const std::string& name : quoted(read_file(file))) {
            CAPTURE(file);
            CAPTURE(name);
            names++;
            if (fs::exists(name)) continue;
            bool sentence = std::ranges::count(name, ' ') > 2;  // the name of a test
            tests += sentence;
            if (sentence) CHECK(all.find("TEST_CASE(\"" + name + "\")") != all.npos);
            else for (const std::string& part : parts_of(name)) CHECK(all.find(part) != all.npos);
        }
    CHECK(names > 100);
    CHECK(tests > 25);
}

TEST_CASE("the diff of docs/models.md is that of today's sources") {
    std::string diff;
    std::istringstream lines(read_file("docs/models.md"));
    bool inside = false;
    for (std::string line; std::getline(lines, line);) {
        if (line.starts_with("```")) inside = line == "```diff";
        else if (inside) diff += line + "\n";
    }
    TempFolder folder;
    folder.write("bias.diff", diff);
    for (const char* file : {"nano.cu", "model.hpp"}) folder.write(file, read_file(file));
    Ran back = shell("cd " + folder.path + " && patch -R -p1 -f <bias.diff");
    CAPTURE(back.out);
    CHECK(back.exit == 0);
    std::string model = read_file(folder / "model.hpp");
    CHECK(model.find("qwen2") == model.npos);
    CHECK(model.find(".bias\"") == model.npos);
}
