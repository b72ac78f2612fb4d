// `nanocu batch`: OpenAI's batch lines in and out, wrong ones, and going on after any interruption.
#include "common.hpp"

#include "../docs/commands/files.hpp"

namespace {

// Requests as lines; a number in place of a field's value stands for itself.
string request_line(const string& id, const json& body, bool chat = false) {
    return json{{"custom_id", id}, {"method", "POST"}, {"body", body},
                {"url", chat ? "/v1/chat/completions" : "/v1/completions"}}.dump() + "\n";
}

// Some hundred short requests of ids for a tiny model, half of them drawn with a seed.
string mixed_requests(int count) {
    std::mt19937 random(5);
    string lines;
    for (int i = 0; i < count; i++) {
        json body = {{"prompt", json::array()}, {"max_tokens", 1 + int(random() % 30)}};
        for (int n = 1 + int(random() % 60), shared = int(random() % 2) * 20, j = 0; j < n; j++)
            body["prompt"].push_back(j < shared ? j : int(random() % 100));
        if (i % 2) body.update({{"temperature", 0.9}, {"seed", i}, {"top_p", 0.9}});
        else body["temperature"] = 0;
        if (i % 5 == 0) body["n"] = 3;
        if (i % 7 == 0) body["logprobs"] = 2;
        if (i % 14 == 0) body["echo"] = true;
        if (i % 11 == 0) body["repetition_penalty"] = 1.3;
        lines += request_line(str("request ", i), body);
    }
    return lines;
}

// Results by custom_id, without what may differ between runs. Each id must be there once.
std::map<string, json> results_of(const string& text) {
    std::map<string, json> results;
    for (const string& line : lines_of(text)) {
        json j = json::parse(line);
        string id = j["custom_id"].is_null() ? str("line ", j["line"].get<int>())
                                             : j["custom_id"].get<string>();
        REQUIRE(!results.contains(id));
        CHECK(j.contains("error"));
        j.erase("id"), j["response"].erase("request_id");
        json& body = j["response"]["body"];
        body.erase("id"), body.erase("created");
        if (body.contains("usage")) body["usage"].erase("prompt_tokens_details");
        results[id] = j;
    }
    return results;
}

const string kTinyBatch = "batch " + kData + "models/llama3 ";

}  // namespace

TEST_CASE("batch: results do not depend on rows, KV memory, prefix cache or threads, to the bit") {
    TempFolder folder;
    folder.write("in.jsonl", mixed_requests(120));
    std::map<string, json> expected;
    for (const char* flags : {"--max-rows 64", "--max-rows 1", "--max-rows 8", "--chunk 5",
                              "--kv-memory 150K --max-context 128", "--no-prefix-cache",
                              "--threads 1"}) {
        CAPTURE(flags);
        Ran r = nanocu(kTinyBatch + folder / "in.jsonl" + " -o - " + string(flags));
        CAPTURE(r.err);
        REQUIRE(r.exit == 0);
        CHECK(r.err.find("120 done, 0 refused") != string::npos);
        auto results = results_of(r.out);
        CHECK(results.size() == 120);
        if (expected.empty()) expected = results;
        CHECK(results == expected);
    }
}

