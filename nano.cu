// nano.cu: a minimal LLM inference engine. Offline generation on the command line, to be read from
// top to bottom, to be forked. The way of a token:
//
//   text -> ids (model.hpp) -> Sequence -> blocks (cache.hpp) -> Step (flat arrays) -> forward
//        -> logits -> sampler.hpp -> id, back into the Sequence and on the screen
//
// Chapters: 1 the step, and what a device is   2 the engine   3 the ops, for a team of threads
//           4 the forward pass, on a CPU and on a GPU   5 session, chat, generate   6 flags, main
// Letters:  T tokens in a step, D hidden size, H query heads, KV key/value heads, HD head size,
//           F intermediate size, V vocabulary, L layers. All arrays are row-major.
// Built by g++ or clang++ it runs on CPUs, built by nvcc on NVIDIA GPUs, too. Whoever includes this
// file in a program of his own defines NANOCU_NO_MAIN.
#include <editline/readline.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <clocale>
#include <csignal>
#include <deque>
#include <functional>
#include <iostream>
#include <numeric>
#include <optional>
#include <random>

#include "cache.hpp"
#include "model.hpp"
#include "sampler.hpp"

#ifdef __CUDACC__
#include <cublas_v2.h>
#include <cuda_bf16.h>
#endif

// =============================================================================================
// 1. The step, and what a device is
// =============================================================================================

// What a row of logits is for: to draw the id at a position of a sequence, or to score one that is
// known.
struct Draw {
    int row, part;                        // of Step::logit_rows, of the step's sequences
    int sample, position;                 // of the id that is asked for
    const Sampling& sampling;
    std::span<const int> prompt, output;  // ids before it, for penalties; gone after launch
    int logprobs;                         // -1: none; k: of the id and of the k likeliest
    int known = -1;                       // the id to score; -1: draw one
};

// What comes back for a Draw.
struct Drawn {
    int id = -1;
    vector<TokenLogprob> scores = {};
};

// What a device sees of one iteration: T tokens of several sequences, each token one row. An id
// below 0 is not known yet: -1 - i is what draw i of the step before it gives.
struct Step {
    vector<int> ids, positions;  // [T]
    vector<int> sequence;        // [T], whose token this is: a row of tables
    vector<int> tables;          // [sequences, table_width], block tables
    int table_width = 0;
    vector<int> logit_rows;      // the rows whose logits are asked for
    vector<Draw> draws;          // what for, in the same order
    vector<Drawn> drawn = {};    // out: what came of each draw
    vector<Cache::Copy> copies;  // blocks to copy before anything is written
    vector<int> taken;           // blocks whose old contents nobody may read
    struct Observer* observer = nullptr;  // who looks at the logits, or null
    int buffer = 0;              // for the device's own use
    bool replayed = false;       // out: ran as a captured graph

    int tokens() const { return int(ids.size()); }
    int sequences() const { return int(tables.size()) / std::max(1, table_width); }
    const int* table(int row) const { return &tables[size_t(sequence[row]) * table_width]; }
};

// Where steps run. Its memory for keys and values comes with reserve.
struct Device {
    string name, note;       // note: what is worth knowing, or empty
    bool overlaps = false;   // launch returns before the step is done
    vector<string> chapters;               // that this device can be run without (--without)
    std::map<string, string> served;       // op -> the file whose code does it
    virtual ~Device() = default;
    virtual size_t block_bytes() const = 0;
    size_t token_bytes() const { return block_bytes() / kBlockSize; }
    virtual size_t free_memory() const = 0;  // what the cache may take, if nothing else is said
    virtual void reserve(int blocks) = 0;
    virtual void launch(Step& step) = 0;
    virtual void wait(Step& step) = 0;  // until the draws of this one, the oldest, are made
};

// The names, with commas between.
string listed(const vector<string>& names) {
    string all;
    for (const string& name : names) all += (all.empty() ? "" : ", ") + name;
    return all;
}

double now() { return omp_get_wtime(); }

size_t physical_memory() { return size_t(sysconf(_SC_PHYS_PAGES)) * getpagesize(); }

// =============================================================================================
// 2. The engine: continuous batching (Yu et al. 2022) over the paged cache
// =============================================================================================

struct Request {
    vector<int> prompt;
    Sampling sampling;
    int max_tokens = INT_MAX;   // new ones; the context may end before
    int samples = 1;            // continuations, which share the prompt's blocks
    int logprobs = -1;          // -1: none; 0: of the chosen id; k: of the k likeliest too
    bool ignore_eos = false;
    bool score_prompt = false;  // log-probabilities of the prompt's own ids
    int score_from = 1;         // the first of these; only what is before may come from the cache
};

// One text on its way: a request's, or one of its samples.
struct Sequence {
    int number, sample;                   // of the request, of its samples
    std::shared_ptr<const Request> request;
    vector<int> ids;                      // prompt and output; -1: drawn, but not known yet
    int max_size;                         // ids at the end
    int unforked;                         // samples that start when the prompt is computed
    int computed = 0, cached = 0;         // ids in the cache; of the prompt's, found there
    int published = 0;                    // ids that the cache knows of
    int draw = 0;                         // the last step's that gives the last id
    bool ended = false;
    vector<int> table = {};               // block table
    vector<vector<TokenLogprob>> prompt_logprobs = {};  // of prompt ids score_from, ...

    int reusable() const {  // ids whose beginning the cache may have
        return request->score_prompt ? request->score_from : int(ids.size());
    }
    int known() const {  // ids before the first -1
        int count = int(ids.size());
        while (count > 0 && ids[count - 1] < 0) count--;
        return count;
    }
};

// What a step has to say about one sequence.
struct Output {
    int request, sample, id;                // id: the new token
    int cached;                             // tokens of the prompt that were in the cache
    const char* finish = nullptr;           // "stop", "length", or null: goes on
    vector<TokenLogprob> logprobs = {};     // of id, then of the likeliest, if asked for
    vector<vector<TokenLogprob>> prompt_logprobs = {};  // with the finish, if asked for
};

struct Part {  // of a step: the next count ids of a sequence
    std::shared_ptr<Sequence> sequence;
    int count;
};

struct Flight {  // a step that was launched, or is about to be
    std::unique_ptr<Step> step;  // null: nothing to do
    vector<Part> parts;
};

struct EngineOptions {
    size_t kv_memory = 0;       // bytes; 0: a quarter of the machine's, on a GPU nearly all that is
                                // free, if max_rows can use it
    int max_context = INT_MAX;  // tokens of a sequence; never more than the model's
    int max_rows = 0;           // sequences running at a time; 0: 64, on a GPU 256
    int chunk = 0;              // tokens computed in a step; 0: 512, on a GPU 8192
    bool prefix_cache = true;
    bool graphs = true;         // decode steps are captured (GPU)
    string device = "auto";     // or cpu, cuda, cuda:1
    vector<string> without = {};  // chapters that are switched off; "all": all of them
};

// The device that o.device names; auto: a GPU where there is one. Fills in what o leaves to it.
// context: most tokens of a sequence. An error is a line that says what is wrong. It stands at the
// end of chapter 4.
std::unique_ptr<Device> make_device(const Model& m, EngineOptions& o, int context);

// Who looks on as an engine works, where Engine::observer is set.
struct Observer {
    virtual ~Observer() = default;
    virtual void scheduled(const Flight&) = 0;  // a step, about to be launched
    virtual void collected(const Flight&) = 0;  // its ids are in; what ended has left
    // A draw was made from logits [V], before penalties. Several threads call this.
    virtual void drawn(const Draw&, const Drawn&, std::span<const float> logits) = 0;
};

class Engine {
public:
    const Model& model;
    EngineOptions options;
    const int context;  // most tokens of a sequence
    const std::unique_ptr<Device> device;
    Cache cache;
    int preemptions = 0;
    Observer* observer = nullptr;  // null: nobody looks; to be set before the first step

    Engine(const Model& m, EngineOptions o)
        : model(m), options(o), context(std::min(m.config.context, o.max_context)),
          device(make_device(m, options, context)), cache(reserve_blocks(), o.prefix_cache) {
        cache.on_take = [this](int block) { taken.push_back(block); };
    }

    // Takes a request; its Outputs carry the number returned here. One that can never run throws
    // std::invalid_argument with the sizes.
    int add(Request r) {
        auto refuse = [](const auto&... what) { throw std::invalid_argument(str(what...)); };
        int size = int(r.prompt.size()), room = cache.blocks() * kBlockSize;
        r.sampling.check();
        if (r.samples < 1 || r.max_tokens < 1) refuse("samples, max-tokens: expected 1 or more");
        if (size == 0) refuse("prompt: no tokens; give some text");
        for (int id : r.prompt) if (id < 0 || id >= model.config.vocab)
            refuse("prompt: id ", id, " is outside the vocabulary of ", model.config.vocab);
        if (r.score_prompt && (r.score_from < 1 || r.score_from > size))
            refuse("score_from: expected 1 to the prompt's ", size, " tokens");
        if (size + !r.score_prompt > context)
            refuse("prompt: ", size, " tokens do not fit into the context of ", context);
        // without -n the memory may end a text; with it, all must fit
        int limit = r.max_tokens == INT_MAX ? std::min(context, std::max(room, size + 1)) : context;
        int max_size = size + std::min(r.max_tokens, std::max(1, limit - size));
        if (max_size - 1 > room) refuse("prompt: ", size, " tokens and ", max_size - size,
            " new ones do not fit into KV memory for ", room, "; raise --kv-memory");
        auto request = std::make_shared<Request>(std::move(r));
        Sequence s = {requests, 0, request, request->prompt, max_size, request->samples - 1};
        if (request->score_prompt) s.prompt_logprobs.resize(size - request->score_from);
        waiting.push_back(std::make_shared<Sequence>(std::move(s)));
        return requests++;
    }

    // What an observer may look at: the sequences that have blocks, the oldest first.
    const auto& rows() const { return running; }

    // Blocks in use, and their slots that hold no token yet.
    std::pair<int, int> memory_use() const {
        int unused = 0;
        for (auto& s : running) unused += int(s->table.size()) * kBlockSize - s->computed;
        return {cache.blocks() - cache.free(), unused};
    }

    bool busy() const { return !running.empty() || !waiting.empty() || flying.step; }

    // One iteration: schedule, run, sample, collect. Returns at most one Output a sequence. On a
    // device that overlaps, they are of the step before the one that is launched, unless somebody
    // observes: then each step is collected before the next one is scheduled.
    vector<Output> step() {
        vector<Output> out;
        Flight done = std::exchange(flying, {});
        if (done.step && needs_ids(done)) collect(std::exchange(done, {}), out);
        flying = schedule();
        if (flying.step) launch(flying);
        if (!device->overlaps || observer) done = std::exchange(flying, {});
        if (done.step) collect(std::move(done), out);
        return out;
    }

    // Between steps, on a device that does not overlap: a running sample goes on with id in place
    // of the last one it drew. Under a new number (as): a copy does, which shares its blocks, and
    // the sample itself goes on as it was.
    void branch(int request, int sample, int as, int id) {
        auto s = std::ranges::find_if(running, [&](const std::shared_ptr<Sequence>& s) {
            return s->number == request && s->sample == sample;
        });
        if (s == running.end()) fail("branch: sample ", sample, " is not running");
        (as == sample ? **s : fork(**s, as)).ids.back() = id;
    }

    // Ends a sequence from outside (a stop string, Ctrl-C); sample -1: all of the request.
    void stop(int request, int sample) {
        for (auto* list : {&running, &waiting})
            std::erase_if(*list, [&](const std::shared_ptr<Sequence>& s) {
                if (s->number != request || (sample >= 0 && s->sample != sample)) return false;
                cache.release(s->table);
                return s->ended = true;
            });
    }

private:
    // Has the device make room for the cache; returns how many blocks there are.
    int reserve_blocks() {
        size_t block = device->block_bytes(), each = context / kBlockSize + 1;
        size_t blocks = std::min(device->free_memory() / block, each * options.max_rows);
        if (options.kv_memory) blocks = options.kv_memory / block;
        if (!blocks) fail("KV memory: no room for a block of ", block, " bytes; give --kv-memory");
        blocks = std::min<size_t>(blocks, INT_MAX / kBlockSize);
        device->reserve(int(blocks));
        return int(blocks);
    }

    // Whether the next step can't be scheduled before the ids of this one are known.
    static bool needs_ids(const Flight& flight) {
        return std::ranges::any_of(flight.step->draws, [&](const Draw& d) {
            return d.sampling.has_penalties() || d.sample != flight.parts[d.part].sequence->sample;
        });
    }

