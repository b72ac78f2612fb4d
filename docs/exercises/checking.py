"""What the checks of the exercises share: building, running nanocu, and saying what was expected.

A check is a Python file that calls these and ends with done(). It runs from the repository's root.
"""
import json
import os
import subprocess
import sys

MODEL = "models/smollm2"
TINY = "tests/data/models/"
PLAIN = ("--without", "all")  # the ops of nano.cu alone, without the chapters
binary = "build/exercises/nanocu"
failures = 0


def make(*targets):
    """Builds; an error of the compiler is the student's to read."""
    print("building", *targets, flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    out = subprocess.run(["make", "-s", "-j2", *targets], env=environment)
    if out.returncode:
        print("FAIL: the sources do not build")
        sys.exit(1)


def short(value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) < 300 else text[:300] + "..."


def expect(what, ok, wanted, came):
    """Says whether ok, and if not, what was wanted and what came instead."""
    global failures
    print(("  ok    " if ok else "  wrong ") + what, flush=True)
    if not ok:
        failures += 1
        print("          expected: " + short(wanted))
        print("          came:     " + short(came), flush=True)
    return ok


def equal(what, wanted, came):
    return expect(what, wanted == came, wanted, came)


def done():
    print(f"FAIL: {failures} of what was expected did not come" if failures else "PASS")
    sys.exit(failures > 0)


def need(what, ok, wanted, came):
    """Like expect, where nothing that follows makes sense without it."""
    if not expect(what, ok, wanted, came):
        done()


def run(*arguments, program=None, text=None):
    """Runs a program: its result, with returncode, stdout and stderr. nanocu has one thread."""
    one_thread = ["--threads", "1"] if arguments and arguments[0] in ("generate", "score") else []
    command = [program or binary, *map(str, arguments), *one_thread]
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=200)
    except subprocess.TimeoutExpired:
        need(short(" ".join(command)), False, "an end within seconds", "none after 200 s")


def run_check(name):
    """Builds check.cpp of the exercise and becomes it: it says what it expects itself."""
    make("build/exercises/" + name)
    sys.stdout.flush()
    os.execl("build/exercises/" + name, name)


def nanocu(*arguments, program=None):
    """The stdout of nanocu, which must end well."""
    result = run(*arguments, program=program)
    if result.returncode:
        need("nanocu " + repr(" ".join(map(str, arguments))), False, "exit status 0",
             f"{result.returncode}: {result.stderr.strip()}")
    return result.stdout


def generate(*arguments, model=MODEL, program=None):
    """What generate --json says, an object for each sample."""
    lines = nanocu("generate", model, "--json", *arguments, program=program).splitlines()
    return [json.loads(line) for line in lines]
