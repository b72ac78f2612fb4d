// The binary as a user runs it: what it prints where, its exit codes, and what it says of mistakes.
#include "common.hpp"

#include <regex>

namespace {

#ifdef __SANITIZE_ADDRESS__
const bool kRealSpeed = false;  // the sanitizers' own work would be measured
#else
const bool kRealSpeed = true;
#endif

const std::string kLlama = kData + "models/llama3";  // has no tokenizer
const std::string kQuestion =
    "'<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n'";
const std::string kAnswer = "The capital of France is Paris.";

std::vector<std::string> lines_of(const std::string& text) {
    std::istringstream in(text);
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
}

// The figures of the closing lines on stderr.
struct Closing {
    int prompt, cached, tokens;
    double first;
};

std::vector<Closing> closing_lines(const std::string& err) {
    static const std::regex line(R"((\d+) prompt tokens \((\d+) from cache\), (\d+) (?:new )?tokens.*after ([0-9.]+) s)");
    std::vector<Closing> all;
    for (std::sregex_iterator i(err.begin(), err.end(), line), end; i != end; ++i)
        all.push_back({std::stoi((*i)[1]), std::stoi((*i)[2]), std::stoi((*i)[3]), std::stod((*i)[4])});
    return all;
}

std::string binary() {
    const char* name = getenv("NANOCU");
    return name ? name : "./nanocu";
}

// One line on stderr that says what, nothing on stdout, exit 1, and no waiting for it.
void check_refused(const std::string& arguments, const std::string& says) {
    Ran r = shell("timeout 20 " + binary() + " " + arguments + " </dev/null");
    CAPTURE(arguments);
    std::string error = r.err.substr(0, 400);
    CAPTURE(error);
    CHECK(r.exit == 1);
    CHECK(r.out == "");
    CHECK(r.err.starts_with("nanocu: "));
    CHECK(r.err.find('\n') == r.err.size() - 1);
    CHECK(r.err.size() < 400);
    CHECK(r.err.find(says) != std::string::npos);
}

// What it printed as JSON, an object a line.
std::vector<json> json_lines(const std::string& arguments) {
    Ran r = nanocu(arguments);
    CAPTURE(arguments);
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    std::vector<json> all;
    for (const std::string& line : lines_of(r.out)) all.push_back(json::parse(line));
    return all;
}

std::set<std::string> keys(const json& j) {
    std::set<std::string> all;
    for (const auto& [key, value] : j.items()) all.insert(key);
    return all;
}

const Tokenizer& demo_tokenizer() {
    static const Tokenizer t(kDemo);
    return t;
}

// A chat whose user types these lines.
Ran talk(const std::string& flags, const std::string& typed) {
    TempFolder folder;
    folder.write("typed", typed);
    return nanocu("chat " + kDemo + " -t 0 " + flags + " <" + (folder / "typed"));
}

}  // namespace

TEST_CASE("help and version are no mistakes") {
    for (std::string arguments : {"--help", "generate --help", "chat --help", "score --help", "tokenize --help",
                                  "bench --help", "info --help", "--version"}) {
        Ran r = nanocu(arguments);
        CHECK(r.exit == 0);
        CHECK(r.out.size() > 1);
        CHECK(r.err == "");
    }
}