    // First come, first served; running sequences before waiting ones. When blocks run out, the
    // youngest gives its own back and is computed again later.
    Flight schedule() {
        Flight flight = {std::make_unique<Step>(), {}};
        int budget = std::max(options.chunk, options.max_rows);
        for (size_t i = 0; i < running.size() && budget > 0; i++)
            while (i < running.size() && !add_part(flight, running[i], budget)) {
                preemptions++;
                suspend();
            }
        while (!waiting.empty() && int(running.size()) < options.max_rows && budget > 0) {
            auto s = waiting.front();
            if (s->ids.back() < 0) break;  // on its way from the device
            // what is scored needs its logits, so nothing of it may be skipped
            s->computed = cache.match(std::span(s->ids).first(s->reusable()), s->table);
            if (will_be_known(*s)) {  // somebody is computing what comes next: wait for that
                s->computed = 0;
                cache.release(s->table);
                break;
            }
            s->published = s->computed;
            if (s->ids.size() == s->request->prompt.size()) s->cached = s->computed;
            running.push_back(s);
            waiting.pop_front();
            if (add_part(flight, s, budget)) continue;
            suspend();  // until there are blocks
            break;
        }
        Step& step = *flight.step;
        for (auto& part : flight.parts)
            step.table_width = std::max(step.table_width, int(part.sequence->table.size()));
        for (auto& part : flight.parts) {
            const vector<int>& table = part.sequence->table;
            step.tables.insert(step.tables.end(), table.begin(), table.end());
            step.tables.resize(step.tables.size() + step.table_width - table.size());
        }
        step.taken = std::exchange(taken, {});
        if (flight.parts.empty()) flight.step.reset();
        return flight;
    }

    // Whether the block behind what s found in the cache is being computed for another sequence.
    bool will_be_known(const Sequence& s) const {
        int end = s.computed + kBlockSize;
        return options.prefix_cache && end < s.reusable() &&
            std::ranges::any_of(running, [&](const std::shared_ptr<Sequence>& other) {
                return other->published < end && other->known() >= end &&
                       std::equal(s.ids.begin(), s.ids.begin() + end, other->ids.begin());
            });
    }

    // The youngest sequence goes back to the head of those that wait.
    void suspend() {
        cache.release(running.back()->table);
        running.back()->computed = running.back()->published = 0;
        waiting.push_front(std::move(running.back()));
        running.pop_back();
    }

    // Puts as many ids of s into the step as the budget allows; false if blocks do not suffice.
    bool add_part(Flight& flight, const std::shared_ptr<Sequence>& sequence, int& budget) {
        Step& step = *flight.step;
        Sequence& s = *sequence;
        const Request& r = *s.request;
        int size = int(s.ids.size()), end = std::min(size, s.computed + budget);
        if (size == s.max_size) return true;  // ends with what is on its way
        if (!cache.reserve(s.table, s.computed, end, step.copies)) return false;
        auto add_draw = [&](int sample, int position, int logprobs, int known) {
            int row = int(step.logit_rows.size()) - 1, part = int(flight.parts.size());
            auto ids = std::span(s.ids), output = ids.subspan(r.prompt.size());
            step.draws.push_back({row, part, sample, position, r.sampling, r.prompt, output,
                                  logprobs, known});
        };
        for (int i = s.computed; i < end; i++) {
            int scored_at = i + 1 - r.score_from;
            bool scored = scored_at >= 0 && scored_at < int(s.prompt_logprobs.size());
            bool newest = i + 1 == size;  // what comes behind it is to be drawn
            if (newest || scored) step.logit_rows.push_back(step.tokens());
            if (scored) add_draw(s.sample, i + 1, std::max(0, r.logprobs), s.ids[i + 1]);
            if (newest)
                for (int n = s.unforked; n >= 0; n--)  // the sequence's own draw comes last
                    add_draw(s.sample + n, size, r.logprobs, -1);
            step.ids.push_back(s.ids[i] < 0 ? -1 - s.draw : s.ids[i]);
            step.positions.push_back(i);
            step.sequence.push_back(int(flight.parts.size()));
        }
        flight.parts.push_back({sequence, end - s.computed});
        budget -= end - s.computed;
        return true;
    }

    void launch(Flight& flight) {
        flight.step->observer = observer;
        flight.step->drawn.resize(flight.step->draws.size());
        if (observer) observer->scheduled(flight);
        device->launch(*flight.step);
        for (Part& part : flight.parts) part.sequence->computed += part.count;
        for (size_t i = 0; i < flight.step->draws.size(); i++) {
            const Draw& d = flight.step->draws[i];
            Sequence& s = *flight.parts[d.part].sequence;
            if (d.position != int(s.ids.size()) || d.sample != s.sample) continue;
            s.ids.push_back(-1);
            s.draw = int(i);
        }
    }

    // One more sequence like s, sharing its blocks.
    Sequence& fork(const Sequence& s, int sample) {
        running.push_back(std::make_shared<Sequence>(s));
        Sequence& child = *running.back();
        child.sample = sample;
        child.unforked = 0;
        cache.share(child.table);
        if (int(running.size()) > options.max_rows) suspend();  // it will find its blocks again
        return child;
    }

    // Puts the drawn ids in, starts the samples that waited for the prompt, ends what is finished.
    void collect(Flight flight, vector<Output>& all) {
        device->wait(*flight.step);
        for (Part& part : flight.parts) {
            Sequence& s = *part.sequence;
            if (s.ended) continue;  // while this was on its way; its blocks may be another's by now
            int full = std::min(s.computed, s.known());
            if (full > s.published) cache.publish(s.ids, s.table, s.published, full);
            s.published = std::max(s.published, full);
        }
        for (size_t i = 0; i < flight.step->draws.size(); i++) {
            const Draw& d = flight.step->draws[i];
            Drawn& drawn = flight.step->drawn[i];
            Sequence& leader = *flight.parts[d.part].sequence;
            if (leader.ended) continue;  // while this was on its way
            if (d.position < int(leader.request->prompt.size())) {
                int from = leader.request->score_from;
                leader.prompt_logprobs[d.position - from] = std::move(drawn.scores);
                continue;
            }
            Sequence& s = d.sample == leader.sample ? leader : fork(leader, d.sample);
            s.unforked = 0;
            s.ids[d.position] = drawn.id;
            Output out = {s.number, s.sample, drawn.id, s.cached};
            bool eos = !s.request->ignore_eos && model.config.eos.count(drawn.id);
            out.finish = eos ? "stop" : d.position + 1 == s.max_size ? "length" : nullptr;
            if (out.finish) out.prompt_logprobs = s.prompt_logprobs;
            out.logprobs = std::move(drawn.scores);
            all.push_back(std::move(out));
        }
        for (const Output& out : all) if (out.finish) stop(out.request, out.sample);
        if (observer) observer->collected(flight);
    }

    std::deque<std::shared_ptr<Sequence>> waiting, running;  // each in order of arrival
    Flight flying;      // launched, not collected
    vector<int> taken;  // blocks whose contents are forgotten in this step
    int requests = 0;
};

// =============================================================================================
// 3. The ops, for a team
//    Each op is a struct: its fields are what it works on, and a call does one unit of the work (a
//    row, say) with a team of threads: one thread on a CPU, a thread block on a GPU (sampler.hpp).
//    Real is the type of activations, keys and values: float on a CPU, bf16 on a GPU; whatever is
//    added up is float. kThreads: of a block. All threads of a team go through the same barriers,
//    sums and maxima, so no thread leaves a loop early that has some of these in it.
// =============================================================================================

#ifdef __CUDA_ARCH__  // registers cannot be indexed: a loop over an array in registers is unrolled
#define NANOCU_UNROLL_ALL _Pragma("unroll")
#define NANOCU_UNROLL_BY_2 _Pragma("unroll 2")
#else
#define NANOCU_UNROLL_ALL
#define NANOCU_UNROLL_BY_2
#endif

// N numbers that are read or written at once, from an address that is a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    T at[N];
};
template <int N, class T>
NANOCU_BOTH Pack<T, N> load(const T* from) { return *(const Pack<T, N>*)from; }

template <int N, class T>
NANOCU_BOTH void store(T* to, const float (&values)[N]) {
    Pack<T, N> pack;
    for (int i = 0; i < N; i++) pack.at[i] = T(values[i]);
    *(Pack<T, N>*)to = pack;
}

// What GPUs compute in few instructions: 1 / sqrt(x), exp(x).
NANOCU_BOTH inline float inverse_root(float x) {
#ifdef __CUDA_ARCH__
    return rsqrtf(x);
#else
    return 1 / sqrtf(x);
#endif
}
NANOCU_BOTH inline float exp_fast(float x) { return exp2f(1.44269504f * x); }

// How a page lies in memory. A page holds the keys, or the values, of one kv head in one block: HD
// numbers for each of 16 slots. Chapters keep pages in squares of 8 slots by 8 components, so there
// are four strides: to the next slot, to the eighth behind it, and the same for components.
struct PageLayout {
    int slot, eight_slots, dim, eight_dims;

    NANOCU_BOTH int at(int s, int d) const {
        return s / 8 * eight_slots + s % 8 * slot + d / 8 * eight_dims + d % 8 * dim;
    }
    static PageLayout by_token(int head_dim) {  // [16, HD]
        return {head_dim, 8 * head_dim, 1, 8};
    }
};

// The sizes of a model as ops take them, and where pages are.
struct Shape {
    int hidden, heads, kv_heads, head_dim, intermediate, vocab, layers;
    float norm_eps;
    PageLayout keys, values;

    Shape(const Config& c, PageLayout keys, PageLayout values)
        : hidden(c.hidden), heads(c.heads), kv_heads(c.kv_heads), head_dim(c.head_dim),
          intermediate(c.intermediate), vocab(c.vocab), layers(c.layers), norm_eps(c.norm_eps),
          keys(keys), values(values) {}

    NANOCU_BOTH int q_dim() const { return heads * head_dim; }
    NANOCU_BOTH int qkv_dim() const { return (heads + 2 * kv_heads) * head_dim; }
    NANOCU_BOTH int group() const { return heads / kv_heads; }  // query heads of a kv head

    // The cache is [blocks, L, 2 (keys, values), KV] pages. Where the keys of a head are:
    NANOCU_BOTH size_t key_page(int block, int layer, int kv_head) const {
        size_t page = (size_t(block) * layers + layer) * 2 * kv_heads + kv_head;
        return page * kBlockSize * head_dim;
    }
    NANOCU_BOTH size_t value_page(int block, int layer, int kv_head) const {
        return key_page(block, layer, kv_head) + value_offset();
    }
    NANOCU_BOTH size_t value_offset() const { return size_t(kv_heads) * kBlockSize * head_dim; }
    NANOCU_BOTH size_t block_numbers() const { return key_page(1, 0, 0); }
};

// What a draw needs to know.
struct DrawKey {
    Sampling sampling;
    int row, sample, position;  // row: of the logits in memory
};

// Some rows of a step, one behind the other in one sequence, that are attended for together.
struct Tile {
    int row, rows;           // the first, how many
    int position, sequence;  // of the first
    int first, last;         // pages of the context: first .. last - 1
    int part;                // for a chapter that cuts contexts; else -1
};

// A step's arrays as ops see them. All of them lie in one piece of memory, carved in the same way
// on the host and on the device.
struct StepArrays {
    struct Header {
        int rows, table_width, decodes, tiles;  // how many this step really has
    };
    // How many the ops are run for. In a captured graph, which serves any step of up to so many
    // rows, these are more than the header's; ops return at once for units that the step has not.
    int rows = 0, decodes = 0, tiles = 0, draws = 0, logits = 0;
    bool one_each = false;  // each row is a sequence's newest token, and has a draw
    Header* header;
    DrawKey* keys;        // [draws]
    Tile* prompts;        // [tiles]: the rows of sequences that have several in this step
    int *ids, *positions, *sequence, *logit_rows;  // [T]
    int* single;          // [decodes]: the others, one a sequence, the longest context first
    int* tables;          // [sequences, table_width]

    NANOCU_BOTH const int* table(int row) const {
        return tables + size_t(sequence[row]) * header->table_width;
    }
    NANOCU_BOTH int pages(int row) const { return positions[row] / kBlockSize + 1; }
    NANOCU_BOTH Tile tile_of(int row) const {
        return {row, 1, positions[row], sequence[row], 0, pages(row), -1};
    }
};

// x [T, D] = the embeddings of the ids. angles [T, 2, HD / 2] = cosines and sines of the angles by
// which RoPE turns at the rows' positions. A unit is a row.
struct Embed {
    static constexpr int kThreads = 128;
    StepArrays s;
    Shape c;
    const int* drawn;  // ids that the host does not know yet
    const bf16* table;
    const float* inv_freq;
    float *x, *angles;

    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int row) const {
        const int id = s.ids[row] < 0 ? drawn[-1 - s.ids[row]] : s.ids[row];
        const bf16* from = table + size_t(id) * c.hidden;
        float* to = x + size_t(row) * c.hidden;
        for (int i = team.rank; i < c.hidden; i += team.size) to[i] = float(from[i]);
        const int half = c.head_dim / 2;
        float* cosines = angles + size_t(row) * 2 * half;
        for (int i = team.rank; i < half; i += team.size) {
            float angle = float(s.positions[row]) * inv_freq[i];
            cosines[i] = cosf(angle);
            cosines[half + i] = sinf(angle);
        }
    }
};

