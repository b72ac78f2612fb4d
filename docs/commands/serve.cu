// serve.cu: a server that speaks OpenAI's API: chat, completions, models, as JSON or streamed.
//
//   ./nanocu serve models/smollm2 --port 8000
//
// A program of its own, nanocu-serve, which nanocu starts where it stands beside it: cpp-httplib
// can't be linked statically everywhere, and nanocu is to run wherever it is copied.
//
// The main thread alone drives the engine (`drive`). Each connection has a thread, which reads its
// request, waits for news of its job, and writes what is new; a Live is all that the two share. How
// a body is read and a response is built is openai.hpp's, as for `nanocu batch`; http.hpp has the
// connections, and what protects them.
#define NANOCU_NO_MAIN
#include "../../nano.cu"

#include "../chapters/all.hpp"

#include "http.hpp"
#include "settings.hpp"

#include <condition_variable>
#include <mutex>

constexpr int kSamples = 128, kTop = 20;  // n and top_logprobs at most, as OpenAI's
constexpr size_t kStops = 16, kStopBytes = 256;  // each is looked for in each new token's text

struct ServeOptions {
    string host = "127.0.0.1", key;
    int port = 8000, max_queue = 256, timeout = 600;
    size_t max_body = 1 << 20;
} options;

// A job that a connection's thread and the main thread share.
struct Live : Job {
    std::mutex mutex;              // for what follows, and for replies and open
    std::condition_variable news;
    bool accepted = false;         // by the engine
    string refusal;                // by the engine, and why
    double end;                    // when its time is over
};

// Where jobs wait for the main thread.
struct Desk {
    std::mutex mutex;
    std::condition_variable news;
    vector<std::shared_ptr<Live>> arrived;
    int samples = 0;  // of all jobs that have not ended
    std::map<string, int64_t> counts;  // for GET /metrics; of tokens, of requests that ended
};

// ---------------------------------------------------------------------------------------------
// The main thread.

// Takes in what arrived, and drops what has ended, or has nobody who waits for it: its thread has
// let it go.
void exchange_jobs(Session& s, Desk& desk, std::map<int, std::shared_ptr<Live>>& jobs) {
    std::unique_lock lock(desk.mutex);
    auto& c = desk.counts;
    if (jobs.empty() && desk.arrived.empty()) desk.news.wait_for(lock, kTick);
    for (auto& job : std::exchange(desk.arrived, {})) {
        std::lock_guard hold(job->mutex);
        try {
            jobs.emplace(s.engine.add(job->request), job);
            job->accepted = true;
            c["requests_total"]++;
        } catch (const std::exception& e) {
            job->refusal = e.what();
        }
        job->news.notify_one();
    }
    std::erase_if(jobs, [&](const auto& entry) {
        auto& [number, job] = entry;
        bool ended = job->open == 0;
        if (!ended && job.use_count() > 1) return false;
        s.engine.stop(number, -1);
        c[ended ? "requests_finished_total" : "requests_abandoned_total"]++;
        c["prompt_tokens_total"] += job->request.prompt.size();
        for (const Reply& reply : job->replies) c["new_tokens_total"] += reply.ids.size();
        c["cached_tokens_total"] += job->replies[0].last.cached;
        return true;
    });
    int64_t running = 0;
    desk.samples = 0;
    for (auto& [number, job] : jobs) {
        desk.samples += job->open;
        running += !job->replies[0].ids.empty();  // only this thread writes them
    }
    c["requests_running"] = running, c["requests_waiting"] = int64_t(jobs.size()) - running;
    c["blocks_used"] = s.engine.memory_use().first, c["blocks_free"] = s.engine.cache.free();
    c["preemptions_total"] = s.engine.preemptions;
}