TEST_CASE("a wrong flag is one line on stderr, nothing on stdout, exit 1") {
    struct Case {
        std::string arguments, says;
    };
    const std::string tiny = "generate " + kLlama + " --ids 1,2 ";
    for (const Case& c : std::vector<Case>{{"", "subcommand"},
                                           {"sing", ""},
                                           {"generate", "MODEL"},
                                           {tiny + "--loud", "--loud"},
                                           {tiny + "extra", "extra"},
                                           {"generate build/nowhere --ids 1", "build/nowhere"},
                                           {"chat build/nowhere -p hi", "build/nowhere"},
                                           {"score build/nowhere --ids 1", "build/nowhere"},
                                           {"tokenize build/nowhere -p hi", "build/nowhere"},
                                           {"info build/nowhere", "build/nowhere"},
                                           {"bench build/nowhere", "build/nowhere"},
                                           {"info build", "config.json"},
                                           {tiny + "-t -1", "temperature"},
                                           {tiny + "-t nan", "temperature"},
                                           {tiny + "--top-p 2", "top-p"},
                                           {tiny + "--top-p 0", "top-p"},
                                           {tiny + "--min-p 2", "min-p"},
                                           {tiny + "--min-p -0.1", "min-p"},
                                           {tiny + "--top-k -1", "top-k"},
                                           {tiny + "--repetition-penalty 0", "repetition-penalty"},
                                           {tiny + "--presence-penalty 1000", "presence-penalty"},
                                           {tiny + "--frequency-penalty nan", "frequency-penalty"},
                                           {tiny + "-n -5", "max-tokens"},
                                           {tiny + "-n abc", "max-tokens"},
                                           {tiny + "-n 99999999999", "max-tokens"},
                                           {tiny + "--samples 0", "samples"},
                                           {tiny + "--samples -3", "samples"},
                                           {tiny + "--seed x", "seed"},
                                           {tiny + "--threads -1", "threads"},
                                           {tiny + "--chunk 0", "chunk"},
                                           {tiny + "--max-rows 0", "max-rows"},
                                           {tiny + "--max-context -1", "max-context"},
                                           {tiny + "--kv-memory much", "kv-memory"},
                                           {tiny + "--kv-memory -4", "kv-memory"},
                                           {tiny + "--kv-memory 1E", "kv-memory"},
                                           {tiny + "--device cuda", "cuda"},
                                           {tiny + "--device tpu", "device"},
                                           {tiny + "--load-format gguf", "load-format"},
                                           {tiny + "--logprobs 2", "--json"},
                                           {tiny + "--logprobs -2 --json", "logprobs"},
                                           {tiny + "--stop ''", "--stop"},
                                           {"bench " + kLlama + " --pp 0", "pp"},
                                           {"bench " + kLlama + " --json --pp 5000", "5001"}})
        check_refused(c.arguments, c.says);
}

TEST_CASE("a prompt that cannot be computed is refused with what is wrong with it") {
    TempFolder folder;
    folder.write("bad", "caf\xC3\xA9 caf\xE9 au lait");
    struct Case {
        std::string arguments, says;
    };
    const std::string tiny = "generate " + kLlama + " ", demo = " " + kDemo + " ";
    for (const Case& c : std::vector<Case>{{tiny + "--ids 1,x", "1,x"},
                                           {tiny + "--ids 1,,2", "--ids"},
                                           {tiny + "--ids 1.5", "1.5"},
                                           {tiny + "--ids true", "--ids"},
                                           {tiny + "--ids 99999", "99999"},
                                           {tiny + "--ids 1,512", "512"},
                                           {tiny + "--ids=-1", "-1"},
                                           {tiny + "--ids 4294967297", "4294967297"},  // 1, if it were cut
                                           {tiny + "--ids ' '", "prompt"},
                                           {"score " + kLlama + " --ids 7,512", "512"},
                                           {tiny + "-p hello", "tokenizer.json"},
                                           {"generate" + demo + "-p ''", "prompt"},
                                           {"generate" + demo, "prompt"},  // stdin is empty
                                           {"score" + demo + "-p ''", "prompt"},
                                           {"chat" + demo + "-p ''", ""},
                                           {"generate" + demo + "-f build/nowhere", "build/nowhere"},
                                           {"generate" + demo + "-f build", "build"},
                                           {"generate" + demo + "-f " + folder / "bad", "byte 9"},
                                           {"score" + demo + "-f " + folder / "bad", "byte 9"},
                                           {"tokenize" + demo + "-f " + folder / "bad", "byte 9"},
                                           {"chat" + demo + "-p \"$(cat " + folder / "bad" + ")\"", "byte 9"},
                                           {"tokenize" + demo + "--decode -p '[1, 2'", ""},
                                           {"tokenize" + demo + "--decode -p '{}'", ""},
                                           {"tokenize" + demo + "--decode -p '[\"a\"]'", ""},
                                           {"tokenize" + demo + "--decode -p '[4294967297]'", "4294967297"},
                                           {"tokenize" + demo + "--chat -p '[{\"role\": \"user\"}]'", "content"},
                                           {"tokenize" + demo + "--chat -p '[]'", "chat"},
                                           {"tokenize" + demo + "--jsonl -p '\"a\"\n\"b'", ""}})
        check_refused(c.arguments, c.says);
}

