// The binary as a user runs it: what it prints where, its exit codes, and what it says of mistakes.
#include "common.hpp"

#include <regex>

namespace fs = std::filesystem;

namespace {

const string kLlama = kData + "models/llama3";  // has no tokenizer
// Most runs take one thread: two would wait for each other where something else is running too.
const string kOne = kDemo + " --threads 1 -t 0 ";
const string kPrompt =
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
const string kAsk = "generate " + kOne + "-p '" + kPrompt + "' ";
const string kAnswer = "The capital of France is Paris.";

vector<string> lines_of(const string& text) {
    std::istringstream in(text);
    vector<string> lines;
    for (string line; std::getline(in, line);) lines.push_back(line);
    return lines;
}

// The figures of a closing line on stderr.
struct Closing {
    int prompt, cached, tokens;
};

vector<Closing> closing_lines(const string& err) {
    static const std::regex figures(
        R"((\d+) prompt tokens \((\d+) from cache\), (\d+) new tokens, .*first token after)");
    vector<Closing> all;
    for (std::sregex_iterator i(err.begin(), err.end(), figures), end; i != end; ++i)
        all.push_back({std::stoi((*i)[1]), std::stoi((*i)[2]), std::stoi((*i)[3])});
    return all;
}

// One line on stderr that says what, nothing on stdout, exit 1, and no waiting for it.
void check_refused(const string& arguments, const string& says) {
    Ran r = shell("timeout 60 " + binary() + " " + arguments + " </dev/null");
    string error = r.err.substr(0, 400);
    CAPTURE(arguments);
    CAPTURE(error);
    CHECK(r.exit == 1);
    CHECK(r.out == "");
    CHECK(r.err.starts_with("nanocu: "));
    CHECK(r.err.find('\n') == r.err.size() - 1);
    CHECK(r.err.size() < 400);
    CHECK(r.err.find(says) != string::npos);
}

// What it prints as JSON, an object a line.
vector<json> json_lines(const string& arguments) {
    Ran r = nanocu(arguments + " --json");
    CAPTURE(arguments);
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    vector<json> all;
    for (const string& line : lines_of(r.out)) all.push_back(json::parse(line));
    return all;
}

string keys(const json& j) {
    string all;
    for (const auto& [key, value] : j.items()) all += key + " ";
    return all;
}

const Tokenizer& demo_tokenizer() {
    static const Tokenizer t(kDemo);
    return t;
}

// A chat whose user types this.
Ran talk(const string& flags, const string& typed) {
    TempFolder folder;
    folder.write("typed", typed);
    return nanocu("chat " + kOne + flags + " <" + (folder / "typed"));
}

}  // namespace

TEST_CASE("help and version are no mistakes") {
    for (string arguments : {"--help", "generate --help", "chat --help", "score --help",
                             "tokenize --help", "bench --help", "info --help", "--version"}) {
        Ran r = nanocu(arguments);
        CHECK(r.exit == 0);
        CHECK(r.out.size() > 1);
        CHECK(r.err == "");
    }
}

TEST_CASE("--help names every flag with its value and default; what is unknown, the nearest there is") {
    string all = nanocu("--help").out;
    for (const char* name : {"chat", "generate", "batch", "bench", "beam", "explain", "tune"}) {
        CAPTURE(name);
        CHECK(all.find(str("\n  ", name, " ")) != string::npos);
        string help = nanocu(str(name, " --help")).out;
        for (const char* noise : {"{", "[1", "INT", "UINT", "FLOAT", ":FILE"})
            CHECK(help.find(noise) == string::npos);
        for (const string& line : lines_of(help)) CHECK(line.size() <= 100);
    }
    CHECK(all.find("\n  serve ") != string::npos);  // stands beside
    string help = nanocu("generate --help").out;
    for (const char* part : {"\nengine:\n", "\nwhat is drawn:\n", "  -n,--max-tokens N   ",
                             "sequences at a time; else 64, on a GPU 256", "  --no-prefix-cache  "})
        CHECK(help.find(part) != string::npos);
    check_refused("generat", "generat: no such command; the nearest is generate;");
    check_refused("serv", "the nearest is serve;");
    check_refused("generate " + kLlama + " --temp 1", "--temp: no such flag; the nearest is --temperature;");
    check_refused("generate --thread=3 " + kLlama, "--thread: no such flag; the nearest is --threads;");
    check_refused("bench " + kLlama + " --max-row 3", "the nearest is --max-rows;");
    check_refused("generate " + kLlama + " --ids 1 --without nothing", "--without nothing: not known");
    CHECK(nanocu("generate " + kLlama + " --ids 1 -n 1 --without all").exit == 0);
}

