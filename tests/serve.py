"""Clients of nanocu serve, run by tests/serve.cpp:  build/openai/bin/python tests/serve.py CASE

Each case starts a server at a port that the system chooses, and ends it. Clients connect to 127.0.0.1 only.
"""
import contextlib
import gzip
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

NANOCU = os.environ.get("NANOCU", "./nanocu")
DEMO, TINY = "models/smollm2", "tests/data/models/llama3"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    """A running one. Ends by Ctrl-C, within two seconds and with exit 130, or the case fails."""

    def __init__(self, model, *flags, **environment):
        self.process = subprocess.Popen([NANOCU, "serve", model, "--port", "0", *flags], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("no server: " + self.process.stderr.read())
        self.url, self.port = line.strip(), int(re.search(r":(\d+)/v1$", line)[1])

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.process.kill()
        self.process.send_signal(signal.SIGINT)
        start = time.time()
        status = self.process.wait(20)
        self.errors = self.process.stderr.read()
        if not kind:
            assert status == 130 and time.time() - start < 20, (status, time.time() - start, self.errors)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path, body=None, headers=(), method=None):
        """Status, headers, and what the JSON says, or the text. body: JSON, or bytes as they are."""
        c = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        c.request(method or ("GET" if body is None else "POST"), path, data,
                  {"Content-Type": "application/json", **dict(headers)})
        r = c.getresponse()
        text = r.read()
        c.close()
        return r.status, r.headers, json.loads(text) if "json" in r.headers["Content-Type"] else text.decode()

    def open_stream(self, path, body, headers=()):
        """The response to a streamed request, which is open."""
        c = self.connect()
        c.request("POST", path, json.dumps(body | {"stream": True}),
                  {"Content-Type": "application/json", **dict(headers)})
        r = c.getresponse()
        assert r.status == 200 and r.headers["Content-Type"] == "text/event-stream", r.read()
        return r

    def stream(self, path, body, headers=()):
        """All events of a streamed request; the last, [DONE], is checked. Each is UTF-8 and JSON by itself."""
        text = self.open_stream(path, body, headers).read()
        events = text.split(b"\n\n")
        assert events.pop() == b"" and events.pop() == b"data: [DONE]", text[-200:]
        assert all(e.startswith(b"data: {") for e in events), text
        return [json.loads(e[6:].decode("utf-8", "strict")) for e in events]

    def metric(self, name):
        text = self.ask("/metrics")[2]
        return int(re.search(rf"^nanocu_{name} (\d+)$", text, re.M)[1])

    def until(self, seconds, *wanted):
        """Waits until the metrics have these (name, value)."""
        end = time.time() + seconds
        while any(self.metric(name) != value for name, value in wanted):
            assert time.time() < end, self.ask("/metrics")[2]
            time.sleep(0.05)

    def memory(self):
        """Resident bytes."""
        with open(f"/proc/{self.process.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def merged(events):
    """The response that the chunks add up to, in the form of one that is not streamed."""
    choices = {}
    for e in events:
        for c in e["choices"]:
            all_of = choices.setdefault(c["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert all_of["finish_reason"] is None, "news after the end"
            all_of["text"] += c["delta"].get("content", "") if "delta" in c else c["text"]
            assert ("delta" in c) == (e["object"] == "chat.completion.chunk")
            all_of["finish_reason"] = c["finish_reason"]
            if c["logprobs"] and not all_of["logprobs"]:
                all_of["logprobs"] = c["logprobs"]
            elif c["logprobs"]:
                for key, values in c["logprobs"].items():
                    all_of["logprobs"][key] += values
    return [choices[i] for i in range(len(choices))]


def whole(response):
    return [{"text": c["message"]["content"] if "message" in c else c["text"], "logprobs": c["logprobs"],
             "finish_reason": c["finish_reason"]} for c in response["choices"]]


def batch(model, requests):
    """What `nanocu batch` answers to (path, body)s: the bodies of its responses."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for i, (path, body) in enumerate(requests):
            file.write(json.dumps({"custom_id": str(i), "url": path, "body": body}) + "\n")
        file.flush()
        out = subprocess.run([NANOCU, "batch", model, file.name, "-o", "-"], check=True, text=True,
                             capture_output=True).stdout
    lines = {j["custom_id"]: j["response"]["body"] for j in map(json.loads, out.splitlines())}
    return [lines[str(i)] for i in range(len(requests))]


def in_threads(count, work):
    results = [None] * count

    def one(i):
        results[i] = work(i)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def check_error(answer, status, says=""):
    got, _, j = answer
    assert got == status and list(j) == ["error"], answer
    assert list(j["error"]) == ["message", "type", "param", "code"], answer
    assert len(j["error"]["message"]) <= 300, answer
    assert says in j["error"]["message"] and "\n" not in j["error"]["message"], (says, answer)


# ------------------------------------------------------------------------------------------------------------


def many():
    """64 clients stream at once, and each gets what batch gives, and generate, for the same request."""
    requests = []
    for i in range(64):
        body = {"max_tokens": 3 + i % 6, "temperature": 0.9 if i % 3 else 0, "seed": i, "top_p": 0.95}
        if i % 2:
            body["messages"] = [{"role": "user", "content": f"Tell me about the number {i}."}]
        else:
            body["prompt"] = f"The number {i} \U0001F600 is 四"
        if i % 8 < 2:
            body |= {"logprobs": True, "top_logprobs": 2} if i % 2 else {"logprobs": 2}
        if i % 16 == 4:
            body |= {"echo": True}
        if i == 8:
            body |= {"echo": True}  # with log-probabilities
        if i % 7 == 0:
            body |= {"n": 3, "stop": [" the", "."]}
        if i % 5 == 0:
            body |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_p": 0.01, "top_k": 100}
        requests.append((CHAT if i % 2 else TEXT, body))
    expected = batch(DEMO, requests)
    with Server(DEMO) as s:
        usage = {"stream_options": {"include_usage": True}}
        got = in_threads(64, lambda i: s.stream(requests[i][0], requests[i][1] | usage))
        for i in range(64):
            last = got[i].pop()
            assert last["choices"] == [] and all(e["usage"] is None for e in got[i])
            assert merged(got[i]) == whole(expected[i]), (i, merged(got[i]), whole(expected[i]))
            for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert last["usage"][key] == expected[i]["usage"][key], (i, key)
            assert len({(e["id"], e["created"], e["model"]) for e in got[i]}) == 1
        for i in (0, 7, 8):  # not streamed
            _, _, response = s.ask(*requests[i])
            assert whole(response) == whole(expected[i]), i
            assert list(response) == list(expected[i]) and response["object"] == expected[i]["object"]
        s.until(5, ("blocks_used", 0), ("requests_running", 0), ("requests_waiting", 0),
                ("requests_finished_total", 67), ("requests_abandoned_total", 0))
        assert s.metric("cached_tokens_total") > 0
        assert s.metric("new_tokens_total") >= sum(e["usage"]["completion_tokens"] for e in expected)
    text = subprocess.run([NANOCU, "generate", DEMO, "-p", requests[2][1]["prompt"], "-n", "5", "--seed", "2",
                           "-t", "0.9", "--top-p", "0.95"], capture_output=True, check=True, text=True).stdout
    assert text == merged(got[2])[0]["text"] + "\n"


def client():
    """OpenAI's own client, as it is."""
    import openai
    with Server(DEMO, NANOCU_API_KEY="a key") as s:
        api = openai.OpenAI(base_url=s.url, api_key="a key", max_retries=0, timeout=60)
        assert [m.id for m in api.models.list()] == [DEMO]
        ask = dict(model=DEMO, messages=QUESTION, temperature=0)
        chat = api.chat.completions.create(**ask)
        assert chat.choices[0].message.content == "The capital of France is Paris."
        assert chat.choices[0].message.role == "assistant" and chat.choices[0].finish_reason == "stop"
        assert chat.usage.completion_tokens == 8 and chat.usage.total_tokens == chat.usage.prompt_tokens + 8

        chunks = list(api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == chat.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == 8
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 32

        draw = ask | {"temperature": 1, "n": 3, "seed": 5, "max_tokens": 6}
        three = api.chat.completions.create(**draw)
        texts = ["", "", ""]
        for chunk in api.chat.completions.create(**draw, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert [c.index for c in three.choices] == [0, 1, 2] and len(set(texts)) > 1
        assert texts == [c.message.content for c in three.choices]

        sure = api.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        content = sure.choices[0].logprobs.content
        assert len(content) == 8 and content[0].token == "The" and bytes(content[0].bytes) == b"The"
        assert len(content[0].top_logprobs) == 2 and content[0].top_logprobs[0].logprob == content[0].logprob
        streamed = [t for c in api.chat.completions.create(**ask, logprobs=True, top_logprobs=2, stream=True)
                    for t in c.choices[0].logprobs.content]
        assert streamed == content

        stop = api.chat.completions.create(**ask, stop=["zebra", " is Par"])
        assert stop.choices[0].message.content == "The capital of France"
        assert stop.choices[0].finish_reason == "stop"
        stop = list(api.chat.completions.create(**ask, stop=" is Par", stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in stop) == "The capital of France"
        assert stop[-1].choices[0].finish_reason == "stop"

        text = dict(model=DEMO, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=1)
        done = api.completions.create(**text, echo=True).choices[0]
        assert done.text.startswith("The capital of France is") and done.finish_reason == "length"
        assert done.logprobs.text_offset[:5] == [0, 3, 11, 14, 21] and done.logprobs.token_logprobs[0] is None
        pieces = [c.choices[0] for c in api.completions.create(**text, stream=True)]
        assert "The capital of France is" + "".join(p.text for p in pieces) == done.text
        assert [x for p in pieces for x in p.logprobs.token_logprobs] == done.logprobs.token_logprobs[5:]

        smile = dict(model=DEMO, prompt="\U0001F600" * 12, temperature=0, max_tokens=12)
        pieces = [c.choices[0].text for c in api.completions.create(**smile, stream=True)]
        assert "".join(pieces) == api.completions.create(**smile).choices[0].text
        assert "\U0001F600" in pieces  # four bytes of several tokens come together

        for mistake, kind in ((dict(temperature=-1), openai.BadRequestError),
                              (dict(max_tokens=2**31), openai.BadRequestError),
                              (dict(n=10**6), openai.BadRequestError)):
            try:
                api.chat.completions.create(**ask | mistake)
                raise AssertionError(mistake)
            except kind as e:
                assert list(mistake)[0].replace("_", "-") in e.message.replace("_", "-"), e.message
                assert e.type == "invalid_request_error"
        for wrong in ("a ke", "a kez", "b key", "a keya key"):
            try:
                api.with_options(api_key=wrong).models.list()
                raise AssertionError(wrong)
            except openai.AuthenticationError as e:
                assert e.code == "invalid_api_key"
        check_error(s.ask("/v1/models"), 401)
        check_error(s.ask("/v1/models", headers=[("Authorization", "Basic a key")]), 401)
        check_error(s.ask(CHAT, {}), 401)
        assert s.ask("/health")[0] == 200 and s.ask("/metrics")[0] == 200  # without
    assert s.errors == ""


def wrong():
    """What is malformed, too large or unknown is refused with its reason, in OpenAI's shape."""
    deep = b'{"prompt":' + b"[" * 100000 + b"]" * 100000 + b"}"
    with Server(TINY, "--max-body", "200K") as s:
        for body, says in (
                (b"", "JSON"), (b"{", "JSON"), (b"[]", "body"), (b"7", "body"), (b"null", "body"), (b"{}", "prompt"),
                (b'{"prompt":"\xff"}', "JSON"), (b'{"prompt":"\\ud800"}', "JSON"), (b'{"prompt":1e999}', "JSON"),
                (b"\x00" * 100, "JSON"), (deep[:150000], "nested"), (deep[:100], "nested"),
                ({"prompt": [1], "best_of": 2}, "best_of"), ({"prompt": [1], "n": 0}, "n: "),
                ({"prompt": [1], "n": 129}, "n: "), ({"prompt": [1], "n": 2**31}, "n: "),
                ({"prompt": [1], "n": 10**6}, "n: "), ({"prompt": [1], "max_tokens": 2.5}, "max_tokens"),
                ({"prompt": [1], "max_tokens": 0}, "max-tokens"), ({"prompt": [1], "max_tokens": -5}, "max-tokens"),
                ({"prompt": [1], "max_tokens": 10**400}, "JSON"), ({"prompt": [1], "temperature": 1e300}, "temp"),
                ({"prompt": [1], "top_p": 0}, "top-p"), ({"prompt": [1], "stream": "yes"}, "stream"),
                ({"prompt": [1], "stream": True, "stream_options": 5}, "stream_options"),
                ({"prompt": [1], "stream": True, "stream_options": {"other": 1}}, "stream_options"),
                ({"prompt": [1], "logprobs": 21}, "logprobs"), ({"prompt": [1], "logprobs": -1}, "logprobs"),
                ({"prompt": [1], "stop": ["a"] * 17}, "stop"), ({"prompt": [1], "stop": "a" * 257}, "stop"),
                ({"prompt": [1], "stop": ""}, "stop"), ({"prompt": [1], "stop": [["a"]]}, "JSON"),
                ({"prompt": []}, "prompt"), ({"prompt": [512]}, "vocabulary"), ({"prompt": [-1]}, "prompt"),
                ({"prompt": "text"}, "tokenizer"), ({"prompt": [1] * 4096}, "context"),
                ({"prompt": [1], "model\r\nX: y": "\r\nX: y"}, "model  X: y is not")):
            for stream in (False, True) if isinstance(body, dict) and "stream" not in body else (None,):
                answer = s.ask(TEXT, body if stream is None else body | {"stream": stream})
                check_error(answer, 400, says)
                assert "X" not in answer[1]
        for messages in (None, 7, [], ["hi"], [{"role": "user"}], [{"content": "hi"}],
                         [{"role": 7, "content": "hi"}], [{"role": "user", "content": {"a": 1}}]):
            check_error(s.ask(CHAT, {"messages": messages}), 400)
        check_error(s.ask(TEXT, b" " * 300000), 413, "204800")
        check_error(s.ask(TEXT, gzip.compress(b" " * 300000), headers=[("Content-Encoding", "gzip")]), 413, "204800")
        check_error(s.ask(CHAT, {"messages": [{"role": "x" * 100000, "content": "hi"}] * 2}), 400)
        check_error(s.ask(TEXT, b"{}", headers=[("Content-Type", "text/plain")]), 415)
        check_error(s.ask(TEXT, b"{}", headers=[("Content-Type", "multipart/form-data; boundary=x")]), 415)
        check_error(s.ask(TEXT, b"{}", headers=[("Origin", "http://example.com")]), 403)
        for path, method in (("/", "GET"), ("/v1", "GET"), ("/v1/embeddings", "POST"), (TEXT, "GET"), (TEXT, "PUT"),
                             ("/health", "POST"), ("/../../etc/passwd", "GET"), ("/%2e%2e/etc/passwd", "GET")):
            check_error(s.ask(path, b"{}" if method != "GET" else None, method=method), 404, "route")
        ok = {"prompt": [1, 2], "max_tokens": 3, "model": "\r\nX: y", "user": "\x00"}
        status, headers, j = s.ask(TEXT, ok, headers=[("Range", "bytes=" + "0-," * 2000)])
        assert status in (200, 416) and "X" not in headers
        # a request that asks for all there is
        status, _, j = s.ask(TEXT, ok | {"n": 128, "logprobs": 20, "max_tokens": 5})
        assert status == 200 and len(j["choices"]) == 128 and j["usage"]["completion_tokens"] == 640
    for flags, says in (((TINY, "--max-queue", "4", "--kv-memory", "100K"), "KV memory"),):
        with Server(*flags) as s:
            check_error(s.ask(TEXT, {"prompt": [1], "max_tokens": 3000}), 400, says)
            check_error(s.ask(TEXT, {"prompt": [1], "n": 5}), 400, "--max-queue")
    with Server(DEMO, "--max-queue", "3", "--timeout", "1") as s:
        long = {"prompt": "Once", "max_tokens": 8000, "ignore_eos": True}
        first = s.open_stream(TEXT, long | {"n": 3})
        refused = s.ask(TEXT, long)
        check_error(refused, 429)
        assert refused[1]["Retry-After"] == "1"
        events = first.read().decode().split("\n\n")  # its time is over
        assert json.loads(events[-2][6:])["error"]["code"] == 504, events[-2:]
        s.until(5, ("blocks_used", 0), ("requests_abandoned_total", 1))
        check_error(s.ask(TEXT, long), 504)
        s.until(5, ("blocks_used", 0), ("requests_abandoned_total", 2))
        assert s.ask(TEXT, long | {"max_tokens": 2})[0] == 200


def gone():
    """A client that hangs up frees its blocks, also one that waits for all at once, or is killed."""
    with Server(DEMO) as s:
        long = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "n": 2}
        code = ("import sys; sys.path.insert(0, 'tests'); import serve; s = object.__new__(serve.Server); "
                f"s.port = {s.port}; r = s.open_stream({TEXT!r}, {long!r}); "
                "print(r.readline() and 'begun', flush=True); r.read()")
        killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert killed.stdout.readline() == "begun\n"
        s.until(3, ("requests_running", 1))
        assert s.metric("blocks_used") > 0
        killed.kill()
        s.until(3, ("blocks_used", 0), ("requests_running", 0), ("requests_abandoned_total", 1))
        quiet = s.connect()  # one that waits for all at once
        quiet.request("POST", TEXT, json.dumps(long), {"Content-Type": "application/json"})
        s.until(3, ("requests_running", 1))
        quiet.close()
        s.until(3, ("blocks_used", 0), ("requests_running", 0), ("requests_abandoned_total", 2))
        # Ctrl-C, in the middle of one
        rest = s.open_stream(TEXT, long)
        rest.readline()
    assert json.loads(rest.read().split(b"\n\n")[-2][6:])["error"]["code"] == 503


def attack():
    """Clients that do not read, half-open connections, random bytes, endless headers: it goes on serving."""
    rng = random.Random(7)
    with Server(TINY) as s:
        before = s.memory()
        # one that does not read holds up nobody
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(("127.0.0.1", s.port))
        body = json.dumps({"prompt": [1], "n": 128, "max_tokens": 100, "logprobs": 20, "stream": True})
        small.sendall(f"POST {TEXT} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                      f"\r\n\r\n{body}".encode())
        s.until(30, ("requests_total", 1))
        s.until(30, ("requests_running", 0), ("requests_waiting", 0), ("blocks_used", 0))
        start = time.time()
        for i in range(5):
            assert s.ask(TEXT, {"prompt": [1, 2], "max_tokens": 3})[0] == 200
        assert time.time() - start < 30
        assert s.memory() - before < 200e6, s.memory() - before

        def connect(data):
            c = socket.create_connection(("127.0.0.1", s.port), timeout=20)
            with contextlib.suppress(OSError):  # it may have hung up
                c.sendall(data)
            return c
        half = [b"", b"P", b"POST " + TEXT.encode() + b" HTTP/1.1\r\nContent-Length: 10000\r\n", b"GET /health",
                b"POST " + TEXT.encode() + b" HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"]
        opened = [connect(half[i % len(half)]) for i in range(300)]  # more than it takes at a time
        start = time.time()
        trickle = opened[1]
        while time.time() - start < 9:
            with contextlib.suppress(OSError):
                trickle.sendall(b"x")
            time.sleep(0.5)
        assert s.ask("/health")[0] == 200 and time.time() - start < 60
        for c in opened:
            c.close()
        s.until(3, ("connections", 1))  # the one that does not read was given up, too
        small.close()

        lines = [b"POST " + TEXT.encode() + b" HTTP/1.1\r\n", b"GET /metrics HTTP/1.0\r\n", b"GET /health HTTP/1.1\r\n"]
        fields = [b"Content-Type: application/json\r\n", b"Content-Length: 20\r\n", b"Content-Length: -1\r\n",
                  b"Content-Length: 18446744073709551615\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n",
                  b"Range: bytes=0-,9-1,--\r\n", b"Content-Encoding: gzip\r\n", b"Connection: keep-alive\r\n", b"\r\n", b"\n"]
        for i in range(700):
            noise = rng.randbytes(rng.randrange(1, 3000))
            data = noise if i % 3 == 0 else rng.choice(lines) + b"".join(rng.sample(fields, 5)) + b"\r\n" + noise
            c = connect(data)
            if i % 10 == 0:
                c.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    c.recv(1000)
            c.close()
        huge = connect(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(OSError):  # headers without an end, up to 100 MB
            for i in range(1000):
                huge.sendall((b"X: " + b"y" * 997) * 100 if i % 2 else b"A: b\r\n" * 16000)
            raise AssertionError("it reads headers for ever")
        for head in (b"Range: bytes=" + b"0-0," * 2000 + b"0-0", b"X: " + b"a" * 8000, b"Range: bytes=" + b"9" * 8000 + b"-"):
            for path in (b"/health", b"/" + b"a" * 8000, b"/health?" + b"a=b&" * 2000):
                c = connect(b"GET " + path + b" HTTP/1.1\r\n" + head + b"\r\n\r\n")
                assert c.recv(12).startswith(b"HTTP/1.1 "), (head[:20], path[:20])
                c.close()
        bomb = connect(b"POST " + TEXT.encode() + b" HTTP/1.1\r\nContent-Type: application/json\r\n"
                       b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for i in range(1000):
                bomb.sendall(b"186A0\r\n" + b" " * 100000 + b"\r\n")
            raise AssertionError("it reads a body for ever")
        s.until(15, ("connections", 1), ("requests_running", 0))
        assert s.ask(TEXT, {"prompt": [1, 2], "max_tokens": 3})[0] == 200
        assert s.memory() - before < 200e6, s.memory() - before


def listening(port):
    """The addresses at which this machine listens at a port, as /proc/net/tcp has them."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open("/proc/net/" + name) as f:
            for line in f.readlines()[1:]:
                _, local, _, state = line.split()[:4]
                if state == "0A" and int(local.split(":")[1], 16) == port:
                    found.add(local.split(":")[0])
    return found


def listen():
    """Only at this machine's own address without --host; two at one port: one line, exit 1."""
    with Server(TINY) as s:
        assert listening(s.port) == {"0100007F"}, listening(s.port)
        second = subprocess.run([NANOCU, "serve", TINY, "--port", str(s.port)], capture_output=True, text=True)
        assert second.returncode == 1 and second.stdout == "" and second.stderr.count("\n") == 1, second
        assert second.stderr.startswith("nanocu: ") and "--port" in second.stderr
        assert s.ask("/health")[0] == 200
    assert s.errors == ""
    with Server(TINY, "--host", "0.0.0.0") as s:
        assert listening(s.port) == {"00000000"}, listening(s.port)
        assert s.ask("/health")[0] == 200
    assert "--api-key" in s.errors and s.errors.count("\n") == 1
    for flags in (["--port", "70000"], ["--host", "no.such.host.invalid"], ["--max-queue", "0"], ["--timeout", "x"]):
        r = subprocess.run([NANOCU, "serve", TINY, *flags], capture_output=True, text=True)
        assert r.returncode == 1 and r.stdout == "" and r.stderr.count("\n") == 1, (flags, r)
    assert subprocess.run([NANOCU, "serve"], capture_output=True).returncode == 1


if __name__ == "__main__":
    {f.__name__: f for f in (many, client, wrong, gone, attack, listen)}[sys.argv[1]]()