// RMS norm (Zhang and Sennrich 2019): out = x / sqrt(mean(x^2) + eps) * weight. A unit is a row of
// out.
template <class Real>
struct Norm {
    static constexpr int kThreads = 256;
    Shape c;
    const int* rows;  // which rows of x; null: the first ones
    const float *x, *weight;
    Real* out;

    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int unit) const {
        const int D = c.hidden;
        const float* from = x + size_t(rows ? rows[unit] : unit) * D;
        float squares = 0;
        for (int i = team.rank * 4; i < D; i += team.size * 4)
            for (float v : load<4>(from + i).at) squares += v * v;
        const float factor = inverse_root(team.sum(squares) / float(D) + c.norm_eps);
        for (int i = team.rank * 4; i < D; i += team.size * 4) {
            auto v = load<4>(from + i), w = load<4>(weight + i);
            float scaled[4];
            for (int j = 0; j < 4; j++) scaled[j] = v.at[j] * factor * w.at[j];
            store(out + size_t(unit) * D + i, scaled);
        }
    }
};

// What becomes of q, k and v between the products and attention: bias (Qwen2), the norm of each
// head of q and k (Qwen3), RoPE (Su et al. 2021), which turns the pairs (v[i], v[i + HD / 2]). Then
// keys and values go to their slots in the cache, queries stay. A unit is a row, or with parts > 1
// a part of its heads. A group of lanes takes a head, each lane 4 pairs at a time.
template <class Real>
struct Rotate {
    static constexpr int kThreads = 256;
    StepArrays s;
    Shape c;
    int layer, parts;
    const float *bias, *q_norm, *k_norm;  // of the layer: [(H + 2 KV) HD], [HD]; or null
    const float* angles;
    Real *qkv, *kv;

    // Lanes of a head: a power of two, so that 4 pairs each are enough for most.
    static NANOCU_BOTH int lanes_of(int head_dim) {
        return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32;
    }

    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int unit) const {
        auto lanes = team.group(lanes_of(c.head_dim));
        const int row = unit / parts, heads = c.heads + 2 * c.kv_heads;
        if (row >= s.header->rows) return;
        const int position = s.positions[row], block = s.table(row)[position / kBlockSize];
        for (int first = unit % parts * lanes.count; first < heads; first += parts * lanes.count)
            rotate_head(lanes, row, first + lanes.index, block, position % kBlockSize);
    }

    template <class Group>
    NANOCU_BOTH void rotate_head(Group& lanes, int row, int head, int block, int slot) const {
        const int HD = c.head_dim, half = HD / 2, H = c.heads, KV = c.kv_heads;
        const bool query = head < H, value = head >= H + KV, inside = head < H + 2 * KV;
        const float* weight = query ? q_norm : k_norm;
        Real* v = qkv + size_t(row) * c.qkv_dim() + size_t(head) * HD;
        float squares = 0, factor = 1, a[4], b[4];
        for (int i = lanes.rank * 4; weight && inside && i < half; i += lanes.size * 4) {
            read(v, head, i, a), read(v, head, i + half, b);
            for (int j = 0; j < 4; j++) squares += a[j] * a[j] + b[j] * b[j];
        }
        if (weight) factor = inverse_root(lanes.sum(squares) / float(HD) + c.norm_eps);
        for (int i = lanes.rank * 4; inside && i < half; i += lanes.size * 4) {
            read(v, head, i, a), read(v, head, i + half, b);
            if (!value) turn(row, i, weight, factor, a, b);
            if (query) {
                store(v + i, a), store(v + i + half, b);
                continue;
            }
            const PageLayout& layout = value ? c.values : c.keys;
            Real* page = kv + (value ? c.value_page(block, layer, head - H - KV)
                                     : c.key_page(block, layer, head - H));
            put(page, layout, slot, i, a), put(page, layout, slot, i + half, b);
        }
    }

private:
    NANOCU_BOTH void read(const Real* v, int head, int i, float (&to)[4]) const {
        auto four = load<4>(v + i);
        for (int j = 0; j < 4; j++)
            to[j] = float(four.at[j]) + (bias ? bias[head * c.head_dim + i + j] : 0);
    }
    NANOCU_BOTH void turn(int row, int i, const float* weight, float factor, float (&a)[4],
                          float (&b)[4]) const {
        const int half = c.head_dim / 2;
        const float* cosines = angles + size_t(row) * 2 * half;
        auto cosine = load<4>(cosines + i), sine = load<4>(cosines + half + i);
        for (int j = 0; j < 4; j++) {
            float x = a[j], y = b[j];
            if (weight) x *= factor * weight[i + j], y *= factor * weight[i + j + half];
            a[j] = x * cosine.at[j] - y * sine.at[j];
            b[j] = y * cosine.at[j] + x * sine.at[j];
        }
    }
    static NANOCU_BOTH void put(Real* page, const PageLayout& layout, int slot, int d,
                                const float (&four)[4]) {
        if (layout.dim == 1) return store(page + layout.at(slot, d), four);
        for (int j = 0; j < 4; j++) page[layout.at(slot, d + j)] = Real(four[j]);
    }
};

// Attention (Vaswani et al. 2017) as it is defined, for a team of one: att = softmax(q K^T /
// sqrt(HD)) V over all tokens up to the row's own. A unit is a row and a query head.
template <class Real>
struct AttendAlone {
    StepArrays s;
    Shape c;
    int layer;
    const Real *qkv, *kv;
    Real* att;  // [T, H HD]

    size_t scratch() const {  // for scores, and for the sum of values
        return (s.header->table_width * kBlockSize + c.head_dim) * sizeof(float);
    }

    template <class Team>
    void operator()(Team& team, int unit) const {
        const int row = unit / c.heads, head = unit % c.heads, kv_head = head / c.group();
        const int tokens = s.positions[row] + 1, HD = c.head_dim;
        const int* table = s.table(row);
        const Real* q = qkv + size_t(row) * c.qkv_dim() + size_t(head) * HD;
        float *scores = (float*)team.scratch, *sum = scores + s.header->table_width * kBlockSize;
        float top = -INFINITY, total = 0;
        for (int t = 0; t < tokens; t++) {
            const Real* k = kv + c.key_page(table[t / kBlockSize], layer, kv_head);
            float score = 0;
            for (int d = 0; d < HD; d++)
                score += float(q[d]) * float(k[c.keys.at(t % kBlockSize, d)]);
            scores[t] = score * inverse_root(float(HD));
            top = std::max(top, scores[t]);
        }
        std::fill(sum, sum + HD, 0.0f);
        for (int t = 0; t < tokens; t++) {
            const Real* v = kv + c.value_page(table[t / kBlockSize], layer, kv_head);
            const float weight = expf(scores[t] - top);
            total += weight;
            for (int d = 0; d < HD; d++)
                sum[d] += weight * float(v[c.values.at(t % kBlockSize, d)]);
        }
        for (int d = 0; d < HD; d++) att[size_t(unit) * HD + d] = Real(sum[d] / total);
    }
};

constexpr int kMostQueries = 4;  // of a unit of the op below: more would not fit into registers

// A tile of a prompt has so many rows as give kMostQueries queries for a kv head, but at least one.
NANOCU_BOTH inline int tile_rows_of(const Shape& c) {
    return c.group() < kMostQueries ? kMostQueries / c.group() : 1;
}

// The same for a team of many threads, where scores of long contexts have no room. A group of
// lanes takes a token, each lane 8 components of its key and value (so layouts must have these side
// by side), which serve all queries of the unit: the query heads of a kv head, in several rows of a
// prompt. Softmax is done as tokens come (Milakov, Gimelshein 2018): each group keeps, of each
// query, the largest score, the sum of exp(score - largest), and the sum of the values weighted so.
//
//   tokens   0 1 2 3 | 4 5 6 7 | ...        four groups: group g takes tokens g, g + 4, g + 8, ...
//   group    0 1 2 3 | 0 1 2 3 | ...        then their results become one, in scratch
//
// A unit is some queries of a tile with a kv head, and with parts > 1 a part of the context. A part
// writes its result to partial, and MergeParts makes one of them: the same sums as for groups.
template <class Real, int kLanes, int kQueries>
struct Attend {
    static constexpr int kThreads = 256;
    StepArrays s;
    Shape c;
    int layer, parts;
    bool of_prompts;        // the tiles are s.prompts; else each row of s.single is one
    const Real *qkv, *kv;
    float* partial;         // [decodes, H, parts, HD + 2]: values, largest score, sum
    Real* att;              // [T, H HD]

    static constexpr size_t scratch(int head_dim) {
        return kThreads / kLanes * (2 * kQueries + head_dim) * sizeof(float);
    }
    // How often the units of a tile cut its queries.
    static NANOCU_BOTH int chunks(int queries) { return (queries + kQueries - 1) / kQueries; }

    // Of a query, what a group has seen so far; of the values, 8 components of a lane.
    struct State {
        float q[8], top = -1e30f, total = 0, values[8] = {};
        int seen = 0;  // tokens that the query sees
    };

    // unit = ((tile * cuts + cut) * KV + kv head) * parts + part
    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int unit) const {
        const int at = unit / parts / c.kv_heads, part = unit % parts;
        const int kv_head = unit / parts % c.kv_heads, per_tile = of_prompts ? tile_rows_of(c) : 1;
        const int cuts = chunks(per_tile * c.group()), i = at / cuts;
        if (i >= (of_prompts ? s.header->tiles : s.header->decodes)) return;
        const Tile tile = of_prompts ? s.prompts[i] : s.tile_of(s.single[i]);
        const int pages = tile.last, each = pages_each(pages, parts);
        const int first = part * each, last = first + each < pages ? first + each : pages;
        const int query = at % cuts * kQueries;  // the first, of tile.rows * G
        if (first >= pages || query >= tile.rows * c.group()) return;
        State state[kQueries];
        auto lanes = team.group(kLanes);
        load_queries(lanes.rank, tile, kv_head, query, state);
        see_tokens(lanes, tile, kv_head, first * kBlockSize, last * kBlockSize, state);
        NANOCU_UNROLL_ALL
        for (int j = 0; j < kQueries; j++) {
            if (query + j >= tile.rows * c.group()) continue;
            const int row = tile.row + (query + j) / c.group();
            const int head = kv_head * c.group() + (query + j) % c.group();
            merge_groups(team, lanes, state[j], j, [&](int d, float value, float top, float sum) {
                if (each >= pages) {
                    att[(size_t(row) * c.heads + head) * c.head_dim + d] = Real(value / sum);
                    return;
                }
                const size_t place = (size_t(i) * c.heads + head) * parts + part;
                float* to = partial + place * (c.head_dim + 2);
                to[d] = value;
                if (d == 0) to[c.head_dim] = top, to[c.head_dim + 1] = sum;
            });
        }
    }

    // Pages of a part.
    static NANOCU_BOTH int pages_each(int pages, int parts) { return (pages + parts - 1) / parts; }

