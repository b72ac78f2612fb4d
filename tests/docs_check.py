#!/usr/bin/env python3
"""Runs the examples of the documentation and compares what they print.

    python3 tests/docs_check.py [--update] [--limit SECONDS] [FILE.md ...]

(make docs-check [UPDATE=1] [FILES="docs/guide.md ..."] does it for you.) Without files: README.md,
docs/*.md and docs/**/README.md. An example is a fenced block with the info string `console`:

    ```console
    $ ./nanocu tokenize models/smollm2 -p "Hello world"
    [19556,905]
    ```

A line that begins with "$ " is a command for bash; lines below it that begin with "> " continue it,
and so does the line below a backslash at its end. What follows, up to the next command, is what it
prints, stdout and stderr together. "..." inside a line stands for any text there, a line that is only
"..." for any number of lines. Commands run in the repository's root; those of one block share one
shell, so variables stay, and one empty folder for files, $TMP. A command that prints nothing must
end with status 0.

--update writes what came into the files; lines with "..." that still fit are kept.
Exit status 1: an example printed something else (FILE:LINE and what differs), or could not be read.
"""
import argparse
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANY = "..."
MOST_LINES = 5000  # of one command's output


class Problem(Exception):
    pass


class Example:
    """A command: the lines of the file that it and its output are in, from 0, end exclusive."""

    def __init__(self, line, command, output_begin):
        self.line, self.command, self.begin, self.end = line, command, output_begin, output_begin


def read_blocks(path, lines):
    """The console blocks of a Markdown file: (indent, [Example])."""
    blocks, fence, examples, indent = [], None, None, ""
    for i, line in enumerate(lines):
        if fence is None:
            opening = re.match(r"( *)(`{3,}|~{3,})\s*([\w-]*)", line)
            if opening:
                indent, fence, begin = opening[1], opening[2], i
                examples = [] if opening[3] == "console" else None
        elif re.fullmatch(r" *%s+ *" % re.escape(fence[0]), line) and line.strip() >= fence:
            if examples is not None:
                if not examples:
                    raise Problem(f"{path}:{begin + 1}: a console block without a command")
                blocks.append((indent, examples))
            fence = None
        elif examples is not None:
            text = line.removeprefix(indent)
            last = examples[-1] if examples else None
            if text.startswith("$ "):
                examples.append(Example(i, text[2:], i + 1))
            elif last is None:
                raise Problem(f"{path}:{i + 1}: output before the first command ($ ...)")
            elif last.begin == i and (text.startswith("> ") or last.command.endswith("\\")):
                last.command += "\n" + text.removeprefix("> ")
                last.begin = last.end = i + 1
            else:
                last.end = i + 1
    if fence is not None:
        raise Problem(f"{path}:{begin + 1}: this block has no end")
    return blocks


