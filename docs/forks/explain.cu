// explain: shows what the engine did, step by step, as one HTML page that needs nothing else: which
// tokens each step computed, how the block pool changed, and for every token that was drawn the
// candidates it was drawn from.
//
//   build/forks/explain models/smollm2 -p "Once upon a time" -n 30 --samples 3 -o page.html
//
// Recorder is an Observer of the engine; what it notes is the record, a JSON object that explain.html
// (the page, beside this file) is given. Everything in it is the engine's own: the draws are
// computed again from the same logits with the functions of sampler.hpp.
#define NANOCU_NO_MAIN
#include "../../nano.cu"

const char kPage[] =
#include "explain.html"
    ;

constexpr size_t kCandidates = 20;  // shown of a draw

// A file that appears when it is whole, or not at all.
class WholeFile {
public:
    explicit WholeFile(const string& path) : path(path), temporary(path + ".part") {
        if (fs::exists(path) && !fs::is_regular_file(path)) fail(path, ": is not a file");
        file.open(temporary, std::ios::binary);
        if (!file) fail(path, ": ", strerror(errno), "; give another name");
    }
    WholeFile(const WholeFile&) = delete;
    ~WholeFile() { if (!finished) remove(temporary.c_str()); }

    void finish(const string& text) {
        file << text;
        file.close();
        if (!file || rename(temporary.c_str(), path.c_str()))
            fail(path, ": ", strerror(errno), "; nothing was written");
        finished = true;
    }

private:
    string path, temporary;
    std::ofstream file;
    bool finished = false;
};

// How id came to be drawn from logits [V], penalties applied: what each cut of s left of the
// vocabulary, and the likeliest candidates with their probabilities after each.
ordered explain_draw(const vector<float>& logits, const Sampling& s, int sample, int position,
                     int id) {
    const int V = int(logits.size());
    vector<uint64_t> order;
    for (int i = 0; i < V; i++) order.push_back(order_key(logits[i], i));
    size_t count = std::min(kCandidates, order.size());
    std::partial_sort(order.begin(), order.begin() + count, order.end(), std::greater<>{});
    vector<int> shown;
    for (size_t i = 0; i < count; i++) shown.push_back(int(~uint32_t(order[i])));
    if (std::ranges::find(shown, id) == shown.end()) shown.back() = id;

    ordered draw = {{"temperature", s.temperature}, {"min_p", s.min_p}, {"top_k", s.top_k},
                    {"top_p", s.top_p}};
    vector<ordered> candidates;
    for (int i : shown) candidates.push_back({{"id", i}, {"logit", logits[i]}});
    Sampling cut;
    cut.temperature = s.temperature > 0 ? s.temperature : 1;
    double all = 0;  // the sum of weights before the cuts
    auto stage = [&](const char* name) {
        OneThread team;
        Candidates left = ::candidates(team, logits.data(), V, cut);
        uint64_t total = 0;
        int kept = 0;
        vector<uint64_t> before;  // of each id: the weights of those below it
        for (int i = 0; i < V; i++) {
            before.push_back(total);
            total += left.weight(i);
            kept += left.weight(i) > 0;
        }
        if (all == 0) all = double(total);
        draw["stages"].push_back({{"name", name}, {"kept", kept}, {"mass", double(total) / all}});
        for (ordered& c : candidates) {
            int i = c["id"];
            c["p"].push_back(double(left.weight(i)) / double(total));
            c["from"] = double(before[i]) / double(total);
        }
    };
    stage("temperature");
    if (s.temperature > 0) {
        cut.min_p = s.min_p, stage("min-p");
        cut.top_k = s.top_k, stage("top-k");
        cut.top_p = s.top_p, stage("top-p");
        uint64_t random = philox(s.seed, uint32_t(sample), uint32_t(position));
        draw["random"] = double(random) * 0x1p-64;  // falls into [from, from + p) of the id drawn
    }
    draw["candidates"] = candidates;
    return draw;
}

class Recorder : public Observer {
public:
    ordered steps = ordered::array(), sequences = ordered::array();

