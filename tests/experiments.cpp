// The commands that ask something of a model (beam, attribute, teacher, pick-prompt), and what the
// engine has for them.
#include "common.hpp"

namespace {

const string kZubrowka = "\"The capital of Zubrowka is Lutz. The capital of Japan is Tokyo. "
                         "What is the capital of Zubrowka?\"";

json command_json(const string& arguments) {
    Ran r = nanocu(arguments + " --json");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    return json::parse(r.out);
}

// It fails with one line that says text; nothing on stdout.
void check_command_refuses(const string& arguments, const string& text) {
    Ran r = nanocu(arguments);
    CAPTURE(arguments);
    CAPTURE(r.err);
    CHECK(r.exit == 1);
    CHECK(r.out == "");
    CHECK(std::ranges::count(r.err, '\n') == 1);
    CHECK(r.err.find(text) != string::npos);
}

// Beam search with nothing shared: every text is computed from its beginning, each step.
vector<std::pair<double, vector<int>>> plain_beams(Engine& e, const vector<int>& prompt, int width,
                                                   int most) {
    using Text = std::pair<double, vector<int>>;
    vector<Text> beams = {{0, {}}}, complete;
    for (int step = 1; step <= most && !beams.empty(); step++) {
        vector<Text> all;
        for (const auto& [sum, ids] : beams) {
            Request r = greedy(prompt, 1);
            r.prompt.insert(r.prompt.end(), ids.begin(), ids.end());
            r.logprobs = 2 * width;
            vector<TokenLogprob> next = run_one(e, r).logprobs;
            for (size_t i = 1; i < next.size(); i++) {
                all.push_back({sum + next[i].logprob, ids});
                all.back().second.push_back(next[i].id);
            }
        }
        std::ranges::stable_sort(all, std::greater<>{}, &Text::first);
        beams.clear();
        for (const Text& t : all) {
            if (int(beams.size()) == width) break;
            bool ends = step == most || e.model.config.eos.count(t.second.back());
            (ends ? complete : beams).push_back(t);
        }
    }
    std::ranges::stable_sort(complete, std::greater<>{}, &Text::first);
    return complete;
}

}  // namespace

TEST_CASE("engine: only a prompt's end is scored, and what is before it comes from the cache") {
    TinyModel m;
    Engine e(m, options(m, 100)), fresh(m, options(m, 100));
    Request r = greedy(prompt_of(90), 1);
    r.score_prompt = true;
    vector<double> all = run_one(fresh, r).prompt_logprobs;
    REQUIRE(all.size() == 89);
    for (int from : {1, 2, 16, 17, 50, 65, 89, 90}) {
        r.score_from = from;
        Finished f = run_one(e, r);
        CHECK(f.prompt_logprobs == vector<double>(all.begin() + from - 1, all.end()));
        CHECK(f.cached == (from - 1) / 16 * 16);  // the first computed all of it
    }
    for (int from : {0, -1, 91}) {
        r.score_from = from;
        CHECK(error_of([&] { e.add(r); }).find("score_from") != string::npos);
    }
    // several at a time, which wait for the first one's blocks, and with too few blocks for all
    vector<Request> requests;
    for (int from : {60, 70, 80}) requests.push_back(r), requests.back().score_from = from;
    for (int blocks : {100, 8}) {
        Engine together(m, options(m, blocks));
        auto results = run_all(together, requests);
        for (int i = 0; i < 3; i++)
            CHECK(results[{i, 0}].prompt_logprobs ==
                  vector<double>(all.begin() + 59 + 10 * i, all.end()));
        if (blocks == 100) CHECK(results[{2, 0}].cached >= 64);
        CHECK(all_free(together));
    }
}

TEST_CASE("engine: a branch goes on as a request with its ids does, and shares its blocks") {
    TinyModel m;
    Engine e(m, options(m, 100)), fresh(m, options(m, 100));
    Request r = greedy(prompt_of(70), 40);
    r.ignore_eos = true;
    int number = e.add(r);
    vector<vector<int>> got(3), want(3);
    for (bool branched = false; e.busy();) {
        for (Output& o : e.step()) got[o.sample].push_back(o.id);
        if (branched || got[0].size() < 3) continue;
        branched = true;
        int blocks = e.memory_use().first;
        e.branch(number, 0, 1, 17);
        e.branch(number, 0, 2, 18);
        e.branch(number, 0, 0, 19);
        CHECK(e.memory_use().first == blocks);
        for (int i : {2, 1, 0}) (got[i] = got[0]).back() = i == 0 ? 19 : 16 + i;
        CHECK(error_of([&] { e.branch(number, 7, 8, 1); }) != "");
    }
    for (const vector<int>& ids : got) {
        Request alone = r;
        alone.prompt.insert(alone.prompt.end(), ids.begin(), ids.begin() + 3);
        alone.max_tokens = 37;
        CHECK(ids.size() == 40);
        CHECK(run_one(fresh, alone).ids == vector<int>(ids.begin() + 3, ids.end()));
    }
    CHECK(all_free(e));
}