TEST_CASE("batch: wrong lines get status 400 and a reason, the others are done, exit 1") {
    TempFolder folder;
    const std::vector<std::pair<string, string>> wrong = {
        {"{bad\r\n", "JSON"},
        {"[1]\n", "custom_id"},
        {"{\"custom_id\":7}\n", "custom_id"},
        {"{\"custom_id\":\"\xff\"}\n", "JSON"},
        {request_line("3", {{"prompt", {1}}}), "was there before"},
        {request_line("stream", {{"prompt", {1}}, {"stream", true}}), "stream"},
        {request_line("field", {{"prompt", {1}}, {"best_of", 2}}), "best_of"},
        {request_line("type", {{"prompt", {1}}, {"max_tokens", 2.5}}), "max_tokens"},
        {request_line("large", {{"prompt", {1}}, {"max_tokens", 1ll << 40}}), "max_tokens"},
        {request_line("hot", {{"prompt", {1}}, {"temperature", -1}}), "temperature"},
        {request_line("id", {{"prompt", {1, 100000}}}), "vocabulary"},
        {request_line("none", {{"prompt", json::array()}}), "prompt"},
        {request_line("long", {{"prompt", std::vector<int>(100000, 1)}}), "context"},
        {request_line("many", {{"prompt", {1}}, {"n", 2000}}), "n: "},
        {request_line("text", {{"prompt", "hello"}}), "tokenizer.json"},
        {request_line("chat", {{"messages", json::array()}}, true), "chat template"},
        {request_line("top", {{"messages", json::array()}, {"top_logprobs", 2}}, true), "logprobs"},
        {"{\"custom_id\":\"url\",\"url\":\"/v1/embeddings\",\"body\":{}}\n", "url"},
        {"{\"custom_id\":\"body\",\"url\":\"/v1/completions\"}\n", "body"},
        {"{\"custom_id\":\"get\",\"url\":\"/v1/completions\",\"body\":{},\"method\":\"GET\"}\n",
         "method"},
        {string(100, '[') + "\n", "nested"},
    };
    string lines;
    for (int i = 0; i < 90; i++) {
        lines += request_line(str(i), {{"prompt", {1, 2, i}}, {"max_tokens", 3},
                                       {"model", "any"}, {"user", "me"}, {"stop", nullptr}});
        if (i % 10 == 0) lines += i % 20 ? "\n" : "  \r\n";  // empty ones do not count
        if (i >= 4 && size_t(i - 4) < wrong.size()) lines += wrong[i - 4].first;
    }
    lines.pop_back();  // the last line has no end
    folder.write("in.jsonl", lines);
    string command = kTinyBatch + folder / "in.jsonl" + " -o " + folder / "out.jsonl";
    for (int run = 0; run < 2; run++) {  // the second finds all done
        Ran r = nanocu(command);
        CHECK(r.exit == 1);
        string says = str("nanocu: ", wrong.size(), " of ", 90 + wrong.size(), " requests");
        CHECK(r.err.find(says) != string::npos);
        std::vector<string> reasons;
        int done = 0;
        for (const string& line : lines_of(read_file(folder / "out.jsonl"))) {
            json j = json::parse(line), response = j["response"];
            done += response["status_code"] == 200;
            if (response["status_code"] == 400) reasons.push_back(response["body"]["error"]["message"]);
        }
        CHECK(done == 90);
        REQUIRE(reasons.size() == wrong.size());
        for (size_t i = 0; i < wrong.size(); i++) {
            CAPTURE(reasons[i]);
            CHECK(reasons[i].find(wrong[i].second) != string::npos);
        }
    }
}