TEST_CASE("a name that is no command starts the program nanocu-NAME beside the binary") {
    TempFolder folder;
    fs::copy_file(binary(), folder / "nanocu");
    folder.write("nanocu-greet", "#!/bin/sh\necho \"$# $1 $2\"; exit 7\n");
    fs::permissions(folder / "nanocu-greet", fs::perms(0755));
    Ran r = shell(folder / "nanocu" + " greet you 'and me'");
    CHECK(r.exit == 7);
    CHECK(r.out == "2 you and me\n");
    CHECK(shell(folder / "nanocu" + " --help").out.find("\n  greet ") != string::npos);
    r = shell(folder / "nanocu" + " serve");
    CHECK(r.exit == 1);
    CHECK(r.err.starts_with("nanocu: serve: no such command"));
}

TEST_CASE("the four files and the Makefile alone build an engine that answers as it should") {
    fs::create_directories("build/alone");
    for (const char* file : {"Makefile", "nano.cu", "model.hpp", "cache.hpp", "sampler.hpp"}) {
        fs::copy_file(file, str("build/alone/", file), fs::copy_options::overwrite_existing);
        fs::last_write_time(str("build/alone/", file), fs::last_write_time(file));
    }
    Ran r = shell("make -s -C build/alone plain NVCC=");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    CHECK(r.err == "");
    const string plain = "build/alone/build/plain/nanocu ";
    CHECK(shell(plain + "chat " + kOne + "-p 'What is the capital of France?'").out == kAnswer + "\n");
    CHECK(shell(plain + "score").err.starts_with("nanocu: score: no such command"));
    for (const string& name : kTiny)
        for (const json& one : golden("models/" + name + "/golden.json")) {
            string ids = one["prompt"].dump();
            r = shell(str(plain, "generate ", kData, "models/", name, " -t 0 --ignore-eos --json -n ",
                          one["greedy"].size(), " --ids ", ids.substr(1, ids.size() - 2)));
            CAPTURE(r.err);
            REQUIRE(r.exit == 0);
            vector<int> got = json::parse(r.out)["ids"];
            for (size_t i = 0; i < got.size() && one["margin"][i] >= 0.001; i++)
                CHECK(got[i] == one["greedy"][i].get<int>());
        }
}

TEST_CASE("chat at a terminal: keys edit the line, /help, Ctrl-C, nothing but answers on stdout") {
    Ran r = shell("NANOCU=" + binary() + " python3 tests/terminal.py");
    CAPTURE(r.err);
    CHECK(r.exit == 0);
}

TEST_CASE("make install copies what was built" * doctest::skip(kSanitized)) {
    TempFolder folder;
    Ran r = shell("make -s -o nanocu install PREFIX=/usr DESTDIR=" + fs::absolute(folder.path).string());
    CAPTURE(r.err);
    CHECK(r.exit == 0);
    CHECK(shell(folder / "usr/bin/nanocu" + " --version").out == "nanocu 0.1\n");
    CHECK(fs::exists(folder / "usr/bin/nanocu-serve"));
}