// Drives the engine until Ctrl-C.
void drive(Session& s, Desk& desk) {
    std::map<int, std::shared_ptr<Live>> jobs;  // by the engine's number
    while (!interrupted) {
        exchange_jobs(s, desk, jobs);
        for (Output& o : s.engine.step()) {
            auto found = jobs.find(o.request);
            if (found == jobs.end()) continue;  // dropped while this was on its way
            Live& job = *found->second;
            std::lock_guard hold(job.mutex);
            job.replies[o.sample].take(s.engine, o);
            job.open -= job.replies[o.sample].last.finish != nullptr;
            job.news.notify_one();
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The server.

class Server : public HttpServer {
public:
    Server(const Session& s, const ServeOptions& o, Desk& desk)
        : HttpServer(o.max_body), s(s), o(o), desk(desk) {
        try {
            format = Chat::load(s.f.model);
        } catch (const std::exception&) {}  // whoever asks for a chat is told why
        set_pre_routing_handler([this](const httplib::Request& q, httplib::Response&) {
            check(q);
            return HandlerResponse::Unhandled;
        });
        Post("/v1/chat/completions", [this](auto&, auto& a, auto& read) { run(a, read, true); });
        Post("/v1/completions", [this](auto&, auto& a, auto& read) { run(a, read, false); });
        Get("/v1/models", [this](auto&, auto& a) {
            ordered model = {{"id", this->s.f.model}, {"object", "model"}, {"created", started},
                             {"owned_by", "nano.cu"}};
            show(a, 200, {{"object", "list"}, {"data", ordered::array({model})}});
        });
        Get("/health", [](auto&, auto& a) { show(a, 200, {{"status", "ok"}}); });
        Get("/metrics", [this](auto&, auto& a) { a.set_content(metrics(), "text/plain"); });
    }

private:
    const Session& s;
    const ServeOptions& o;
    Desk& desk;
    std::mutex reading;  // one body is parsed at a time: parsed, it takes up to 100 times its bytes
    std::optional<Chat> format;
    int64_t jobs = 0;
    time_t started = time(nullptr);
    string series = str(std::hex, std::random_device()());  // of ids

    // Whether a request may come in at all.
    void check(const httplib::Request& q) const {
        if (!q.path.starts_with("/v1/")) return;
        string given = q.get_header_value("Authorization"), right = "Bearer " + o.key;
        unsigned differs = given.size() != right.size();  // all is compared, wherever it differs
        for (size_t i = 0; i < given.size(); i++) differs |= given[i] ^ right[i % right.size()];
        if (!o.key.empty() && differs) throw Refusal(401, "no API key, or a wrong one");
        // a page that somebody looks at could else send requests to the viewer's own machine
        if (q.has_header("Origin")) throw Refusal(403, "not for pages in a browser (Origin)");
        string type = q.get_header_value("Content-Type");
        if (q.method == "POST" && !type.starts_with("application/json"))
            throw Refusal(415, "Content-Type: expected application/json");
    }

    void run(httplib::Response& a, const httplib::ContentReader& read, bool chat) {
        auto job = std::make_shared<Live>();
        parse(read_all(read), chat, *job);
        Wire::mine->end = (job->end = now() + o.timeout) + kPatience;
        {
            std::lock_guard lock(desk.mutex);
            if (desk.samples + job->open > o.max_queue)
                throw Refusal(429, str("busy with ", desk.samples, " texts; try again"));
            desk.samples += job->open;
            desk.arrived.push_back(job);
        }
        desk.news.notify_one();
        string id = str(series, "-", job->line);
        std::unique_lock lock(job->mutex);
        wait(*job, lock, [&] { return job->accepted || !job->refusal.empty(); });
        if (!job->accepted) throw Refusal(400, job->refusal);
        if (job->stream) return a.set_chunked_content_provider("text/event-stream",
            [this, job, id](size_t, httplib::DataSink& sink) { return send_news(*job, id, sink); });
        wait(*job, lock, [&] { return job->open == 0; });
        show(a, 200, response_body(s, *job, id));
    }

    void parse(const string& body, bool chat, Job& job) {
        std::lock_guard lock(reading);
        job.chat = chat, job.line = ++jobs;
        read_body(s, format, parse_json(body), job);
        if (job.request.samples > kSamples) fail("n: 1 to ", kSamples);
        if (job.request.samples > o.max_queue) fail("n: over --max-queue, ", o.max_queue);
        if (job.request.logprobs > kTop) fail("logprobs, top_logprobs: 0 to ", kTop);
        if (job.stops.size() > kStops) fail("stop: ", kStops, " texts at most");
        for (const string& stop : job.stops) if (stop.size() > kStopBytes)
            fail("stop: ", kStopBytes, " bytes at most");
    }

    // Waits for news that make a job ready; throws if there is nobody or no time to wait for it.
    void wait(Live& job, std::unique_lock<std::mutex>& lock, auto ready) const {
        while (!ready()) {
            if (interrupted) throw Refusal(503, "the server is ending");
            if (Wire::mine->hung_up()) throw Refusal(400, "the client has hung up");
            if (now() > job.end) throw Refusal(504, str("not done in ", o.timeout, " s"));
            job.news.wait_for(lock, kTick);
        }
    }

    // Writes an event for each sample of which there is something new, the end behind the last.
    // A client that reads slowly gets more in each: nothing but the replies themselves is kept.
    bool send_news(Live& job, const string& id, httplib::DataSink& sink) const {
        string events;
        auto add = [&](const ordered& j) { events += "data: " + dump(j) + "\n\n"; };
        auto add_new = [&] {
            for (int i = 0; i < job.request.samples; i++) {
                const Reply& reply = job.replies[i];
                bool news = reply.text.size() > job.shown[i].text || job.with_logprobs ||
                            !s.tokenizer || reply.last.finish;
                if (reply.ids.size() == job.shown[i].ids || !news) continue;
                if (job.request.score_prompt && !reply.last.finish) continue;  // comes at the end
                ordered choices = ordered::array({next_choice(s, job, i)});
                add(response_with(s, job, id, choices, nullptr));
            }
            return !events.empty();
        };
        bool ended = true;
        try {
            std::unique_lock lock(job.mutex);
            wait(job, lock, add_new);
            ended = job.open == 0;
            if (ended && job.include_usage)
                add(response_with(s, job, id, ordered::array(), usage_of(job)));
            if (ended) events += "data: [DONE]\n\n";
        } catch (const Refusal& e) {
            add(error_body(e.what(), "server_error", e.status));
        }
        if (!sink.write(events.data(), events.size())) return false;
        if (ended) sink.done();
        return true;
    }

    // In the form that Prometheus reads.
    string metrics() const {
        std::lock_guard lock(desk.mutex);
        string text;
        desk.counts["connections"] = connections;
        for (const auto& [name, value] : desk.counts) {
            const char* type = name.ends_with("_total") ? "counter" : "gauge";
            text += str("# TYPE nanocu_", name, " ", type, "\nnanocu_", name, " ", value, "\n");
        }
        return text;
    }
};

void serve(const Flags& f) {
    const ServeOptions& o = options;
    Session s(f);
    Desk desk;
    for (const char* name : {"requests", "requests_finished", "requests_abandoned", "new_tokens",
                             "prompt_tokens", "cached_tokens"})
        desk.counts[str(name, "_total")] = 0;
    Server server(s, o, desk);
    int port = server.open(o.host, o.port);
    if (o.host != "127.0.0.1" && o.host != "localhost" && o.host != "::1" && o.key.empty())
        std::cerr << "--host " << o.host << ": without --api-key it serves whoever reaches it\n";
    put(str("http://", o.host, ":", port, "/v1\n"));
    std::thread accepting([&] { server.accept_all(); });
    struct End {  // also when the engine throws
        std::thread& thread;
        ~End() { interrupted = 1, thread.join(); }
    } end{accepting};
    drive(s, desk);
}

void add_flags(CommandLine& line) {
    line.flag("--host NAME", options.host, "address to listen at; else only this machine's own");
    line.flag("--port N", options.port, "else 8000; 0: any that is free", CLI::Range(0, 65535));
    line.flag("--api-key TEXT", options.key, "what clients must know; or NANOCU_API_KEY")
        ->envname("NANOCU_API_KEY");
    line.flag("--max-body SIZE", options.max_body, "of a request; else 1M",
              CLI::AsSizeValue(false));
    line.flag("--max-queue N", options.max_queue, "texts at a time, running or waiting; else 256",
              kSize);
    line.flag("--timeout N", options.timeout, "seconds for a request; else 600", kSize);
    line.engine_flags();
}

int main(int argc, char** argv) {
    return run_command({"serve", "an OpenAI-compatible HTTP server", add_flags, serve}, argc, argv);
}