TEST_CASE("beam: finds what beam search without any sharing finds") {
    Model m(kDemo);
    Tokenizer t(kDemo);
    m.config.eos.insert(t.eos);
    Engine e(m, options(m, 100));
    struct Case { string text; bool chat; int width, most; };
    for (const Case& c : {Case{"Once upon a time", false, 3, 8},
                          Case{"What is the capital of France?", true, 2, 10}}) {
        string text = c.chat ? Chat::load(kDemo).render({{"user", c.text}}) : c.text;
        vector<int> prompt = t.encode(text);
        auto want = plain_beams(e, prompt, c.width, c.most);
        json got = command_json(str("beam ", kDemo, " -p \"", c.text, "\" -w ", c.width, " -n ",
                                 c.most, c.chat ? " --chat" : ""));
        CAPTURE(got.dump());
        json greedy_text = got["greedy"];
        CHECK(greedy_text["ids"] == run_one(e, greedy(prompt, c.most)).ids);
        if (want[0].first >= greedy_text["logprob"].get<double>())
            CHECK(got["ids"] == want[0].second);
        CHECK(got["logprob"].get<double>() >= want[0].first);
        for (const json& found : got["found"]) {  // what is said of a text is true of it
            Request r = greedy(prompt, 1);
            for (int id : found["ids"]) r.prompt.push_back(id);
            r.score_prompt = true;
            r.score_from = int(prompt.size());
            vector<double> each = run_one(e, r).prompt_logprobs;
            CHECK(std::accumulate(each.begin(), each.end(), 0.0) ==
                  doctest::Approx(found["logprob"].get<double>()).epsilon(1e-9));
        }
    }
}

TEST_CASE("beam: 4 beams of 64 tokens behind 500 take at most 45% of the blocks of 4 copies") {
    Tokenizer t(kDemo);
    vector<int> ids = t.encode(read_file(kData + "smollm2/perplexity.txt"));
    ids.resize(500);
    TempFolder folder;
    folder.write("prompt", t.decode(ids));
    json j = command_json("beam " + kDemo + " -w 4 -n 64 -f " + folder / "prompt");
    CHECK(j["prompt_tokens"] == 500);
    CHECK(j["steps"] == 64);
    CHECK(j["separate_blocks"] == 4 * Cache::blocks_for(563));
    CHECK(j["blocks"].get<int>() <= 0.45 * j["separate_blocks"].get<int>());
    CHECK(j["blocks"].get<int>() >= Cache::blocks_for(563));
    CHECK(j["found"].size() == 4);
    CHECK(j["logprob"] > j["greedy"]["logprob"]);
}

TEST_CASE("beam: on 10 prompts never less likely than greedy search, and likelier on most") {
    int likelier = 0;
    for (const char* text : {"Once upon a time", "The meaning of life is", "To bake bread you need",
                             "In 1905, a young clerk in Bern", "The president of the company said",
                             "My favourite book is", "Water boils at", "def fibonacci(n):",
                             "The old house at the end of the street", "Dear Sir or Madam,"}) {
        json j = command_json("beam " + kDemo + " -n 20 -p \"" + text + "\"");
        CAPTURE(j.dump());
        CHECK(j["logprob"] >= j["greedy"]["logprob"]);
        likelier += j["logprob"] > j["greedy"]["logprob"];
    }
    CHECK(likelier >= 5);
}