private:
    // Scores come out as exponents of 2, because that is what GPUs compute.
    NANOCU_BOTH void load_queries(int lane, const Tile& tile, int kv_head, int query,
                                  State (&state)[kQueries]) const {
        const float scale = 1.44269504f * inverse_root(float(c.head_dim));
        NANOCU_UNROLL_ALL
        for (int j = 0; j < kQueries; j++) {
            const int n = query + j, row = tile.row + n / c.group();
            const bool inside = n < tile.rows * c.group();
            const int head = kv_head * c.group() + n % c.group();
            state[j].seen = inside ? tile.position + n / c.group() + 1 : 0;
            Pack<Real, 8> q = {};
            if (inside && lane * 8 < c.head_dim)
                q = load<8>(qkv + size_t(row) * c.qkv_dim() + head * c.head_dim + lane * 8);
            for (int d = 0; d < 8; d++) state[j].q[d] = float(q.at[d]) * scale;
        }
    }

    template <class Group>
    NANOCU_BOTH void see_tokens(Group& lanes, const Tile& tile, int kv_head, int begin, int end,
                                State (&state)[kQueries]) const {
        const int* table = s.tables + size_t(tile.sequence) * s.header->table_width;
        const int tokens = tile.position + tile.rows, last = (end < tokens ? end : tokens) - 1;
        const Real *keys = kv + c.key_page(0, layer, kv_head), *values = keys + c.value_offset();
        // lanes behind the end of a head read its beginning, which counts nothing: their q is 0
        const int d = lanes.rank * 8 < c.head_dim ? lanes.rank * 8 : 0;
        NANOCU_UNROLL_BY_2
        for (int from = begin; from <= last; from += lanes.count) {
            const int t = from + lanes.index, token = t < last ? t : last;
            const int slot = token % kBlockSize;
            const size_t block = table[token / kBlockSize] * c.block_numbers();
            const auto key = load<8>(keys + block + c.keys.at(slot, d));
            const auto value = load<8>(values + block + c.values.at(slot, d));
            NANOCU_UNROLL_ALL
            for (int j = 0; j < kQueries; j++)
                see_token(lanes, key, value, t <= last && t < state[j].seen, state[j]);
        }
    }

    template <class Group>
    static NANOCU_BOTH void see_token(Group& lanes, const Pack<Real, 8>& key,
                                      const Pack<Real, 8>& value, bool sees, State& q) {
        float score = 0;
        for (int d = 0; d < 8; d++) score += q.q[d] * float(key.at[d]);
        score = lanes.sum(score);
        if (!sees) score = -1e30f;
        const float top = fmaxf(q.top, score), keep = exp2f(q.top - top);
        const float weight = sees ? exp2f(score - top) : 0;
        q.top = top;
        q.total = q.total * keep + weight;
        for (int d = 0; d < 8; d++) q.values[d] = q.values[d] * keep + weight * float(value.at[d]);
    }

    // One result from those of the groups for query j; calls put(d, value, top, sum) for each d.
    template <class Team, class Group>
    NANOCU_BOTH void merge_groups(Team& team, Group& lanes, const State& q, int j, auto put) const {
        const int HD = c.head_dim, groups = lanes.count, d = lanes.rank * 8;
        float *tops = (float*)team.scratch + 2 * j * groups, *totals = tops + groups;
        float* values = (float*)team.scratch + 2 * kQueries * groups;  // [groups, HD], of query j
        if (lanes.rank == 0) tops[lanes.index] = q.top, totals[lanes.index] = q.total;
        team.barrier();
        float top = -1e30f, sum = 0;
        for (int g = 0; g < groups; g++) top = fmaxf(top, tops[g]);
        for (int g = 0; g < groups; g++) sum += totals[g] * exp2f(tops[g] - top);
        const float factor = exp2f(q.top - top);
        for (int i = 0; i < 8 && d < HD; i++)
            values[lanes.index * HD + d + i] = q.values[i] * factor;
        team.barrier();
        for (int i = team.rank; i < HD; i += team.size) {
            float value = 0;
            for (int g = 0; g < groups; g++) value += values[g * HD + i];
            put(i, value, top, sum);
        }
        // Before values are written again, all come to the first barrier of the next query.
    }
};

// Makes one result of the parts of a context that Attend has left in partial. A unit is a row of
// s.single and a query head.
template <class Real>
struct MergeParts {
    static constexpr int kThreads = 128;
    StepArrays s;
    Shape c;
    int parts;
    const float* partial;
    Real* att;

    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int unit) const {
        if (unit / c.heads >= s.header->decodes) return;
        const int row = s.single[unit / c.heads], HD = c.head_dim, pages = s.pages(row);
        const int each = (pages + parts - 1) / parts, used = (pages + each - 1) / each;
        if (used == 1) return;  // Attend has written it
        const float* from = partial + size_t(unit) * parts * (HD + 2);
        auto part = [&](int p) { return from + p * (HD + 2); };
        float top = -1e30f, sum = 0;
        for (int p = 0; p < used; p++) top = fmaxf(top, part(p)[HD]);
        for (int p = 0; p < used; p++) sum += part(p)[HD + 1] * exp2f(part(p)[HD] - top);
        for (int d = team.rank; d < HD; d += team.size) {
            float value = 0;
            for (int p = 0; p < used; p++) value += part(p)[d] * exp2f(part(p)[HD] - top);
            att[(size_t(row) * c.heads + unit % c.heads) * HD + d] = Real(value / sum);
        }
    }
};

// SwiGLU (Shazeer 2020): h [T, F] = silu(gate) * up, of gate_up [T, 2 F]. A unit is a row, or with
// parts > 1 a part of it.
template <class Real>
struct Activate {
    static constexpr int kThreads = 256;
    Shape c;
    int parts;
    const Real* gate_up;
    Real* h;

    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int unit) const {
        const int F = c.intermediate, row = unit / parts;
        const Real* from = gate_up + size_t(row) * 2 * F;
        const int rank = unit % parts * team.size + team.rank, size = parts * team.size;
        for (int i = rank * 4; i < F; i += size * 4) {
            auto gate = load<4>(from + i), up = load<4>(from + F + i);
            float out[4];
            for (int j = 0; j < 4; j++) {
                float g = float(gate.at[j]);
                out[j] = g / (1 + exp_fast(-g)) * float(up.at[j]);
            }
            store(h + size_t(row) * F + i, out);
        }
    }
};

// The draws of a step, from logits [rows, V]. A unit is a draw.
struct DrawIds {
    static constexpr int kThreads = 1024;
    const DrawKey* keys;
    const float* logits;
    int V;
    int *drawn, *host;  // [draws]: for the next step; for the host to read

    template <class Team>
    NANOCU_BOTH void operator()(Team& team, int i) const {
        const DrawKey& key = keys[i];
        const float* row = logits + size_t(key.row) * V;
        int id = draw_id(team, row, V, key.sampling, key.sample, key.position);
        if (id >= 0) drawn[i] = host[i] = id;  // one thread has it
    }
};

// =============================================================================================
// 4. The forward pass, on a CPU and on a GPU
// =============================================================================================

// A pointer, or a handle that is one, and its owner: destroy gives back what it stands for.
template <class Pointer, auto destroy>
class Owned {
public:
    Owned(Pointer pointer = nullptr) : pointer(pointer) {}
    Owned(Owned&& other) noexcept : pointer(std::exchange(other.pointer, nullptr)) {}
    Owned& operator=(Owned other) noexcept {
        std::swap(pointer, other.pointer);
        return *this;
    }
    ~Owned() {
        if (pointer) destroy(pointer);
    }
    operator Pointer() const { return pointer; }

private:
    Pointer pointer;
};

// Lays arrays one behind the other, each at a multiple of 16 bytes.
struct Carver {
    uintptr_t at;

    template <class T>
    void take(T*& array, size_t count) {
        array = (T*)at;
        at += (count * sizeof(T) + 15) / 16 * 16;
    }
};

// What is asked of a device when it is made.
struct DeviceOptions {
    int tokens, rows;  // most in a step; most sequences in one
    int ordinal;       // which GPU
    bool graphs;
    vector<string> without;  // chapters
};

// The matrices of a layer, those that have the same input stacked; and the last of all, [V, D].
enum Product { kQkv, kO, kGateUp, kDown, kLmHead };

inline vector<Matrix> matrices_of(const Model& m, Product p, int layer) {
    if (p == kLmHead) return {m.lm_head};
    const Layer& l = m.layers[layer];
    if (p == kQkv) return {l.q, l.k, l.v};
    if (p == kGateUp) return {l.gate, l.up};
    return {p == kO ? l.o : l.down};
}

// The forward pass of a step in ops that can be overridden. Kind is what runs them, Cpu or Cuda: it
// gives memory (make, to_device), runs the ops of chapter 3 (run), and multiplies (multiply).
template <class Kind>
class Forward : public Kind {
public:
    using Real = typename Kind::Real;
    using Kind::run, Kind::multiply;

    Forward(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Kind(m, o), model(m), c(m.config, keys, values), without(o.without) {
        const size_t T = std::max(o.tokens, Kind::kLogitRows), D = c.hidden;
        x = make<float>(T * D), normed = make<Real>(T * D);
        qkv = make<Real>(T * c.qkv_dim()), att = make<Real>(T * c.q_dim());
        gate_up = make<Real>(T * 2 * c.intermediate), h = make<Real>(T * c.intermediate);
        angles = make<float>(T * c.head_dim);
        logits = make<float>(size_t(Kind::kLogitRows) * c.vocab);
        max_draws = std::max<size_t>(T, o.rows);
        drawn = make<int>(max_draws);
        attn_norms = stack(&Layer::attn_norm, m.final_norm);
        mlp_norms = stack(&Layer::mlp_norm);
        q_norms = stack(&Layer::q_norm), k_norms = stack(&Layer::k_norm);
        if (m.config.type == "qwen2") biases = stack(&Layer::bias);
        inv_freq = Kind::to_device(m.config.inv_freq);
        for (const char* op : {"embed", "norm_linear", "rotate", "attend prompts", "attend decodes",
                               "add_linear", "mlp", "draw", "decode_step"})
            this->served[op] = "nano.cu";
        this->served["decode_step"] = "op by op";
    }

    size_t block_bytes() const override { return c.block_numbers() * sizeof(Real); }

protected:
    template <class T>
    using Array = typename Kind::template Array<T>;

    template <class T>
    Array<T> make(size_t count) { return Kind::template make<T>(count); }

    // A vector of each layer, one behind the other, and one more; null if the model has none.
    Array<float> stack(vector<float> Layer::* member, const vector<float>& last = {}) {
        vector<float> all;
        for (const Layer& l : model.layers)
            all.insert(all.end(), (l.*member).begin(), (l.*member).end());
        all.insert(all.end(), last.begin(), last.end());
        return all.empty() ? nullptr : Kind::to_device(all);
    }

    // For the constructor of a chapter: whether it is switched on, and can do its part (why_not is
    // empty). ops: what it then serves, and when.
    bool switched_on(const string& name, const string& why_not,
                     std::initializer_list<const char*> ops, const string& when) {
        this->chapters.push_back(name);
        auto off = [&](const string& other) { return other == name || other == "all"; };
        if (std::ranges::any_of(without, off)) return false;
        if (!why_not.empty())
            this->note += (this->note.empty() ? "" : "; ") + name + " is off: " + why_not;
        for (const char* op : ops)
            if (string& by = this->served[op]; why_not.empty())
                by = name + (when.empty() ? "" : when + ", else " + by);
        return why_not.empty();
    }

    // ----- The ops. On a CPU all threads call them, and leave them together.

    virtual void embed(const StepArrays& s) {
        run(s.rows, Embed{s, c, drawn, Kind::embedding(), inv_freq, x, angles});
    }

    // qkv, gate_up or logits = norm of x, times the matrix. rows: which rows of x; null: the first.
    virtual void norm_linear(Product p, int layer, const int* rows, int count) {
        run(count, Norm<Real>{c, rows, x, norm_weight(p, layer), normed});
        if (p == kLmHead) multiply(p, layer, normed, (float*)logits, count);
        else multiply(p, layer, normed, p == kQkv ? (Real*)qkv : (Real*)gate_up, count);
    }

    virtual void rotate(const StepArrays& s, int layer) {
        const int per_block = Rotate<Real>::kThreads / Rotate<Real>::lanes_of(c.head_dim);
        const int parts = s.rows > 256 ? 1 : (c.heads + 2 * c.kv_heads + per_block - 1) / per_block;
        run(s.rows * parts, Rotate<Real>{s, c, layer, parts, of_layer(biases, layer, c.qkv_dim()),
                                         of_layer(q_norms, layer, c.head_dim),
                                         of_layer(k_norms, layer, c.head_dim), angles, qkv, kv});
    }

    // att = attention of the step's queries, over what the cache has of their sequences by now.
    virtual void attend(const StepArrays& s, int layer) = 0;

    // x += att or h, times the matrix.
    virtual void add_linear(const StepArrays& s, Product p, int layer) {
        multiply(p, layer, p == kO ? (Real*)att : (Real*)h, (float*)x, s.rows, true);
    }

    // The feed-forward block: x += down(silu(gate(norm(x))) * up(norm(x))).
    virtual void mlp(const StepArrays& s, int layer) {
        norm_swiglu(s, layer);
        add_linear(s, kDown, layer);
    }
    virtual void norm_swiglu(const StepArrays& s, int layer) {
        norm_linear(kGateUp, layer, nullptr, s.rows);
        const int parts = (c.intermediate + 1023) / 1024;
        run(s.rows * parts, Activate<Real>{c, parts, gate_up, h});
    }

    // A whole step of sequences with one row each, from their ids to their logits; false: not done.
    virtual bool decode_step(const StepArrays&) { return false; }

    void forward(const StepArrays& s) {
        embed(s);
        for (int layer = 0; layer < c.layers; layer++) {
            norm_linear(kQkv, layer, nullptr, s.rows);
            rotate(s, layer);
            attend(s, layer);
            add_linear(s, kO, layer);
            mlp(s, layer);
        }
    }

    // ----- A step's arrays, in the host's memory or in the device's.

    // Sets the pointers of s into memory that begins where the carver stands. Chapters add their
    // own arrays; the block tables come last, behind all of them.
    virtual void carve(Carver& carver, StepArrays& s) {
        carver.take(s.header, 1), carver.take(s.keys, s.draws), carver.take(s.prompts, s.rows);
        for (int** array : {&s.ids, &s.positions, &s.sequence, &s.logit_rows, &s.single})
            carver.take(*array, s.rows);
    }

    // Sets all pointers of s into memory that begins at an address.
    void place(StepArrays& s, char* at) {
        Carver carver = {uintptr_t(at)};
        carve(carver, s);
        s.tables = (int*)carver.at;
    }

    // How many bytes a step can take, with all its block tables.
    size_t array_bytes(const DeviceOptions& o) {
        StepArrays s;
        s.rows = std::max(o.tokens, Kind::kLogitRows), s.draws = int(max_draws);
        Carver carver = {0};
        carve(carver, s);
        size_t width = model.config.context / kBlockSize + 1;
        return carver.at + o.rows * width * sizeof(int);
    }

    // Puts a step where s lies, in the host's memory. Rows that the step does not have get id 0.
    void fill(StepArrays& s, const Step& step) {
        *s.header = {step.tokens(), step.table_width, 0, 0};
        std::ranges::copy(step.ids, s.ids);
        std::ranges::copy(step.positions, s.positions);
        std::ranges::copy(step.sequence, s.sequence);
        std::ranges::copy(step.logit_rows, s.logit_rows);
        std::ranges::copy(step.tables, s.tables);
        for (int i = step.tokens(); i < s.rows; i++) s.ids[i] = s.positions[i] = 0;
        for (int i = int(step.logit_rows.size()); i < s.rows; i++) s.logit_rows[i] = 0;
        plan(s, step);
    }

    // Which rows are attended for alone, and which together.
    virtual void plan(StepArrays& s, const Step& step) {
        for (int begin = 0, end; begin < step.tokens(); begin = end) {
            for (end = begin + 1; end < step.tokens(); end++)
                if (step.sequence[end] != step.sequence[begin]) break;
            if (end - begin == 1) s.single[s.header->decodes++] = begin;
            else add_tiles(s, begin, end);
        }
        auto context = [&](int row) { return step.positions[row]; };
        std::ranges::sort(s.single, s.single + s.header->decodes, std::greater(), context);
        s.decodes = s.header->decodes, s.tiles = s.header->tiles;
    }
    void add_tiles(StepArrays& s, int begin, int end) {
        for (int last = end, first; last > begin; last = first) {  // the longest context first
            first = std::max(begin, last - tile_rows());
            s.prompts[s.header->tiles++] = {first, last - first, s.positions[first],
                                            s.sequence[first], 0, s.pages(last - 1), -1};
        }
    }
    virtual int tile_rows() const { return tile_rows_of(c); }

    const float* norm_weight(Product p, int layer) const {
        if (p == kLmHead) layer = c.layers;  // the last norm, behind those of the layers
        return (p == kGateUp ? mlp_norms : attn_norms) + size_t(layer) * c.hidden;
    }
    static const float* of_layer(const float* all, int layer, size_t count) {
        return all ? all + layer * count : nullptr;
    }

    const Model& model;
    const Shape c;
    const vector<string> without;
    size_t max_draws;
    Array<float> x;                 // [T, D], the residual stream
    Array<Real> normed, qkv, att;   // [T, D], [T, (H + 2 KV) HD], [T, H HD]
    Array<Real> gate_up, h;         // [T, 2 F], [T, F]
    Array<float> angles, logits;    // [T, 2, HD / 2], [kLogitRows, V]
    Array<int> drawn;               // [max_draws], the last step's ids
    Array<float> attn_norms;        // [L + 1, D], the last of them before lm_head
    Array<float> mlp_norms, q_norms, k_norms, biases;  // [L, ...]
    Array<float> inv_freq;          // [HD / 2]
    Array<Real> kv;                 // the cache
};

// ----- CPU: bf16 weights, float everything else; OpenMP's threads.

// The sums over k of x[r][k] * w[k] for some rows of x [R, K]: each is 16 sums side by side, as
// compilers keep them in vector registers, so the bits of a row are the same in any company.
template <int R>
void dot_rows(const float* x, const float* w, int K, float sums[R]) {
    float lanes[R][16] = {};
    for (int k = 0; k < K; k += 16)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 16; i++) lanes[r][i] += x[size_t(r) * K + k + i] * w[k + i];
    for (int r = 0; r < R; r++) sums[r] = std::accumulate(lanes[r], lanes[r] + 16, 0.0f);
}

