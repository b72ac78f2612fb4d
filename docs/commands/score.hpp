// score: how likely a model finds a text: the log-probability of each token given those before it.
#pragma once

#include "objects.hpp"

namespace score {

void run(const Flags& f) {
    Session s(f, f.ids.empty());
    Request r = s.request(input_ids(s));
    r.score_prompt = true;
    r.max_tokens = 1;
    Reply reply = ::run(s, r, false)[0];
    if (interrupted) return;
    vector<double> each;
    for (auto& of_token : reply.last.prompt_logprobs) each.push_back(of_token[0].logprob);
    double sum = std::accumulate(each.begin(), each.end(), 0.0), mean = sum / double(each.size());
    ordered j = {{"tokens", r.prompt.size()}, {"logprob", sum}, {"mean_logprob", mean},
                 {"perplexity", std::exp(-mean)}, {"token_logprobs", {nullptr}}};  // NaN is null
    for (double logprob : each) j["token_logprobs"].push_back(logprob);
    put_object(j, f.json);
}

void add_flags(CommandLine& line) {
    json_flag(line);
    line.text_flags();
    line.flag("--ids 1,2,3", line.f.ids, "the text as ids");
    line.flag("--no-special", line.f.no_special, "add no bos, or what else the tokenizer adds");
    line.engine_flags();
}

const bool kAdded = add_command({"score",
    "log-probabilities of a text, and its perplexity", add_flags, run});

}  // namespace score