TEST_CASE("beam: flags, lengths, and what is wrong") {
    string beam = "beam " + kDemo + " -p Hi ";
    // one beam is greedy search
    json one = command_json(beam + "-w 1 -n 8");
    CHECK(one["ids"] == one["greedy"]["ids"]);
    json all = command_json(beam + "-n 6 -w 3 --length-penalty 1");
    for (const json& found : all["found"])
        CHECK(found["score"].get<double>() ==
              doctest::Approx(found["logprob"].get<double>() / double(found["ids"].size())));
    Ran r = nanocu(beam + "-n 6 -w 3 --all");
    CHECK(r.out.find("--- ") != string::npos);
    CHECK(r.err.find("greedy") != string::npos);
    // to the end of the context, and no further
    CHECK(command_json(beam + "-n 64 --max-context 12")["ids"].size() <= 12 - 1);
    check_command_refuses(beam + "-w 4 --max-rows 4", "--max-rows");
    check_command_refuses(beam + "-w 0", "--width");
    check_command_refuses(beam + "-n 64 --kv-memory 6M", "--kv-memory");
    check_command_refuses("beam " + kDemo + " -p ''", "no tokens");
    check_command_refuses("beam nowhere -p Hi", "nowhere");
}

TEST_CASE("attribute: the sentence that the answer comes from has the largest drop by far") {
    // transformers, fp32, on the same weights: 14.67, -0.27, 0.63
    const string base = "attribute " + kDemo + " --chat -p " + kZubrowka;
    json j = command_json(base + " --answer Lutz");
    REQUIRE(j["segments"].size() == 3);
    CHECK(j["segments"][0]["text"] == "The capital of Zubrowka is Lutz.");
    const double want[] = {14.67, -0.27, 0.63};
    for (int i = 0; i < 3; i++)
        CHECK(std::abs(j["segments"][i]["value"].get<double>() - want[i]) < 0.3);
    CHECK(j["variants"] == 4);
    CHECK(j["cached"].get<int>() > 0);
    // alone and with nothing reused, the same to the bit
    json alone = command_json(base + " --answer Lutz --separate");
    CHECK(alone["segments"] == j["segments"]);
    CHECK(alone["cached"] == 0);
    // its own answer is what chat says
    Ran chat = nanocu("chat " + kDemo + " -t 0 -p " + kZubrowka);
    CHECK(command_json(base)["answer"].get<string>() + "\n" == chat.out);
}

TEST_CASE("attribute: Shapley values add up to the difference of all segments and none") {
    string base = "attribute " + kDemo + " --chat --answer Lutz -p " + kZubrowka;
    json j = command_json(base + " --method shapley --samples 7"), marked, none;
    double sum = 0;
    for (const json& s : j["segments"]) sum += s["value"].get<double>();
    // the same difference as one segment of all
    marked = command_json("attribute " + kDemo + " --chat --answer Lutz --by segment -p \"[[" +
                       kZubrowka.substr(1, kZubrowka.size() - 2) + "]]\"");
    CHECK(sum == doctest::Approx(marked["segments"][0]["value"].get<double>()).epsilon(1e-6));
    CHECK(j["logprob"] == marked["logprob"]);
    CHECK(j["variants"] <= 8);
    CHECK(command_json(base + " --method shapley --samples 7")["segments"] == j["segments"]);
    CHECK(command_json(base + " --method shapley --samples 7 --seed 1")["segments"] != j["segments"]);
    // more orders of the same 8 variants
    json many = command_json(base + " --method shapley --samples 500");
    double first = many["segments"][0]["value"], error = many["segments"][0]["error"];
    CHECK(error < 0.2);
    CHECK(std::abs(first - j["segments"][0]["value"].get<double>()) <
          5 * j["segments"][0]["error"].get<double>() + 0.2);
}

TEST_CASE("attribute: words, sentences and marked segments") {
    auto texts = [](const string& text, const string& by) {
        TempFolder folder;
        folder.write("prompt", text);
        json all = json::array(), j = command_json("attribute " + kDemo + " --chat --answer a --by " +
                                                by + " -f " + folder / "prompt");
        for (const json& s : j["segments"]) all.push_back(s["text"]);
        return all;
    };
    CHECK(texts(" one  two\nthree ", "word") == json{"one", "two", "three"});
    CHECK(texts("One (1.5)? \"Two!\" he said.\nThree\n", "sentence") ==
          json{"One (1.5)?", "\"Two!\"", "he said.", "Three"});
    CHECK(texts("日本。東京！", "sentence") == json{"日本。", "東京！"});
    CHECK(texts("Fixed [[one\nline]], [[two]] end.", "segment") == json{"one\nline", "two"});
}