TEST_CASE("a wrong command line is one line on stderr, nothing on stdout, exit 1") {
    const vector<std::pair<string, string>> flags = {{"--loud", "--loud"},
                                                     {"extra", "extra"},
                                                     {"-t -1", "temperature"},
                                                     {"-t nan", "temperature"},
                                                     {"--top-p 2", "top-p"},
                                                     {"--top-p 0", "top-p"},
                                                     {"--min-p 2", "min-p"},
                                                     {"--min-p -0.1", "min-p"},
                                                     {"--top-k -1", "top-k"},
                                                     {"--repetition-penalty 0", "repetition"},
                                                     {"--presence-penalty 1000", "presence"},
                                                     {"--frequency-penalty nan", "frequency"},
                                                     {"-n -5", "max-tokens"},
                                                     {"-n abc", "max-tokens"},
                                                     {"-n 99999999999", "max-tokens"},
                                                     {"--samples 0", "samples"},
                                                     {"--samples -3", "samples"},
                                                     {"--seed x", "seed"},
                                                     {"--threads -1", "threads"},
                                                     {"--threads 100000", "threads"},
                                                     {"--chunk 0", "chunk"},
                                                     {"--max-rows 0", "max-rows"},
                                                     {"--max-context -1", "max-context"},
                                                     {"--kv-memory much", "kv-memory"},
                                                     {"--kv-memory -4", "kv-memory"},
                                                     {"--kv-memory 1E", "kv-memory"},
                                                     {"--device cuda", "cuda"},
                                                     {"--device tpu", "device"},
                                                     {"--load-format gguf", "load-format"},
                                                     {"--logprobs 2", "--json"},
                                                     {"--logprobs -2 --json", "logprobs"},
                                                     {"--stop ''", "--stop"}};
    for (const auto& [flag, says] : flags)
        check_refused("generate " + kLlama + " --ids 1,2 " + flag, says);
    for (string command : {"generate", "chat", "score", "tokenize", "info", "bench"}) {
        check_refused(command, "MODEL");
        check_refused(command + " build/nowhere", "build/nowhere");
    }
    check_refused("", "no command; chat, generate");
    check_refused("sing", "");
    check_refused("info build", "config.json");
    check_refused("chat build/nowhere -p hi", "no such folder");
    check_refused("bench " + kLlama + " --pp 0", "pp");
    check_refused("bench " + kLlama + " --json --pp 5000", "context");
    check_refused("bench " + kLlama + " --rows 100", "--max-rows");
    check_refused("bench " + kLlama + " --rows 64 --depth 200 --kv-memory 1M", "--kv-memory");
    check_refused("bench " + kLlama + " -t -1", "temperature");
    check_refused("bench " + kLlama + " --chapters --tg 1,2", "--chapters");
}

TEST_CASE("a prompt that cannot be computed is refused with what is wrong with it") {
    TempFolder folder;
    folder.write("bad", "caf\xC3\xA9 caf\xE9 au lait");
    const string bad = folder / "bad", demo = " " + kDemo + " ";
    const string ids = "generate " + kLlama + " --ids=", chat = "chat" + demo;
    const string tokenize = "tokenize" + demo, decode = tokenize + "--decode -p ";
    const vector<std::pair<string, string>> cases = {
        {ids + "1,x", "--ids"},
        {ids + "1,,2", "--ids"},
        {ids + "1.5", "--ids"},
        {ids + "true", "--ids"},
        {ids + "' '", "prompt"},
        {ids + "99999", "99999"},
        {ids + "1,512", "512"},
        {ids + "-1", "-1"},
        {ids + "4294967297", ""},  // cut to 32 bits it would be 1
        {"score " + kLlama + " --ids 7,512", "512"},
        {"generate " + kLlama + " -p hello", "tokenizer.json"},
        {"generate" + demo, "prompt"},  // stdin is empty
        {"generate" + demo + "-p ''", "prompt"},
        {"score" + demo + "-p ''", "prompt"},
        {chat + "-p ''", "prompt"},
        {"generate" + demo + "-f build/nowhere", "build/nowhere"},
        {"generate" + demo + "-f build", "build"},
        {"generate" + demo + "-f " + bad, "byte 9"},
        {"score" + demo + "-f " + bad, "byte 9"},
        {tokenize + "-f " + bad, "byte 9"},
        {chat + "-p \"$(cat " + bad + ")\"", "byte 9"},
        {chat + "-p hi --system \"$(cat " + bad + ")\"", "byte 9"},
        {chat + "--system hi -p \"$(cat " + bad + ")\"", "byte 9"},
        {decode + "'[1, 2'", ""},
        {decode + "'{}'", ""},
        {decode + "'[\"a\"]'", ""},
        {decode + "'[4294967297]'", ""},
        {tokenize + "--chat -p '[{\"role\": \"user\"}]'", "content"},
        {tokenize + "--chat -p '[]'", "chat"},
        {tokenize + "--jsonl -p '\"good\"\n\"bad'", ""}};
    for (const auto& [arguments, says] : cases) check_refused(arguments, says);
    Ran typed = nanocu("chat " + kOne + " <" + bad);
    CAPTURE(typed.err);
    CHECK(typed.exit == 1);
    CHECK(typed.err.find("byte 9") != string::npos);
}

