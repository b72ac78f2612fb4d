// serve.cu: an HTTP server that speaks OpenAI's API: chat, completions, models, as JSON or streamed.
//
//   build/forks/serve models/smollm2 --port 8000
//
// The main thread alone drives the engine (`drive`); each connection has a thread that reads its
// request, waits for news of its job and writes what is new. They share a Job, and nothing else of
// the engine. How a body is read and a response is built is batch.hpp's. cpp-httplib, which knows
// HTTP, sees a connection through Wire, which limits its time and its size.
#define NANOCU_NO_MAIN
#include "../../nano.cu"

#define CPPHTTPLIB_OPENSSL_SUPPORT  // as in Debian's build of the library: Request has a field more
#include <httplib.h>

#include <condition_variable>
#include <mutex>
#include <netinet/tcp.h>
#include <poll.h>
#include <thread>

constexpr int kConnections = 256;       // at a time; more wait in the kernel
constexpr int kStops = 16;              // stop strings: each is looked for in each new token's text
constexpr size_t kStopBytes = 256;      // of one of them
constexpr int kSamples = 128, kTop = 20;  // n and logprobs at most, as OpenAI's
constexpr double kPatience = 10;        // seconds for a request to arrive, or a write to begin
constexpr auto kTick = std::chrono::milliseconds(100);  // how soon Ctrl-C and hanging up are seen

struct ServeOptions {
    string host = "127.0.0.1", key;
    int port = 8000, max_queue = 256, timeout = 600;
    size_t max_body = 1 << 20;
};

// An answer other than 200.
struct Refusal : std::runtime_error {
    int status;
    Refusal(int status, const string& what) : std::runtime_error(what), status(status) {}
};

// A job that a connection's thread and the main thread share.
struct Live : Job {
    std::mutex mutex;              // for what follows, and for replies and open
    std::condition_variable news;
    bool accepted = false;         // by the engine
    string refusal;                // by the engine, and why
    double end;                    // when its time is over
};

// What is counted for GET /metrics, by the main thread.
struct Counts {
    int64_t requests = 0, finished = 0, abandoned = 0;
    int64_t prompt_tokens = 0, cached_tokens = 0, new_tokens = 0, preemptions = 0;
    int64_t running = 0, waiting = 0, blocks_used = 0, blocks_free = 0;
};

// Where jobs wait for the main thread.
struct Desk {
    std::mutex mutex;
    std::condition_variable news;
    vector<std::shared_ptr<Live>> arrived;
    int samples = 0;  // of all jobs that have not ended
    Counts counts;
};

// ---------------------------------------------------------------------------------------------
// The main thread.

// Takes in what arrived, and drops what nobody waits for any more: a job whose thread has let it go.
void exchange_jobs(Session& s, Desk& desk, std::map<int, std::shared_ptr<Live>>& jobs, Counts& c) {
    std::unique_lock lock(desk.mutex);
    auto idle = [&] { return jobs.empty() && desk.arrived.empty(); };
    if (idle()) desk.news.wait_for(lock, kTick);
    for (auto& job : std::exchange(desk.arrived, {})) {
        std::lock_guard hold(job->mutex);
        try {
            jobs.emplace(s.engine.add(job->request), job);
            job->accepted = true;
            c.requests++, c.prompt_tokens += job->request.prompt.size();
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
        (ended ? c.finished : c.abandoned)++;
        return true;
    });
    desk.samples = c.running = 0;
    for (auto& [number, job] : jobs) {
        desk.samples += job->open;
        c.running += !job->replies[0].ids.empty();  // this thread alone writes them
    }
    c.waiting = int64_t(jobs.size()) - c.running;
    c.preemptions = s.engine.preemptions;
    c.blocks_used = s.engine.memory_use().first, c.blocks_free = s.engine.cache.free();
    desk.counts = c;
}

// Drives the engine until Ctrl-C.
void drive(Session& s, Desk& desk) {
    std::map<int, std::shared_ptr<Live>> jobs;  // by the engine's number
    Counts counts;
    while (!interrupted) {
        exchange_jobs(s, desk, jobs, counts);
        for (Output& o : s.engine.step()) {
            auto found = jobs.find(o.request);
            if (found == jobs.end()) continue;  // dropped while this was on its way
            Live& job = *found->second;
            std::lock_guard hold(job.mutex);
            if (job.replies[0].ids.empty() && o.sample == 0) counts.cached_tokens += o.cached;
            counts.new_tokens++;
            job.replies[o.sample].take(s.engine, o);
            job.open -= job.replies[o.sample].last.finish != nullptr;
            job.news.notify_one();
        }
    }
}

// ---------------------------------------------------------------------------------------------
// A connection, as cpp-httplib sees it. Time and bytes are limited, however slowly they come.

struct Wire : httplib::Stream {
    int fd;
    size_t left;    // bytes that may still be read
    double end;     // when the time of reading and writing is over
    char buffer[4096];
    ssize_t at = 0, size = 0;
    inline static thread_local Wire* mine = nullptr;  // this thread's

    Wire(int fd, size_t left) : fd(fd), left(left), end(now() + kPatience) { mine = this; }

