#!/usr/bin/env python3
"""Renders docs/guide.md as one HTML page that needs nothing else: pictures are in it.

    python3 docs/guide/page.py docs/guide.md build/guide.html

Markdown is read by cmark-gfm, as on GitHub. Links to other files are made to work from build/.
"""
import html
import os
import re
import subprocess
import sys
from pathlib import Path

CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --muted: #596270; --page: #fdfdfc; --code: #f1f3f5;
        --line: #d5dae0; --link: #1f5fc4; --ask: #f3f0fb; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --muted: #a3adba; --page: #15181d; --code: #20252c; --line: #3a414b;
          --link: #8db8ff; --ask: #221f30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 17px/1.6 system-ui, -apple-system,
       "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
main { max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 5rem; }
h1 { line-height: 1.2; font-size: 2rem; }
h2 { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); line-height: 1.25; }
a { color: var(--link); }
code { font: .88em/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--code);
       padding: .1em .3em; border-radius: 4px; }
pre { background: var(--code); border-radius: 8px; padding: .9rem 1rem; overflow-x: auto; }
pre code { padding: 0; background: none; }
.prompt { font-weight: 600; }
figure { margin: 1.8rem 0; text-align: center; }
figure svg { width: 100%; max-width: 38rem; height: auto; border: 1px solid var(--line); border-radius: 8px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94em; }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .8rem .35rem 0; text-align: left;
         vertical-align: top; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--muted); }
details { background: var(--ask); border-radius: 8px; padding: .6rem 1rem; }
summary { cursor: pointer; font-weight: 600; }
nav ol { columns: 2 15rem; padding-left: 2rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print { pre { white-space: pre-wrap; } h2 { break-before: page; } }
"""


def slug(title):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main():
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        body = subprocess.run(["cmark-gfm", "--unsafe", "-e", "table", "--to", "html", str(source)],
                              check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    except FileNotFoundError:
        sys.exit("page.py: cmark-gfm is missing; make packages installs it")

    def picture(match):
        svg = (source.parent / html.unescape(match[1])).read_text(encoding="utf-8")
        return f"<figure>\n{svg.strip()}\n</figure>"

    def heading(match):
        title = re.sub(r"<[^>]+>", "", match[2])
        anchor = slug(html.unescape(title))
        if match[1] == "2":
            chapters.append(f'<li value="{len(chapters)}"><a href="#{anchor}">'
                            f'{re.sub(r"^[0-9]+[.] ", "", title)}</a></li>')
        return f'<h{match[1]} id="{anchor}">{match[2]}</h{match[1]}>'

    def link(match):
        if re.match(r"[a-z]+:|#", match[1]):
            return match[0]
        there = os.path.relpath(source.parent.resolve() / match[1], target.parent.resolve())
        return f'href="{there}"'

    chapters = []
    body = re.sub(r'<p><img src="([^"]+\.svg)"[^>]*/></p>', picture, body)
    body = re.sub(r'href="([^"]+)"', link, body)
    body = re.sub(r"<h([23])>(.*?)</h\1>", heading, body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'(<pre(?: lang="[^"]*")?)>', r'\1 tabindex="0">', body)  # scrolled by keys, too
    body = re.sub(r"(?m)^((?:<pre[^>]*><code[^>]*>)?)(\$ .*)$", r'\1<span class="prompt">\2</span>', body)
    if "<img" in body:
        sys.exit(f"{source}: a picture that is not an SVG in a line of its own")
    title = html.unescape(re.sub(r"<[^>]+>", "", re.search(r"<h1>(.*?)</h1>", body)[1]))
    contents = "<nav><ol>" + "".join(chapters) + "</ol></nav>"
    body = body.replace("</h1>", "</h1>\n" + contents, 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
                      f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
                      '<link rel="icon" href="data:,">\n'
                      f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
                      encoding="utf-8")


if __name__ == "__main__":
    main()
