#!/usr/bin/env python3
"""chat at a terminal, run by tests/commands.cpp:  NANOCU=./nanocu tests/terminal.py

Types at a pseudo-terminal what a user would, keys included, and looks at what comes: on the terminal, which
is stdin and stderr, and on stdout, which is a file here and must have nothing but answers.
"""
import os
import pty
import select
import signal
import tempfile
import time

NANOCU, MODEL = os.environ.get("NANOCU", "./nanocu"), "models/smollm2"
PROMPT, MORE, ANSWERED = "> ", "| ", "first token after"
LEFT, UP, ERASE, END, INTERRUPT = "\x1b[D", "\x1b[A", "\x7f", "\x04", "\x03"
LIMIT = 60  # seconds that anything may take


class Chat:
    """A chat that runs at a pseudo-terminal."""

    def __init__(self, folder):
        self.out, self.seen, self.at = f"{folder}/out", b"", 0
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.dup2(os.open(self.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.environ.update(TERM="xterm", LC_ALL="C")
            os.execv(NANOCU, [NANOCU, "chat", MODEL, "-t", "0", "-n", "24", "--threads", "1"])

    def read(self):
        """Takes what has come; false at the end."""
        if select.select([self.terminal], [], [], 0.1)[0]:
            try:
                self.seen += os.read(self.terminal, 4096)
            except OSError:  # the other side is closed
                return False
        return True

    def wait(self, text):
        """Until text has come, behind what was waited for before."""
        end = time.time() + LIMIT
        while (found := self.seen.find(text.encode(), self.at)) < 0:
            assert time.time() < end and self.read(), f"waited for {text!r}, came: {self.seen[self.at:]}"
        self.at = found + len(text.encode())

    def type(self, keys, prompt=PROMPT):
        """Behind the prompt; the terminal is made ready for single keys just after that was shown."""
        self.wait(prompt)
        time.sleep(0.2)
        os.write(self.terminal, keys.encode("utf-8", "surrogateescape"))

    def end(self):
        """The exit status, what the terminal showed, and what is on stdout."""
        end = time.time() + LIMIT
        while self.read():
            if time.time() > end:
                os.kill(self.process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.terminal)
        with open(self.out, encoding="utf-8") as file:
            return status, self.seen.decode(errors="replace"), file.read()


def asked(seen):
    """How many questions were answered."""
    return seen.count(ANSWERED)


def edits_and_remembers(chat):
    chat.type("Wat is the capital of France?" + LEFT * 28 + "h\r")
    chat.wait(ANSWERED)
    chat.type("/reset\r")
    chat.type(UP + UP + "\r")
    chat.wait(ANSWERED)
    chat.type("/quit\r")
    status, seen, out = chat.end()
    first, second = out.splitlines()
    assert status == 0 and asked(seen) == 2, seen
    assert "What is the capital of France?" in seen, seen
    assert first == second and "Paris" in first, out
    assert not {PROMPT, MORE} & {line[:2] for line in out.splitlines()} and "\x1b" not in out, out


def knows_its_commands(chat):
    for word in "/help", "/rest", "/quit now":
        chat.type(word + "\r")
        chat.wait("/reset")
        chat.wait("/quit")
    chat.type("/usr/bin is what?\r")  # a path is none
    chat.wait(ANSWERED)
    chat.type(END)
    status, seen, _ = chat.end()
    assert status == 0 and asked(seen) == 1, seen


def lines_go_on_in_any_language(chat):
    chat.type("S\u00e4g \u65e5\u672c" + ERASE + "\u672c \\\r")
    chat.type("\udce4x\r", MORE)  # a byte that is no UTF-8
    chat.wait(ANSWERED)
    chat.type(END)
    status, seen, _ = chat.end()
    assert status == 0 and asked(seen) == 1, seen
    assert "S\u00e4g \u65e5" in seen, seen


def ends_by_ctrl_c(chat):
    chat.type("Hello" + INTERRUPT)
    status, seen, out = chat.end()
    assert status == 130 and asked(seen) == 0 and out == "", (status, seen)


def goes_on_when_an_answer_is_stopped(chat):
    chat.type("Tell me a long story about a dragon.\r")
    end = time.time() + LIMIT
    while not os.path.getsize(chat.out):
        assert time.time() < end and chat.read()
    os.write(chat.terminal, INTERRUPT.encode())
    chat.wait(ANSWERED)
    chat.type("/quit\r")
    status, seen, out = chat.end()
    assert status == 0 and out.endswith("\n"), (status, seen)


if __name__ == "__main__":
    for case in (edits_and_remembers, knows_its_commands, lines_go_on_in_any_language, ends_by_ctrl_c,
                 goes_on_when_an_answer_is_stopped):
        with tempfile.TemporaryDirectory() as folder:
            case(Chat(folder))