TEST_CASE("attribute: of 40 segments' variants little more than half of the tokens are computed") {
    const char* words[] = {"one", "two", "red", "dog", "sun", "tea", "hat", "sea", "car", "day"};
    string text, marked;  // the same text; every fifth word a segment, but the first
    for (int i = 0; i < 40; i++) {
        text += str(i ? " " : "", words[i % 10]);
        bool segment = i && i % 5 == 0;
        marked += str(i ? " " : "", segment ? "[[" : "", words[i % 10], segment ? "]]" : "");
    }
    string base = "attribute " + kDemo + " --chat --answer Lutz -p \"";
    json together = command_json(base + text + "\" --by word");
    CHECK(together["variants"] == 41);
    int tokens = together["tokens"], computed = tokens - together["cached"].get<int>();
    CHECK(computed <= 0.55 * tokens);
    // one by one the same to the bit, and all of it is computed
    string few = base + marked + "\" --by segment";
    json alone = command_json(few + " --separate");
    CHECK(command_json(few)["segments"] == alone["segments"]);
    CHECK(alone["cached"] == 0);
}

TEST_CASE("attribute: the heat map opens in a browser, light and dark") {
    TempFolder folder;
    folder.write("prompt", "A <b>bold</b> & \"quoted\" claim. Is <script>alert(1)</script> run? "
                           "A_very_long_word_" + string(80, 'w') + " too.");
    for (const char* how : {"--by sentence --method shapley --samples 2", "--by word"}) {
        Ran r = nanocu("attribute " + kDemo + " --chat --answer '<i>&' " + how + " -f " +
                      folder / "prompt" + " -o " + folder / "page.html");
        CAPTURE(r.err);
        REQUIRE(r.exit == 0);
        string page = read_file(folder / "page.html");
        CHECK(page.find("<script") == string::npos);
        CHECK(page.find("<b>") == string::npos);
        CHECK(page.find("<i>") == string::npos);
        for (const char* outside : {"http:", "https:", "src=", "@import", "url("})
            CHECK(page.find(outside) == string::npos);
        // every value of the table is in the page as text
        std::istringstream lines(r.out);
        for (string value; lines >> value; std::getline(lines, value))
            CHECK(page.find("<sub>" + value + "</sub>") != string::npos);
        CHECK((page.find(" ± ") != string::npos) == (r.out.find(" ± ") != string::npos));
        if (how != string("--by word")) continue;
        Ran seen = shell("tests/browser.py check " + folder / "page.html");
        CAPTURE(seen.out);
        CAPTURE(seen.err);
        if (seen.exit == 77) MESSAGE("no Chromium here: the page is not looked at");
        else CHECK(seen.exit == 0);
    }
}

TEST_CASE("attribute: what is wrong is one line") {
    string base = "attribute " + kDemo + " -p ";
    check_command_refuses(base + "hi --by segment", "[[");
    check_command_refuses(base + "'[[a]] b]]' --by segment", "other half");
    check_command_refuses(base + "hi --answer a", "--chat");
    check_command_refuses(base + "'' --answer a", "no segment");
    check_command_refuses(base + "hi --by line", "--by");
    check_command_refuses(base + "'a b' --by word --answer a --max-context 2", "context");
    TempFolder folder;
    Ran r = nanocu(base + "'a b' --by word --answer a -o " + folder / "no/page.html");
    CHECK(r.exit == 1);
    CHECK(r.err.find("no/page.html") != string::npos);
    CHECK(shell("ls -A " + folder.path).out == "");
}