TEST_CASE("a request that does not fit is refused at once, with the sizes") {
    const std::string ids = " --ids 1,2,3,4,5,6,7,8 ", tiny = "generate " + kLlama + ids;
    check_refused(tiny + "--max-context 8", "8 tokens");
    check_refused(tiny + "--kv-memory 4K", "24576");  // bytes of one block
    check_refused(tiny + "-n 17 --kv-memory 24K", "KV memory for 16");
    check_refused("score " + kLlama + ids + "--max-context 7", "8 tokens");
    CHECK(nanocu(tiny + "--max-context 9").exit == 0);
    CHECK(nanocu(tiny + "-n 9 --kv-memory 24K").exit == 0);
    CHECK(nanocu("score " + kLlama + ids + "--max-context 8").exit == 0);
    CHECK(nanocu("score " + kLlama + ids + "--kv-memory 24K").exit == 0);

    TempFolder folder;
    std::string page = read_file(kData + "smollm2/perplexity.txt"), text;
    while (text.size() < 10'000'000) text += page;
    folder.write("long", text);
    double start = now();
    check_refused("generate " + kDemo + " -f " + folder / "long", "8192");
    if (kRealSpeed) CHECK(now() - start < 10);
}

TEST_CASE("output that cannot be written is an error") {
    for (std::string arguments : {"generate " + kDemo + " -p Hello -n 5 -t 0", "generate " + kLlama + " --ids 1 -n 3 --json",
                                  "generate " + kLlama + " --ids 1 -n 3 --samples 2", "score " + kLlama + " --ids 1,2",
                                  "tokenize " + kDemo + " -p Hello", "info " + kLlama,
                                  "chat " + kDemo + " -p Hello -n 5"}) {
        Ran r = nanocu(arguments + " >/dev/full");
        CAPTURE(arguments);
        CHECK(r.exit == 1);
        CHECK(r.err.find("nanocu: stdout: No space left on device") != std::string::npos);
    }
}

TEST_CASE("generate puts the continuation on stdout, and one line of figures on stderr") {
    const std::string arguments = "generate " + kDemo + " -t 0 -p " + kQuestion;
    Ran r = nanocu(arguments);
    CHECK(r.exit == 0);
    CHECK(r.out == kAnswer + "\n");
    REQUIRE(closing_lines(r.err).size() == 1);
    CHECK(closing_lines(r.err)[0].cached == 0);
    CHECK(closing_lines(r.err)[0].tokens == 8);
    TempFolder folder;
    folder.write("prompt", "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n");
    CHECK(nanocu("generate " + kDemo + " -t 0 -f " + folder / "prompt").out == kAnswer + "\n");
    CHECK(nanocu("generate " + kDemo + " -t 0 <" + folder / "prompt").out == kAnswer + "\n");
    CHECK(nanocu(arguments + " -n 3").out == "The capital of\n");
    CHECK(nanocu(arguments + " --threads 1 --chunk 5 --no-prefix-cache").out == kAnswer + "\n");
    CHECK(nanocu(arguments + " --verbose").out == kAnswer + "\n");
    CHECK(nanocu(arguments + " --verbose").err.find("threads") != std::string::npos);
    CHECK(nanocu(arguments + " -n 20 --ignore-eos").out.starts_with(kAnswer));
    CHECK(closing_lines(nanocu(arguments + " -n 20 --ignore-eos").err)[0].tokens == 20);
}