TEST_CASE("a request that does not fit is refused at once, with the sizes") {
    const string eight = kLlama + " --ids 1,2,3,4,5,6,7,8 ";
    check_refused("generate " + eight + "--max-context 8", "8 tokens");
    check_refused("generate " + eight + "--kv-memory 4K", "24576");  // bytes of a block
    check_refused("generate " + eight + "-n 17 --kv-memory 24K", "8 tokens and 17");
    check_refused("score " + eight + "--max-context 7", "8 tokens");
    for (string fits : {"generate " + eight + "--max-context 9",
                        "generate " + eight + "-n 9 --kv-memory 24K",
                        "score " + eight + "--max-context 8",
                        "score " + eight + "--kv-memory 24K"}) {
        CAPTURE(fits);
        CHECK(nanocu(fits).exit == 0);
    }
    TempFolder folder;
    string page = read_file(kData + "smollm2/perplexity.txt"), text;
    while (text.size() < 10'000'000) text += page;
    folder.write("long", text);
    check_refused("generate " + kDemo + " -f " + (folder / "long"), "8192");
}

TEST_CASE("output that cannot be written is an error") {
    for (string arguments : {kAsk, kAsk + "--json", kAsk + "--samples 2", "info " + kLlama,
                             "score " + kLlama + " --ids 1,2", "tokenize " + kDemo + " -p Hello",
                             "chat " + kOne + "-p Hello -n 5"}) {
        Ran r = nanocu(arguments + " >/dev/full");
        CAPTURE(arguments);
        CHECK(r.exit == 1);
        CHECK(r.err.find("nanocu: stdout: No space left on device") != string::npos);
    }
}

TEST_CASE("generate puts the continuation on stdout, and one line of figures on stderr") {
    Ran r = nanocu(kAsk);
    CHECK(r.exit == 0);
    CHECK(r.out == kAnswer + "\n");
    CHECK(r.err.find("nanocu:") == string::npos);
    REQUIRE(closing_lines(r.err).size() == 1);
    CHECK(closing_lines(r.err)[0].cached == 0);
    CHECK(closing_lines(r.err)[0].tokens == 8);
    TempFolder folder;
    folder.write("prompt", kPrompt);
    CHECK(nanocu("generate " + kOne + "-f " + (folder / "prompt")).out == kAnswer + "\n");
    CHECK(nanocu("generate " + kOne + "<" + (folder / "prompt")).out == kAnswer + "\n");
    CHECK(nanocu("generate " + kDemo + " -t 0 <" + (folder / "prompt")).out == kAnswer + "\n");
    CHECK(nanocu(kAsk + "-n 3").out == "The capital of\n");
    r = nanocu(kAsk + "--chunk 5 --no-prefix-cache --verbose");
    CHECK(r.out == kAnswer + "\n");
    CHECK(r.err.find("threads") != string::npos);
    r = nanocu(kAsk + "-n 12 --ignore-eos");
    CHECK(r.out.starts_with(kAnswer));
    CHECK(closing_lines(r.err)[0].tokens == 12);
}

TEST_CASE("generate --json has text, ids with the ending eos, why it ended, and what it used") {
    vector<json> all = json_lines(kAsk + "--seed 5");
    REQUIRE(all.size() == 1);
    const json out = all[0], usage = out["usage"];
    CHECK(keys(out) == "finish_reason ids index seed text usage ");
    CHECK(keys(usage) == "cached_tokens completion_tokens prompt_tokens ");
    vector<int> ids = out["ids"];
    CHECK(out["index"] == 0);
    CHECK(out["text"] == kAnswer);
    CHECK(demo_tokenizer().decode(ids) == kAnswer + "<|im_end|>");
    CHECK(out["finish_reason"] == "stop");
    CHECK(out["seed"] == 5);
    CHECK(usage["prompt_tokens"] == demo_tokenizer().encode(kPrompt).size());
    CHECK(usage["completion_tokens"] == ids.size());
    CHECK(usage["cached_tokens"] == 0);
    json cut = json_lines(kAsk + "-n 3")[0];
    CHECK(cut["finish_reason"] == "length");
    CHECK(cut["ids"] == vector<int>(ids.begin(), ids.begin() + 3));
    json tiny = json_lines("generate " + kLlama + " --ids 1,2,3 -n 4")[0];
    CHECK(tiny["text"] == nullptr);  // no tokenizer
    CHECK(tiny["ids"].size() == 4);
    CHECK(tiny["usage"]["prompt_tokens"] == 3);
}

