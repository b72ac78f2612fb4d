// recorder.hpp: Recorder, which looks on as an engine works and notes what it does, as JSON: which
// tokens each step computed, how block tables and the block pool changed, and what each token was
// drawn from. explain.hpp makes a page of it.
//
// All of it is the engine's own: the draws are computed again, with the functions of sampler.hpp,
// from the logits that the engine drew from. The record holds differences: step k says what is
// different after it.
#pragma once

namespace explain {

constexpr size_t kCandidates = 20;  // shown of a draw

double rounded(double x) { return std::round(x * 1e9) / 1e9; }  // more digits make pages larger

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
                    {"top_p", s.top_p},
                    {"penalties", s.has_penalties()}};
    vector<ordered> rows;
    for (int i : shown) rows.push_back({{"id", i}, {"logit", rounded(logits[i])}});
    Sampling cut;
    cut.temperature = s.temperature > 0 ? s.temperature : 1;
    double all = 0;  // the sum of weights before the cuts
    auto stage = [&](const char* name) {
        alignas(16) char scratch[kDrawScratch];
        OneThread team(scratch);
        Candidates left = candidates(team, logits.data(), V, cut);
        uint64_t total = 0;
        int kept = 0;
        vector<uint64_t> before;  // of each id: the weights of those below it
        for (int i = 0; i < V; i++) {
            uint64_t weight = left.weight(i);
            before.push_back(total);
            total += weight;
            kept += weight > 0;
        }
        if (all == 0) all = double(total);
        draw["stages"].push_back({{"name", name}, {"kept", kept}, {"mass", double(total) / all}});
        for (ordered& c : rows) {
            int i = c["id"];
            c["p"].push_back(rounded(double(left.weight(i)) / double(total)));
            c["from"] = rounded(double(before[i]) / double(total));
        }
    };
    stage(s.temperature > 0 ? "temperature" : "softmax");
    if (s.temperature == 0) {
        for (ordered& c : rows) c["p"].push_back(c["id"] == id ? 1 : 0);
        draw["stages"].push_back({{"name", "largest"}, {"kept", 1}, {"mass", rows[0]["p"][0]}});
    } else {
        cut.min_p = s.min_p, stage("min-p");
        cut.top_k = s.top_k, stage("top-k");
        cut.top_p = s.top_p, stage("top-p");
        uint64_t random = philox(s.seed, uint32_t(sample), uint32_t(position));
        draw["random"] = double(random) * 0x1p-64;  // in [from, from + p) of the id drawn
    }
    draw["candidates"] = rows;
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
            r.score_prompt = false, r.logprobs = -1;  // no part of the page
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
            if (!current.is_null()) finish_step();
        }
        for (auto& [number, of_request] : replies) s.engine.stop(number, -1);  // after Ctrl-C
        return replies.empty() ? vector<int>() : replies.rbegin()->second.back().ids;
    }

    void scheduled(const Flight& flight) override {
        ordered step = {{"begin", now() - start}};
        for (const char* key :
             {"preempted", "parts", "draws", "forked", "found", "copied", "taken"})
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
        current = std::move(step);
    }

    // Keeps the logits for later: a step's time is not to hold what is computed for the page.
    void drawn(const Draw& d, const Drawn&, std::span<const float> logits) override {
        vector<float> copy(logits.begin(), logits.end());
        if (d.sampling.has_penalties()) apply_penalties(copy, d.sampling, d.prompt, d.output);
        std::lock_guard lock(mutex);
        kept[&d] = std::move(copy);
    }

    void collected(const Flight& flight) override {
        ordered& step = current;
        step["seconds"] = now() - start - step["begin"].get<double>();
        step["replayed"] = flight.step->replayed;
        for (size_t at = 0; at < flight.step->draws.size(); at++) {
            const Draw& d = flight.step->draws[at];
            const int id = flight.step->drawn[at].id;
            const Sequence& leader = *flight.parts[d.part].sequence;
            int from = index.at({leader.number, leader.sample});
            int i = index.at({leader.number, d.sample});
            ordered draw = {{"sequence", i}, {"position", d.position}, {"id", id}};
            if (kept.contains(&d))
                draw.update(explain_draw(kept[&d], d.sampling, d.sample, d.position, id));
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
        ordered step = std::exchange(current, nullptr);
        step["ended"] = std::exchange(ended, {});
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
    ordered current;           // the step on its way
    vector<int> ended;         // in this step
    std::mutex mutex;          // for kept
    std::map<const Draw*, vector<float>> kept;  // logits, penalties applied
};

}  // namespace explain