    bool wait(short what, double until) const {
        pollfd p = {fd, what, 0};
        while (poll(&p, 1, int(kTick.count())) < 1) if (interrupted || now() > until) return false;
        return now() < until;
    }
    // The client is gone, or waits for nothing more (it has closed its side).
    bool hung_up() const {
        pollfd p = {fd, POLLRDHUP, 0};
        return poll(&p, 1, 0) > 0;
    }
    ssize_t read(char* to, size_t count) override {
        if (at == size) {
            if (!left || !wait(POLLIN, end)) return -1;
            at = 0, size = recv(fd, buffer, std::min(sizeof buffer, left), MSG_DONTWAIT);
            if (size <= 0) return std::exchange(size, 0);
            left -= size;
        }
        count = std::min(count, size_t(size - at));
        memcpy(to, buffer + at, count);
        at += count;
        return ssize_t(count);
    }
    ssize_t write(const char* from, size_t count) override {
        if (!wait(POLLOUT, std::min(end, now() + kPatience))) return -1;
        return send(fd, from, count, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    // Closes. What the client still sends is read for a moment: else it might lose the answer.
    void close() {
        shutdown(fd, SHUT_WR);
        end = now() + 0.5;
        for (int i = 0; i < 1000 && wait(POLLIN, end); i++)
            if (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) <= 0) break;
        ::close(fd);
    }
    socket_t socket() const override { return fd; }
    bool is_readable() const override { return true; }
    bool is_writable() const override { return true; }  // write waits
    void get_remote_ip_and_port(string&, int&) const override {}
    void get_local_ip_and_port(string&, int&) const override {}
    bool wait_readable() const { return true; }  // these three: of later versions of the library
    bool wait_writable() const { return true; }
    time_t duration() const { return 0; }
};

// ---------------------------------------------------------------------------------------------
// The server.

class Server : httplib::Server {
public:
    Server(const Session& s, const ServeOptions& o, Desk& desk) : s(s), o(o), desk(desk) {
        try {
            format = Chat::load(s.f.model);
        } catch (const std::exception&) {}  // whoever asks for a chat is told why
        set_pre_routing_handler([this](const httplib::Request& q, httplib::Response&) {
            check(q);
            return HandlerResponse::Unhandled;
        });
        Post("/v1/chat/completions", [this](auto& q, auto& a, auto& read) { run(q, a, read, true); });
        Post("/v1/completions", [this](auto& q, auto& a, auto& read) { run(q, a, read, false); });
        Get("/v1/models", [this](auto&, auto& a) {
            ordered model = {{"id", this->s.f.model}, {"object", "model"}, {"created", started},
                             {"owned_by", "nano.cu"}};
            show(a, 200, {{"object", "list"}, {"data", {model}}});
        });
        Get("/health", [](auto&, auto& a) { show(a, 200, {{"status", "ok"}}); });
        Get("/metrics", [this](auto&, auto& a) { a.set_content(metrics(), "text/plain"); });
        set_exception_handler([](auto&, auto& a, std::exception_ptr what) { explain(a, what); });
        set_error_handler([](const httplib::Request& q, httplib::Response& a) {
            if (a.body.empty()) show_error(a, a.status, a.status == 404
                ? str(q.method, " ", q.path, ": there is no such route")
                : "not a request that can be read, or one too long or too slow");
        });
    }

    // Listens; returns the port.
    int open() {
        set_socket_options([](socket_t fd) {  // without the library's SO_REUSEPORT
            int on = 1;
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        });
        int port = o.port;
        if (!port) port = bind_to_any_port(o.host);
        else if (!bind_to_port(o.host, port)) port = -1;
        if (port < 0 || ::listen(svr_sock_, 1024))  // the library's backlog is 5
            fail("--host ", o.host, ", --port ", o.port, ": cannot listen (", strerror(errno),
                 "); is another server running there?");
        return port;
    }

    // Accepts connections until Ctrl-C, and waits for their threads to end.
    void accept_all() {
        while (!interrupted) {
            pollfd p = {svr_sock_, POLLIN, 0};
            bool full = connections >= kConnections;
            if (full) std::this_thread::sleep_for(kTick / 10);
            if (full || poll(&p, 1, int(kTick.count())) < 1) continue;
            int fd = accept4(svr_sock_, nullptr, nullptr, SOCK_CLOEXEC);
            if (fd < 0) continue;  // gone again, or no memory for it
            connections++;
            try {
                std::thread([this, fd] { serve(fd), connections--; }).detach();
            } catch (const std::system_error&) {  // no thread to be had
                ::close(fd), connections--;
            }
        }
        while (connections) std::this_thread::sleep_for(kTick / 10);
    }

private:
    const Session& s;
    const ServeOptions& o;
    Desk& desk;
    std::mutex reading;  // one body is parsed at a time: parsed, it takes up to 100 times its bytes
    std::optional<Chat> format;
    int64_t jobs = 0;
    std::atomic<int> connections = 0;
    time_t started = time(nullptr);
    string series = str(std::hex, std::random_device()());  // of ids

