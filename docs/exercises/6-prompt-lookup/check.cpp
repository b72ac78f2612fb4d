// Prompt lookup changes nothing but the number of steps: ids, log-probabilities, what the cache holds
// and how texts end are compared with the same requests without it.
#include "../checking.hpp"

#include "../../chapters/all.hpp"

namespace {

struct Result {
    vector<int> ids;
    vector<double> logprobs;
    string finish;
    int cached = 0, after_end = 0;
    bool operator==(const Result&) const = default;
};

string show(const Result& r) {
    return str(json(r.ids).dump(), " ", r.finish, ", ", r.cached, " cached, ", r.after_end,
               " ids after the end");
}

// All requests at a time; results by request and sample. steps: how often the engine ran, 600 times
// at most, which none of the requests here needs.
std::map<std::pair<int, int>, Result> run_all(Engine& e, const vector<Request>& requests, int& steps) {
    std::map<std::pair<int, int>, Result> results;
    int first = -1;
    for (const Request& r : requests) {
        int number = e.add(r);
        if (first < 0) first = number;
    }
    for (steps = 0; e.busy() && steps < 600; steps++)
        for (Output& o : e.step()) {
            Result& r = results[{o.request - first, o.sample}];
            r.after_end += !r.finish.empty();
            r.ids.push_back(o.id);
            r.cached = o.cached;
            for (const TokenLogprob& t : o.logprobs) r.logprobs.push_back(t.logprob);
            for (const auto& t : o.prompt_logprobs) r.logprobs.push_back(t[0].logprob);
            if (o.finish) r.finish = o.finish;
        }
    if (e.busy()) {
        expect("all requests come to an end", false, "fewer than 600 steps", "no end in 600");
        exit(done());
    }
    return results;
}

Request request(vector<int> prompt, int max_tokens, float temperature = 0) {
    Request r;
    r.prompt = std::move(prompt);
    r.max_tokens = max_tokens;
    r.sampling.temperature = temperature;
    r.sampling.seed = 7;
    r.logprobs = 2;
    return r;
}

template <class R>
struct Check {
    Model model{"models/smollm2"}, tiny{"tests/data/models/qwen3"};
    Tokenizer text{"models/smollm2"};

    static vector<Request> with(vector<R> requests, int lookup) {
        for (R& r : requests) r.lookup = lookup;
        return requests;
    }

    static void all_free(const Engine& e) {
        if (e.cache.free() < e.cache.blocks())
            expect("all blocks are free at the end", false, e.cache.blocks(), e.cache.free());
    }

    // Whether every one of these requests gets the same with lookup as without, in engines like this.
    int same(const string& what, const Model& m, const vector<Request>& requests, int lookup,
             EngineOptions o = {}) {
        o.kv_memory = o.kv_memory ? o.kv_memory : 64 << 20;
        Engine plain(m, {.kv_memory = 64 << 20, .max_rows = o.max_rows, .chunk = o.chunk});
        Engine looking(m, o);
        int steps_before, steps;
        auto before = run_all(plain, requests, steps_before);
        auto after = run_all(looking, with(requests, lookup), steps);
        int different = 0;
        string wanted, came;
        for (auto& [key, result] : before)
            if (Result got = after[key]; got != result && !different++) {
                auto who = str("request ", key.first, ", sample ", key.second, ": ");
                wanted = who + show(result), came = who + show(got);
                if (got.ids == result.ids) came += "; log-probabilities differ in some bits";
            }
        expect(what, different == 0, wanted, came);
        all_free(looking);
        return steps;
    }

    vector<int> questions() {
        return text.encode("Q: What is the capital of France?\nA: The capital of France is Paris.\n"
                           "Q: What is the capital of Spain?\nA:");
    }

    vector<Request> mixed(const Model& m) {
        vector<Request> all;
        for (int i = 0; i < 6; i++) {
            vector<int> ids(20 + 7 * i);
            for (int j = 0; j < int(ids.size()); j++) ids[j] = (j % (5 + i) * 31 + i) % m.config.vocab;
            all.push_back(request(ids, 30 + i, i % 3 ? 0 : 0.7f));
            all.back().ignore_eos = true;
        }
        all[1].sampling.repetition_penalty = 1.3f, all[1].sampling.frequency_penalty = 0.5f;
        all[2].samples = 3;
        all[2].sampling.temperature = 1;
        all[4].score_prompt = true;
        return all;
    }