TEST_CASE("generate --json has text, ids with the ending eos, why it ended, and what it used") {
    const std::string arguments = "generate " + kDemo + " -t 0 --seed 5 --json -p " + kQuestion;
    std::vector<json> out = json_lines(arguments);
    REQUIRE(out.size() == 1);
    CHECK(keys(out[0]) == std::set<std::string>{"finish_reason", "ids", "index", "seed", "text", "usage"});
    std::vector<int> ids = out[0]["ids"];
    CHECK(out[0]["index"] == 0);
    CHECK(out[0]["text"] == kAnswer);
    CHECK(demo_tokenizer().decode(ids) == kAnswer + "<|im_end|>");
    CHECK(out[0]["finish_reason"] == "stop");
    CHECK(out[0]["seed"] == 5);
    CHECK(keys(out[0]["usage"]) == std::set<std::string>{"cached_tokens", "completion_tokens", "prompt_tokens"});
    CHECK(out[0]["usage"]["completion_tokens"] == ids.size());
    CHECK(out[0]["usage"]["cached_tokens"] == 0);
    json cut = json_lines(arguments + " -n 3")[0];
    CHECK(cut["finish_reason"] == "length");
    CHECK(cut["ids"] == std::vector<int>(ids.begin(), ids.begin() + 3));
    json tiny = json_lines("generate " + kLlama + " --json --ids 1,2,3 -n 4")[0];
    CHECK(tiny["text"] == nullptr);  // no tokenizer
    CHECK(tiny["ids"].size() == 4);
    CHECK(tiny["usage"]["prompt_tokens"] == 3);
    CHECK(tiny["seed"].is_number_unsigned());
}

TEST_CASE("samples have numbers and differ; a seed draws them again") {
    const std::string arguments = "generate " + kDemo + " -p 'Once upon a time' -t 1.5 -n 12 --samples 3 --seed ";
    Ran first = nanocu(arguments + "7");
    CHECK(first.exit == 0);
    std::set<std::string> texts;
    for (int i = 0; i < 3; i++) {
        std::string head = str("--- sample ", i, "\n"), next = str("--- sample ", i + 1, "\n");
        size_t at = first.out.find(head), end = i < 2 ? first.out.find(next) : first.out.size();
        REQUIRE(at < end);
        REQUIRE(end != std::string::npos);
        texts.insert(first.out.substr(at + head.size(), end - at - head.size()));
    }
    CHECK(texts.size() == 3);
    CHECK(nanocu(arguments + "7").out == first.out);
    CHECK(nanocu(arguments + "7 --chunk 2 --threads 1 --max-rows 2").out == first.out);
    CHECK(nanocu(arguments + "8").out != first.out);
    std::vector<json> out = json_lines(arguments + "7 --json");
    REQUIRE(out.size() == 3);
    for (int i = 0; i < 3; i++) {
        CHECK(out[i]["index"] == i);
        CHECK(texts.count(out[i]["text"].get<std::string>() + "\n") == 1);
    }
    // without --seed another one each time, which --json tells
    json a = json_lines("generate " + kLlama + " --ids 1 -t 2 -n 8 --json")[0];
    CHECK(json_lines("generate " + kLlama + " --ids 1 -t 2 -n 8 --json")[0]["seed"] != a["seed"]);
    CHECK(json_lines("generate " + kLlama + " --ids 1 -t 2 -n 8 --json --seed " + a["seed"].dump())[0]["ids"] == a["ids"]);
}