TEST_CASE("teacher: what is written is what the model gives") {
    Model m(kDemo);
    Tokenizer t(kDemo);
    Engine e(m, options(m, 100));
    TempFolder folder;
    string text = read_file(kData + "smollm2/perplexity.txt").substr(0, 500), lines;
    folder.write("text", text);
    folder.write("texts.jsonl", json(text).dump() + "\n\n" + json{{"text", "Hello"}}.dump() + "\n");
    vector<int> ids = t.encode(text);
    for (const char* more : {"", " --overlap 10"}) {
        bool overlaps = *more;
        Ran r = nanocu("teacher " + kDemo + " " + folder / "text" +
                      " -k 3 --context 40 -o -" + more);
        REQUIRE(r.exit == 0);
        std::istringstream out(r.out);
        size_t at = 0, told = 0;
        for (int n = 0; std::getline(out, lines); n++) {
            json j = json::parse(lines);
            vector<int> chunk = j["ids"];
            int first = j["first"];
            CHECK(j["chunk"] == n);
            CHECK(first == (overlaps && n ? 10 : 0));
            size_t end = std::min(at + 40, ids.size());
            CHECK(chunk == vector<int>(ids.begin() + at, ids.begin() + end));
            REQUIRE(j["top_ids"].size() == chunk.size() - first);
            REQUIRE(j["top_logprobs"].size() == chunk.size() - first);
            told += j["top_ids"].size();
            at += overlaps ? 30 : 40;
            for (size_t i = first; i < chunk.size(); i += 13) {  // one by one
                Request r = greedy({chunk.begin(), chunk.begin() + i + 1}, 1);
                r.logprobs = 3;
                vector<TokenLogprob> want = run_one(e, r).logprobs;
                for (int k = 0; k < 3; k++) {
                    CHECK(j["top_ids"][i - first][k] == want[k + 1].id);
                    CHECK(std::abs(j["top_logprobs"][i - first][k].get<double>() -
                                   want[k + 1].logprob) <= 0.5001e-5);
                }
            }
        }
        CHECK(told == ids.size());  // behind each id once
    }
    string all = nanocu("teacher " + kDemo + " " + folder / "text" + " -k 3 -o -").out;
    string two = nanocu("teacher " + kDemo + " " + folder / "texts.jsonl" +
                       " --jsonl -k 3 -o -").out;
    CHECK(two.starts_with(all));
    CHECK(json::parse(two.substr(all.size()))["ids"] == t.encode("Hello"));
}

TEST_CASE("teacher: after kill -9 it goes on to the same bytes") {
    TempFolder folder;
    string text = read_file(kData + "smollm2/perplexity.txt").substr(0, 1500);
    folder.write("text", text);
    string command = binary() + " teacher " + kDemo + " " + folder / "text" +
                     " -k 4 --context 24 --chunk 24 -o ";
    REQUIRE(shell(command + folder / "want").exit == 0);
    string want = read_file(folder / "want"), out = folder / "out";
    // killed as soon as there is a line; then torn as by a full disk, and left alone
    shell(command + out + " & for i in $(seq 6000); do [ -s " + out + " ] && break; sleep 0.01; "
          "done; kill -9 $!");
    string part = read_file(out);
    CHECK(part.size() > 0);
    CHECK(part.size() < want.size());
    CHECK(want.starts_with(part));
    for (size_t size : {part.size(), want.size() / 2, want.size() - 1, want.size()}) {
        folder.write("out", want.substr(0, size));
        Ran r = shell(command + out);
        CAPTURE(r.err);
        CHECK(r.exit == 0);
        CHECK(read_file(out) == want);
    }
}

TEST_CASE("teacher: what it can't go on with is left alone; what cannot be written is told") {
    TempFolder folder;
    folder.write("text", "The quick brown fox jumps over the lazy dog, again and again.");
    folder.write("other", "Something else that is long enough to be a chunk or two of it.");
    string base = "teacher " + kDemo + " ", in = base + folder / "text" + " --context 8 -k 2";
    string out = " -o " + folder / "out";
    REQUIRE(nanocu(in + out).exit == 0);
    string want = read_file(folder / "out");
    check_command_refuses(base + folder / "other" + " --context 8 -k 2" + out, "another corpus");
    check_command_refuses(base + folder / "text" + " --context 9 -k 2" + out, "settings");
    check_command_refuses(base + folder / "text" + " --context 8 -k 3" + out, "settings");
    check_command_refuses(in + " --overlap 2" + out, "settings");
    CHECK(read_file(folder / "out") == want);
    string changed = want;  // as by another model
    size_t digit = changed.find(".", changed.rfind("top_logprobs")) - 1;
    changed[digit] = changed[digit] == '9' ? '1' : char(changed[digit] + 1);
    folder.write("out", changed);
    check_command_refuses(in + out, "another model");
    CHECK(read_file(folder / "out") == changed);
    folder.write("out", "my notes\n");
    check_command_refuses(in + out, "line 1");
    CHECK(read_file(folder / "out") == "my notes\n");
    string locked = folder / "out2";
    CHECK(shell("flock " + locked + " " + binary() + " " + in + " -o " + locked).exit == 1);
    check_command_refuses(in + " -o /dev/full", "No space left");
    check_command_refuses(in + " -o " + folder / "text", "corpus");
    check_command_refuses(in + " -o " + folder.path, folder.path);
    check_command_refuses(in + " --overlap 8 -o -", "--overlap");
    check_command_refuses(base + folder / "text" + " --context 10000 -o -", "--context");
    check_command_refuses(base + folder / "nothing" + " -o -", "nothing");
    folder.write("bad.jsonl", "\"fine\"\n\n[1]\n");
    check_command_refuses(base + folder / "bad.jsonl" + " --jsonl -o " + folder / "none", "line 3");
    folder.write("bad", "abc\xff");
    check_command_refuses(base + folder / "bad" + " -o " + folder / "none", "byte 3");
}