    // One request, one answer.
    void serve(int fd) {
        Wire wire(fd, o.max_body + 65536);  // with its headers
        try {
            bool closed = false;
            // many ranges of an answer would multiply it
            auto setup = [](httplib::Request& q) { q.ranges.clear(); };
            auto process = [&](auto& self) {  // later versions of the library want addresses
                if constexpr (requires { self.process_request(wire, true, closed, setup); })
                    self.process_request(wire, true, closed, setup);
                else self.process_request(wire, "", 0, "", 0, true, closed, setup);
            };
            process(*this);
        } catch (const std::exception&) {}  // no memory in the middle of an answer
        wire.close();
    }

    static void show(httplib::Response& a, int status, const ordered& j) {
        a.status = status;
        a.set_content(dump(j), "application/json");
    }

    static void show_error(httplib::Response& a, int status, string what) {
        std::ranges::replace_if(what, [](unsigned char c) { return c < 32; }, ' ');
        const char* type = status == 429 ? "rate_limit_error"
                         : status >= 500 ? "server_error" : "invalid_request_error";
        if (status == 429) a.set_header("Retry-After", "1");
        if (status == 401) a.set_header("WWW-Authenticate", "Bearer");
        show(a, status, error_body(what.substr(0, 300), type, status == 401 ? ordered("invalid_api_key")
                                                             : ordered(status)));
    }

    // Whatever a handler throws is an answer.
    static void explain(httplib::Response& a, std::exception_ptr what) try {
        std::rethrow_exception(what);
    } catch (const Refusal& e) {
        show_error(a, e.status, e.what());
    } catch (const std::bad_alloc&) {
        show_error(a, 500, "no memory left for this request");
    } catch (const std::exception& e) {
        show_error(a, 400, reason_of(e));
    }

    // Whether a request may come in at all.
    void check(const httplib::Request& q) const {
        if (!q.path.starts_with("/v1/")) return;
        string given = q.get_header_value("Authorization"), right = "Bearer " + o.key;
        unsigned differs = given.size() != right.size();  // all is compared, wherever it differs
        for (size_t i = 0; i < given.size(); i++) differs |= given[i] ^ right[i % right.size()];
        if (!o.key.empty() && differs) throw Refusal(401, "no API key, or a wrong one");
        // a page that somebody looks at could else send requests to the viewer's own machine
        if (q.has_header("Origin")) throw Refusal(403, "not for pages in a browser (Origin)");
        if (q.method == "POST" && !q.get_header_value("Content-Type").starts_with("application/json"))
            throw Refusal(415, "Content-Type: expected application/json");
    }

    void run(const httplib::Request&, httplib::Response& a, const httplib::ContentReader& read,
             bool chat) {
        string body;
        bool whole = read([&](const char* data, size_t size) {
            body.append(data, size);
            return body.size() <= o.max_body;
        });
        if (body.size() > o.max_body) throw Refusal(413, str("body: over ", o.max_body, " bytes"));
        if (!whole) return;  // the error handler tells
        auto job = std::make_shared<Live>();
        parse(body, chat, *job);
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
                add(response_with(s, job, id, {next_choice(s, job, i)}, nullptr));
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
        string text;
        auto add = [&](const string& name, const char* type, int64_t value) {
            text += str("# TYPE nanocu_", name, " ", type, "\nnanocu_", name, " ", value, "\n");
        };
        std::lock_guard lock(desk.mutex);
        const Counts& c = desk.counts;
        add("requests_total", "counter", c.requests);
        add("requests_finished_total", "counter", c.finished);
        add("requests_abandoned_total", "counter", c.abandoned);
        add("prompt_tokens_total", "counter", c.prompt_tokens);
        add("cached_tokens_total", "counter", c.cached_tokens);
        add("new_tokens_total", "counter", c.new_tokens);
        add("preemptions_total", "counter", c.preemptions);
        add("requests_running", "gauge", c.running);
        add("requests_waiting", "gauge", c.waiting);
        add("connections", "gauge", connections);
        add("blocks_used", "gauge", c.blocks_used);
        add("blocks_free", "gauge", c.blocks_free);
        return text;
    }
};

void serve(const Flags& f, const ServeOptions& o) {
    Session s(f);
    Desk desk;
    Server server(s, o, desk);
    int port = server.open();
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

int main(int argc, char** argv) {
    CommandLine line("serve: an OpenAI-compatible HTTP server");
    ServeOptions o;
    line.model("");
    line.flag(line.own, "--host", o.host, "address to listen at; else only this machine's own");
    line.flag(line.own, "--port", o.port, "0: any that is free", CLI::Range(0, 65535));
    line.flag(line.own, "--api-key", o.key, "what clients must know; or NANOCU_API_KEY");
    line.flag(line.own, "--max-body", o.max_body, "of a request", CLI::AsSizeValue(false));
    line.flag(line.own, "--max-queue", o.max_queue, "texts at a time, running or waiting", kSize);
    line.flag(line.own, "--timeout", o.timeout, "seconds for a request", kSize);
    line.engine_flags(line.own);
    line.app.get_option("--api-key")->envname("NANOCU_API_KEY");
    return line.run(argc, argv, [&] { serve(line.f, o); });
}