// Copies bf16 numbers as floats.
inline void widen(const bf16* from, int count, float* to) {
    for (int i = 0; i < count; i++) to[i] = float(from[i]);
}

class Cpu : public Device {
protected:
    using Real = float;
    static constexpr int kLogitRows = 64;  // rows whose logits are in memory at a time

    Cpu(const Model& m, const DeviceOptions&) : weights(m) { name = "cpu"; }

    template <class T>
    using Array = Owned<T*, std::free>;

    // Zeros; memory is real only once it is touched.
    template <class T>
    static Array<T> make(size_t count) {
        auto memory = (T*)calloc(std::max<size_t>(count, 1), sizeof(T));
        if (!memory) fail("memory: ", count * sizeof(T) >> 20, " MiB are more than there is");
        return memory;
    }
    static Array<float> to_device(const vector<float>& values) {
        Array<float> copy = make<float>(values.size());
        std::ranges::copy(values, (float*)copy);
        return copy;
    }

    // Runs an op for all units; all threads call this.
    template <class Op>
    static void run(int units, const Op& op) {
        vector<float> memory;
        if constexpr (requires { op.scratch(); }) memory.resize(op.scratch() / sizeof(float));
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < units; i++) {
            OneThread team;
            team.scratch = (char*)memory.data();
            op(team, i);
        }
    }

    const bf16* embedding() const { return weights.embed.data; }

    // y [T, N] = x [T, K] w^T, or +=. A row of weights is widened once for all rows of x.
    void multiply(Product p, int layer, const float* x, float* y, int T, bool add = false) const {
        const vector<Matrix> matrices = matrices_of(weights, p, layer);
        const int K = matrices[0].cols;
        int N = 0, first = 0;
        for (const Matrix& w : matrices) N += w.rows;
        vector<float> wide(K);
        for (const Matrix& w : matrices) {
            #pragma omp for schedule(static) nowait
            for (int n = 0; n < w.rows; n++) {
                widen(w.row(n), K, wide.data());
                for (int t = 0, rows; t < T; t += rows) {
                    float sums[4];
                    rows = T - t >= 4 ? 4 : 1;
                    auto dots = rows == 4 ? dot_rows<4> : dot_rows<1>;
                    dots(x + size_t(t) * K, wide.data(), K, sums);
                    for (int r = 0; r < rows; r++) {
                        float& to = y[size_t(t + r) * N + first + n];
                        to = add ? to + sums[r] : sums[r];
                    }
                }
            }
            first += w.rows;
        }
        #pragma omp barrier
    }

    const Model& weights;
};

// Draws or scores the id that d asks for, from its row of logits [V]; drawn: where it goes, with an
// id if there is one already. Several threads call this.
void resolve(const Step& step, const Draw& d, std::span<const float> logits, Drawn& drawn) {
    if (d.known >= 0) drawn.id = d.known;
    if (drawn.id < 0) {
        vector<float> penalized;
        if (d.sampling.has_penalties()) {
            penalized.assign(logits.begin(), logits.end());
            apply_penalties(penalized, d.sampling, d.prompt, d.output);
        }
        drawn.id = sample_id(penalized.empty() ? logits : penalized, d.sampling, d.sample,
                             d.position);
    }
    if (d.logprobs >= 0) drawn.scores = log_probabilities(logits, drawn.id, d.logprobs);
    if (step.observer) step.observer->drawn(d, drawn, logits);
}

class CpuDevice : public Forward<Cpu> {
public:
    CpuDevice(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Forward<Cpu>(m, o, keys, values), options(o) {}

    size_t free_memory() const override { return physical_memory() / 4; }
    void reserve(int blocks) override {
        if (blocks * block_bytes() > physical_memory())
            fail("--kv-memory: more than this machine has; lower it");
        kv = make<float>(blocks * c.block_numbers());
        arrays = make<char>(array_bytes(options));
    }

    void launch(Step& step) override {
        for (auto [from, to] : step.copies)
            std::copy_n(kv + from * c.block_numbers(), c.block_numbers(),
                        kv + to * c.block_numbers());
#ifndef NDEBUG  // whoever reads what is no longer there gets NaN
        for (auto [from, to] : step.copies) std::erase(step.taken, to);
        for (int block : step.taken)
            std::fill_n(kv + block * c.block_numbers(), c.block_numbers(), NAN);
#endif
        StepArrays s;
        s.rows = step.tokens();
        s.logits = int(step.logit_rows.size());
        place(s, arrays);
        fill(s, step);
        #pragma omp parallel
        if (!decode_step(s)) forward(s);
        for (int begin = 0; begin < s.logits; begin += kLogitRows) {
            const int count = std::min(kLogitRows, s.logits - begin);
            #pragma omp parallel
            {
                norm_linear(kLmHead, 0, s.logit_rows + begin, count);
                #pragma omp for schedule(dynamic)
                for (size_t i = 0; i < step.draws.size(); i++) {
                    const Draw& d = step.draws[i];
                    const float* row = logits + size_t(d.row % kLogitRows) * c.vocab;
                    if (d.row / kLogitRows == begin / kLogitRows)
                        resolve(step, d, {row, size_t(c.vocab)}, step.drawn[i]);
                }
            }
        }
    }
    void wait(Step&) override {}

protected:
    void attend(const StepArrays& s, int layer) override {
        run(s.rows * c.heads, AttendAlone<float>{s, c, layer, qkv, kv, att});
    }

private:
    const DeviceOptions options;
    Array<char> arrays;
};


// ----- GPU: weights, activations, keys and values in bf16, sums and the residual stream in float.

#ifdef __CUDACC__

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail("CUDA: ", what, ": ", cudaGetErrorString(error));
}

// GPUs in this machine; a driver too old for this build is an error.
int count_gpus() {
    int gpus = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&gpus);
    cudaDriverGetVersion(&driver);  // 0: there is none
    if (error == cudaErrorInsufficientDriver && driver > 0)
        fail("GPU: its driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
             ", this build needs ", CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10,
             "; update the driver, or use --device cpu");
    return error == cudaSuccess ? gpus : 0;
}

// Waits until the kernel before this one has ended, so that its results can be read. The kernel
// behind this one may be set up meanwhile (programmatic dependent launch, from Hopper on).
__device__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
}

// The one kernel that runs all ops of chapter 3: a block for each unit.
template <class Op>
__global__ void __launch_bounds__(Op::kThreads) on_blocks(const __grid_constant__ Op op) {
    extern __shared__ __align__(16) char block_scratch[];
    wait_for_previous();
    Block team(block_scratch);
    op(team, int(blockIdx.x));
}

class Cuda : public Device {
protected:
    using Real = bf16;
    static constexpr int kLogitRows = 256;  // of a captured step, and whose logits are in memory
    static constexpr size_t kWorkspace = 64 << 20;  // of cuBLAS

    Cuda(const Model& m, const DeviceOptions& o) : ordinal(o.ordinal) {
        overlaps = true;
        cudaDeviceProp device;
        check(cudaSetDevice(ordinal), "device");
        check(cudaGetDeviceProperties(&device, ordinal), "device");
        name = device.name;
        if (device.major < 8)
            fail("GPU: ", name, " is older than compute capability 8.0; use --device cpu");
        cudaFuncAttributes code;
        check(cudaFuncGetAttributes(&code, on_blocks<Embed>), "no code for this GPU in here");
        kernels_wait = code.ptxVersion >= 90;
        stream = new_stream(), uploads = new_stream();
        cublasHandle_t handle;
        if (cublasCreate(&handle)) fail("CUDA: cuBLAS does not start");
        blas = handle;
        cublasSetStream(blas, stream);
        workspace = make<char>(kWorkspace);
        cublasSetWorkspace(blas, workspace, kWorkspace);
        load(m);
    }

    template <class T>
    using Array = Owned<T*, cudaFree>;