TEST_CASE("pick-prompt: accuracy and log-probabilities are those of the labels one by one") {
    TempFolder folder;
    folder.write("templates", "{text} I am {label}\n\"Q: {text}\\nA: {label}\"\n");
    folder.write("examples", "{\"text\": \"I won!\", \"label\": \"happy\"}\n"
                             "{\"text\": \"It {text} rains.\", \"label\": \"so sad\"}\n"
                             "{\"text\": \"I lost.\", \"label\": \"so sad\"}\n");
    Ran r = nanocu("pick-prompt " + kDemo + " " + folder / "templates" + " " +
                  folder / "examples" + " --json");
    REQUIRE(r.exit == 0);
    Model m(kDemo);
    Tokenizer t(kDemo);
    Engine e(m, options(m, 100));
    auto logprob = [&](const string& prompt, const string& label) {
        Request r = greedy(t.encode(prompt), 1);
        int from = int(r.prompt.size());
        for (int id : t.encode(label)) r.prompt.push_back(id);
        r.score_prompt = true;
        vector<double> each = run_one(e, r).prompt_logprobs;
        return std::accumulate(each.begin() + from - 1, each.end(), 0.0);
    };
    std::istringstream lines(r.out);
    double last = 0;
    int count = 0;
    for (string line; std::getline(lines, line); count++) {
        json j = json::parse(line);
        bool question = j["template"] == "Q: {text}\nA: {label}";
        vector<double> right;
        int correct = 0;
        for (auto [text, sad] : {std::pair("I won!", false), {"It {text} rains.", true},
                                 {"I lost.", true}}) {
            string prompt = question ? str("Q: ", text, "\nA:") : str(text, " I am");
            double happy = logprob(prompt, " happy"), so_sad = logprob(prompt, " so sad");
            right.push_back(sad ? so_sad : happy);
            correct += (so_sad > happy) == sad;
        }
        double mean = (right[0] + right[1] + right[2]) / 3, squares = 0;
        for (double value : right) squares += (value - mean) * (value - mean);
        CHECK(j["accuracy"].get<double>() == doctest::Approx(correct / 3.0));
        CHECK(j["logprob"].get<double>() == doctest::Approx(mean).epsilon(1e-6));
        CHECK(j["error"].get<double>() == doctest::Approx(std::sqrt(squares / 6)).epsilon(1e-4));
        CHECK(j["logprob"].get<double>() <= last);
        last = j["logprob"];
    }
    CHECK(count == 2);
}

TEST_CASE("pick-prompt: what is wrong is one line with its number") {
    TempFolder folder;
    folder.write("t", "{text} {label}\n");
    folder.write("e", "{\"text\": \"a\", \"label\": \"b\"}\n{\"text\": \"a\", \"label\": \"c\"}\n");
    auto refuses = [&](const string& templates, const string& examples, const string& text,
                       const string& more = "") {
        folder.write("t2", templates);
        folder.write("e2", examples);
        string files = folder / (templates.empty() ? "t" : "t2") + " " +
                       folder / (examples.empty() ? "e" : "e2");
        check_command_refuses("pick-prompt " + kDemo + " " + files + more, text);
    };
    refuses("\n{text} {label}\n{label} {text}\n", "", "line 3");
    refuses("{label}\n", "", "line 1");
    refuses("\"{text} {label}\n", "", "line 1");
    refuses("", "{\"text\": \"a\", \"label\": \"b\"}\n", "only one label");
    refuses("", "{\"text\": \"a\", \"label\": \"b\"}\n{\"text\": 1, \"label\": \"b\"}\n", "line 2");
    refuses("", "{\"text\": \"a\"}\n", "line 1");
    refuses("", "", "not among", " --label b --label d");
    check_command_refuses("pick-prompt " + kDemo + " nothing " + folder / "e", "nothing");
}