TEST_CASE("a stop string ends the text before it, and may be given before MODEL") {
    const std::string prompt = " -t 0 -p " + kQuestion;
    CHECK(nanocu("generate " + kDemo + prompt + " --stop Paris").out == "The capital of France is \n");
    CHECK(nanocu("generate " + kDemo + prompt + " --stop 'is P' --stop ital").out == "The cap\n");
    CHECK(nanocu("generate " + kDemo + prompt + " --stop London").out == kAnswer + "\n");
    CHECK(nanocu("generate --stop Paris " + kDemo + prompt).out == "The capital of France is \n");
    json out = json_lines("generate " + kDemo + prompt + " --stop France --json")[0];
    CHECK(out["text"] == "The capital of ");
    CHECK(out["finish_reason"] == "stop");
    CHECK(out["ids"].size() == 4);
}

TEST_CASE("--logprobs K gives the chosen id and the K likeliest for each token") {
    const std::string arguments = "generate " + kDemo + " -t 0 -n 5 --json -p " + kQuestion + " --logprobs ";
    json out = json_lines(arguments + "2")[0];
    REQUIRE(out["logprobs"].size() == 5);
    for (size_t i = 0; i < 5; i++) {
        const json& one = out["logprobs"][i];
        CHECK(keys(one) == std::set<std::string>{"id", "logprob", "token", "top"});
        CHECK(one["id"] == out["ids"][i]);
        CHECK(one["token"] == demo_tokenizer().decode(std::vector<int>{one["id"]}));
        REQUIRE(one["top"].size() == 2);
        CHECK(keys(one["top"][0]) == std::set<std::string>{"id", "logprob", "token"});
        CHECK(one["top"][0]["id"] == one["id"]);  // greedy
        CHECK(one["top"][0]["logprob"] == one["logprob"]);
        CHECK(one["top"][1]["logprob"] < one["top"][0]["logprob"]);
        CHECK(one["logprob"] < 0);
    }
    CHECK(json_lines(arguments + "0")[0]["logprobs"][0]["top"] == json::array());
    // before penalties and temperature
    json hot = json_lines("generate " + kLlama + " --ids 1,2 -n 1 -t 3 --presence-penalty 2 --seed 1 --json --logprobs 512")[0];
    json cold = json_lines("generate " + kLlama + " --ids 1,2 -n 1 -t 0 --json --logprobs 512")[0];
    CHECK(hot["logprobs"][0]["top"] == cold["logprobs"][0]["top"]);
    CHECK(hot["logprobs"][0]["token"] == nullptr);
    double sum = 0;
    for (const json& one : cold["logprobs"][0]["top"]) sum += std::exp(one["logprob"].get<double>());
    CHECK(sum == doctest::Approx(1).epsilon(1e-9));
}

TEST_CASE("score tells log-probabilities and perplexity") {
    json out = json_lines("score " + kLlama + " --ids 5,6,7 --json")[0];
    CHECK(keys(out) == std::set<std::string>{"logprob", "mean_logprob", "perplexity", "token_logprobs", "tokens"});
    CHECK(out["tokens"] == 3);
    REQUIRE(out["token_logprobs"].size() == 3);
    CHECK(out["token_logprobs"][0] == nullptr);
    double a = out["token_logprobs"][1], b = out["token_logprobs"][2];
    CHECK(out["logprob"].get<double>() == doctest::Approx(a + b).epsilon(1e-12));
    CHECK(out["mean_logprob"].get<double>() == doctest::Approx((a + b) / 2).epsilon(1e-12));
    CHECK(out["perplexity"].get<double>() == doctest::Approx(std::exp(-(a + b) / 2)).epsilon(1e-9));
    json first = json_lines("generate " + kLlama + " --ids 5 -n 1 --logprobs 512 --json")[0]["logprobs"][0];
    for (const json& one : first["top"]) if (one["id"] == 6) CHECK(one["logprob"].get<double>() == doctest::Approx(a));

    json single = json_lines("score " + kLlama + " --ids 5 --json")[0];
    CHECK(single["tokens"] == 1);
    CHECK(single["logprob"] == 0);
    CHECK(single["mean_logprob"] == nullptr);
    CHECK(single["perplexity"] == nullptr);
    CHECK(single["token_logprobs"] == json{nullptr});

    Ran text = nanocu("score " + kDemo + " -p 'The capital of France is Paris.'");
    CHECK(text.exit == 0);
    for (std::string key : {"tokens", "logprob", "mean_logprob", "perplexity"})
        CHECK(text.out.find(key) != std::string::npos);
    json likely = json_lines("score " + kDemo + " --json -p 'The capital of France is Paris.'")[0];
    json unlikely = json_lines("score " + kDemo + " --json -p 'The capital of France is green.'")[0];
    CHECK(likely["logprob"] > unlikely["logprob"]);
}

