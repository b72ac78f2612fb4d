#!/usr/bin/env python3
"""The sizes of the sources, and their limits: make lines runs it. Exit status 1: a limit is broken.

A line is code if it is neither blank nor a // comment. Counted is every source file outside tests,
docs/exercises and docs/guide; a file that several commands include counts once, as shared.
"""
import re
import subprocess
import sys
from pathlib import Path

ENGINE = ["nano.cu", "model.hpp", "cache.hpp", "sampler.hpp"]
COLUMNS, FUNCTION = 100, 100
# What the engine and everything are to come down to, and what they may not grow beyond until then.
GOALS = {"engine": 2400, "engine in all": 3200, "everything": 7400}
ENGINE_CODE, ENGINE_ALL, EVERYTHING = 3060, 3810, 7900
CHAPTER, COMMAND = 450, 450
CHAPTERS = {"tensor-cores": 200, "stream": 750}  # what the name begins with: another limit
OUTSIDE = ("tests/", "docs/exercises/", "docs/guide/")
PAGE = 700  # a page that a command fills in: HTML with its own script

broken = []


def check(ok, what):
    if not ok:
        broken.append(what)


class Source:
    def __init__(self, path):
        self.path, self.lines = path, Path(path).read_text().splitlines()
        self.code = sum(not re.match(r"\s*(//|$)", line) for line in self.lines)
        self.columns = max(map(len, self.lines), default=0)
        folder = Path(path).parent
        self.includes = [str((folder / name).resolve().relative_to(Path.cwd()))
                         for name in re.findall(r'^#include "([^"]+)"', "\n".join(self.lines), re.M)]


def without_texts(lines):
    """The lines with strings, characters, comments and raw strings taken out."""
    text = re.sub(r'R"(\w*)\((?:.|\n)*?\)\1"', lambda m: '""' + "\n" * m[0].count("\n"), "\n".join(lines))
    token = r'//[^\n]*|/\*(?:.|\n)*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''
    return re.sub(token, lambda m: "\n" * m[0].count("\n") if m[0][0] == "/" else '""', text).split("\n")


def statements(line):
    """How many statements end on a line, those of a for header left out."""
    line = re.sub(r"\bfor \([^;]*;[^;]*;", "for (", line)
    return line.count(";")


def functions(lines):
    """The first line and the length of each function: what a line begins that ends in { and has ( in it,
    and is inside nothing but namespaces and structs, to the line where that is closed again."""
    opened, found, head = [], [], ""  # kinds of open braces
    for number, line in enumerate(lines, 1):
        for part in re.findall(r"[{};]|[^{};]+", line):
            if part == "{":
                kind = "scope" if re.search(r"\b(namespace|struct|class|enum|union)\b[^()=]*$", head) else \
                    "function" if "(" in head and not any(k == "function" for k, _ in opened) else "block"
                opened.append((kind, number))
                head = ""
            elif part == "}":
                kind, begin = opened.pop() if opened else ("", number)
                if kind == "function":
                    found.append((begin, number - begin + 1))
                head = ""
            elif part == ";":
                head = "" if head.count("(") == head.count(")") else head + part
            elif not part.lstrip().startswith("#"):
                head += " " + part
    return found


def check_style(source):
    lines = without_texts(source.lines)
    check(source.columns <= COLUMNS, f"{source.path}: {source.columns} columns")
    for number, line in enumerate(lines, 1):
        check(statements(line) <= 2, f"{source.path}:{number}: more than two statements")
    for begin, length in functions(lines):
        check(length <= FUNCTION, f"{source.path}:{begin}: a function of {length} lines")


def row(name, code, lines, columns, limit):
    print(f"{name:30} {code:6} {lines:6} {columns:8} {limit:>8}")


def group(title, names, sources, limit, code_limit=None):
    """A row for the files together, one for each."""
    files = [sources[name] for name in names]
    code = sum(f.code for f in files)
    row(title, code, sum(len(f.lines) for f in files), max((f.columns for f in files), default=0),
        limit or "")
    if limit:
        check(code <= limit, f"{title}: {code} lines of code, {limit} at most")
    if len(files) > 1 or title not in names:
        for f in files:
            row("  " + f.path, f.code, len(f.lines), f.columns, "")


def main():
    paths = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True,
                           check=True).stdout.split("\n")
    sources = {p: Source(p) for p in sorted(set(paths)) if re.search(r"\.(cu|cuh|[ch]pp|h|c|html|js|py|sh)$", p)
               and not p.startswith(OUTSIDE) and Path(p).exists()}
    row("", "code", "all", "columns", "limit")
    group("engine", ENGINE, sources, ENGINE_CODE)
    lines = sum(len(sources[name].lines) for name in ENGINE)
    check(lines <= ENGINE_ALL, f"engine: {lines} lines in all, {ENGINE_ALL} at most")

    left = [p for p in sources if p not in ENGINE]
    for path in [p for p in left if p.startswith("docs/chapters/")]:
        name = Path(path).name
        limit = next((n for begin, n in CHAPTERS.items() if name.startswith(begin)), CHAPTER)
        group(path, [path], sources, limit)

    # a command: a file that adds one, with all files that no other command reaches
    def reached(path, seen):
        for name in sources[path].includes:
            if name in left and name not in seen:
                seen.add(name)
                reached(name, seen)
        return seen

    commands = [p for p in left if p.startswith("docs/commands/")
                and re.search(r"add_command\(|int main\(", "\n".join(sources[p].lines))]
    used = {p: reached(p, set()) - set(commands) for p in commands}
    shared = set(left) - set(commands) - {p for p in left if p.startswith("docs/chapters/")}
    for path in commands:
        own = {p for p in used[path] if not p.startswith("docs/chapters/")
               and not any(p in used[other] for other in commands if other != path)}
        pages = [p for p in own if p.endswith(".html")]
        shared -= own
        group(path, [path, *sorted(own - set(pages))], sources, COMMAND)
        for page in pages:
            group(page, [page], sources, PAGE)
    group("shared and the rest", sorted(shared), sources, None)
    code = sum(s.code for s in sources.values() if not s.path.endswith(".html"))
    row("everything but pages", code, sum(len(s.lines) for s in sources.values()),
        max(s.columns for s in sources.values()), EVERYTHING)
    check(code <= EVERYTHING, f"everything: {code} lines of code, {EVERYTHING} at most")
    engine = sum(sources[name].code for name in ENGINE)
    for name, now in (("engine", engine), ("engine in all", lines), ("everything", code)):
        if now > GOALS[name]:
            print(f"{name}: {now - GOALS[name]} over its goal of {GOALS[name]}")

    for source in sources.values():
        if source.path.endswith((".cu", ".cuh", ".hpp")):
            check_style(source)
    for what in broken:
        print("broken: " + what, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
