// record: what the pictures of docs/guide.md show, from runs of the engine, as one JSON object.
// docs/guide/pictures.py runs it and draws. Everything here is the same in every run and on every
// machine: ids, blocks, attention, weights of a draw, steps of a schedule; no times.
#define NANOCU_NO_MAIN
#include "../../nano.cu"

#include "../chapters/all.hpp"
#include "../commands/bench.hpp"

// The text of each id.
json words_of(const Tokenizer& t, std::span<const int> ids) {
    json words = json::array();
    for (const int& id : ids) words.push_back(t.decode({&id, 1}));
    return words;
}

vector<int> greedy(Session& s, const vector<int>& prompt, int count) {
    Request r = s.request(prompt);
    r.sampling = {};
    r.max_tokens = count;
    s.engine.add(r);
    vector<int> ids;
    while (s.engine.busy())
        for (const Output& o : s.engine.step()) ids.push_back(o.id);
    return ids;
}

// Two turns of a chat and two samples, in a pool of 8 blocks: after each call of Cache, who uses
// which block, and what can be found in it. The counts in the captions are checked by pictures.py.
json record_blocks(Session& s) {
    const Tokenizer& t = *s.tokenizer;
    Chat format = Chat::load(s.f.model);
    vector<int> first = t.encode(format.opening(nullptr) +
                                 format.user_turn("What is the capital of France?"));
    vector<int> answer = greedy(s, first, 20), second = first;
    second.insert(second.end(), answer.begin(), answer.end());
    for (int id : t.encode("\n" + format.user_turn("And of Italy?"))) second.push_back(id);

    int prompt = int(first.size()), computed = prompt + int(answer.size()) - 1;
    vector<int> spoken = first;
    spoken.insert(spoken.end(), answer.begin(), answer.end());

    Cache cache(8);
    vector<int> a, b, c;          // block tables
    vector<Cache::Copy> copies;
    std::map<int, string> holds;  // what findable blocks hold
    cache.on_take = [&](int block) { holds.erase(block); };
    auto publish = [&](const vector<int>& ids, const vector<int>& table, int computed) {
        cache.publish(ids, table, 0, computed);
        for (int i = 0; i < computed / kBlockSize; i++)
            holds[table[i]] = t.decode(std::span(ids).subspan(i * kBlockSize, kBlockSize));
    };
    json all = json::array();
    auto show = [&](const char* call, const char* what) {
        json refs = json::array(), findable = json::object();
        for (int i = 0; i < cache.blocks(); i++) refs.push_back(cache.refs(i));
        for (auto& [block, text] : holds) findable[str(block)] = text;
        all.push_back({{"call", call}, {"what", what}, {"refs", refs}, {"findable", findable},
                       {"tables", {{"A", a}, {"B", b}, {"C", c}}}, {"free", cache.free()}});
    };
    cache.reserve(a, 0, prompt, copies);
    show("reserve", "A, turn 1: 37 tokens");
    cache.reserve(a, prompt, computed, copies);
    publish(spoken, a, computed);
    show("publish", "A is answered: 44 computed");
    cache.release(a);
    show("release", "A has ended");
    int matched = cache.match(second, b);
    show("match", "B, turn 2: finds 32 of 59");
    cache.reserve(b, matched, int(second.size()), copies);
    publish(second, b, int(second.size()));
    show("reserve", "B: room for the other 27");
    c = b;
    cache.share(c);
    show("share", "C, a second sample of B");
    cache.reserve(c, int(second.size()), int(second.size()) + 1, copies);
    show("reserve", "C writes token 59: a copy");
    return {{"snapshots", all}, {"copies", copies}, {"prompt", prompt}, {"computed", computed},
            {"matched", matched}, {"second", second.size()}};
}

// The CPU's device, which keeps the scores of one head in one layer: of a step's last row with all
// tokens up to its own. Queries and keys are there, and turned, when attend is called.
class WatchedDevice : public CpuVectors<CpuDevice> {
public:
    using Base = CpuVectors<CpuDevice>;
    vector<double> scores;

    WatchedDevice(const Model& m, int tokens, int layer, int head)
        : Base(m, {tokens, 1, 0, false, {}}, keys_transposed(),
               PageLayout::by_token(m.config.head_dim)),
          watched_layer(layer), watched_head(head) {}

protected:
    void attend(const StepArrays& s, int layer) override {
        if (layer == watched_layer) {
            #pragma omp single
            keep_scores(s, layer, s.rows - 1);
        }
        Base::attend(s, layer);
    }

    void keep_scores(const StepArrays& s, int layer, int row) {
        const int HD = c.head_dim, kv_head = watched_head / c.group();
        const float* q = qkv + size_t(row) * c.qkv_dim() + watched_head * HD;
        for (int t = 0; t <= s.positions[row]; t++) {
            const float* keys = kv + c.key_page(s.table(row)[t / kBlockSize], layer, kv_head);
            double score = 0;
            for (int d = 0; d < HD; d++) score += q[d] * keys[c.keys.at(t % kBlockSize, d)];
            scores.push_back(score / std::sqrt(double(HD)));
        }
    }

