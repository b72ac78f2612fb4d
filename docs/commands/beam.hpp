// beam: beam search (Lowerre 1976; as in Sutskever et al. 2014): the width likeliest texts are
// extended side by side, by one token a step, and the width likeliest of what comes out go on.
//
// A beam is a sequence of the engine, a sample of one request. When two beams go on from the same
// parent, Engine::branch makes one of them a fork: it shares the parent's blocks, and the last one,
// where both will write, is copied before the first write. So the prompt is in memory once, and of
// the new text what the beams have in common.
//
// Beam search alone may end below greedy search: it can drop the greedy text early, and lose later.
// Therefore greedy search runs along as one more sequence, on the same blocks, and is a candidate
// at the end.
#pragma once

namespace beam {

struct Options {
    int width = 4;
    double penalty = 0;  // A: sums are compared over length^A
    bool all = false, chat = false;
} options;

struct Beam {
    int sample;             // the engine's number for its sequence
    vector<int> ids = {};   // new ones
    double logprob = 0;     // the sum over ids
    bool complete = false;  // by an end of text, which is the last of ids, or by its length

    // What beams are ordered by; penalty 0: the sum, A: the sum over length^A (Wu et al. 2016).
    double score(double penalty) const { return bound(penalty, int(ids.size())); }
    // The most that can come of it: sums only fall, so at best it costs nothing up to that length.
    double bound(double penalty, int length) const { return logprob / std::pow(length, penalty); }
};

class Search {
public:
    vector<Beam> found;       // complete texts, the best first; greedy's is one of them
    Beam greedy{1};
    int peak = 0, steps = 0;  // most blocks in use; tokens that a beam got

    Search(Session& s, const vector<int>& prompt, int width, int most, double penalty)
        : engine(s.engine), width(width), most(most), penalty(penalty) {
        if (width + 1 > engine.options.max_rows)
            fail("--width ", width, ": needs ", width + 1, " rows with greedy's; raise --max-rows");
        engine.device->overlaps = false;  // the next ids are chosen between the steps
        Request r;
        r.prompt = prompt;
        r.samples = 2;             // the first beam and greedy, which have the prompt in common
        r.max_tokens = most + 1;   // so that the engine ends none of them, and
        r.ignore_eos = true;       // neither does an end of text: others may go on from there
        r.logprobs = width + int(engine.model.config.eos.size());  // width that do not end it
        number = engine.add(r);
        while ((!beams.empty() || !greedy.complete) && !interrupted) {
            std::map<int, Output> of_sample;
            for (Output& o : engine.step()) of_sample.emplace(o.sample, std::move(o));
            if (engine.preemptions)
                fail("KV memory: no room for ", width, " beams of this length; raise --kv-memory");
            if (!beams.empty()) peak = std::max(peak, engine.memory_use().first);
            if (of_sample.empty()) continue;  // the prompt is not computed yet
            if (!greedy.complete) follow(of_sample.at(greedy.sample));
            if (!beams.empty()) extend(of_sample);
        }
        engine.stop(number, -1);
        auto same = [&](const Beam& b) { return b.ids == greedy.ids; };
        if (std::ranges::none_of(found, same)) found.push_back(greedy);
        auto score = [&](const Beam& b) { return b.score(penalty); };
        std::ranges::stable_sort(found, std::greater<>{}, score);
        found.resize(std::min<size_t>(found.size(), width));
    }

private:
    bool ends(int id) const { return engine.model.config.eos.count(id) > 0; }

    void follow(const Output& o) {
        greedy.ids.push_back(o.id);
        greedy.logprob += o.logprobs[0].logprob;
        greedy.complete = ends(o.id) || int(greedy.ids.size()) == most;
        if (greedy.complete) engine.stop(number, greedy.sample);
    }

    // One step: the likeliest continuations of all beams become the beams.
    void extend(std::map<int, Output>& of_sample) {
        vector<Beam> next, all;
        bool last = ++steps == most;
        for (const Beam& b : beams)
            for (const TokenLogprob& t : std::span(of_sample.at(b.sample).logprobs).subspan(1)) {
                all.push_back({b.sample, b.ids, b.logprob + t.logprob, last || ends(t.id)});
                all.back().ids.push_back(t.id);
            }
        std::ranges::stable_sort(all, std::greater<>{}, &Beam::logprob);
        for (const Beam& b : all)
            if (int(next.size()) < width) (b.complete ? found : next).push_back(b);
        go_on(std::move(next));
    }