TEST_CASE("samples have numbers and differ; a seed draws them again") {
    const string three = "generate " + kDemo +
        " --threads 1 -p 'Once upon a time' -t 1.5 -n 8 --samples 3 --seed ";
    vector<json> out = json_lines(three + "7");
    REQUIRE(out.size() == 3);
    string expected;
    std::set<string> texts;
    for (int i = 0; i < 3; i++) {
        CHECK(out[i]["index"] == i);
        texts.insert(out[i]["text"]);
        expected += str("--- sample ", i, "\n", out[i]["text"].get<string>(), "\n");
    }
    CHECK(texts.size() == 3);
    CHECK(nanocu(three + "7").out == expected);
    CHECK(nanocu(three + "7 --chunk 2 --max-rows 2").out == expected);
    CHECK(nanocu(three + "8").out != expected);
    // without --seed another one each time, which --json tells
    const string any = "generate " + kLlama + " --ids 1 -t 2 -n 8";
    json first = json_lines(any)[0], second = json_lines(any)[0];
    CHECK(first["seed"] != second["seed"]);
    CHECK(json_lines(any + " --seed " + first["seed"].dump())[0]["ids"] == first["ids"]);
}

TEST_CASE("a stop string ends the text before it") {
    CHECK(nanocu(kAsk + "--stop Paris").out == "The capital of France is \n");
    CHECK(nanocu(kAsk + "--stop 'is P' --stop ital").out == "The cap\n");
    CHECK(nanocu(kAsk + "--stop London").out == kAnswer + "\n");
    CHECK(nanocu("generate --stop is " + kAsk.substr(9)).out == "The capital of France \n");
    json out = json_lines(kAsk + "--stop France")[0];
    CHECK(out["text"] == "The capital of ");
    CHECK(out["finish_reason"] == "stop");
    CHECK(out["ids"].size() == 4);
}

TEST_CASE("--logprobs K gives the chosen id and the K likeliest for each token") {
    json out = json_lines(kAsk + "-n 5 --logprobs 2")[0];
    REQUIRE(out["logprobs"].size() == 5);
    for (size_t i = 0; i < 5; i++) {
        const json& one = out["logprobs"][i];
        CHECK(keys(one) == "id logprob token top ");
        CHECK(one["id"] == out["ids"][i]);
        CHECK(one["token"] == demo_tokenizer().decode(vector<int>{one["id"]}));
        REQUIRE(one["top"].size() == 2);
        CHECK(keys(one["top"][1]) == "id logprob token ");
        CHECK(one["top"][0]["id"] == one["id"]);  // greedy
        CHECK(one["top"][0]["logprob"] == one["logprob"]);
        CHECK(one["top"][1]["logprob"] < one["logprob"]);
        CHECK(one["logprob"] < 0);
    }
    CHECK(json_lines(kAsk + "-n 1 --logprobs 0")[0]["logprobs"][0]["top"] == json::array());
    const string tiny = "generate " + kLlama + " --ids 1,2 -n 1 --logprobs 512 ";
    json cold = json_lines(tiny)[0]["logprobs"][0];
    json hot = json_lines(tiny + "-t 3 --presence-penalty 2 --top-k 3")[0]["logprobs"][0];
    CHECK(hot["top"] == cold["top"]);  // before penalties and temperature
    CHECK(hot["token"] == nullptr);
    double sum = 0;
    for (const json& one : cold["top"]) sum += std::exp(one["logprob"].get<double>());
    CHECK(sum == doctest::Approx(1).epsilon(1e-9));
}

