// The pages that `nanocu explain` writes: their record against the engine's own of the same
// run, and the pages themselves in a browser.
#include "common.hpp"

#include "../docs/commands/openai.hpp"

namespace {

const string kExplain = binary() + " explain " + kDemo + " --threads 1 ";

Ran explain(const string& arguments) { return shell(kExplain + arguments); }

// The record inside a page.
json record_of(const string& page) {
    const string text = read_file(page), begin = "id=\"record\">";
    size_t from = text.find(begin);
    REQUIRE(from != string::npos);
    from += begin.size();
    return json::parse(text.substr(from, text.find("</script>", from) - from));
}

// Runs the same requests on an engine that nobody observes, and compares step by step.
void check_record(const json& record, Session& s, const vector<Request>& requests) {
    Engine& engine = s.engine;
    std::map<std::pair<int, int>, size_t> place;
    for (const json& q : record["sequences"]) place[{q["request"], q["sample"]}] = place.size();
    vector<vector<int>> ids(place.size());
    vector<string> finish(place.size());
    vector<int> cached(place.size());
    for (const Request& r : requests) engine.add(r);
    size_t k = 0;
    for (; engine.busy() && k < record["steps"].size(); k++) {
        const json& step = record["steps"][k];
        std::set<size_t> drawn, ended;
        for (const Output& o : engine.step()) {
            size_t i = place.at({o.request, o.sample});
            ids[i].push_back(o.id);
            cached[i] = o.cached;
            drawn.insert(i);
            if (o.finish) finish[i] = o.finish, ended.insert(i);
        }
        CAPTURE(k);
        std::map<string, int> counts = {{"used", 0}, {"shared", 0}, {"cached", 0}, {"free", 0}};
        for (int b = 0; b < engine.cache.blocks(); b++) {
            int refs = engine.cache.refs(b);
            counts["used"] += refs > 0, counts["shared"] += refs > 1;
            counts[engine.cache.findable(b) ? "cached" : "free"] += refs == 0;
        }
        CHECK(step["counts"] == json(counts));
        std::set<size_t> of_record;
        for (const json& draw : step["draws"]) {
            size_t i = draw["sequence"];
            of_record.insert(i);
            CHECK(ids[i].back() == draw["id"]);
            CHECK(requests[record["sequences"][i]["request"]].prompt.size() + ids[i].size() - 1 ==
                  draw["position"]);
        }
        CHECK(of_record == drawn);
        CHECK(step["ended"].get<std::set<size_t>>() == ended);
    }
    CHECK_FALSE(engine.busy());
    CHECK(k == record["steps"].size());
    CHECK(record["preemptions"] == engine.preemptions);
    CHECK(record["blocks"] == engine.cache.blocks());
    for (auto [which, i] : place) {
        const json& q = record["sequences"][i];
        CHECK(q["prompt"] == requests[which.first].prompt);
        CHECK(q["ids"] == ids[i]);
        CHECK(q["finish"] == finish[i]);
        CHECK(q["cached"] == cached[i]);
    }
}

// What must be so in any record, from one step to the next.
void check_consistent(const json& record) {
    size_t count = record["sequences"].size(), preempted = 0;
    vector<vector<int>> tables(count);
    vector<int> computed(count);
    std::set<int> findable;
    double last = 0;
    for (const json& step : record["steps"]) {
        CHECK(step["begin"] >= last);
        last = step["begin"].get<double>() + step["seconds"].get<double>();
        CHECK_FALSE(step["replayed"]);  // no GPU here
        preempted += step["preempted"].size();
        for (int i : step["preempted"]) computed[i] = 0;
        for (const json& part : step["parts"]) {
            int i = part["sequence"], begin = part["begin"], n = part["count"];
            if (computed[i] == 0) CHECK(part["found"] == begin);
            else CHECK(begin == computed[i]);
            computed[i] = begin + n;
            CHECK((part["kind"] == "decode") == (n == 1 && part["kind"] != "recompute" &&
                begin >= int(record["sequences"][i]["prompt"].size())));
        }
        for (auto& [i, table] : step["tables"].items()) tables[std::stoi(i)] = table.get<vector<int>>();
        for (auto& [i, n] : step["computed"].items()) computed[std::stoi(i)] = n;
        for (int b : step["findable"]) CHECK(findable.insert(b).second);
        for (int b : step["forgotten"]) CHECK(findable.erase(b) == 1);
        std::map<int, int> refs;
        for (size_t i = 0; i < count; i++) {
            CHECK(int(tables[i].size()) == Cache::blocks_for(computed[i]));
            for (int b : tables[i]) refs[b]++;
        }
        int shared = 0, cached = 0;
        for (auto [b, n] : refs) shared += n > 1;
        for (int b : findable) cached += !refs.contains(b);
        CHECK(step["counts"] == json({{"used", refs.size()}, {"shared", shared}, {"cached", cached},
            {"free", record["blocks"].get<int>() - int(refs.size()) - cached}}));
        for (int b : step["freed"]) CHECK_FALSE(refs.contains(b));
    }
    CHECK(preempted == record["preemptions"]);
    for (const json& step : record["steps"]) for (const json& d : step["draws"]) {
        REQUIRE(d["candidates"].size() == 20);
        const json& stages = d["stages"];
        for (size_t n = 1; n < stages.size(); n++) {
            CHECK(stages[n]["kept"] <= stages[n - 1]["kept"]);
            CHECK(stages[n]["mass"] <= stages[n - 1]["mass"]);
        }
        bool found = false;
        for (const json& c : d["candidates"]) {
            REQUIRE(c["p"].size() == stages.size());
            if (c["id"] != d["id"]) continue;
            found = true;
            CHECK(c["p"].back() > 0);
            if (!d.contains("random")) continue;
            double from = c["from"], random = d["random"], p = c["p"].back();
            CHECK(from <= random + 1e-8);
            CHECK(random <= from + p + 1e-8);
        }
        CHECK(found);
    }
}

// The page does what it should in Chromium, where there is one: on Debian there has to be.
void check_page(const string& page) {
    Ran r = shell("tests/browser.py check " + page + " --script explain");
    CAPTURE(r.out);
    CAPTURE(r.err);
    bool debian = shell(". /etc/os-release && test $ID = debian").exit == 0;
    if (r.exit == 77 && !debian) {
        MESSAGE("skipped: the page in a browser; ", r.out);
        return;
    }
    CHECK(r.exit == 0);
}

const char* kLines[] = {
    R"("chat", "messages": [{"role": "user", "content": "Why is the sky blue? Answer in one
 sentence."}], "max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "seed": 1)",
    R"("chat", "messages": [{"role": "user", "content": "Why is grass green? Answer in one
 sentence."}], "max_tokens": 30, "temperature": 0.7, "min_p": 0.05, "seed": 2)",
    R"("chat", "messages": [{"role": "user", "content": "Why is the sky blue? </script><img src=x
 onerror=alert(1)>{{record}} \u65e5\u672c"}], "max_tokens": 20, "n": 2, "temperature": 0.9,
 "top_k": 40, "seed": 3)",
    R"("", "prompt": "Once upon a time there was a little block of memory that", "max_tokens": 30,
 "temperature": 0.8, "repetition_penalty": 1.1, "seed": 4, "n": 2)",
};

}  // namespace