    template <class T>
    static Array<T> make(size_t count) {
        void* memory = nullptr;
        if (cudaMalloc(&memory, std::max<size_t>(count, 1) * sizeof(T)) == cudaSuccess)
            return (T*)memory;
        cudaGetLastError();  // it is told here, and not again
        size_t free = 0, total = 0;
        cudaMemGetInfo(&free, &total);
        fail("GPU: ", count * sizeof(T) >> 20, " MiB do not fit into the ", free >> 20, " MiB that "
             "are free; lower --kv-memory, --chunk or --max-rows, or take a smaller model");
    }
    static cudaStream_t new_stream() {
        cudaStream_t made;
        check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "stream");
        return made;
    }

    // Copies numbers from the host and waits until they are there.
    template <class T>
    static void copy(const T* from, size_t count, T* to) {
        check(cudaMemcpy(to, from, count * sizeof(T), cudaMemcpyHostToDevice), "copy");
    }
    static Array<float> to_device(const vector<float>& values) {
        Array<float> to = make<float>(values.size());
        copy(values.data(), values.size(), (float*)to);
        return to;
    }

    // Launches a kernel. shared: bytes of dynamic shared memory; cluster: of so many blocks.
    template <class... Parameters, class... Arguments>
    void start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster,
               const Arguments&... arguments) {
        cudaLaunchAttribute attributes[2];
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
        const unsigned count = cluster > 1 ? 2 : kernels_wait;
        cudaLaunchConfig_t config = {grid, dim3(threads), shared, stream, attributes, count};
        check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "kernel");
    }

    // Runs an op for all units, a block each.
    template <class Op>
    void run(int units, const Op& op, size_t scratch = 0) {
        if (units > 0) start(on_blocks<Op>, dim3(units), Op::kThreads, scratch, 1, op);
    }

    const bf16* embedding() const { return embed_table; }

    // y [T, N] = x [T, K] w^T, or +=
    template <class Out>
    void multiply(Product p, int layer, const bf16* x, Out* y, int T, bool add = false) {
        const Stack& w = weights[p];
        const bf16* from = w.data + size_t(layer) * w.N * w.K;
        float one = 1, old = add;
        auto type = std::is_same_v<Out, float> ? CUDA_R_32F : CUDA_R_16BF;
        if (cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, w.N, T, w.K, &one, from, CUDA_R_16BF, w.K,
                         x, CUDA_R_16BF, w.K, &old, y, type, w.N, CUBLAS_COMPUTE_32F,
                         CUBLAS_GEMM_DEFAULT))
            fail("CUDA: cuBLAS refused a product");
    }

    // The matrices of a product, [N, K] for each layer, one behind the other.
    struct Stack {
        Array<bf16> memory;
        bf16* data = nullptr;
        int N = 0, K = 0;
    };

    void load(const Model& m) {
        for (Product p : {kQkv, kO, kGateUp, kDown, kLmHead}) {
            const int layers = p == kLmHead ? 1 : m.config.layers;
            Stack& w = weights[p];
            for (const Matrix& part : matrices_of(m, p, 0)) w.N += part.rows, w.K = part.cols;
            w.data = w.memory = make<bf16>(size_t(layers) * w.N * w.K);
            bf16* to = w.data;
            for (int layer = 0; layer < layers; layer++)
                for (const Matrix& part : matrices_of(m, p, layer)) to = append(part, to);
        }
        embed_table = weights[kLmHead].data;
        if (m.config.tied) return;
        embed_memory = make<bf16>(size_t(m.embed.rows) * m.embed.cols);
        embed_table = embed_memory;
        append(m.embed, embed_table);
    }

    // Copies a matrix to an address; returns where it ends there.
    static bf16* append(const Matrix& m, bf16* to) {
        const size_t size = size_t(m.rows) * m.cols;
        copy(m.data, size, to);
        return to + size;
    }

    const int ordinal;
    bool kernels_wait = false;  // for each other, by themselves: see wait_for_previous
    Owned<cudaStream_t, cudaStreamDestroy> stream, uploads;
    Owned<cublasHandle_t, cublasDestroy> blas;
    Array<char> workspace;
    Array<bf16> embed_memory;  // where lm_head is another matrix
    bf16* embed_table;         // [V, D]
    Stack weights[5];   // by Product
};

class CudaDevice : public Forward<Cuda> {
public:
    CudaDevice(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Forward<Cuda>(m, o, keys, values), options(o) {
        if (c.head_dim > kMostHeadDim)
            fail("config.json: head_dim ", c.head_dim, " is over ", kMostHeadDim, ", too much for "
                 "the GPU's attention; use --device cpu");
        // Several parts are made only of fewer than kTeams (row, kv head) pairs, so of all pairs
        // together there are fewer than 2 kTeams parts, each of the pair's query heads. Room for 8
        // heads at least makes this array large, and keeps it away from the small ones, which are
        // read all the time.
        partial = make<float>(size_t(2) * kTeams * std::max(c.group(), 8) * (c.head_dim + 2));
    }
    ~CudaDevice() override { cudaStreamSynchronize(uploads), cudaStreamSynchronize(stream); }

    size_t free_memory() const override {
        size_t free, total;
        check(cudaMemGetInfo(&free, &total), "memory");
        return free - std::min(free, kMargin);
    }

    void reserve(int blocks) override {
        kv = make<bf16>(blocks * c.block_numbers());
        // a chapter may read slots without a token, and weight them with 0; 0 times NaN is NaN
        check(cudaMemsetAsync(kv, 0, blocks * block_bytes(), stream), "KV memory");
        bytes = array_bytes(options);
        for (Buffer& b : buffers) {
            b.device = make<char>(bytes);
            b.host = make_pinned<char>(bytes);
            b.drawn = make_pinned<int>(max_draws);
            b.uploaded = new_event(), b.done = new_event();
        }
    }

    // A step is a captured graph if its sequences, up to kLogitRows, have one row each, which is
    // drawn from, and no draw needs the host.
    void launch(Step& step) override {
        const int T = step.tokens();
        const bool host = std::ranges::any_of(step.draws, needs_host);
        const bool one_each = T == step.sequences() && int(step.draws.size()) == T &&
                              int(step.logit_rows.size()) == T && T <= kLogitRows;
        const bool captured = one_each && !host && options.graphs;
        const int padded = T <= 16 ? int(std::bit_ceil(unsigned(T))) : (T + 15) / 16 * 16;
        StepArrays s = upload(step, captured ? padded : T, one_each, captured);
        before_step(s);
        for (auto [from, to] : step.copies)
            check(cudaMemcpyAsync(kv + from_block(to), kv + from_block(from), block_bytes(),
                                  cudaMemcpyDeviceToDevice, stream), "copy of a block");
        step.replayed = captured;
        if (captured) {
            Graph& graph = graphs[{s.rows, turn, s.tiles}];
            if (!graph) graph = capture(s);
            check(cudaGraphLaunch(graph, stream), "graph");
        } else {
            run_step(s, &step);
        }
        check(cudaEventRecord(buffers[turn].done, stream), "step");
    }

    void wait(Step& step) override {
        Buffer& b = buffers[step.buffer];
        check(cudaEventSynchronize(b.done), "step");
        for (size_t i = 0; i < step.draws.size(); i++) {
            const Draw& d = step.draws[i];
            if (step.drawn[i].id < 0) step.drawn[i].id = b.drawn[i];
            if (!step.replayed || !step.observer) continue;
            vector<float> row(c.vocab);  // a graph's logits are there until the next step
            check(cudaMemcpy(row.data(), logits + size_t(d.row) * c.vocab,
                             row.size() * sizeof(float), cudaMemcpyDeviceToHost), "logits");
            step.observer->drawn(d, step.drawn[i], row);
        }
    }

protected:
    static constexpr size_t kMargin = 1 << 30;  // of memory that is left to others
    static constexpr int kTeams = 264;   // blocks that attention should make, to use the whole GPU
    static constexpr int kMaxParts = 32;  // of a context
    static constexpr int kMostHeadDim = 256;  // 8 components for each of the 32 lanes of a warp

    void attend(const StepArrays& s, int layer) override {
        if (s.tiles) attend_prompts(s, layer);
        if (s.decodes) attend_decodes(s, layer);
    }
    virtual void attend_prompts(const StepArrays& s, int layer) {
        attend_by_head_dim<kMostQueries>(s, layer, true, s.tiles, 1);
    }
    virtual void attend_decodes(const StepArrays& s, int layer) {
        const int units = s.decodes * c.kv_heads;
        const int parts = std::clamp((kTeams + units - 1) / units, 1, kMaxParts);
        if (c.group() <= 2) attend_by_head_dim<2>(s, layer, false, s.decodes, parts);
        else attend_by_head_dim<kMostQueries>(s, layer, false, s.decodes, parts);
        if (parts > 1) run(s.decodes * c.heads, MergeParts<bf16>{s, c, parts, partial, att});
    }
    template <int kQueries>
    void attend_by_head_dim(const StepArrays& s, int layer, bool of_prompts, int tiles, int parts) {
        if (c.head_dim <= 64) attend_by<8, kQueries>(s, layer, of_prompts, tiles, parts);
        else if (c.head_dim <= 128) attend_by<16, kQueries>(s, layer, of_prompts, tiles, parts);
        else attend_by<32, kQueries>(s, layer, of_prompts, tiles, parts);
    }
    template <int kLanes, int kQueries>
    void attend_by(const StepArrays& s, int layer, bool of_prompts, int tiles, int parts) {
        using Op = Attend<bf16, kLanes, kQueries>;
        const int chunks = Op::chunks((of_prompts ? tile_rows_of(c) : 1) * c.group());
        run(tiles * chunks * c.kv_heads * parts,
            Op{s, c, layer, parts, of_prompts, qkv, kv, partial, att}, Op::scratch(c.head_dim));
    }

    // The ids of draws, to the device's own array and to the host's.
    virtual void draw(const DrawKey* keys, int count, int* drawn, int* host) {
        run(count, DrawIds{keys, logits, c.vocab, drawn, host}, kDrawScratch);
    }

    // What cannot be part of a captured step because it differs from step to step.
    virtual void before_step(const StepArrays&) {}

    // The whole step; captured, it has no draws that need the host, and step is null.
    void run_step(const StepArrays& s, Step* step) {
        const bool done = decode_step(s);
        if (!done) forward(s);
        for (int begin = 0; begin < s.logits; begin += kLogitRows) {
            const int count = std::min(kLogitRows, s.logits - begin);
            if (!done) norm_linear(kLmHead, 0, s.logit_rows + begin, count);
            if (step) draw_rows(s, *step, begin, count);
            else draw(s.keys, s.draws, drawn, buffers[turn].drawn);
        }
    }

    // The draws from rows begin .. begin + count - 1 of logits. Penalties, log-probabilities and
    // observers are the host's work.
    void draw_rows(const StepArrays& s, Step& step, int begin, int count) {
        auto row_of = [](const Draw& d) { return d.row; };
        const auto first = std::ranges::lower_bound(step.draws, begin, {}, row_of);
        const auto last = std::ranges::lower_bound(step.draws, begin + count, {}, row_of);
        const int from = int(first - step.draws.begin()), end = int(last - step.draws.begin());
        int* host = buffers[turn].drawn;
        draw(s.keys + from, end - from, drawn + from, host + from);
        if (!step.observer && std::none_of(first, last, needs_host)) return;
        vector<float> all(size_t(count) * c.vocab);
        check(cudaMemcpyAsync(all.data(), logits, all.size() * sizeof(float),
                              cudaMemcpyDeviceToHost, stream), "logits");
        check(cudaStreamSynchronize(stream), "logits");
        #pragma omp parallel for schedule(dynamic)
        for (int i = from; i < end; i++) {
            const Draw& d = step.draws[i];
            if (!step.observer && !needs_host(d)) continue;
            if (!d.sampling.has_penalties()) step.drawn[i].id = host[i];
            const std::span row(all.data() + size_t(d.row - begin) * c.vocab, size_t(c.vocab));
            resolve(step, d, row, step.drawn[i]);
        }
    }
    static bool needs_host(const Draw& d) { return d.logprobs >= 0 || d.sampling.has_penalties(); }

    // Puts a step where kernels see it. rows: at least its own; those behind them are computed,
    // but nobody reads what comes out.
    StepArrays upload(Step& step, int rows, bool one_each, bool captured) {
        step.buffer = turn = !turn;
        Buffer& b = buffers[turn];
        StepArrays s;
        s.rows = rows, s.one_each = one_each;
        s.draws = std::max(one_each ? rows : 0, int(step.draws.size()));
        if (size_t(s.draws) > max_draws)
            fail("GPU: ", s.draws, " samples at a time, room for ", max_draws, "; lower --samples");
        place(s, b.host);
        const size_t used = (char*)(s.tables + step.tables.size()) - b.host;
        if (used > bytes) fail("GPU: a step of ", used, " bytes, room for ", bytes);
        fill(s, step);
        fill_keys(s, step);
        s.logits = int(step.logit_rows.size());
        if (captured) generalize(s);
        place(s, b.device);
        check(cudaMemcpyAsync(b.device, b.host, used, cudaMemcpyHostToDevice, uploads), "upload");
        check(cudaEventRecord(b.uploaded, uploads), "upload");
        check(cudaStreamWaitEvent(stream, b.uploaded), "upload");
        return s;
    }
    // Sets how many the ops are run for in a captured graph, which serves all decodes of up to so
    // many rows.
    virtual void generalize(StepArrays& s) { s.decodes = s.logits = s.rows; }
    static void fill_keys(StepArrays& s, const Step& step) {
        for (int i = 0; i < s.draws; i++) s.keys[i] = {};
        for (size_t i = 0; i < step.draws.size(); i++) {
            const Draw& d = step.draws[i];
            s.keys[i] = {d.sampling, d.row % kLogitRows, d.sample, d.position};
            if (d.known >= 0) s.keys[i].sampling.temperature = 0;  // only scored
        }
    }

    using Graph = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;
    Graph capture(const StepArrays& s) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        run_step(s, nullptr);
        check(cudaStreamEndCapture(stream, &graph), "capture");
        check(cudaGraphInstantiate(&exec, graph), "graph");
        check(cudaGraphDestroy(graph), "graph");
        return exec;
    }