    explicit Recorder(Session& s)
        : s(s), blocks(s.engine.cache.blocks()), start(now()) { s.engine.observer = this; }
    ~Recorder() { s.engine.observer = nullptr; }

    // Runs requests to their end or to Ctrl-C. stops: of each. Returns the ids of the last sample.
    vector<int> run(vector<Request> requests, const vector<vector<string>>& stops) {
        std::map<int, vector<Reply>> replies;
        for (size_t i = 0; i < requests.size(); i++) {
            Request& r = requests[i];
            r.score_prompt = false;
            // on a GPU the logits of a replayed graph are not read back
            r.logprobs = s.engine.device->overlaps && !s.f.graphs ? 0 : -1;
            int number = s.engine.add(r);
            for (int n = 0; n < r.samples; n++) note_sequence(number, n, r);
            replies[number].assign(r.samples, Reply{TextStream(s.tokenizer.get(), stops[i])});
        }
        while (s.engine.busy() && !interrupted) {
            vector<Output> outputs = s.engine.step();
            for (Output& o : outputs) {
                ordered& sequence = sequences[index.at({o.request, o.sample})];
                replies[o.request][o.sample].take(s.engine, o);
                const Output& last = replies[o.request][o.sample].last;
                sequence["ids"].push_back(last.id);
                sequence["cached"] = last.cached;
                if (!last.finish) continue;
                sequence["finish"] = last.finish;
                ended.push_back(index.at({last.request, last.sample}));
            }
            if (done) finish_step();
        }
        for (auto& [number, of_request] : replies) s.engine.stop(number, -1);  // after Ctrl-C
        return replies.empty() ? vector<int>() : replies.rbegin()->second.back().ids;
    }

    void scheduled(const Flight& flight) override {
        ordered step = {{"begin", now() - start}};
        for (const char* key : {"preempted", "parts", "draws", "forked", "found", "copied", "taken"})
            step[key] = ordered::array();
        for (size_t i = 0; i < states.size(); i++) {
            State& state = states[i];
            if (!state.sequence || state.sequence->computed >= state.computed) continue;
            step["preempted"].push_back(i);
            state.computed = 0;
        }
        for (const Part& part : flight.parts) {
            const Sequence& seq = *part.sequence;
            int i = index.at({seq.number, seq.sample}), begin = seq.computed;
            State& state = states[i];
            state.sequence = part.sequence;
            bool decode = part.count == 1 && begin >= int(seq.request->prompt.size());
            const char* kind = begin < state.most ? "recompute" : decode ? "decode" : "prefill";
            int found = state.computed == 0 ? begin : 0;  // tokens, in the cache
            step["parts"].push_back({{"sequence", i}, {"begin", begin}, {"count", part.count},
                                     {"kind", kind}, {"found", found}});
            for (int b = 0; b < found / kBlockSize; b++) step["found"].push_back(seq.table[b]);
            state.computed = begin + part.count;
            state.most = std::max(state.most, state.computed);
        }
        for (auto [from, to] : flight.step->copies) step["copied"].push_back({from, to});
        for (int block : flight.step->taken) step["taken"].push_back(block);
        open.push_back(std::move(step));
    }

    // Keeps the logits for later: a step's time is not to hold what is computed for the page.
    void drawn(const Draw& d, std::span<const float> logits) override {
        vector<float> copy(logits.begin(), logits.end());
        if (d.sampling.has_penalties()) apply_penalties(copy, d.sampling, d.prompt, d.output);
        std::lock_guard lock(mutex);
        kept[&d] = std::move(copy);
    }

    void collected(const Flight& flight) override {
        done = true;
        ordered& step = open.front();
        step["seconds"] = now() - start - step["begin"].get<double>();
        step["replayed"] = flight.step->replayed;
        for (const Draw& d : flight.step->draws) {
            const Sequence& leader = *flight.parts[d.part].sequence;
            int from = index.at({leader.number, leader.sample});
            int i = index.at({leader.number, d.sample});
            if (leader.ended && states[from].ended) continue;  // while this was on its way
            ordered draw = {{"sequence", i}, {"position", d.position}, {"id", d.id}};
            if (kept.contains(&d))
                draw.update(explain_draw(kept[&d], d.sampling, d.sample, d.position, d.id));
            step["draws"].push_back(std::move(draw));
            if (i != from) step["forked"].push_back({from, i});
        }
        kept.clear();
    }