TEST_CASE("score tells log-probabilities and perplexity") {
    json out = json_lines("score " + kLlama + " --ids 5,6,7")[0];
    CHECK(keys(out) == "logprob mean_logprob perplexity token_logprobs tokens ");
    CHECK(out["tokens"] == 3);
    REQUIRE(out["token_logprobs"].size() == 3);
    CHECK(out["token_logprobs"][0] == nullptr);
    double a = out["token_logprobs"][1], b = out["token_logprobs"][2], sum = out["logprob"];
    CHECK(sum == doctest::Approx(a + b).epsilon(1e-12));
    CHECK(double(out["mean_logprob"]) == doctest::Approx(sum / 2).epsilon(1e-12));
    CHECK(double(out["perplexity"]) == doctest::Approx(std::exp(-sum / 2)).epsilon(1e-9));
    json next = json_lines("generate " + kLlama + " --ids 5 -n 1 --logprobs 512")[0]["logprobs"][0];
    for (const json& one : next["top"]) if (one["id"] == 6) CHECK(one["logprob"] == a);

    json single = json_lines("score " + kLlama + " --ids 5")[0];
    CHECK(single["tokens"] == 1);
    CHECK(single["logprob"] == 0);
    CHECK(single["mean_logprob"] == nullptr);
    CHECK(single["perplexity"] == nullptr);
    CHECK(single["token_logprobs"] == json{nullptr});

    const string text = "score " + kDemo + " --threads 1 -p 'The capital of France is ";
    CHECK(json_lines(text + "Paris.'")[0]["logprob"] > json_lines(text + "green.'")[0]["logprob"]);
    Ran plain = nanocu(text + "Paris.'");
    CHECK(plain.exit == 0);
    for (string key : {"tokens", "logprob", "mean_logprob", "perplexity"})
        CHECK(plain.out.find(key) != string::npos);
}

TEST_CASE("tokenize: text to ids and back, lines of JSON, and chats") {
    TempFolder folder;  // needs a tokenizer.json, nothing else
    std::filesystem::create_symlink(std::filesystem::absolute(kDemo + "/tokenizer.json"),
                                    folder / "tokenizer.json");
    const string text = "  It's 12\u20AC\n\n<|im_end|>\U0001F600";
    auto tokenized = [&](const string& flags, const string& in) {
        folder.write("in", in);
        Ran r = nanocu("tokenize " + folder.path + flags + " -f " + (folder / "in"));
        CHECK(r.exit == 0);
        return r.out;
    };
    const string ids = tokenized("", text);
    CHECK(json::parse(ids) == demo_tokenizer().encode(text));
    CHECK(lines_of(ids).size() == 1);
    CHECK(tokenized(" --decode", ids) == text);
    CHECK(nanocu("tokenize " + folder.path + " -p one").out == tokenized("", "one"));

    const string strings = "\"one\"\n\"\"\n\"two\\nlines\"\n";
    const string arrays = tokenized("", "one") + "[]\n" + tokenized("", "two\nlines");
    CHECK(tokenized(" --jsonl", strings) == arrays);
    CHECK(tokenized(" --jsonl --decode", arrays) == strings);

    const json chats = golden("chat/smollm2.json");
    for (const json& one : chats["renderings"]) {
        folder.write("in", one["messages"].dump());
        Ran r = nanocu("tokenize " + kDemo + " --chat -f " + (folder / "in"));
        CHECK(json::parse(r.out) == demo_tokenizer().encode(one["text"].get<string>()));
    }
}