TEST_CASE("explain: a prompt's samples are those of generate, and so is their likelihood") {
    TempFolder folder;
    const string flags = " -p 'The three most important ideas in computer science are' -n 24 "
        "--samples 3 -t 0.8 --top-p 0.9 --min-p 0.02 --seed 1 --kv-memory 6M ";
    Ran r = explain(flags + "-o " + folder / "page.html" + " --trace " + folder / "run.json");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    json record = record_of(folder / "page.html");
    check_consistent(record);
    Ran same = nanocu("generate " + kDemo + flags + "--logprobs 20 --json --threads 1");
    REQUIRE(same.exit == 0);
    std::istringstream lines(same.out);
    string line;
    for (size_t i = 0; std::getline(lines, line); i++) {
        json j = json::parse(line);
        REQUIRE(i < record["sequences"].size());
        CHECK(record["sequences"][i]["ids"] == j["ids"]);
        CHECK(record["sequences"][i]["finish"] == j["finish_reason"]);
        CHECK(record["sequences"][i]["cached"] == j["usage"]["cached_tokens"]);
        // differences of logits are differences of log-probabilities, before temperature
        for (const json& step : record["steps"]) for (const json& d : step["draws"]) {
            if (d["sequence"] != i) continue;
            const json& of_token = j["logprobs"][d["position"].get<size_t>() -
                                                 record["sequences"][i]["prompt"].size()];
            const json &first = d["candidates"][0], &tenth = d["candidates"][9];
            CHECK(of_token["top"][0]["id"] == first["id"]);
            CHECK(of_token["top"][9]["id"] == tenth["id"]);
            double logits = first["logit"].get<double>() - tenth["logit"].get<double>();
            double logprobs = of_token["top"][0]["logprob"].get<double>() -
                              of_token["top"][9]["logprob"].get<double>();
            CHECK(logits == doctest::Approx(logprobs).epsilon(1e-4));
            double p = first["p"][0], other = tenth["p"][0];
            CHECK(std::log(p / other) == doctest::Approx(logits / 0.8).epsilon(1e-4));
        }
    }
    CHECK(lines.eof());

    size_t copied = 0;
    for (const json& step : record["steps"]) copied += step["copied"].size();
    CHECK(copied == 2);  // of the prompt's block, by two of the three samples
    CHECK(r.out == str(folder / "page.html", ": ", record["steps"].size(), " steps, 72 tokens, 0 ",
                       "blocks found in the cache, 2 copied, 0 preemptions\n"));
    json trace = json::parse(read_file(folder / "run.json"));
    size_t steps = 0, parts = 0, expected = 0;
    for (const json& e : trace["traceEvents"]) {
        if (e["ph"] != "X") continue;
        CHECK(e["dur"] > 0);
        (e["tid"] == 0 ? steps : parts)++;
    }
    for (const json& step : record["steps"]) expected += step["parts"].size();
    CHECK(steps == record["steps"].size());
    CHECK(parts == expected);
    check_page(folder / "page.html");
}

