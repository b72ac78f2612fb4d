// openai.hpp: requests and responses in OpenAI's form, for the commands that read or write them:
// read_body and read_job tell what is asked for; next_choice and response_body build the answer of
// a job that is on its way or has ended.
#pragma once

// How much of a reply a response has shown: the ids, the bytes of text, and of the next id's text
// the offset in code points.
struct Shown {
    size_t ids = 0, text = 0, offset = 0;
};

// One request in OpenAI's form, on its way.
struct Job {
    Request request;
    bool chat = false, echo = false, with_logprobs = false, no_output = false;
    bool stream = false, include_usage = false;  // the response is sent piece by piece
    string prompt;  // its text
    vector<string> stops;
    vector<Reply> replies;
    vector<Shown> shown;  // of each reply
    int64_t line;         // number of the request
    json id;              // custom_id
    time_t created = time(nullptr);
    int open;             // samples that have not ended
};

// Moves body[key], if it is there, to value.
template <class T>
void take_field(json& body, const char* key, T& value) {
    constexpr bool is_bool = std::is_same_v<T, bool>, whole = std::is_integral_v<T> && !is_bool;
    if (!body.contains(key)) return;
    json j = std::move(body[key]);
    body.erase(key);
    bool fits = is_bool ? j.is_boolean() : whole ? j.is_number_integer()
              : std::is_floating_point_v<T> ? j.is_number() : true;
    if (whole && sizeof(T) == 4) fits = fits && j >= INT_MIN && j <= INT_MAX;
    if (!fits) fail(key, ": ", j.dump(), " is not of the right type or size");
    if constexpr (std::is_same_v<T, json>) value = std::move(j);
    else value = j.get<T>();
}

// A message whose content is a string, or a list of parts of type text.
Message message_of(const json& m) {
    for (const auto& [key, value] : m.items())
        if (key != "role" && key != "content" && !value.is_null())
            fail("messages: field ", key, " is not supported");
    const json& content = m.at("content");
    if (content.is_string()) return {m.at("role"), content};
    if (!content.is_array()) fail("messages: content: expected a text");
    string text;
    for (const json& part : content) {
        if (part.at("type") != "text") fail("messages: only content of type text is supported");
        text += part.at("text").get<string>();
    }
    return {m.at("role"), text};
}