TEST_CASE("info and bench print objects with --json, text without") {
    json info = json_lines("info " + kLlama)[0];
    CHECK(info["layers"] == 3);
    CHECK(info["vocabulary"] == 512);
    CHECK(info["context"] == 4096);
    CHECK(info["kv_bytes_per_token"] == 3 * 2 * 64 * 4);
    CHECK(nanocu("info " + kLlama).out.find("4096") != string::npos);
    CHECK(nanocu("info " + kLlama + " --load-format dummy").exit == 0);

    vector<string> tests;
    for (const json& row : json_lines("bench " + kLlama + " --pp 16 --tg 4 --rows 1,2")) {
        REQUIRE(row.is_object());
        if (!row.contains("test")) continue;  // what the machine can do
        tests.push_back(row["test"]);
        CHECK(row["tokens_per_s"] > 0);
        CHECK(row["of_limit"] > 0);
    }
    CHECK(tests == vector<string>{"pp16", "tg4@16 x 1", "tg4@16 x 2"});
    CHECK(nanocu("bench --pp 16 --tg 4 --rows 1 " + kLlama).exit == 0);  // MODEL may come last
    vector<json> chapters = json_lines("bench " + kLlama + " --chapters --rows 1,2 --pp 32 --tg 4");
    CHECK(chapters.front()["with"] == "none");  // then each chapter that this binary has
    for (const json& row : chapters) {
        CHECK(keys(row) == "prompt_ms shared_tokens_per_s tokens_per_s x 1 tokens_per_s x 2 with ");
        CHECK(row["tokens_per_s x 2"] > 0);
    }

    TempFolder folder;
    folder.write("workload", "20 5\n100 7\n");
    json run = json_lines("bench " + kLlama + " --workload " + (folder / "workload")).back();
    CHECK(run["new_tokens"] == 12);
    CHECK(run["blocks_at_peak"] == 9);  // of 24 and 106 tokens, for the last ids are never computed
    CHECK(run["unused_at_peak"] > 0);
    CHECK(run["unused_at_peak"] < 0.2);
    for (const char* bad : {"", "20", "20 5\n30", "20 5\n0 5\n", "20 5\nabc\n", "5000 5\n",
                            "20 0\n"}) {
        folder.write("bad", bad);
        CAPTURE(bad);
        Ran r = nanocu("bench " + kLlama + " --json --workload " + (folder / "bad"));
        CHECK(r.exit == 1);
        CHECK(r.out == "");
        CHECK(r.err.starts_with("nanocu: "));
    }
    CHECK(nanocu("info " + kLlama + " --verbose").err.find("rows 64, chunk 512") != string::npos);
}

TEST_CASE("chat computes only what is new in each turn") {
    const string question = "What is the capital of France?";
    Ran r = talk("-n 20", question + "\nAnd of Spain?\nThank you!\n");
    CHECK(r.exit == 0);
    CHECK(r.out.starts_with(kAnswer + "\n"));
    vector<Closing> turns = closing_lines(r.err);
    REQUIRE(turns.size() == 3);
    string rendered = Chat::load(kDemo).render({{"user", question}});
    CHECK(turns[0].prompt == int(demo_tokenizer().encode(rendered).size()));
    CHECK(turns[0].cached == 0);
    for (int i = 1; i < 3; i++) {  // all full blocks of what was computed before
        CHECK(turns[i].cached == (turns[i - 1].prompt + turns[i - 1].tokens - 1) / 16 * 16);
        CHECK(turns[i].cached > 0);
        CHECK(turns[i].prompt > turns[i - 1].prompt + turns[i - 1].tokens);
    }
}

TEST_CASE("chat: one question, a system text, /reset, /quit, and lines that go on") {
    const Chat format = Chat::load(kDemo);
    auto size = [&](const vector<Message>& messages) {
        return int(demo_tokenizer().encode(format.render(messages)).size());
    };
    CHECK(nanocu("chat " + kOne + "-p 'What is the capital of France?'").out == kAnswer + "\n");
    Ran r = talk("-n 4", "Hello\n/reset\nHello\n\nGood \\\nbye\n/quit\nnever seen\n");
    CHECK(r.exit == 0);
    vector<Closing> turns = closing_lines(r.err);
    REQUIRE(turns.size() == 3);
    CHECK(turns[0].prompt == size({{"user", "Hello"}}));
    CHECK(turns[1].prompt == turns[0].prompt);
    CHECK(turns[1].cached == (turns[0].prompt - 1) / 16 * 16);
    int more = size({{"user", "Good \nbye"}}) - size({{"user", ""}});
    CHECK(turns[2].prompt > turns[1].prompt + more);
    turns = closing_lines(talk("-n 4 --system 'You are a poet.'", "Good \\\nbye").err);
    REQUIRE(turns.size() == 1);  // a last line without its end counts
    CHECK(turns[0].prompt == size({{"system", "You are a poet."}, {"user", "Good \nbye"}}));
    CHECK(talk("", "").exit == 0);
    // with -p it is a text like any other
    CHECK(shell("timeout 60 " + binary() + " chat " + kOne + "-n 4 -p /reset").exit == 0);
}