TEST_CASE("tokenize: text to ids and back, lines of JSON, and chats") {
    TempFolder folder;  // needs a tokenizer.json, nothing else
    std::filesystem::create_symlink(std::filesystem::absolute(kDemo + "/tokenizer.json"), folder / "tokenizer.json");
    const std::string tokenize = "tokenize " + folder.path + " ", text = "  It's 12\u20AC\n\n<|im_end|>\U0001F600";
    folder.write("text", text);
    Ran ids = nanocu(tokenize + "-f " + folder / "text");
    CHECK(ids.exit == 0);
    CHECK(json::parse(ids.out) == demo_tokenizer().encode(text));
    CHECK(lines_of(ids.out).size() == 1);
    folder.write("ids", ids.out);
    CHECK(nanocu(tokenize + "--decode -f " + folder / "ids").out == text);
    CHECK(nanocu(tokenize + "--decode <" + folder / "ids").out == text);

    folder.write("lines", "\"one\"\n\"\"\n\"two\\nlines\"\n");
    Ran lines = nanocu(tokenize + "--jsonl -f " + folder / "lines");
    REQUIRE(lines_of(lines.out).size() == 3);
    CHECK(json::parse(lines_of(lines.out)[0]) == demo_tokenizer().encode("one"));
    CHECK(lines_of(lines.out)[1] == "[]");
    CHECK(json::parse(lines_of(lines.out)[2]) == demo_tokenizer().encode("two\nlines"));
    folder.write("back", lines.out);
    CHECK(nanocu(tokenize + "--jsonl --decode -f " + folder / "back").out == read_file(folder / "lines"));

    for (const json& one : golden("chat/smollm2.json")["renderings"]) {
        folder.write("chat", one["messages"].dump());
        Ran chat = nanocu("tokenize " + kDemo + " --chat -f " + folder / "chat");
        CHECK(json::parse(chat.out) == demo_tokenizer().encode(one["text"].get<std::string>()));
    }
}

TEST_CASE("info and bench print objects with --json, text without") {
    json info = json_lines("info " + kLlama + " --json")[0];
    CHECK(info["layers"] == 3);
    CHECK(info["vocabulary"] == 512);
    CHECK(info["context"] == 4096);
    CHECK(info["kv_bytes_per_token"] == 3 * 2 * 64 * 4);
    CHECK(nanocu("info " + kLlama).out.find("4096") != std::string::npos);
    CHECK(nanocu("info " + kLlama + " --load-format dummy").exit == 0);

    std::vector<std::string> tests;
    for (const json& row : json_lines("bench " + kLlama + " --json --pp 16 --tg 4 --rows 1,2")) {
        REQUIRE(row.is_object());
        if (!row.contains("test")) continue;
        tests.push_back(row["test"]);
        CHECK(row["tokens_per_s"] > 0);
        CHECK(row["of_limit"] > 0);
    }
    CHECK(tests == std::vector<std::string>{"pp16", "tg4 x 1", "tg4 x 2"});
    CHECK(nanocu("bench --pp 16 --tg 4 --rows 1 " + kLlama).exit == 0);  // MODEL may come last
}