    // The record as a page gets it; ids come with the bytes they stand for, as Latin-1.
    ordered record() const {
        const Engine& e = s.engine;
        ordered tokens = ordered::object(), special = ordered::array();
        auto name = [&](int id) {
            if (!s.tokenizer || tokens.contains(std::to_string(id))) return;
            string latin;
            for (unsigned char c : s.tokenizer->bytes(id))
                if (c < 128) latin += char(c);
                else latin += {char(0xC0 | c >> 6), char(0x80 | (c & 63))};
            tokens[std::to_string(id)] = latin;
            if (s.tokenizer->is_special(id)) special.push_back(id);
        };
        for (const ordered& q : sequences)
            for (const char* key : {"prompt", "ids"}) for (int id : q[key]) name(id);
        for (const ordered& step : steps) for (const ordered& draw : step["draws"])
            for (const ordered& c : draw.value("candidates", ordered::array())) name(c["id"]);
        return {{"model", s.f.model}, {"device", e.device->name}, {"threads", s.f.threads},
            {"seed", s.f.sampling.seed}, {"interrupted", interrupted != 0},
            {"block_size", kBlockSize}, {"blocks", e.cache.blocks()},
            {"block_bytes", e.device->block_bytes()}, {"context", e.context},
            {"chunk", e.options.chunk}, {"max_rows", e.options.max_rows},
            {"prefix_cache", e.options.prefix_cache}, {"preemptions", e.preemptions},
            {"sequences", sequences}, {"steps", steps}, {"tokens", tokens}, {"special", special}};
    }

private:
    struct State {  // of a sequence
        std::shared_ptr<const Sequence> sequence = nullptr;
        int computed = 0, most = 0;  // tokens in the cache; ever
        bool ended = false;
        vector<int> table = {};
    };
    struct BlockState {
        int refs = 0;
        bool findable = false;
    };

    void note_sequence(int number, int sample, const Request& r) {
        index[{number, sample}] = int(states.size());
        states.push_back({});
        string name = std::to_string(number + 1);
        if (r.samples > 1) name += sample < 26 ? string(1, char('a' + sample)) : str(".", sample);
        sequences.push_back({{"name", name}, {"request", number}, {"sample", sample},
            {"arrived", steps.size()}, {"prompt", r.prompt}, {"ids", ordered::array()},
            {"cached", 0}, {"finish", nullptr}});
    }

    // What is different after a step: block tables, tokens computed, blocks that can be found.
    void finish_step() {
        const Cache& cache = s.engine.cache;
        ordered step = std::move(open.front());
        open.pop_front();
        done = false;
        step["ended"] = std::exchange(ended, {});
        for (int i : step["ended"]) states[i].ended = true;
        step["tables"] = step["computed"] = ordered::object();
        vector<const Sequence*> running(states.size());
        for (auto& q : s.engine.rows()) {
            int i = index.at({q->number, q->sample});
            running[i] = q.get();
            states[i].sequence = q;
            if (states[i].most == 0) states[i].computed = states[i].most = q->computed;  // a fork
        }
        for (size_t i = 0; i < states.size(); i++) {
            vector<int> table = running[i] ? running[i]->table : vector<int>();
            string key = std::to_string(i);
            int computed = running[i] ? running[i]->computed : 0;
            if (computed != told[key]) step["computed"][key] = told[key] = computed;
            if (table != states[i].table) step["tables"][key] = states[i].table = table;
        }
        for (const char* key : {"freed", "findable", "forgotten"}) step[key] = ordered::array();
        std::set<int> touched;
        for (const char* key : {"taken", "found"}) for (int b : step[key]) touched.insert(b);
        int used = 0, shared = 0, cached = 0;
        for (int b = 0; b < cache.blocks(); b++) {
            BlockState now = {cache.refs(b), cache.findable(b)};
            BlockState before = std::exchange(blocks[b], now);
            bool was_used = before.refs > 0 || touched.contains(b);
            if (was_used && !now.refs) step["freed"].push_back(b);
            if (now.findable && !before.findable) step["findable"].push_back(b);
            if (!now.findable && before.findable) step["forgotten"].push_back(b);
            used += now.refs > 0, shared += now.refs > 1, cached += now.findable && !now.refs;
        }
        step["counts"] = {{"used", used}, {"shared", shared}, {"cached", cached},
                          {"free", cache.free() - cached}};
        steps.push_back(std::move(step));
    }

