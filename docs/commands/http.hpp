// http.hpp: what serve.cu adds to cpp-httplib, so that no client can hold up the others: limits on
// the time and the bytes of a connection, however slowly or endlessly they come, and on the number
// of connections; knowing that a client has hung up; errors in OpenAI's form; an end by Ctrl-C.
//
// The library parses requests, finds the handler, writes responses. It sees a connection through
// Wire; each has a thread of its own, and brings one request.
#pragma once

#include "openai.hpp"

#define CPPHTTPLIB_OPENSSL_SUPPORT  // as in Debian's build of the library: Request has a field more
#include <httplib.h>

#include <netinet/tcp.h>
#include <poll.h>
#include <thread>

constexpr int kConnections = 256;       // at a time; more wait in the kernel
constexpr double kPatience = 10;        // seconds for a request to arrive, or a write to begin
constexpr auto kTick = std::chrono::milliseconds(100);  // how soon Ctrl-C and hanging up are seen

// An answer other than 200; handlers throw it.
struct Refusal : std::runtime_error {
    int status;
    Refusal(int status, const string& what) : std::runtime_error(what), status(status) {}
};

// A connection.
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

    // What the client still sends is read for a moment: else it might lose the answer.
    void close() {
        shutdown(fd, SHUT_WR);
        end = now() + 0.5;
        for (int i = 0; i < 1000 && wait(POLLIN, end); i++)
            if (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) <= 0) break;
        ::close(fd);
    }

    socket_t socket() const override { return fd; }
    bool is_readable() const override { return true; }
    void get_remote_ip_and_port(string&, int&) const override {}
    void get_local_ip_and_port(string&, int&) const override {}
    bool is_writable() const { return true; }    // write waits; of versions up to 0.18
    bool wait_readable() const { return true; }  // these three: of later ones
    bool wait_writable() const { return true; }
    time_t duration() const { return 0; }
};

class HttpServer : protected httplib::Server {
public:
    explicit HttpServer(size_t max_body) : max_body(max_body) {
        set_exception_handler([](auto&, auto& a, std::exception_ptr what) { explain(a, what); });
        set_error_handler([](const httplib::Request& q, httplib::Response& a) {
            if (a.body.empty()) show_error(a, a.status, a.status == 404
                ? str(q.method, " ", q.path, ": there is no such route")
                : "not a request that can be read, or one too long or too slow");
        });
    }

    // Listens; returns the port. port 0: any that is free.
    int open(const string& host, int port) {
        set_socket_options([](socket_t fd) {  // without the library's SO_REUSEPORT
            int on = 1;
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        });
        int got = port ? bind_to_port(host, port) ? port : -1 : bind_to_any_port(host);
        if (got < 0 || ::listen(svr_sock_, 1024))  // the library's backlog is 5
            fail("--host ", host, ", --port ", port, ": cannot listen (", strerror(errno),
                 "); is another server running there?");
        return got;
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

protected:
    std::atomic<int> connections = 0;

    static void show(httplib::Response& a, int status, const ordered& j) {
        a.status = status;
        a.set_content(dump(j), "application/json");
    }

    // The body of a request, whole.
    string read_all(const httplib::ContentReader& read) const {
        string body;
        bool whole = read([&](const char* data, size_t size) {
            body.append(data, size);
            return body.size() <= max_body;
        });
        if (body.size() > max_body) throw Refusal(413, str("body: over ", max_body, " bytes"));
        if (!whole) throw Refusal(400, "body: cannot be read, or came too slowly");
        return body;
    }

private:
    size_t max_body;

    // One request, one answer.
    void serve(int fd) {
        Wire wire(fd, max_body + 65536);  // with its headers
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

    static void show_error(httplib::Response& a, int status, string what) {
        std::ranges::replace_if(what, [](unsigned char c) { return c < 32; }, ' ');
        const char* type = status == 429 ? "rate_limit_error"
                         : status >= 500 ? "server_error" : "invalid_request_error";
        if (status == 429) a.set_header("Retry-After", "1");
        if (status == 401) a.set_header("WWW-Authenticate", "Bearer");
        ordered code = status == 401 ? ordered("invalid_api_key") : ordered(status);
        show(a, status, error_body(what.substr(0, 300), type, code));
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
};