TEST_CASE("batch: killed at any moment and run again, it ends with every result once, unchanged") {
    TempFolder folder;
    std::mt19937 random(9);
    string lines;
    for (int i = 0; i < 60; i++) {
        json body = {{"max_tokens", 4 + i % 9}, {"temperature", 0}};
        string question = str("Tell me about the number ", i, ".");
        if (i % 2) body["messages"] = {{{"role", "user"}, {"content", question}}};
        else body["prompt"] = question;
        lines += request_line(str("no. ", i), body, i % 2);
    }
    lines += "no JSON\n" + request_line("no. 5", {{"prompt", "again"}});
    folder.write("in.jsonl", lines);
    string command = "batch " + kDemo + " " + folder / "in.jsonl" + " -o " + folder.path;
    Ran whole = nanocu(command + "/whole.jsonl");
    CHECK(whole.exit == 1);
    auto expected = lines_of(read_file(folder / "whole.jsonl"));
    CHECK(expected.size() == 62);

    int killed = 0;
    Ran r = {137, "", ""};
    for (int i = 0; i < 12 && r.exit == 137; i++) {
        // killed when there is more than before; a few rows, so that results come one by one
        string part = folder / "part.jsonl";
        size_t more = (fs::exists(part) ? fs::file_size(part) : 0) + random() % 5000;
        r = shell(str(binary(), " ", command, "/part.jsonl --max-rows 4 & pid=$!; while kill -0 $pid "
                      "&& [ $(cat ", part, " | wc -c) -le ", more, " ]; do sleep 0.005; done; "
                      "kill -9 $pid; wait $pid"));
        killed += r.exit == 137;
        if (i % 3 || !std::filesystem::exists(folder / "part.jsonl")) continue;
        std::ofstream(folder / "part.jsonl", std::ios::app) << "{\"id\":\"batch-12";  // a torn line
    }
    CHECK(killed >= 2);
    if (r.exit == 137) r = nanocu(command + "/part.jsonl");
    CHECK(r.exit == 1);
    auto sorted = [&](const string& file) {
        std::map<string, json> results;
        for (const string& line : lines_of(read_file(folder / file))) {
            json j = json::parse(line);
            json& body = j["response"]["body"];
            string key = str(j["custom_id"], j.value("line", 0));
            CHECK(!results.contains(key));
            j.erase("id"), j["response"].erase("request_id"), body.erase("id");
            body.erase("created");
            if (body.contains("usage")) body["usage"].erase("prompt_tokens_details");
            results[key] = j;
        }
        return results;
    };
    CHECK(sorted("part.jsonl") == sorted("whole.jsonl"));
}

TEST_CASE("batch: Ctrl-C once finishes what runs, and the next run does the rest") {
    TempFolder folder;
    string lines;
    for (int i = 0; i < 40; i++)
        lines += request_line(str(i), {{"prompt", "Once"}, {"max_tokens", 60}, {"ignore_eos", true}});
    folder.write("in.jsonl", lines);
    string command = binary() + " batch " + kDemo + " " + folder / "in.jsonl" + " --max-rows 2 -o " +
                     folder / "out.jsonl";
    Ran r = shell("timeout -s INT 1 " + command + "; echo $?");
    CHECK(r.out == "124\n");  // timeout's own; the command ended by itself
    auto some = lines_of(read_file(folder / "out.jsonl"));
    CHECK(some.size() < 40);
    for (const string& line : some)
        CHECK(json::parse(line)["response"]["body"]["usage"]["completion_tokens"] == 60);
    CHECK(shell(command).exit == 0);
    CHECK(results_of(read_file(folder / "out.jsonl")).size() == 40);
}

