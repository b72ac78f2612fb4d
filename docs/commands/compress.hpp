// compress: what smaller weights cost. Methods that shrink a model's matrices are applied to all
// matrices of a kind (all q, all gate, ...) and to all matrices at once, and each time the
// perplexity of a text is measured:
//
//   int8, int4, int4/64  symmetric rounding to nearest: the numbers of a row, or of each 64 in a
//                        row, are integers of b bits times one bf16 scale, largest / (2^(b-1) - 1)
//   prune50              the half of a matrix that is smallest in magnitude becomes 0; what is left
//                        stays bf16, and a bit for each number tells where it goes
//   rank50               two bf16 factors of half the full rank, by the singular value
//                        decomposition: no others are closer (Eckart and Young 1936)
//
// The engine computes with bf16, so it gets what the small form stands for, rounded to bf16: a copy
// of each changed matrix, where the model's view then points. Sizes are those of the small form.
#pragma once

#include "compress_methods.hpp"
#include "compress_output.hpp"

namespace compress {

// Of ids, each given those before it. A new engine: a GPU's has the weights that it began with.
double perplexity(const Model& model, const Flags& f, const vector<int>& ids) {
    Engine engine(model, f);
    Request r;
    r.prompt = ids;
    r.score_prompt = true;
    r.max_tokens = 1;
    engine.add(r);
    double sum = 0;
    while (engine.busy() && !interrupted)
        for (const Output& o : engine.step())
            for (const auto& of_token : o.prompt_logprobs) sum += of_token[0].logprob;
    return std::exp(-sum / double(ids.size() - 1));
}

struct Options {
    vector<string> methods = {"int8", "int4", "int4/64", "int4/32", "prune50", "prune75", "rank75",
                              "rank50"};
    vector<string> kinds;
    int tokens = 256, layer = -1;
    string svg, folder;
} options;

void run(const Flags& f) {
    const Options& o = options;
    vector<Method> methods(o.methods.begin(), o.methods.end());
    if (!o.folder.empty() && methods.size() != 1) fail("--write: give one method with --methods");
    if (!o.folder.empty()) check_new(o.folder);
    Model m(f.model, f.load == "dummy");
    if (o.layer >= m.config.layers)
        fail("--layer ", o.layer, ": the model has 0 to ", m.config.layers - 1);
    Tokenizer tokenizer(f.model);
    vector<int> ids = tokenizer.encode(input_text(f), !f.no_special);
    if (ids.size() < 2) fail("the text: ", ids.size(), " tokens; give some more");
    ids.resize(std::min<size_t>(ids.size(), o.tokens));
    vector<Tensor> tensors = tensors_of(m);
    vector<string> kinds;  // in their order in a layer, the chosen ones
    vector<Tensor*> chosen;
    std::set<string> unknown(o.kinds.begin(), o.kinds.end());
    for (Tensor& t : tensors) {
        bool wanted = o.kinds.empty() || std::ranges::count(o.kinds, t.kind);
        if (!t.view || !wanted || (o.layer >= 0 && t.layer != o.layer)) continue;
        if (!std::ranges::count(kinds, t.kind)) kinds.push_back(t.kind);
        unknown.erase(t.kind);
        chosen.push_back(&t);
    }
    if (!unknown.empty())
        fail("--kinds ", *unknown.begin(), ": no such matrix here; q, k, v, o, gate, up, down are; "
             "without --layer embed, and lm_head if it is not embed");
    if (kinds.size() > 1) kinds.push_back("all");
    if (!o.folder.empty()) kinds = {kinds.back()};
    auto point = [&](const string& kind, bool changed) {
        for (Tensor* t : chosen)
            if (kind == "all" || kind == t->kind)
                t->view->data = changed ? t->changed.data() : t->original.data;
        if (m.config.tied) m.lm_head = m.embed;
    };
    Eigen::setCpuCacheSizes(32 << 10, 512 << 10, 4 << 20);  // fixed: the same bits on any machine
    double base = perplexity(m, f, ids);
    vector<Result> results;
    for (const Method& method : methods) {
        #pragma omp parallel for schedule(dynamic)
        for (Tensor* t : chosen) if (!interrupted) t->changed = method.apply(t->original);
        for (const string& kind : kinds) {
            if (interrupted) return;
            if (isatty(2)) std::cerr << "\r\33[K" << method.name << " " << kind << std::flush;
            Result r = {kind, method.name, 0, 0, 0};
            for (Tensor* t : chosen) if (kind == "all" || kind == t->kind) {
                r.bytes += method.bytes(t->original);
                r.before += 2.0 * t->original.rows * t->original.cols;
            }
            point(kind, true);
            r.perplexity = perplexity(m, f, ids);
            if (o.folder.empty()) point(kind, false);
            results.push_back(r);
        }
    }
    if (isatty(2)) std::cerr << "\r\33[K";
    if (interrupted) return;
    double whole = double(m.weights.bytes);
    if (!o.svg.empty()) WholeFile(o.svg).finish(plot(results, kinds, o.methods, base));
    if (!o.folder.empty()) write_model(f.model, o.folder, tensors);
    show(f, results, kinds, o.methods, base, ids.size(), whole);
    if (!o.folder.empty())
        put(str("\n", o.folder, ": written, in bf16 and so as large as before; compressed the "
                "weights would take ", megabytes(whole - results[0].before + results[0].bytes),
                " of ", megabytes(whole), " MB\n"));
}

void add_flags(CommandLine& line) {
    line.text_flags();
    line.flag("--no-special", line.f.no_special, "add no bos in front of the text");
    line.flag("--tokens N", options.tokens, "of the text, the first; else 256",
              CLI::Range(2, 1 << 20));
    line.group("what is compressed");
    line.flag("--methods A,B", options.methods, "int2 to int8, int4/32, prune50, rank50; else some "
              "of each")->delimiter(',');
    line.flag("--kinds A,B", options.kinds,
              "only these: q, k, v, o, gate, up, down, embed, lm_head")
        ->delimiter(',');
    line.flag("--layer N", options.layer, "only matrices of this layer, from 0",
              CLI::Range(0, 10000));
    line.flag("--svg FILE", options.svg, "for the plot");
    line.flag("--write FOLDER", options.folder, "a new one for the model after the one method");
    line.flag("--json", line.f.json, "JSON, an object a measurement");
    line.engine_flags();
}

const bool kAdded = add_command({"compress", "size against perplexity", add_flags, run});

}  // namespace compress
