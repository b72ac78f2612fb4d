// answers.hpp: how likely a model finds answers, many at a time.
#pragma once

// An answer is scored as ids of its own behind those of its prompt, so that it is the same ids
// behind every prompt.
struct Question {
    vector<int> prompt, answer;  // neither is empty
};

struct Scores {
    vector<double> logprobs;         // of the answers, natural logarithms; sums over their ids
    int64_t tokens = 0, cached = 0;  // of all questions and answers; not computed, but found
};

// One batch for all of them: what questions have in common at their beginnings is computed once, in
// whole blocks. After Ctrl-C some logprobs are 0.
inline Scores score_answers(Engine& engine, const vector<Question>& questions) {
    Scores scores;
    int first = -1;
    for (const Question& q : questions) {
        Request r;
        r.prompt = q.prompt;
        r.prompt.insert(r.prompt.end(), q.answer.begin(), q.answer.end());
        r.score_prompt = true;
        r.score_from = int(q.prompt.size());
        r.max_tokens = 1;  // which nobody reads
        scores.tokens += int64_t(r.prompt.size());
        int number = engine.add(r);
        if (first < 0) first = number;
    }
    scores.logprobs.resize(questions.size());
    while (engine.busy() && !interrupted)
        for (const Output& o : engine.step()) {
            scores.cached += o.cached;
            for (const auto& of_token : o.prompt_logprobs)
                scores.logprobs[o.request - first] += of_token[0].logprob;
        }
    return scores;
}