    Session& s;
    std::map<std::pair<int, int>, int> index;  // (request, sample) -> place in sequences
    vector<State> states;                      // of sequences, after the last step
    std::map<string, int> told;                // tokens computed, as in the record so far
    vector<BlockState> blocks;                 // after the last step
    double start;
    std::deque<ordered> open;  // steps on their way, the oldest first
    bool done = false;         // the oldest was collected
    vector<int> ended;         // in this step
    std::mutex mutex;          // for kept
    std::map<const Draw*, vector<float>> kept;  // logits, penalties applied
};

// The record as trace events, for Perfetto or chrome://tracing: a track of steps, one for each
// sequence, and the blocks in use. Times in microseconds.
ordered trace_events(const ordered& record) {
    ordered events = ordered::array();
    auto event = [&](const char* phase, const string& name, double time, size_t track) -> ordered& {
        events.push_back({{"ph", phase}, {"name", name}, {"ts", time * 1e6}, {"pid", 1},
                          {"tid", track}});
        return events.back();
    };
    auto name_of = [&](const ordered& i) { return record["sequences"][size_t(i)]["name"]; };
    event("M", "process_name", 0, 0)["args"] = {{"name", record["model"]}};
    event("M", "thread_name", 0, 0)["args"] = {{"name", "steps"}};
    for (size_t i = 0; i < record["sequences"].size(); i++)
        event("M", "thread_name", 0, i + 1)["args"] = {{"name", str("sequence ",
            record["sequences"][i]["name"].get<string>())}};
    for (size_t i = 0; i < record["steps"].size(); i++) {
        const ordered& step = record["steps"][i];
        double begin = step["begin"], seconds = step["seconds"];
        bool replayed = step["replayed"];
        auto& whole = event("X", str("step ", i + 1, replayed ? ", replayed" : ""), begin, 0);
        whole["dur"] = seconds * 1e6;
        for (const char* key : {"found", "copied", "taken", "freed"}) whole["args"][key] = step[key];
        event("C", "blocks", begin + seconds, 0)["args"] = step["counts"];
        for (const ordered& part : step["parts"]) {
            auto& e = event("X", part["kind"], begin, size_t(part["sequence"]) + 1);
            e["dur"] = seconds * 1e6;
            e["args"] = {{"begin", part["begin"]}, {"count", part["count"]}};
        }
        for (const ordered& q : step["preempted"]) event("i", "preempted", begin, size_t(q) + 1);
        for (const ordered& pair : step["forked"])
            event("i", str("forked from ", name_of(pair[0]).get<string>()), begin + seconds,
                  size_t(pair[1]) + 1);
    }
    return {{"traceEvents", events}, {"displayTimeUnit", "ms"}};
}

struct What {  // the run that is asked for, and where to write
    string page, trace, batch;
    vector<string> questions;
};

// The questions of a conversation, one after the other.
void run_chat(Session& s, Recorder& recorder, const vector<string>& questions) {
    Chat format = Chat::load(s.f.model);
    format.thinking = !s.f.no_think;
    auto encode = [&](const string& text) { return s.tokenizer->encode(text); };
    vector<int> ids = encode(format.opening(s.f.system.empty() ? nullptr : &s.f.system));
    auto append = [&](const vector<int>& more) { ids.insert(ids.end(), more.begin(), more.end()); };
    for (const string& question : questions) {
        if (interrupted) break;
        append(encode(format.user_turn(question)));
        vector<int> answer = recorder.run({s.request(ids)}, {s.f.stop});
        append(answer);
        string rest = format.end_of_turn;
        string last = answer.empty() ? "" : s.tokenizer->bytes(answer.back());
        append(encode(rest.starts_with(last) ? rest.substr(last.size()) : rest));
    }
}

