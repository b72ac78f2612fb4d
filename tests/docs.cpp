// The documentation: its examples, its links, and that the guide names and quotes what is there.
#include "common.hpp"

#include <regex>

namespace {

namespace fs = std::filesystem;

Ran docs_check(const string& arguments) { return shell("python3 tests/docs_check.py " + arguments); }

vector<string> files_of(const string& folder, const std::set<string>& endings) {
    vector<string> files;
    for (const auto& file : fs::recursive_directory_iterator(folder))
        if (endings.count(file.path().extension())) files.push_back(file.path());
    return files;
}

vector<string> markdown_files() {
    vector<string> files = files_of("docs", {".md"});
    files.push_back("README.md");
    return files;
}

vector<string> source_files() {
    vector<string> files;
    for (const char* folder : {"docs/chapters", "docs/commands"})
        for (const string& file : files_of(folder, {".hpp", ".cu", ".cuh"})) files.push_back(file);
    for (const char* file : {"nano.cu", "model.hpp", "cache.hpp", "sampler.hpp"}) files.push_back(file);
    return files;
}

// The lines of a text, without white space at their ends.
vector<string> trimmed_lines(const string& text) {
    vector<string> lines;
    std::istringstream in(text);
    for (string line; std::getline(in, line);) lines.push_back(trim(line));
    return lines;
}

// Whether the lines of part stand in text, one behind the other.
bool stands_in(const vector<string>& part, const vector<string>& text) {
    return std::search(text.begin(), text.end(), part.begin(), part.end()) != text.end();
}

struct Markdown {
    string prose;                                        // without fenced blocks
    vector<std::pair<string, vector<string>>> blocks;    // language, trimmed lines
};

Markdown read_markdown(const string& file) {
    Markdown m;
    bool inside = false;
    std::istringstream in(read_file(file));
    for (string line; std::getline(in, line);) {
        bool fence = trim(line).starts_with("```");
        if (fence && !inside) m.blocks.push_back({trim(line).substr(3), {}});
        else if (inside && !fence) m.blocks.back().second.push_back(trim(line));
        if (!fence && !inside) m.prose += line + "\n";
        inside ^= fence;
    }
    return m;
}

vector<std::smatch> all_matches(const string& text, const char* pattern) {
    std::regex regex(pattern);
    return {std::sregex_iterator(text.begin(), text.end(), regex), {}};
}

// The anchors that GitHub gives the headings of a file.
std::set<string> anchors_of(const string& file) {
    std::set<string> anchors;
    string prose = read_markdown(file).prose;
    for (auto& heading : all_matches(prose, "(^|\n)#+ ([^\n]+)")) {
        string anchor;
        for (char c : heading.str(2))
            if (isalnum(c) || c == '_' || c == '-' || c == ' ' || c & 0x80)
                anchor += c == ' ' ? '-' : char(tolower(c));
        anchors.insert(anchor);
    }
    return anchors;
}

}  // namespace

TEST_CASE("docs: links lead somewhere") {
    int links = 0;
    for (const string& file : markdown_files()) {
        string prose = read_markdown(file).prose;
        for (auto& link : all_matches(prose, "\\]\\(([^)\\s]+)\\)")) {
            string to = link.str(1), path = to.substr(0, to.find('#'));
            if (std::regex_search(to, std::regex("^[a-z]+:"))) continue;
            links++;
            fs::path target = path.empty() ? fs::path(file) : fs::path(file).parent_path() / path;
            CHECK_MESSAGE(fs::exists(target), file, " links to ", to);
            if (to.size() > path.size() && fs::exists(target))
                CHECK_MESSAGE(anchors_of(target).count(to.substr(path.size() + 1)), file, ": ", to);
        }
    }
    CHECK(links >= 15);
}

TEST_CASE("docs: the guide quotes the sources as they are") {
    vector<vector<string>> sources;
    for (const string& file : source_files()) sources.push_back(trimmed_lines(read_file(file)));
    Markdown guide = read_markdown("docs/guide.md");
    int quotes = 0;
    for (auto& [language, lines] : guide.blocks) {
        if (language != "cpp") continue;
        quotes++;
        bool found = std::ranges::any_of(sources, [&](auto& s) { return stands_in(lines, s); });
        CHECK_MESSAGE(found, "not in the sources: ", lines.at(0));
    }
    CHECK(quotes >= 20);

    // what is quoted as text is the speed log's
    string quote;
    for (auto& line : all_matches(guide.prose, "(^|\\n)> ([^\\n]+)")) quote += line.str(2) + "\n";
    auto one_line = [](const string& text) {
        return std::regex_replace(text, std::regex("\\s+"), " ");
    };
    CHECK(quote.size() > 100);
    CHECK(one_line(read_file("docs/speed.md")).find(one_line(quote)) != string::npos);
}

TEST_CASE("docs: the guide names what is there") {
    std::set<string> words, missing;
    string all = read_file("Makefile");
    for (const string& file : source_files()) all += read_file(file);
    for (auto& word : all_matches(all, "[A-Za-z_]\\w*")) words.insert(word.str());
    int names = 0;
    string prose = read_markdown("docs/guide.md").prose;
    for (auto& code : all_matches(prose, "`([^`]+)`")) {
        if (fs::exists(code.str(1))) continue;
        string text = code.str(1);
        for (auto& word : all_matches(text, "[A-Za-z_]\\w+")) {
            names++;
            if (!words.count(word.str())) missing.insert(word.str());
        }
    }
    CHECK(names >= 100);
    for (const string& word : missing) FAIL_CHECK("docs/guide.md names ", word, ", which is nowhere");
}

TEST_CASE("docs: the guide's pictures are what would be drawn, and its page is whole"
          * doctest::skip(kSanitized)) {
    Ran r = shell("python3 docs/guide/pictures.py --check build/guide/record models/smollm2");
    CHECK_MESSAGE(r.exit == 0, r.out, r.err, "run make guide");
    TempFolder folder;
    string file = folder / "guide.html";
    r = shell("python3 docs/guide/page.py docs/guide.md " + file);
    REQUIRE_MESSAGE(r.exit == 0, r.err);
    string page = read_file(file);
    string prose = read_markdown("docs/guide.md").prose;
    CHECK(all_matches(page, "<svg ").size() == all_matches(prose, "!\\[").size());
    CHECK(all_matches(page, "<svg ").size() >= 11);
    CHECK(all_matches(page, "<(script|img|link rel=\"stylesheet)").empty());
    CHECK(all_matches(page, "<details>").size() == 10);
    r = shell("tests/browser.py check " + file);
    if (r.exit == 77 && shell(". /etc/os-release && test $ID = debian").exit != 0) {
        MESSAGE("skipped: the guide in a browser; ", r.out);
        return;
    }
    CHECK_MESSAGE(r.exit == 0, r.out, r.err);
}

TEST_CASE("docs: the examples print what they say" * doctest::skip(kSanitized)) {
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