    static cudaEvent_t new_event() {
        cudaEvent_t event;
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
        return event;
    }
    template <class T>
    static Owned<T*, cudaFreeHost> make_pinned(size_t count) {
        T* memory;
        check(cudaMallocHost(&memory, count * sizeof(T)), "pinned memory, lower --max-rows");
        return memory;
    }
    size_t from_block(int block) const { return c.key_page(block, 0, 0); }

    // What a step needs of its own while it is on its way. Two take turns: one is filled while the
    // step before is still running.
    struct Buffer {
        Array<char> device;
        Owned<char*, cudaFreeHost> host;
        Owned<int*, cudaFreeHost> drawn;  // written by the device
        Owned<cudaEvent_t, cudaEventDestroy> uploaded, done;
    };

    const DeviceOptions options;
    Array<float> partial;  // results of parts of a context
    Buffer buffers[2];
    bool turn = false;     // which buffer is the last step's
    size_t bytes = 0;      // of a buffer
    std::map<std::tuple<int, bool, int>, Graph> graphs;  // by rows, buffer, tiles
};

#endif  // __CUDACC__

// ----- Which device there is

// How devices are made. A program that has chapters for them puts its own functions here.
struct Devices {
    using Make = std::unique_ptr<Device>(const Model&, const DeviceOptions&);
    Make* cpu = [](const Model& m, const DeviceOptions& o) -> std::unique_ptr<Device> {
        const PageLayout pages = PageLayout::by_token(m.config.head_dim);
        return std::make_unique<CpuDevice>(m, o, pages, pages);
    };
    Make* cuda = [](const Model& m, const DeviceOptions& o) -> std::unique_ptr<Device> {
#ifdef __CUDACC__
        const PageLayout pages = PageLayout::by_token(m.config.head_dim);
        return std::make_unique<CudaDevice>(m, o, pages, pages);
#else
        fail("GPU: this build has no code for it (", m.config.type, ", cuda:", o.ordinal, ")");
#endif
    };
};
Devices devices;

std::unique_ptr<Device> make_device(const Model& m, EngineOptions& o, int context) {
    int gpus = 0, ordinal = 0;
    bool wanted = o.device == "cuda";
    if (o.device.starts_with("cuda:")) {
        const char *begin = &o.device[5], *end = begin + o.device.size() - 5;
        wanted = std::from_chars(begin, end, ordinal).ptr == end && ordinal >= 0 && begin < end;
    }
    if (!wanted && o.device != "cpu" && o.device != "auto")
        fail("--device ", o.device, ": not known; auto, cpu, cuda and cuda:1 are");
#ifdef __CUDACC__
    if (o.device != "cpu") gpus = count_gpus();
#endif
    if (wanted && ordinal >= gpus)
        fail("--device ", o.device, ": no such GPU here, or no driver for it; use cpu");
    if (!o.max_rows) o.max_rows = gpus ? 256 : 64;
    if (!o.chunk) o.chunk = gpus ? 8192 : 512;
    int64_t most = std::min<int64_t>(o.chunk, int64_t(context) * o.max_rows);  // tokens in a step
    DeviceOptions options = {std::max(o.max_rows, int(most)), o.max_rows, ordinal, o.graphs,
                             o.without};
    auto device = gpus ? devices.cuda(m, options) : devices.cpu(m, options);
    const vector<string>& known = device->chapters;
    for (const string& name : o.without)
        if (name != "all" && !std::ranges::count(known, name))
            fail("--without ", name, ": not known; ", known.empty() ? "nothing" : listed(known),
                 " can be turned off here");
    return device;
}

// =============================================================================================
// 5. A session at the terminal: chat and generate
// =============================================================================================

using ordered = nlohmann::ordered_json;

// What the command line says: a request and the engine's options, but for what the model decides.
struct Flags : Request, EngineOptions {
    string model, file, ids, system, load = "auto";
    std::optional<string> text;  // of --prompt; a request's prompt is ids
    bool no_think = false, json = false, verbose = false, no_special = false;
    std::optional<float> temperature, top_p, min_p, repetition_penalty;  // else the model's own
    std::optional<int> top_k;
    int threads = 0;  // 0: one a core
    vector<string> stop;
};

volatile std::sig_atomic_t interrupted = 0;  // by Ctrl-C

// Text on stdout, at once; what cannot be written is an error.
void put(const string& text) {
    if (fwrite(text.data(), 1, text.size(), stdout) < text.size() || fflush(stdout))
        fail("stdout: ", strerror(errno), "; the output is incomplete");
}

// What a command starts with: the model, its tokenizer if it has one, the engine.
struct Session {
    const Flags& f;
    Model model{f.model, f.load == "dummy"};
    std::unique_ptr<Tokenizer> tokenizer;
    Engine engine{model, f};

    explicit Session(const Flags& f, bool needs_text = false) : f(f) {
        if (std::filesystem::exists(f.model + "/tokenizer.json"))
            tokenizer = std::make_unique<Tokenizer>(f.model);
        else if (needs_text)
            fail(f.model, "/tokenizer.json: missing; give --ids instead of text");
        if (tokenizer && tokenizer->eos >= 0) model.config.eos.insert(tokenizer->eos);
        const string& rounded = model.weights.rounded;
        if (!rounded.empty()) std::cerr << "weights: " << rounded << ", rounded to bf16\n";
        if (f.verbose) describe();
    }

    void describe() const {
        const Device& device = *engine.device;
        if (!device.note.empty()) std::cerr << device.note << '\n';
        std::cerr << str("device ", device.name, ", threads ", f.threads, ", KV memory for ",
            engine.cache.blocks() * kBlockSize, " tokens, context ", engine.context, ", rows ",
            engine.options.max_rows, ", chunk ", engine.options.chunk, ", seed ",
            f.sampling.seed, "\n");
        for (const auto& [op, file] : device.served) std::cerr << op << ": " << file << "\n";
    }

    // The request of the flags; what they leave open is the model's.
    Request request(vector<int> prompt) const {
        Request r = f;
        const Config& c = model.config;
        r.prompt = std::move(prompt);
        r.sampling.temperature = f.temperature.value_or(c.temperature);
        r.sampling.top_k = f.top_k.value_or(int(c.top_k));
        r.sampling.top_p = f.top_p.value_or(c.top_p);
        r.sampling.min_p = f.min_p.value_or(c.min_p);
        r.sampling.repetition_penalty = f.repetition_penalty.value_or(c.repetition_penalty);
        return r;
    }
};

string input_text(const Flags& f) {
    if (f.text) return *f.text;
    if (!f.file.empty()) return read_file(f.file);
    return {std::istreambuf_iterator<char>(std::cin), {}};
}

vector<int> ids_of(const json& j, const char* where) {
    for (const json& id : j)
        if (!id.is_number_unsigned() || id > INT_MAX) fail(where, ": no id: ", id.dump());
    return j.get<vector<int>>();
}

vector<int> input_ids(const Session& s) {
    if (s.f.ids.empty()) return s.tokenizer->encode(input_text(s.f), !s.f.no_special);
    return ids_of(parse_json("[" + s.f.ids + "]"), "--ids");
}

// What comes for one sample of a request.
struct Reply {
    TextStream stream;
    string text = {};
    vector<int> ids = {};
    vector<vector<TokenLogprob>> logprobs = {};  // of each id, and of the likeliest, if asked for
    Output last = {};  // tells why it ended, and more of the whole sequence

    // Takes what a step says of the sample; returns the text that is certain now.
    string take(Engine& engine, Output& o) {
        ids.push_back(o.id);
        string more = stream.push(o.id);
        if (stream.stopped) engine.stop(o.request, o.sample), o.finish = "stop";
        if (o.finish) more += stream.finish();
        if (!o.logprobs.empty()) logprobs.push_back(std::move(o.logprobs));
        last = std::move(o);
        text += more;
        return more;
    }
};

ordered logprob_json(const Session& s, const TokenLogprob& t) {
    ordered token = s.tokenizer ? ordered(s.tokenizer->decode({&t.id, 1})) : ordered();
    return {{"id", t.id}, {"token", token}, {"logprob", t.logprob}};
}

// all: of a token, then of the likeliest. The token as show gives it, with these as a list, key.
ordered with_likeliest(std::span<const TokenLogprob> all, const char* key, auto show) {
    ordered j = show(all[0]);
    j[key] = ordered::array();
    for (const TokenLogprob& t : all.subspan(1)) j[key].push_back(show(t));
    return j;
}

// Runs one request to its end or to Ctrl-C, and prints the closing line. show: the text of the one
// sample goes to stdout as soon as it is certain.
vector<Reply> run(Session& s, const Request& r, bool show) {
    vector<Reply> replies(r.samples, Reply{TextStream(s.tokenizer.get(), s.f.stop)});
    double start = now(), first = start;
    int number = s.engine.add(r), tokens = 0;
    while (s.engine.busy() && !interrupted)
        for (Output& o : s.engine.step()) {
            if (tokens++ == 0) first = now();
            string more = replies[o.sample].take(s.engine, o);
            if (show) put(more);
        }
    s.engine.stop(number, -1);  // after Ctrl-C
    double rate = std::max(0, tokens - r.samples) / (now() - first);
    for (Reply& reply : replies) {  // those that did not end
        string more = reply.stream.finish();
        reply.text += more;
        if (show) put(more);
    }
    if (show) put("\n");
    fprintf(stderr, "\n%zu prompt tokens (%d from cache), %d new tokens, %.1f tokens/s, "
            "first token after %.3f s\n",
            r.prompt.size(), replies[0].last.cached, tokens, rate, first - start);
    return replies;
}

void generate(const Flags& f) {
    if (f.logprobs >= 0 && !f.json) fail("--logprobs: shown in JSON only; add --json");
    Session s(f, f.ids.empty());
    Request r = s.request(input_ids(s));
    bool show = !f.json && r.samples == 1;
    vector<Reply> replies = run(s, r, show);
    for (int i = 0; i < r.samples && !show; i++) {
        const Reply& a = replies[i];
        const char* finish = a.last.finish;
        ordered j = {{"index", i}, {"text", s.tokenizer ? ordered(a.text) : ordered()},
            {"ids", a.ids}, {"finish_reason", finish ? ordered(finish) : ordered()},
            {"seed", r.sampling.seed}, {"usage", {{"prompt_tokens", r.prompt.size()},
            {"cached_tokens", a.last.cached}, {"completion_tokens", a.ids.size()}}}};
        auto show_logprob = [&](const TokenLogprob& t) { return logprob_json(s, t); };
        if (r.logprobs >= 0) j["logprobs"] = ordered::array();
        for (const auto& of_token : a.logprobs)
            j["logprobs"].push_back(with_likeliest(of_token, "top", show_logprob));
        put(f.json ? j.dump() + "\n" : str("--- sample ", i, "\n", a.text, "\n"));
    }
}

// What libedit reads a key with: a character, or -1 after Ctrl-C, where its own would read on.
int read_key(FILE* in) {
    mbstate_t state = {};
    for (char byte; read(fileno(in), &byte, 1) == 1;) {
        wchar_t wide = L'?';
        if (mbrtowc(&wide, &byte, 1, &state) != size_t(-2)) return int(wide);  // -2: goes on
    }
    return -1;
}

// The user's next line; false at the end of input. At a terminal libedit reads it: with arrows and
// a history, and on stderr, so that stdout has nothing but answers.
bool read_line(const char* prompt, string& line) {
    if (!isatty(0) || !isatty(2)) return bool(std::getline(std::cin, line));
    setlocale(LC_CTYPE, "C.UTF-8");
    rl_outstream = stderr;
    rl_getc_function = read_key;
    char* typed = readline(prompt);
    if (typed && *typed) add_history(typed);
    if (typed) line = typed;
    else std::cerr << "\n";
    free(typed);
    return typed;
}

// The user's next message, where a line that ends in \ goes on; false at the end of input.
bool read_message(string& text) {
    text.clear();
    for (string line;;) {
        if (!read_line(text.empty() ? "> " : "| ", line)) return !text.empty();
        text += line;
        if (!line.ends_with("\\")) return true;
        text.back() = '\n';
    }
}

// What the template adds behind an answer, less what the model has said of it itself.
vector<int> end_of_turn(const Chat& format, const Tokenizer& text, const vector<int>& answer) {
    string rest = format.end_of_turn, last = answer.empty() ? "" : text.bytes(answer.back());
    if (rest.starts_with(last)) rest.erase(0, last.size());
    return text.encode(rest);
}

const char* const kChatHelp =
    "/help, /reset (forgets what was said), /quit; a line that ends in \\ goes on\n";