TEST_CASE("chat forgets the oldest turn when the context is full, and says so") {
    string typed;
    for (int i = 0; i < 6; i++) typed += str("Tell me something about the number ", i, ".\n");
    Ran r = talk("-n 16 --max-context 128", typed);
    CHECK(r.exit == 0);
    CHECK(r.err.find("context is full") != string::npos);
    CHECK(r.err.find("nanocu:") == string::npos);
    vector<Closing> turns = closing_lines(r.err);
    CHECK(turns.size() == 6);
    for (const Closing& turn : turns) CHECK(turn.prompt + turn.tokens <= 128);
}

TEST_CASE("Ctrl-C ends a generation cleanly: exit 130, whole output, the line of figures") {
    const string endless = "generate " + kOne + "-p 'Once upon a time' -n 8000 --ignore-eos ";
    TempFolder folder;
    auto interrupted = [&](const string& flags, const string& wait) {
        Ran r = shell(binary() + " " + endless + flags + " >" + (folder / "text") + " & pid=$!; " +
                      wait + "; kill -INT $pid; wait $pid");
        CHECK(r.exit == 130);
        REQUIRE(closing_lines(r.err).size() == 1);
        CHECK(closing_lines(r.err)[0].tokens < 8000);
        return read_file(folder / "text");
    };
    string text = interrupted(
        "", "while ! test -s " + (folder / "text") + " && kill -0 $pid; do sleep 0.01; done");
    CHECK(text.size() > 1);
    CHECK(text.ends_with("\n"));
    for (size_t i = 0; i < text.size(); i += std::max(1, utf8_char(text.substr(i))))
        CHECK(utf8_char(text.substr(i)) > 0);
    vector<string> lines = lines_of(interrupted("--json --samples 2", "sleep 1"));
    REQUIRE(lines.size() == 2);
    CHECK(json::parse(lines[1])["finish_reason"] == nullptr);
    CHECK(json::parse(lines[1])["ids"].size() > 0);
}

TEST_CASE("a hostile file ends in one line, not in a crash or a hang") {
    const json config = golden("models/qwen2/config.json");
    auto refused = [&](const string& file, const string& text) {
        TempFolder folder;
        folder.write("config.json", config.dump());
        folder.write(file, text);
        string begin = text.substr(0, 60);
        CAPTURE(file);
        CAPTURE(begin);
        bool weights = file != "tokenizer.json";
        check_refused(weights ? "info " + folder.path : "tokenize " + folder.path + " -p a", "");
    };
    // 100,000 lists in each other: whatever calls itself for each of them runs out of stack
    const string deep = string(100'000, '[') + string(100'000, ']');
    for (string key : {"hidden_act", "eos_token_id", "layer_types", "rope_parameters"}) {
        json j = config;
        j.erase(key);
        refused("config.json", "{\"" + key + "\": " + deep + ", " + j.dump().substr(1));
    }
    refused("generation_config.json", "{\"eos_token_id\": " + deep + "}");
    for (string key : {"model", "normalizer", "added_tokens", "pre_tokenizer", "post_processor"}) {
        json j = {{"model", {{"vocab", json::object()}, {"merges", json::array()}}}};
        j.erase(key);
        j["version"] = "1.0";
        refused("tokenizer.json", "{\"" + key + "\": " + deep + ", " + j.dump().substr(1));
    }

    auto tensors = [&](const string& header) {
        uint64_t length = header.size();
        refused("model.safetensors", string((const char*)&length, 8) + header);
    };
    auto tensor = [](const string& shape) {
        return R"(: {"dtype": "BF16", "data_offsets": [0, 0], "shape": )" + shape + "}";
    };
    tensors("{\"a\"" + tensor(deep) + "}");
    tensors("\"" + string(1'000'000, 'a'));              // would be quoted in the message
    tensors("{\"\\u001b[31m\\n\"" + tensor("[1]") + "}");  // as would this
    string many;
    for (int i = 0; i < 50'000; i++) many += str(", \"", i, "\"", tensor("[0]"));
    tensors("{" + many.substr(1) + "}");

    for (string single : {R"([{"Foo": {}}])", R"([{"SpecialToken": {}}])", R"(["$A"])"})
        refused("tokenizer.json", R"({"model": {"vocab": {"a": 0}, "merges": []}, "post_processor":
            {"type": "TemplateProcessing", "special_tokens": {}, "single": )" + single + "}}");
}