TEST_CASE("batch: chat, n, stop, logprobs and echo look as OpenAI's do") {
    TempFolder folder;
    json ask = {{{"role", "system"}, {"content", "Be brief."}},
                {{"role", "user"}, {"content", {{{"type", "text"}, {"text", "What is the capital "}},
                                                {{"type", "text"}, {"text", "of France?"}}}}}};
    folder.write("in.jsonl",
        request_line("chat", {{"messages", ask}, {"temperature", 0}, {"n", 2}, {"logprobs", true},
                              {"top_logprobs", 2}, {"max_completion_tokens", 20}}, true) +
        request_line("stop", {{"messages", ask}, {"temperature", 0}, {"stop", {"zebra", " is"}}},
                     true) +
        request_line("echo", {{"prompt", "The capital of France is"}, {"temperature", 0},
                              {"max_tokens", 1}, {"echo", true}, {"logprobs", 1}}) +
        request_line("score", {{"prompt", "The capital of France is Paris"}, {"max_tokens", 0},
                               {"echo", true}, {"logprobs", 0}}));
    Ran r = nanocu("batch " + kDemo + " " + folder / "in.jsonl" + " -o -");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    auto all = results_of(r.out);
    auto body = [&](const char* id) { return all.at(id)["response"]["body"]; };

    json chat = body("chat");
    CHECK(chat["object"] == "chat.completion");
    REQUIRE(chat["choices"].size() == 2);
    for (int i : {0, 1}) {
        json choice = chat["choices"][i];
        CHECK(choice["index"] == i);
        CHECK(choice["message"] == json{{"role", "assistant"},
                                        {"content", "The capital of France is Paris."}});
        CHECK(choice["finish_reason"] == "stop");
        json content = choice["logprobs"]["content"];
        CHECK(content.size() == 8);  // with the end
        CHECK(content[0]["token"] == "The");
        CHECK(content[0]["bytes"] == json{'T', 'h', 'e'});
        CHECK(content[0]["top_logprobs"].size() == 2);
        CHECK(content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"]);
    }
    CHECK(chat["usage"]["completion_tokens"] == 16);
    CHECK(chat["usage"]["total_tokens"] == 16 + chat["usage"]["prompt_tokens"].get<int>());

    json stop = body("stop")["choices"][0];
    CHECK(stop["message"]["content"] == "The capital of France");
    CHECK(stop["finish_reason"] == "stop");
    CHECK(stop["logprobs"].is_null());

    json echo = body("echo")["choices"][0], lists = echo["logprobs"];
    CHECK(echo["text"].get<string>().starts_with("The capital of France is"));
    CHECK(echo["finish_reason"] == "length");
    CHECK(lists["tokens"].size() == 6);
    CHECK(lists["token_logprobs"][0].is_null());
    CHECK(lists["top_logprobs"][1].size() == 1);
    CHECK(lists["text_offset"] == json{0, 3, 11, 14, 21, 24});
    json scored = body("score")["choices"][0];
    CHECK(scored["text"] == "The capital of France is Paris");
    CHECK(scored["logprobs"]["tokens"].size() == 6);
    CHECK(body("score")["usage"]["completion_tokens"] == 0);
    for (int i = 1; i < 5; i++)
        CHECK(scored["logprobs"]["token_logprobs"][i] == lists["token_logprobs"][i]);
}

TEST_CASE("batch: what a message may not have is refused, not ignored") {
    TempFolder folder;
    const std::vector<std::pair<json, string>> wrong = {
        {{{"role", "user"}, {"content", "Hi"}, {"name", "me"}}, "field name"},
        {{{"role", "user"}, {"content", nullptr}}, "content"},
        {{{"role", "user"}}, "content"},
        {{{"role", "user"}, {"content", 7}}, "content"},
        {{{"role", "user"}, {"content", {{{"type", "image_url"}, {"image_url", "x"}}}}}, "type text"},
        {{{"role", "tool"}, {"content", "Hi"}}, "user"},
    };
    string lines;
    for (size_t i = 0; i < wrong.size(); i++)
        lines += request_line(str(i), {{"messages", json::array({wrong[i].first})}}, true);
    json fine = {{"role", "user"}, {"content", "Hi"}, {"tool_calls", nullptr}};
    lines += request_line("fine", {{"messages", json::array({fine})}, {"max_tokens", 1}}, true);
    folder.write("in.jsonl", lines);
    Ran r = nanocu("batch " + kDemo + " " + folder / "in.jsonl" + " -o -");
    CHECK(r.exit == 1);
    auto all = results_of(r.out);
    for (size_t i = 0; i < wrong.size(); i++) {
        json response = all.at(str(i))["response"];
        CAPTURE(response.dump());
        CHECK(response["status_code"] == 400);
        CHECK(response["body"]["error"]["message"].get<string>().find(wrong[i].second) != string::npos);
    }
    CHECK(all.at("fine")["response"]["status_code"] == 200);
}

TEST_CASE("batch: what is not its own output is left alone; what cannot be written is told") {
    TempFolder folder;
    folder.write("in.jsonl", request_line("a", {{"prompt", {1, 2}}, {"max_tokens", 2}}));
    string in = kTinyBatch + folder / "in.jsonl";
    for (const char* text : {"my notes", "my notes\n", "{\"id\":\"batch-1\nmore\n",
                             "{\"id\":\"batch-1\"}\n"}) {
        folder.write("notes", text);
        check_refused(in + " -o " + folder / "notes", "notes");
        CHECK(read_file(folder / "notes") == text);
    }
    check_refused(in + " -o " + folder / "in.jsonl", "is the input");
    check_refused(in + " -o " + folder / "no/such", "no/such");
    check_refused(in + " -o " + folder.path, folder.path);
    check_refused(kTinyBatch + folder / "nothing" + " -o -", "nothing");
    check_refused(kTinyBatch + folder.path + " -o -", folder.path);
    check_refused(in, "--output");
    Ran full = nanocu(in + " -o /dev/full");
    CHECK(full.exit == 1);
    CHECK(full.err.find("No space left") != string::npos);
    // one run at a time
    string lock = "flock " + folder / "out.jsonl" + " ";
    CHECK(shell(lock + binary() + " " + in + " -o " + folder / "out.jsonl").exit == 1);
    CHECK(nanocu(in + " -o " + folder / "out.jsonl").exit == 0);
}

TEST_CASE("batch: long lines, and input as a stream") {
    TempFolder folder;
    string lines = request_line("a", {{"prompt", {1, 2}}, {"max_tokens", 2},
                                      {"user", string(1 << 20, 'x')}});
    lines += request_line("b", {{"prompt", {1, 2}}, {"max_tokens", 2}});
    folder.write("in.jsonl", lines);
    Ran r = shell("cat " + folder / "in.jsonl" + " | " + binary() + " " + kTinyBatch + "- -o -");
    CHECK(r.exit == 0);
    CHECK(results_of(r.out).size() == 2);
    // 200 MB through a process that may have 150: not read ahead, and nothing kept
    if (kSanitized) return;  // which takes address space by terabytes
    folder.write("make.py", "for i in range(200):\n    print('{\"custom_id\":\"%d\",\"url\":\"/v1/"
                 "completions\",\"body\":{\"prompt\":[1],\"max_tokens\":1,\"user\":\"%s\"}}' % "
                 "(i, 'x' * 1000000))\n");
    r = shell("python3 " + folder / "make.py" + " | ( ulimit -v 150000; " + binary() + " " +
              kTinyBatch + "- -o - --threads 1 --kv-memory 1M )");
    CHECK(r.exit == 0);
    CHECK(results_of(r.out).size() == 200);
}

TEST_CASE("engine: what requests share is computed once, and held once") {
    Model m(kData + "models/llama3");
    EngineOptions o;
    o.device = "cpu", o.max_rows = 16, o.chunk = 64, o.kv_memory = 64 << 20;
    std::vector<int> prefix;
    for (int i = 0; i < 200; i++) prefix.push_back(i * 31 % 100);
    SUBCASE("requests that come together") {
        Engine e(m, o);
        std::vector<Request> requests(8, greedy(prefix, 4));
        for (int i = 0; i < 8; i++) requests[i].prompt.push_back(i);
        int computed = 0;
        for (auto& [key, f] : run_all(e, requests)) computed += 201 - f.cached;
        CHECK(computed == 201 + 7 * (201 - 192));
    }
    SUBCASE("samples of one prompt: the issue's 8 of 1,000 tokens, in small") {
        auto peak = [&](int count, int samples) {
            Engine e(m, o);
            for (int i = 0; i < count; i++) {
                Request r = greedy(prefix, 20);
                r.prompt[0] = i, r.samples = samples, r.ignore_eos = true;
                r.sampling.temperature = 1, r.sampling.seed = i;
                e.add(r);
            }
            int used = 0;
            while (e.busy()) {
                e.step();
                used = std::max(used, e.cache.blocks() - e.cache.free());
            }
            return used;
        };
        CHECK(peak(1, 8) <= 0.45 * peak(8, 1));
    }
}