    // Gives each of next a sequence whose last id is its own, and ends the others.
    void go_on(vector<Beam> next) {
        double best = -INFINITY;
        for (const Beam& b : found) best = std::max(best, b.score(penalty));
        auto hopeless = [&](const Beam& b) { return b.bound(penalty, most) <= best; };
        if (std::ranges::all_of(next, hopeless)) next.clear();
        std::map<int, int> children;
        for (const Beam& b : next) children[b.sample]++;
        for (const Beam& b : beams)  // first, so that their blocks and rows are free
            if (!children.count(b.sample)) engine.stop(number, b.sample);
        for (Beam& b : next) {
            bool fork = --children[b.sample] > 0;  // the last child takes the parent's place
            engine.branch(number, b.sample, fork ? samples : b.sample, b.ids.back());
            if (fork) b.sample = samples++;
        }
        beams = std::move(next);
    }

    Engine& engine;
    int width, most;  // beams; new tokens
    double penalty;
    int number, samples = 2;  // of the request; numbers given to its samples
    vector<Beam> beams = {Beam{0}};
};

string text_of(const Tokenizer& tokenizer, const vector<int>& ids) {
    TextStream stream(&tokenizer, {});
    string text;
    for (int id : ids) text += stream.push(id);
    return text + stream.finish();
}

void run(const Flags& f) {
    const Options& o = options;
    std::optional<Chat> format;
    if (o.chat) format = Chat::load(f.model);
    Session s(f, true);
    string text = input_text(f);
    vector<int> prompt = format ? s.tokenizer->encode(format->render({{"user", text}}))
                                : s.tokenizer->encode(text, !f.no_special);
    int most = std::min(f.max_tokens, std::max(1, s.engine.context - int(prompt.size())));
    Search search(s, prompt, o.width, most, o.penalty);
    if (interrupted) return;
    int size = int(prompt.size()) + search.steps - 1;  // computed of each beam
    int separate = o.width * Cache::blocks_for(size);
    auto show = [&](const Beam& b) -> ordered {
        return {{"text", text_of(*s.tokenizer, b.ids)}, {"ids", b.ids}, {"logprob", b.logprob},
                {"score", b.score(o.penalty)}};
    };
    ordered j = show(search.found[0]);
    j["greedy"] = show(search.greedy);
    j["found"] = ordered::array();
    for (const Beam& b : search.found) j["found"].push_back(show(b));
    j.update({{"prompt_tokens", prompt.size()}, {"steps", search.steps},
              {"blocks", search.peak}, {"separate_blocks", separate}});
    if (f.json) return put(j.dump() + "\n");
    for (size_t i = 0; i < (o.all ? search.found.size() : 1); i++) {
        const Beam& b = search.found[i];
        if (o.all) put(str("--- ", std::fixed, std::setprecision(3), b.score(o.penalty), "\n"));
        put(text_of(*s.tokenizer, b.ids) + "\n");
    }
    fprintf(stderr, "\nlog-probability %.3f in %zu tokens; greedy: %.3f in %zu\n"
            "%d blocks at the peak, greedy's included; %d separate copies: %d (%.0f%%)\n",
            search.found[0].logprob, search.found[0].ids.size(), search.greedy.logprob,
            search.greedy.ids.size(), search.peak, o.width, separate,
            100.0 * search.peak / separate);
}

void add_flags(CommandLine& line) {
    line.f.max_tokens = 64;
    line.text_flags();
    line.flag("--chat", options.chat, "the text is a question in the model's chat format");
    line.flag("--no-special", line.f.no_special, "add no bos in front of the text");
    line.group("the search");
    line.flag("-w,--width N", options.width, "beams; else 4", CLI::Range(1, 64));
    line.flag("-n,--max-tokens N", line.f.max_tokens, "new ones; else 64", kSize);
    line.flag("--length-penalty A", options.penalty,
              "compare sums over length^A; else 0, the sums themselves", CLI::Range(0.0, 10.0));
    line.flag("--all", options.all, "show all that were found, not only the best");
    line.flag("--json", line.f.json, "one JSON object");
    line.engine_flags();
}

const bool kAdded = add_command({"beam", "beam search on shared blocks", add_flags, run});

}  // namespace beam