    void steps_and_bits() {
        Request r = request(questions(), 48);
        r.ignore_eos = true;
        for (int k : {1, 4, 10}) {
            int steps = same(str("lookup ", k, ": the same ids and log-probabilities, to the bit"),
                             model, {r}, k);
            int least = 48 / (k + 1), most = k == 1 ? 40 : 28;
            expect(str("... in ", steps, " steps instead of 48"), steps >= least && steps <= most,
                   str(least, " to ", most), steps);
        }
        r.sampling.temperature = 0.8f;
        same("drawn at temperature 0.8, with a seed: the same", model, {r}, 6);
        r = request(text.encode("Once upon a time"), 40);
        same("a text with little to look up: the same", model, {r}, 4);
    }

    void ends() {
        Request r = request(questions(), 40);
        r.ignore_eos = true;
        Engine plain(model, {.kv_memory = 64 << 20});
        int steps;
        vector<int> ids = run_all(plain, {r}, steps)[{0, 0}].ids;
        for (int n : {1, 2, 5, 6, 11}) {
            r.max_tokens = n;
            same(str("-n ", n), model, {r}, 5);
        }
        r.max_tokens = 40, r.ignore_eos = false;
        std::set<int> eos = model.config.eos;
        for (int at : {5, 10, 14}) {  // an end of text where several tokens come in one step
            model.config.eos = {ids[at]};
            same(str("the end of text is token ", at + 1, " or before"), model, {r}, 8);
        }
        model.config.eos = eos;
        Flags f;
        f.model = "models/smollm2", f.stop = {"A: The cap"}, f.kv_memory = 64 << 20;
        Session s(f, true);
        r.logprobs = -1;
        Reply before = run(s, r, false)[0], after = run(s, with({r}, 8)[0], false)[0];
        expect("a stop string: the text ends before it",
               after.text == before.text && before.text.ends_with("Italy?\n"), before.text,
               after.text);
        expect("... and no ids come behind it", after.ids == before.ids, json(before.ids).dump(),
               json(after.ids).dump());
    }

    void company() {
        const Model& m = tiny;
        vector<Request> all = mixed(m);
        same("six requests and samples together", m, all, 5);
        same("six, in chunks of 7 and three rows", m, all, 5, {.max_rows = 3, .chunk = 7});
        all[2].samples = 1;  // of preempted samples, who is first to find blocks may change
        for (Request& r : all) r.score_prompt = false;
        Engine plain(m, {.kv_memory = 64 << 20});
        Engine small(m, {.kv_memory = 9 * plain.device->block_bytes()});
        int steps;
        auto before = run_all(plain, all, steps), after = run_all(small, with(all, 5), steps);
        bool equal = true;
        for (auto& [key, result] : before)
            equal = equal && after[key].ids == result.ids && after[key].logprobs == result.logprobs;
        expect("so little memory that sequences are preempted", equal && small.preemptions > 0,
               "the same, and preemptions",
               str(equal ? "the same" : "different", ", ", small.preemptions, " preemptions"));
        all_free(small);
    }

    // What was guessed and not drawn must not be found by others, what was drawn must.
    void cache() {
        Engine plain(model, {.kv_memory = 64 << 20}), looking(model, {.kv_memory = 64 << 20});
        Request r = request(questions(), 45);
        r.ignore_eos = true;
        int steps;
        vector<int> ids = run_all(plain, {r}, steps)[{0, 0}].ids;
        run_all(looking, with({r}, 7), steps);
        for (int keep : {45, 30}) {
            Request next = request(r.prompt, 10);
            next.prompt.insert(next.prompt.end(), ids.begin(), ids.begin() + keep);
            next.prompt.push_back(ids[0]);
            Result wanted = run_all(plain, {next}, steps)[{0, 0}];
            Result came = run_all(looking, {next}, steps)[{0, 0}];
            expect(str("a prompt that goes on after ", keep, " of the ids finds the same blocks"),
                   came == wanted, show(wanted), show(came));
        }
    }
};

template <class R>
void check() {
    if constexpr (requires(R r) { r.lookup = 4; }) {
        if (!expect("Request has lookup", true, "", "")) return;
        Check<R> c;
        c.steps_and_bits();
        c.ends();
        c.company();
        c.cache();
    } else {
        expect("Request has lookup, how many tokens are guessed in a step", false,
               "int lookup = 0 in Request", "no such member");
    }
}

}  // namespace

int main() {
    omp_set_num_threads(1);
    check<Request>();
    return done();
}