TEST_CASE("explain: a batch's hits, copies, preemptions and blocks are the engine's") {
    TempFolder folder;
    string batch;
    for (size_t i = 0; i < std::size(kLines); i++) {
        string body = kLines[i];
        std::erase(body, '\n');
        bool chat = body.starts_with("\"chat\"");
        body = body.substr(body.find(", ") + 2);
        batch += str(R"({"custom_id": ")", i, R"(", "url": "/v1/)", chat ? "chat/" : "",
                     R"(completions", "body": {)", body, "}}\n");
    }
    folder.write("in.jsonl", batch);
    Ran r = explain("--batch " + folder / "in.jsonl" + " --kv-memory 10M --chunk 24 -o " +
                    folder / "page.html");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    json record = record_of(folder / "page.html");
    check_consistent(record);

    Flags f;
    f.model = kDemo;
    f.kv_memory = 10 << 20;
    f.chunk = 24;
    Session s(f, true);
    vector<Request> requests;
    std::optional<Chat> format;
    std::istringstream lines(batch);
    for (string line; std::getline(lines, line);) {
        Job job;
        read_job(s, format, json::parse(line), job);
        requests.push_back(job.request);
    }
    check_record(record, s, requests);

    size_t found = 0, copied = 0, again = 0;
    for (const json& step : record["steps"]) {
        found += step["found"].size(), copied += step["copied"].size();
        for (const json& part : step["parts"]) again += part["kind"] == "recompute";
    }
    CHECK(found > 0);
    CHECK(copied > 0);
    CHECK(again > 0);
    CHECK(record["preemptions"] > 0);
    check_page(folder / "page.html");
}