// All requests of a batch file at a time.
void run_batch(const Session& s, Recorder& recorder, const string& path) {
    std::istringstream lines(read_file(path));
    std::optional<Chat> format;
    vector<Request> requests;
    vector<vector<string>> stops;
    int number = 0;
    for (string line; std::getline(lines, line);) {
        number++;
        if (line.find_first_not_of(" \t\r") == string::npos) continue;
        Job job;
        job.line = number;
        try {
            read_job(s, format, parse_json(line), job);
        } catch (const std::exception& e) {
            fail(path, ": line ", number, ": ", e.what());
        }
        requests.push_back(job.request);
        stops.push_back(job.stops);
    }
    if (requests.empty()) fail(path, ": holds no requests");
    recorder.run(requests, stops);
}

void explain(const Flags& f, const What& what) {
    int sources = (f.text || !f.file.empty() || !f.ids.empty()) + !what.batch.empty() +
                  !what.questions.empty();
    if (sources > 1) fail("-p, -f, --ids, --chat, --batch: give one of them");
    if (what.page == what.trace) fail(what.page, ": is the page and the trace; give two names");
    std::error_code none;
    for (const string* out : {&what.page, &what.trace})
        for (const string* in : {&what.batch, &f.file})
            if (fs::equivalent(*out, *in, none)) fail(*out, ": is the input, too; give another -o");
    WholeFile page(what.page);
    std::optional<WholeFile> trace;
    if (!what.trace.empty()) trace.emplace(what.trace);
    Session s(f, f.ids.empty());
    Recorder recorder(s);
    if (!what.questions.empty()) run_chat(s, recorder, what.questions);
    else if (!what.batch.empty()) run_batch(s, recorder, what.batch);
    else recorder.run({s.request(input_ids(s))}, {f.stop});

    ordered record = recorder.record();
    string text = record.dump(-1, ' ', true), html = kPage;  // "<" would begin a tag in a page
    for (size_t at = 0; (at = text.find('<', at)) != string::npos;) text.replace(at, 1, "\\u003c");
    const string place = "{{record}}";
    page.finish(html.replace(html.find(place), place.size(), text));
    if (trace) trace->finish(trace_events(record).dump() + "\n");
    size_t tokens = 0, found = 0, copied = 0;
    for (const ordered& q : record["sequences"]) tokens += q["ids"].size();
    for (const ordered& step : record["steps"])
        found += step["found"].size(), copied += step["copied"].size();
    put(str(what.page, ": ", record["steps"].size(), " steps, ", tokens, " tokens, ", found,
            " blocks found in the cache, ", copied, " copied, ", s.engine.preemptions,
            " preemptions\n"));
}

int main(int argc, char** argv) {
    CommandLine line("explain: what the engine does, step by step, as an HTML page");
    Flags& f = line.f;
    What what;
    line.model("");
    line.flag(line.own, "-o,--output", what.page, "the page");
    line.app.get_option("--output")->required();
    line.flag(line.own, "--trace", what.trace, "the run as a file for Perfetto (ui.perfetto.dev)");
    line.text_flags(line.own);
    line.flag(line.own, "--ids", f.ids, "the text as ids: 1,2,3");
    line.flag(line.own, "--no-special", f.no_special, "add no bos, or what else the tokenizer adds");
    line.flag(line.own, "--samples", f.samples, "continuations of the one prompt", kSize);
    line.app.add_option("--chat", what.questions, "questions, asked one after the other");
    line.flag(line.own, "--system", f.system, "the system message of --chat");
    line.flag(line.own, "--no-think", f.no_think, "Qwen3: answer without a thought");
    line.flag(line.own, "--batch", what.batch, "a file of requests, in OpenAI's batch format");
    line.drawing_flags(line.own);
    line.engine_flags(line.own);
    return line.run(argc, argv, [&] { explain(f, what); });
}