TEST_CASE("chat computes only what is new in each turn") {
    Ran r = talk("-n 20", "What is the capital of France?\nAnd of Spain?\nThank you!\n");
    CHECK(r.exit == 0);
    CHECK(r.out.starts_with(kAnswer + "\n"));
    std::vector<Closing> turns = closing_lines(r.err);
    REQUIRE(turns.size() == 3);
    CHECK(turns[0].cached == 0);
    for (int i = 1; i < 3; i++) {  // all full blocks of what the turn before has computed
        CHECK(turns[i].cached == (turns[i - 1].prompt + turns[i - 1].tokens - 1) / 16 * 16);
        CHECK(turns[i].cached > 0);
        CHECK(turns[i].prompt > turns[i - 1].prompt + turns[i - 1].tokens);
    }
    // its first prompt is the template's
    json messages = {{{"role", "user"}, {"content", "What is the capital of France?"}}};
    Ran whole = nanocu("tokenize " + kDemo + " --chat -p '" + messages.dump() + "'");
    CHECK(turns[0].prompt == int(json::parse(whole.out).size()));
}

TEST_CASE("chat: one question, a system text, /reset, /quit, and lines that go on") {
    CHECK(nanocu("chat " + kDemo + " -t 0 -p 'What is the capital of France?'").out == kAnswer + "\n");
    const Chat format = Chat::load(kDemo);
    auto size = [&](const std::vector<Message>& messages) {
        return int(demo_tokenizer().encode(format.render(messages)).size());
    };
    Ran r = talk("-n 4", "Hello\n/reset\nHello\n\nGood \\\nbye\n/quit\nnever seen\n");
    CHECK(r.exit == 0);
    std::vector<Closing> turns = closing_lines(r.err);
    REQUIRE(turns.size() == 3);
    CHECK(turns[0].prompt == size({{"user", "Hello"}}));
    CHECK(turns[1].prompt == turns[0].prompt);
    CHECK(turns[1].cached == (turns[0].prompt - 1) / 16 * 16);
    CHECK(turns[2].prompt > turns[1].prompt + size({{"user", "Good \nbye"}}) - size({{"user", ""}}));
    turns = closing_lines(talk("-n 4 --system 'You are a poet.'", "Good \\\nbye").err);
    REQUIRE(turns.size() == 1);  // a last line without its end counts too
    CHECK(turns[0].prompt == size({{"system", "You are a poet."}, {"user", "Good \nbye"}}));
    CHECK(talk("", "").exit == 0);
    // with -p there is nobody to command
    CHECK(shell("timeout 20 " + binary() + " chat " + kDemo + " -t 0 -n 4 -p /reset").exit == 0);
}

TEST_CASE("chat forgets the oldest turn when the context is full, and says so") {
    std::string typed;
    for (int i = 0; i < 8; i++) typed += str("Tell me something about the number ", i, ".\n");
    Ran r = talk("-n 30 --max-context 160", typed);
    CHECK(r.exit == 0);
    CHECK(closing_lines(r.err).size() == 8);
    CHECK(r.err.find("context is full") != std::string::npos);
    for (const Closing& turn : closing_lines(r.err)) CHECK(turn.prompt + turn.tokens <= 160);
    CHECK(r.err.find("nanocu:") == std::string::npos);
}