TEST_CASE("explain: a conversation finds what it said before in the cache") {
    TempFolder folder;
    Ran r = explain("--chat 'What is the capital of France?' 'And of Spain?' -t 0 -o " +
                    folder / "page.html");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    json record = record_of(folder / "page.html");
    check_consistent(record);
    Ran same = shell("printf 'What is the capital of France?\\nAnd of Spain?\\n' | " + binary() +
                     " chat " + kDemo + " -t 0 --threads 1");
    REQUIRE(record["sequences"].size() == 2);
    Tokenizer tokenizer(kDemo);
    string said;
    for (const json& q : record["sequences"]) {
        vector<int> ids = q["ids"];
        CHECK(ids.back() == tokenizer.eos);
        ids.pop_back();
        said += tokenizer.decode(ids) + "\n";
    }
    CHECK(same.out == said);
    CHECK(record["sequences"][0]["cached"] == 0);
    CHECK(record["sequences"][1]["cached"] == 32);
    for (const json& step : record["steps"]) for (const json& d : step["draws"]) {
        CHECK(d["stages"].back()["kept"] == 1);
        CHECK(d["candidates"][0]["id"] == d["id"]);
    }
}

TEST_CASE("explain: a mistake is one line, and leaves no file") {
    TempFolder folder;
    folder.write("bad.jsonl", "{\"custom_id\": \"a\", \"url\": \"/v1/chat\", \"body\": {}}\n");
    folder.write("empty.jsonl", "\n");
    const string page = folder / "page.html", to = " -o " + page;
    const std::pair<string, string> mistakes[] = {
        {"-p Hello", "--output"},
        {"-p Hello --chat Hello" + to, "give one of them"},
        {"-p Hello -o " + folder / "none/page.html", "No such file"},
        {"-p Hello -o /dev/null", "/dev/null: is not a file"},
        {"-p Hello --trace " + page + to, "give two names"},
        {"--batch " + folder / "bad.jsonl" + to, "bad.jsonl: line 1: url /v1/chat"},
        {"--batch " + folder / "bad.jsonl" + " -o " + folder / "bad.jsonl", "is the input"},
        {"--batch " + folder / "empty.jsonl" + to, "holds no requests"},
        {"--batch " + folder / "none.jsonl" + to, "none.jsonl"},
        {"-p Hello -t -1 " + to, "temperature"},
        {"-p '' " + to, "no tokens"},
        {"-p Hello --kv-memory 1M -n 100" + to, "raise --kv-memory"},
    };
    for (auto& [arguments, says] : mistakes) {
        Ran r = explain(arguments + " </dev/null");
        CAPTURE(arguments);
        CAPTURE(r.err);
        CHECK(r.exit == 1);
        CHECK(r.out == "");
        CHECK(r.err.starts_with("nanocu: "));
        CHECK(r.err.find('\n') == r.err.size() - 1);
        CHECK(r.err.find(says) != string::npos);
    }
    for (const auto& file : std::filesystem::directory_iterator(folder.path))
        CHECK(file.path().extension() == ".jsonl");
}

TEST_CASE("explain: Ctrl-C ends with a whole page of what was done") {
    TempFolder folder;
    const string page = folder / "page.html";
    Ran r = shell(kExplain + "-p 'Once upon a time' -n 8000 --ignore-eos -o " + page +
                  " & pid=$!; while ! test -e " + page + ".part && kill -0 $pid; do sleep 0.01; "
                  "done; sleep 1; kill -INT $pid; wait $pid");
    CHECK(r.exit == 130);
    json record = record_of(page);
    CHECK(record["interrupted"] == true);
    CHECK(record["steps"].size() > 0);
    CHECK_FALSE(std::filesystem::exists(page + ".part"));
}