    const int watched_layer, watched_head;
};

// The scores of one head from the last token of a text to all, over scattered blocks.
json record_attention(const Session& s, const string& text, int layer, int head) {
    Step step;
    step.ids = s.tokenizer->encode(text);
    const int n = step.tokens();
    step.positions.resize(n);
    std::iota(step.positions.begin(), step.positions.end(), 0);
    step.sequence.assign(n, 0);
    step.tables = {5, 2, 7};
    step.table_width = Cache::blocks_for(n);
    WatchedDevice device(s.model, n, layer, head);
    device.reserve(8);
    device.launch(step);
    return {{"words", words_of(*s.tokenizer, step.ids)}, {"table", step.tables}, {"layer", layer},
            {"head", head}, {"scores", device.scores}};
}

// The likeliest ids behind a text: probability, weight at a temperature, and what each cut leaves.
json record_draw(Session& s, const string& text, Sampling p, int count) {
    Request r = s.request(s.tokenizer->encode(text));
    r.logprobs = 1000;
    r.max_tokens = 1;
    r.sampling = p;
    s.engine.add(r);
    Output o = std::move(s.engine.step().at(0));
    vector<float> logits(s.model.config.vocab, -INFINITY);  // log-probabilities are logits, too
    for (size_t i = 1; i < o.logprobs.size(); i++)
        logits[o.logprobs[i].id] = float(o.logprobs[i].logprob);
    alignas(16) char scratch[kDrawScratch];
    OneThread team(scratch);
    int V = int(logits.size());
    Sampling min_p = {.temperature = p.temperature, .min_p = p.min_p};
    Sampling top_k = min_p;
    top_k.top_k = p.top_k;
    vector<Candidates> cuts;
    for (const Sampling& cut : {Sampling{.temperature = p.temperature}, min_p, top_k, p})
        cuts.push_back(candidates(team, logits.data(), V, cut));
    json tokens = json::array(), kept = json::array();
    for (int i = 1; i <= count; i++) {
        int id = o.logprobs[i].id;
        json weights = json::array();
        for (const Candidates& c : cuts) weights.push_back(c.weight(id));
        tokens.push_back({{"id", id}, {"token", s.tokenizer->decode({&id, 1})},
                          {"probability", std::exp(o.logprobs[i].logprob)},
                          {"weights", weights}});
    }
    for (const Candidates& c : cuts) {
        int left = 0;
        for (int id = 0; id < V; id++) left += c.weight(id) > 0;
        kept.push_back(left);
    }
    int position = int(r.prompt.size());
    return {{"text", text}, {"ids", r.prompt}, {"words", words_of(*s.tokenizer, r.prompt)},
            {"tokens", tokens}, {"kept", kept}, {"drawn", o.id},
            {"random", double(philox(p.seed, 0, uint32_t(position))) / 0x1p64},
            {"temperature", p.temperature}, {"top_k", p.top_k}, {"top_p", p.top_p},
            {"min_p", p.min_p}, {"seed", p.seed}};
}

// Requests of (prompt, new) tokens, run in a small pool: for each step the tokens computed, and
// which requests got a token.
json record_schedule(const Session& s, const bench::Workload& lengths, int blocks, int chunk) {
    EngineOptions o;
    o.kv_memory = s.engine.device->block_bytes() * blocks;
    o.chunk = chunk;
    o.max_rows = 4;
    Engine engine(s.model, o);
    for (auto [prompt, count] : lengths) {
        Request r = bench::request(s, prompt, count);
        r.sampling = {};
        engine.add(r);
    }
    json steps = json::array();
    while (engine.busy()) {
        json tokens = json::array(), ended = json::array();
        for (const Output& out : engine.step()) {
            tokens.push_back(out.request);
            if (out.finish) ended.push_back(out.request);
        }
        auto [used, unused] = engine.memory_use();
        steps.push_back({{"tokens", tokens}, {"ended", ended}, {"used", used},
                         {"computed", used * kBlockSize - unused},
                         {"preemptions", engine.preemptions}});
    }
    return {{"lengths", lengths}, {"blocks", blocks}, {"chunk", chunk}, {"steps", steps}};
}

void record(const Flags& f) {
    Session s(f, true);
    json j;
    j["step"] = record_draw(s, "The capital of France is", {}, 3);
    j["blocks"] = record_blocks(s);
    j["attention"] = record_attention(s, "Anna lives in Rome and has a cat. Ben lives in Oslo "
        "and has a dog. Clara lives in Lima and has a parrot. The one who lives in Oslo has a",
        17, 5);
    j["draw"] = record_draw(s, "Once upon a time, there was a",
        {.temperature = 0.8f, .top_k = 8, .top_p = 0.8f, .min_p = 0.05f, .seed = 7}, 12);
    j["schedule"] = record_schedule(s, {{40, 24}, {70, 12}, {24, 24}, {30, 10}}, 10, 32);
    put(j.dump(1) + "\n");
}

int main(int argc, char** argv) {
    auto flags = [](CommandLine& line) { line.engine_flags(); };
    return run_command({"record", "what the guide's pictures show, as JSON", flags, record}, argc, argv);
}