TEST_CASE("Ctrl-C ends a generation cleanly: exit 130, whole output, the line of figures") {
    auto interrupted = [&](const std::string& arguments, bool wait_for_text) {
        TempFolder folder;
        std::string ready = wait_for_text ? "test -s " + folder / "text" : "sleep 1";
        Ran r = shell(str(binary(), " ", arguments, " >", folder / "text", " & pid=$!; while ! ", ready,
                          " && kill -0 $pid; do sleep 0.01; done; kill -INT $pid; wait $pid"));
        r.out = read_file(folder / "text");
        return r;
    };
    const std::string endless = "generate " + kDemo + " -p 'Once upon a time' -n 8000 --ignore-eos -t 1 ";
    Ran r = interrupted(endless, true);
    CHECK(r.exit == 130);
    CHECK(r.out.size() > 1);
    CHECK(r.out.ends_with("\n"));
    for (size_t i = 0; i < r.out.size(); i += std::max(1, utf8_char(r.out.substr(i))))
        CHECK(utf8_char(r.out.substr(i)) > 0);
    REQUIRE(closing_lines(r.err).size() == 1);
    CHECK(closing_lines(r.err)[0].tokens < 8000);

    r = interrupted(endless + "--json --samples 2", false);
    CHECK(r.exit == 130);
    std::vector<std::string> lines = lines_of(r.out);
    REQUIRE(lines.size() == 2);
    CHECK(json::parse(lines[1])["finish_reason"] == nullptr);
    CHECK(json::parse(lines[1])["ids"].size() > 0);
}

TEST_CASE("the demo model's first token comes within 1 s of the start") {
    double best = 100;
    for (int i = 0; i < 3; i++) {
        double start = now();
        CHECK(nanocu("chat " + kDemo + " -p 'What is the capital of France?' -n 1").exit == 0);
        best = std::min(best, now() - start);
    }
    if (kRealSpeed) CHECK(best < 1);
}

TEST_CASE("a hostile file ends in one line, not in a crash or a hang") {
    const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
    const std::string plain = read_file(kData + "models/qwen2/config.json");
    auto refused = [&](const std::string& file, const std::string& text) {
        TempFolder folder;
        folder.write("config.json", plain);
        folder.write(file, text);
        CAPTURE(file);
        std::string begin = text.substr(0, 200);
        CAPTURE(begin);
        check_refused(file == "tokenizer.json" ? "tokenize " + folder.path + " -p a" : "info " + folder.path, "");
    };
    auto with = [&](const char* key, const std::string& value) {
        json j = json::parse(plain);
        j[key] = "here";
        std::string text = j.dump();
        return text.replace(text.find("\"here\""), 6, value);
    };
    for (const char* key : {"hidden_act", "eos_token_id", "layer_types", "rope_parameters", "quantization_config"})
        refused("config.json", with(key, deep));
    refused("generation_config.json", "{\"eos_token_id\": " + deep + "}");
    refused("tokenizer.json", "{\"model\": " + deep + "}");
    refused("tokenizer.json", "{\"normalizer\": " + deep + ", \"model\": {\"vocab\": {}, \"merges\": []}}");
    auto tensors = [](const std::string& header) {
        uint64_t length = header.size();
        return std::string((const char*)&length, 8) + header;
    };
    const std::string empty = ": {\"dtype\": \"BF16\", \"shape\": [0], \"data_offsets\": [0, 0]}";
    refused("model.safetensors", tensors("{\"a\": {\"dtype\": \"F32\", \"shape\": " + deep + ", \"data_offsets\": [0, 0]}}"));
    refused("model.safetensors", tensors("\"" + std::string(1'000'000, 'a')));
    refused("model.safetensors", tensors("{\"\\u001b[31m\\n\"" + empty + "}x"));
    std::string many = "{";
    for (int i = 0; i < 50'000; i++) many += str(i ? ", " : "", "\"", i, "\"", empty);
    double start = now();
    refused("model.safetensors", tensors(many + "}"));
    if (kRealSpeed) CHECK(now() - start < 5);
    for (std::string single : {R"([{"Foo": {}}])", R"([{"SpecialToken": {}}])", R"(["$A"])", R"({"a": 1})"})
        refused("tokenizer.json", R"({"model": {"vocab": {"a": 0}, "merges": []}, "post_processor":
            {"type": "TemplateProcessing", "special_tokens": {}, "single": )" + single + "}}");
}