// What a body asks for; an exception tells what is wrong with it. job.chat and job.line are set
// before. format: of chats, loaded once.
void read_body(const Session& s, std::optional<Chat>& format, json body, Job& job) {
    const Flags& f = s.f;
    Request& r = job.request = s.request({});
    Sampling& p = r.sampling;
    json messages, stop, prompt, stream_options = json::object();
    int top = 0;
    if (!body.is_object()) fail("body: expected an object");
    for (const char* key : {"model", "user", "metadata", "store"}) body.erase(key);
    for (auto field = body.begin(); field != body.end();)
        field = field->is_null() ? body.erase(field) : std::next(field);
    p.seed = philox(p.seed, uint32_t(job.line), uint32_t(job.line >> 32));
    take_field(body, "stream", job.stream), take_field(body, "n", r.samples);
    take_field(body, "max_tokens", r.max_tokens), take_field(body, "seed", p.seed);
    take_field(body, "temperature", p.temperature), take_field(body, "top_p", p.top_p);
    take_field(body, "top_k", p.top_k), take_field(body, "min_p", p.min_p);
    take_field(body, "presence_penalty", p.presence_penalty);
    take_field(body, "frequency_penalty", p.frequency_penalty);
    take_field(body, "repetition_penalty", p.repetition_penalty);
    take_field(body, "ignore_eos", r.ignore_eos), take_field(body, "stop", stop);
    if (p.top_k == -1) p.top_k = 0;  // vLLM's all
    if (job.stream) take_field(body, "stream_options", stream_options);
    take_field(stream_options, "include_usage", job.include_usage);
    if (!stream_options.empty()) fail("stream_options: only include_usage is supported");
    if (stop.is_string()) stop = json::array({stop});
    for (const json& text : stop) job.stops.push_back(text);
    for (const string& text : job.stops) if (text.empty()) fail("stop: is empty; leave it out");
    if (job.chat) {
        take_field(body, "max_completion_tokens", r.max_tokens);
        take_field(body, "messages", messages);
        take_field(body, "logprobs", job.with_logprobs), take_field(body, "top_logprobs", top);
        if (top && !job.with_logprobs) fail("top_logprobs: needs logprobs to be true");
        if (!format) format = Chat::load(f.model);
        vector<Message> list;
        for (const json& m : messages) list.push_back(message_of(m));
        job.prompt = format->render(list);
    } else {
        take_field(body, "echo", job.echo), take_field(body, "prompt", prompt);
        job.with_logprobs = body.contains("logprobs");
        take_field(body, "logprobs", top);
        if (prompt.is_string()) job.prompt = prompt;
        else if (prompt.is_array()) r.prompt = ids_of(prompt, "prompt");
        else fail("prompt: expected one text, or a list of ids");
    }
    if (!body.empty()) fail("field ", body.begin().key(), " is not supported");
    if (top < 0 || top > 1000) fail("logprobs, top_logprobs: 0 to 1000, not ", top);
    if (!s.tokenizer && !prompt.is_array())
        fail(f.model, "/tokenizer.json: missing; give a list of ids as prompt");
    if (!prompt.is_array()) r.prompt = s.tokenizer->encode(job.prompt, !job.chat && !f.no_special);
    else if (s.tokenizer) job.prompt = s.tokenizer->decode(r.prompt);
    if (job.with_logprobs) r.logprobs = top;
    r.score_prompt = job.echo && job.with_logprobs;
    job.no_output = job.echo && r.max_tokens == 0;
    if (job.no_output) r.max_tokens = 1;
    if (r.samples < 1 || r.samples > 1024) fail("n: 1 to 1024, not ", r.samples);
    job.open = r.samples;
    job.replies.assign(r.samples, Reply{TextStream(s.tokenizer.get(), job.stops)});
    job.shown.resize(r.samples);
}

// What a line of a batch asks for.
void read_job(const Session& s, std::optional<Chat>& format, json line, Job& job) {
    string url = line.at("url");
    if (value_or(line, "method", string("POST")) != "POST") fail("method: only POST is supported");
    job.chat = url == "/v1/chat/completions";
    if (!job.chat && url != "/v1/completions")
        fail("url ", url, " is not supported; /v1/chat/completions and /v1/completions are");
    read_body(s, format, std::move(line.at("body")), job);
    if (job.stream) fail("stream: only false is supported");
}

// The log-probabilities of what is not shown yet: in a chat an object for each token, else lists
// side by side.
ordered choice_logprobs(const Session& s, const Job& job, const Reply& reply, Shown& shown) {
    if (!job.with_logprobs) return nullptr;
    auto token = [&](int id) { return s.tokenizer ? s.tokenizer->decode({&id, 1}) : str(id); };
    auto entry = [&](const TokenLogprob& t) {
        string bytes = s.tokenizer ? s.tokenizer->bytes(t.id) : "";
        return ordered{{"token", token(t.id)}, {"logprob", t.logprob},
                       {"bytes", vector<uint8_t>(bytes.begin(), bytes.end())}};
    };
    ordered chat = ordered::array(), tokens = chat, logprobs = chat, tops = chat, offsets = chat;
    auto add = [&](int id, const vector<TokenLogprob>* of_token) {  // null: of the first id
        string text = token(id);
        auto begins = [](char c) { return (c & 0xC0) != 0x80; };  // a code point
        offsets.push_back(shown.offset);
        shown.offset += std::ranges::count_if(text, begins);
        tokens.push_back(text);
        logprobs.push_back(of_token ? ordered((*of_token)[0].logprob) : ordered());
        tops.push_back(of_token ? ordered::object() : ordered());
        if (of_token) for (auto& t : std::span(*of_token).subspan(1))
            tops.back()[token(t.id)] = t.logprob;
    };
    if (job.chat) for (const auto& of_token : std::span(reply.logprobs).subspan(shown.ids))
        chat.push_back(with_likeliest(of_token, "top_logprobs", entry));
    if (job.chat) return {{"content", chat}};
    for (size_t i = 0; job.echo && i < job.request.prompt.size(); i++)
        add(job.request.prompt[i], i ? &reply.last.prompt_logprobs[i - 1] : nullptr);
    for (size_t i = shown.ids; i < reply.ids.size() && !job.no_output; i++)
        add(reply.ids[i], &reply.logprobs[i]);
    return {{"tokens", tokens}, {"token_logprobs", logprobs}, {"top_logprobs", tops},
            {"text_offset", offsets}};
}