def run_block(commands, limit):
    """Runs commands in one shell; (output lines, exit status) of each. Status None: over the limit,
    or the shell had ended before."""
    with tempfile.TemporaryDirectory() as folder:
        script, results = [], []
        os.mkdir(f"{folder}/files")
        for i, command in enumerate(commands):
            Path(f"{folder}/{i}.sh").write_text(command + "\n")
            script.append(f". {folder}/{i}.sh >{folder}/{i}.out 2>&1 </dev/null; echo $? >&9")
        environment = {k: v for k, v in os.environ.items()
                       if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "UPDATE", "FILES")}
        environment.update(TMP=f"{folder}/files", LC_ALL="C.UTF-8", COLUMNS="80")
        told, tell = os.pipe()
        shell = subprocess.Popen(["bash", "-c", f"exec 9>&{tell} {tell}>&-\n" + "\n".join(script)],
                                 cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                 pass_fds=(tell,), start_new_session=True)
        os.close(tell)
        try:
            for i in range(len(commands)):
                status, end = b"", time.monotonic() + limit
                while not status.endswith(b"\n"):  # a byte at a time: the next one's may be there
                    ready = select.select([told], [], [], max(0, end - time.monotonic()))[0]
                    more = os.read(told, 1) if ready else b""
                    if not more:
                        status = b""
                        break
                    status += more
                path = Path(f"{folder}/{i}.out")
                text = path.read_text(errors="replace") if path.exists() else ""
                # the folder has another name each time
                lines = text.replace(f"{folder}/files", "$TMP").split("\n")
                results.append((trimmed(lines[:MOST_LINES]), int(status) if status else None))
                if not status:
                    break
        finally:
            try:
                os.killpg(shell.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            shell.wait()
            os.close(told)
    return results + [([], None)] * (len(commands) - len(results))


def trimmed(lines):
    """Without white space at the ends of lines, and without empty lines at the end."""
    lines = [line.rstrip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def matches(pattern, line):
    return re.fullmatch(".*".join(map(re.escape, pattern.split(ANY))), line) is not None


def renumbered(pattern, line):
    """A pattern with "..." that would fit but for its numbers, with those of line; else None."""
    if ANY not in pattern:
        return None
    parts = re.split(r"(\.\.\.|\d+(?:\.\d+)*)", pattern)
    regex = "".join(".*?" if p == ANY else r"(\d+(?:\.\d+)*)" if i % 2 else re.escape(p)
                    for i, p in enumerate(parts))
    found = re.fullmatch(regex, line)
    if not found:
        return None
    numbers = iter(found.groups())
    return "".join(next(numbers) if i % 2 and p != ANY else p for i, p in enumerate(parts))


def align(expected, got):
    """Pairs (pattern or None, line or None), in order, that fit as well as they can: a pattern that is
    only "..." takes any number of lines. All fit if no pair but those of "..." has a None."""
    n, m = len(expected), len(got)
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    step = [["end"] * (m + 1) for _ in range(n + 1)]
    for i in range(n, -1, -1):
        for j in range(m, -1, -1):
            options = []
            if i < n and expected[i] == ANY:
                options.append((best[i + 1][j], "skip"))
                if j < m:
                    options.append((best[i][j + 1] + 0.01, "take"))
            elif i < n:
                if j < m and matches(expected[i], got[j]):
                    options.append((best[i + 1][j + 1] + 1, "both"))
                elif j < m and renumbered(expected[i], got[j]):
                    options.append((best[i + 1][j + 1] + 0.001, "differ"))
                options.append((best[i + 1][j], "less"))
            if j < m:
                options.append((best[i][j + 1], "more"))
            if options:
                best[i][j], step[i][j] = max(options, key=lambda option: option[0])
    pairs, i, j = [], 0, 0
    while step[i][j] != "end":
        kind = step[i][j]
        pairs.append((kind, expected[i] if kind not in ("more",) else None,
                      got[j] if kind not in ("less", "skip") else None))
        i += kind in ("both", "differ", "less", "skip")
        j += kind in ("both", "differ", "more", "take")
    return pairs


def difference(pairs):
    """What differs, with a line around it."""
    shown = []
    for kind, pattern, line in pairs:
        if kind in ("less", "differ"):
            shown.append("  - " + pattern)
        if kind in ("more", "differ"):
            shown.append("  + " + line)
        if kind in ("both", "skip") or (kind == "take" and shown[-1:] != ["    " + ANY]):
            shown.append("    " + pattern)
    marks = [i for i, text in enumerate(shown) if text[2] in "+-"]
    near = [text for i, text in enumerate(shown) if any(abs(i - k) <= 2 for k in marks)]
    if len(near) > 40:
        near[40:] = [f"    ({len(near) - 40} more lines)"]
    return "\n".join(near)


def updated(pairs):
    out = []
    for kind, pattern, line in pairs:
        if kind == "both" or kind == "skip":
            out.append(pattern)
        elif kind == "differ":
            out.append(renumbered(pattern, line))
        elif kind == "more":
            out.append(line)
    return out


def check(path, update, limit):
    """Checks one file; returns how many examples it has and how many did not fit."""
    name = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else path
    text = path.read_text()
    lines, count, bad, edits = text.split("\n"), 0, 0, []
    for indent, examples in read_blocks(name, lines):
        results = run_block([e.command for e in examples], limit)
        for example, (got, status) in zip(examples, results):
            count += 1
            expected = trimmed(x.removeprefix(indent) for x in lines[example.begin:example.end])
            pairs = align(expected, got)
            silent_failure = status and not got
            if status is not None and not silent_failure and \
                    all(kind in ("both", "take", "skip") for kind, _, _ in pairs):
                continue
            if update and status is not None and not silent_failure:
                new = updated(pairs)
                if any(x.startswith(("$ ", "```", "~~~")) for x in new):
                    raise Problem(f"{name}:{example.line + 1}: prints a line that would end its "
                                  "block; print something else")
                while example.end > example.begin and not lines[example.end - 1].strip():
                    example.end -= 1  # empty lines before the next command stay
                edits.append((example.begin, example.end, [indent + x if x else x for x in new]))
                print(f"{name}:{example.line + 1}: updated")
                continue
            bad += 1
            print(f"{name}:{example.line + 1}: $ {example.command}")
            if status is None:
                print(f"  did not come to its end within {limit:g} s, or the shell ended before it")
            elif silent_failure:
                print(f"  printed nothing and ended with status {status}")
            if shown := difference(pairs):
                print(shown)
    for begin, end, new in reversed(edits):
        lines[begin:end] = new
    if edits:
        path.write_text("\n".join(lines))
    return count, bad


def main():
    parser = argparse.ArgumentParser(description="Runs the examples of the documentation.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.md")
    parser.add_argument("--update", action="store_true", help="write what came into the files")
    parser.add_argument("--limit", type=float, default=120, help="seconds a command may take")
    options = parser.parse_args()
    files = [f.resolve() for f in options.files]
    if not files:
        files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
                 *sorted((ROOT / "docs").glob("*/**/README.md"))]
    count = bad = 0
    try:
        for path in files:
            checked, wrong = check(path, options.update, options.limit)
            count, bad = count + checked, bad + wrong
    except (Problem, OSError, UnicodeDecodeError) as e:
        print(f"docs_check: {e}", file=sys.stderr)
        return 1
    print(f"{count} examples, {bad} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