// Whether a message begins with a slash and a word: a path has more than one slash.
bool is_command(const string& message) {
    string word = message.substr(0, message.find_first_of(" \n"));
    auto is_letter = [](unsigned char c) { return isalpha(c) != 0; };
    return word.size() > 1 && word[0] == '/' && std::ranges::all_of(word.substr(1), is_letter);
}

void chat(const Flags& f) {
    Chat format = Chat::load(f.model);
    Session s(f, true);
    const Tokenizer& text = *s.tokenizer;
    format.thinking = !f.no_think;
    text.encode(f.system);  // here and below: an error tells its offset in the user's own text
    vector<int> opening = text.encode(format.opening(f.system.empty() ? nullptr : &f.system));
    std::deque<vector<int>> turns;  // ids of a question, its answer and the end of turn
    auto answer = [&](const string& message) {
        text.encode(message);
        turns.push_back(text.encode(format.user_turn(message)));
        int room = std::min(s.engine.context / 4, f.max_tokens);
        vector<int> prompt;
        for (;; turns.pop_front()) {
            prompt = opening;
            for (const auto& turn : turns) prompt.insert(prompt.end(), turn.begin(), turn.end());
            if (turns.size() == 1 || int(prompt.size()) + room <= s.engine.context) break;
            std::cerr << "(the context is full: the oldest turn is forgotten)\n";
        }
        vector<int> ids = run(s, s.request(prompt), true)[0].ids;
        for (const auto& more : {ids, end_of_turn(format, text, ids)})
            turns.back().insert(turns.back().end(), more.begin(), more.end());
    };
    if (f.text && f.text->empty()) fail("--prompt: no text; give a question");
    if (f.text) return answer(*f.text);
    for (string message; read_message(message) && message != "/quit";) {
        if (message == "/reset") turns.clear();
        else if (is_command(message)) std::cerr << kChatHelp;
        else if (!message.empty()) answer(message);
        if (interrupted && !isatty(0)) break;
        interrupted = 0;
    }
}

// =============================================================================================
// 6. Commands, their flags, and main
// =============================================================================================

// OpenMP's threads meet 250 times a token: those that wait spin for some microseconds, then sleep,
// so that other work on the machine can go on. libgomp reads this before main.
__attribute__((constructor(101))) void wait_briefly() { setenv("GOMP_SPINCOUNT", "1000", 0); }

// What `nanocu NAME` runs.
struct Command {
    string name, help;  // help: one line
    void (*add_flags)(struct CommandLine&);
    void (*run)(const Flags&);
};

// All commands. This file adds two; whoever includes it may add more, from anywhere.
vector<Command>& commands() {
    static vector<Command> all;
    return all;
}

bool add_command(const Command& c) {
    commands().push_back(c);
    return true;
}

// Fills in what the flags left open, before a command runs; whoever includes this file may set it.
std::function<void(Flags&)> fill_in = [](Flags&) {};

// How many letters must be put in, left out or replaced to make one word of the other
// (Levenshtein 1966). row[j] is the distance of a's first i letters from the first j of b.
int distance(const string& a, const string& b) {
    vector<int> row(b.size() + 1);
    std::iota(row.begin(), row.end(), 0);
    for (size_t i = 0; i < a.size(); i++) {
        int corner = std::exchange(row[0], int(i) + 1);
        for (size_t j = 0; j < b.size(); j++) {
            int replaced = corner + (a[i] != b[j]);
            corner = row[j + 1];
            row[j + 1] = std::min({replaced, corner + 1, row[j] + 1});
        }
    }
    return row.back();
}

// Which of names was meant: one that begins as the word does, else the one that looks most like it.
string nearest(const string& word, const vector<string>& names) {
    auto far = [&](const string& name) {
        return name.starts_with(word) ? 0 : distance(word, name);
    };
    return *std::ranges::min_element(names, {}, far);
}

const auto kSize = CLI::Range(1, 1 << 24);  // of flags that count

// The flags of a command, and its --help.
struct CommandLine {
    Flags f = {};
    CLI::App app;
    string help;           // a line for each flag
    vector<string> names = {"--help"};  // of all flags

    CommandLine() {
        f.sampling.seed = std::random_device()();
        app.allow_extras();  // to be told better than the library does
    }

    // Begins a group of flags in the help.
    void group(const string& title) { help += "\n" + title + ":\n"; }

    void describe(const string& names, const string& what) {
        help += str("  ", std::left, std::setw(28), names, " ", what, "\n");
    }

    CLI::Option* argument(const char* name, auto& value, const string& what) {
        describe(name, what);
        return app.add_option(name, value)->required();
    }

    // A flag, as "-n,--max-tokens N"; check may refuse or change its value.
    CLI::Option* flag(const string& form, auto& value, const string& what,
                      const CLI::Validator& check = {}) {
        using T = std::decay_t<decltype(value)>;
        string spelled = form.substr(0, form.find(' '));
        CLI::Option* option;
        if constexpr (std::is_same_v<T, bool>) option = app.add_flag(spelled, value);
        else option = app.add_option(spelled, value)->transform(check)->allow_extra_args(false)
            ->delimiter(std::is_same_v<T, vector<int>> ? ',' : '\0');
        describe(form.substr(form[0] == '!'), what);
        for (const string& name : option->get_snames()) names.push_back("-" + name);
        for (const string& name : option->get_lnames()) names.push_back("--" + name);
        return option;
    }

    void text_flags() {
        group("text");
        flag("-p,--prompt TEXT", f.text, "the text");
        flag("-f,--file FILE", f.file, "a file with the text; without -p and -f: stdin");
    }

    void truncation_flags() {
        flag("-t,--temperature X", f.temperature, "0: always the likeliest; else the model's own");
        flag("-k,--top-k K", f.top_k, "only the K likeliest; 0: all; else the model's own");
        flag("--top-p P", f.top_p, "only the likeliest that together have P; 1: all");
        flag("--min-p P", f.min_p, "only those with P times the largest probability; 0: all");
    }

    void drawing_flags() {
        group("what is drawn");
        truncation_flags();
        flag("-n,--max-tokens N", f.max_tokens, "else to the end of text or context", kSize);
        flag("--repetition-penalty X", f.repetition_penalty, "1: none; else the model's own");
        flag("--presence-penalty X", f.sampling.presence_penalty, "0, the default: none");
        flag("--frequency-penalty X", f.sampling.frequency_penalty, "0, the default: none");
        flag("--seed N", f.sampling.seed, "the same seed draws the same; else a random one");
        flag("--stop TEXT", f.stop, "end before this text; may be repeated");
        flag("--ignore-eos", f.ignore_eos, "go on behind the end of text");
    }

    void engine_flags() {
        group("engine");
        flag("--device NAME", f.device, "auto (the default), cpu, cuda or cuda:1");
        flag("--threads N", f.threads, "of the CPU; else one a core", CLI::Range(1, 1024));
        flag("--kv-memory SIZE", f.kv_memory, "of the cache, as 512M; else what there is, "
             "of a CPU's a quarter", CLI::AsSizeValue(false));
        flag("--max-context N", f.max_context, "fewer tokens than the model allows", kSize);
        flag("--max-rows N", f.max_rows, "sequences at a time; else 64, on a GPU 256", kSize);
        flag("--chunk N", f.chunk, "tokens computed in a step; else 512, on a GPU 8192", kSize);
        flag("!--no-prefix-cache", f.prefix_cache, "compute all prompts from the start");
        flag("!--no-graph", f.graphs, "no captured graphs (GPU only)");
        flag("--without NAME,NAME", f.without, "turn these optimizations off; all: every one")
            ->delimiter(',');
        flag("--load-format dummy", f.load, "random weights instead of the model's",
             CLI::IsMember({"auto", "dummy"}));
        flag("--verbose", f.verbose, "say what was chosen");
    }

    // What stands on the line and is nothing; "" if all was understood.
    string not_understood() const {
        for (string word : app.remaining())
            if (word.starts_with("-")) {
                word = word.substr(0, word.find('='));
                return str(word, ": no such flag; the nearest is ", nearest(word, names));
            }
        return app.remaining_size() ? app.remaining()[0] + ": one argument too many" : "";
    }
};

// An error is one line: what, where, what to do. Returns the exit status.
int report(string error) {
    std::ranges::replace_if(error, [](unsigned char c) { return c < 32; }, ' ');
    std::cerr << "nanocu: " << error.substr(0, 300) << "\n";
    return 1;
}

// Reads the flags and does the work. Returns the exit status: after Ctrl-C 130.
int run_command(const Command& command, int argc, char** argv) try {
    struct sigaction action = {};
    action.sa_handler = [](int) {
        if (interrupted) _exit(130);  // the second time, at once
        interrupted = 1;
    };
    sigaction(SIGINT, &action, nullptr);
    CommandLine line;
    line.argument("MODEL", line.f.model, "a model's folder, as Hugging Face has it");
    command.add_flags(line);
    string error;
    try {
        line.app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
        put(str("nanocu ", command.name, ": ", command.help, "\n\n", line.help));
        return 0;
    } catch (const CLI::ParseError& e) {
        error = e.what();
    }
    if (string more = line.not_understood(); !more.empty()) error = more;  // tells better why
    if (!error.empty()) fail(error, "; see nanocu ", command.name, " --help");
    for (const string& stop : line.f.stop)
        if (stop.empty()) fail("--stop: is empty; leave it out");
    fill_in(line.f);
    if (!line.f.threads) line.f.threads = omp_get_num_procs();
    omp_set_num_threads(line.f.threads);
    command.run(line.f);
    return interrupted ? 130 : 0;
} catch (const json::exception& e) {  // of what the user wrote; a file's own has its name
    return report(str("input, --ids: ", strchr(e.what(), ']') + 2));
} catch (const std::exception& e) {
    return report(e.what());
}

// The programs nanocu-NAME in the folder of this one: commands, too.
std::map<string, string> programs_beside(const string& self) {
    std::map<string, string> found;
    std::error_code none;
    auto path = std::filesystem::canonical("/proc/self/exe", none);
    if (none) path = std::filesystem::absolute(self);
    for (const auto& entry : std::filesystem::directory_iterator(path.parent_path(), none)) {
        string name = entry.path().filename();
        if (name.starts_with("nanocu-") && access(entry.path().c_str(), X_OK) == 0)
            found[name.substr(7)] = entry.path();
    }
    return found;
}

int run_program(int argc, char** argv) try {
    const string name = argc > 1 ? argv[1] : "";
    for (const Command& c : commands())
        if (c.name == name) return run_command(c, argc - 1, argv + 1);
    std::map<string, string> beside = programs_beside(argv[0]);
    if (beside.contains(name)) {
        execv(beside[name].c_str(), argv + 1);
        fail(beside[name], ": ", strerror(errno));
    }
    string help = "nanocu: LLM inference, small enough to be read\n\nnanocu COMMAND MODEL ...\n";
    vector<string> names;
    for (const Command& c : commands()) {
        help += str("  ", std::left, std::setw(12), c.name, " ", c.help, "\n");
        names.push_back(c.name);
    }
    for (const auto& [other, path] : beside) {
        help += str("  ", std::left, std::setw(12), other, " a program of its own, nanocu-", other,
                    "\n");
        names.push_back(other);
    }
    help += "\nnanocu COMMAND --help: the flags of a command; nanocu --version\n";
    if (name == "--version") put("nanocu 0.1\n");
    else if (name == "--help" || name == "-h") put(help);
    else if (name.empty()) fail("no command; ", listed(names), " are; see nanocu --help");
    else fail(name, ": no such command; the nearest is ", nearest(name, names),
              "; see nanocu --help");
    return 0;
} catch (const std::exception& e) {
    return report(e.what());
}

void chat_flags(CommandLine& line) {
    line.flag("-p,--prompt TEXT", line.f.text, "one question; answer it and end");
    line.flag("--system TEXT", line.f.system, "the system message");
    line.flag("--no-think", line.f.no_think, "Qwen3: answer without a thought");
    line.drawing_flags();
    line.engine_flags();
}

void generate_flags(CommandLine& line) {
    line.flag("--json", line.f.json, "JSON on stdout, one object a line");
    line.flag("--samples N", line.f.samples, "continuations of the one prompt; else 1", kSize);
    line.flag("--logprobs K", line.f.logprobs, "log-probabilities, and of the K likeliest (JSON)",
              CLI::Range(1000));
    line.text_flags();
    line.flag("--ids 1,2,3", line.f.ids, "the text as ids");
    line.flag("--no-special", line.f.no_special, "add no bos, or what else the tokenizer adds");
    line.drawing_flags();
    line.engine_flags();
}

const bool kAdded = add_command({"chat", "talk; /help there names what it knows", chat_flags, chat})
    && add_command({"generate", "continue a text as it is", generate_flags, generate});

#ifndef NANOCU_NO_MAIN
int main(int argc, char** argv) { return run_program(argc, argv); }
#endif