// A choice of a response: what has come for sample i and is not shown yet.
ordered next_choice(const Session& s, Job& job, int i) {
    const Reply& reply = job.replies[i];
    Shown& shown = job.shown[i];
    bool begins = shown.ids == 0;
    string text = job.echo && begins ? job.prompt : "";
    if (!job.no_output) text += reply.text.substr(shown.text);
    ordered choice = {{"index", i}}, message = ordered::object();
    if (begins) message["role"] = "assistant";
    message["content"] = text;
    if (job.chat) choice[job.stream ? "delta" : "message"] = message;
    else choice["text"] = s.tokenizer ? ordered(text) : ordered();
    if (!s.tokenizer)
        choice["token_ids"] = vector<int>(reply.ids.begin() + shown.ids, reply.ids.end());
    choice["logprobs"] = choice_logprobs(s, job, reply, shown);
    choice["finish_reason"] = reply.last.finish ? ordered(reply.last.finish) : ordered();
    shown.ids = reply.ids.size(), shown.text = reply.text.size();
    return choice;
}

// Tokens in and out. What was cached is known when the first token has come.
ordered usage_of(const Job& job) {
    size_t prompt = job.request.prompt.size(), made = 0;
    for (const Reply& reply : job.replies) made += job.no_output ? 0 : reply.ids.size();
    return {{"prompt_tokens", prompt}, {"completion_tokens", made}, {"total_tokens", prompt + made},
            {"prompt_tokens_details", {{"cached_tokens", job.replies[0].last.cached}}}};
}

// A response, or with job.stream a chunk of it.
ordered response_with(const Session& s, const Job& job, const string& id, ordered choices,
                      ordered usage) {
    const char* chat = job.stream ? "chat.completion.chunk" : "chat.completion";
    return {{"id", (job.chat ? "chatcmpl-" : "cmpl-") + id},
            {"object", job.chat ? chat : "text_completion"}, {"created", job.created},
            {"model", s.f.model}, {"choices", std::move(choices)}, {"usage", std::move(usage)}};
}

// The body of a finished job's response.
ordered response_body(const Session& s, Job& job, const string& id) {
    ordered choices = ordered::array();
    for (int i = 0; i < job.request.samples; i++) choices.push_back(next_choice(s, job, i));
    return response_with(s, job, id, std::move(choices), usage_of(job));
}

// What is wrong with a request, in one line.
string reason_of(const std::exception& e) {
    const char* kind = dynamic_cast<const json::exception*>(&e) ? strchr(e.what(), ']') : nullptr;
    return kind ? str("JSON: ", kind + 2) : e.what();
}

ordered error_body(const string& message, const char* type, const ordered& code) {
    return {{"error", {{"message", message}, {"type", type}, {"param", nullptr}, {"code", code}}}};
}

// JSON that may quote what is no UTF-8.
string dump(const ordered& j) { return j.dump(-1, ' ', false, ordered::error_handler_t::replace); }
