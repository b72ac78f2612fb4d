#!/usr/bin/python3
"""Opens an HTML page in headless Chromium and says what is wrong with it.

    tests/browser.py check PAGE [--script NAME] [--screenshots FOLDER]

PAGE, a file, is opened 390 and 1600 pixels wide, light and dark. Wrong is: a message on the console
(so is whatever asks the network, which is blocked), a page wider than the window, text that is cut
off, text over other text. A script, a function at the end of this file, then uses the page and
raises AssertionError where it does not do what it should. Every complaint is a line on stdout; exit
status 0: none, 1: some, 77: there is no Chromium here.

Needs Debian's chromium, chromium-driver and python3-selenium; `make browser` installs them.
"""
import argparse
import json
import os
import pathlib
import shutil
import sys

SETTINGS = [(width, scheme) for width in (390, 1600) for scheme in ("light", "dark")]
HEIGHT = {390: 844, 1600: 900}

# Complaints about text that can't be read: where it is cut off, sticks out of a box with a border,
# or lies over other text. Text is looked at line by line, as the browser has broken it; only what
# can be seen counts.
UNREADABLE = r"""
const wrong = [], lines = [];
const quote = node => JSON.stringify(node.textContent.trim().slice(0, 40));
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walker.nextNode());) {
    const of = node.parentElement;
    if (!node.textContent.trim() || of.closest('script, style, select, textarea')) continue;
    if (!of.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) {
        if (r.width < 1 || r.height < 1) continue;
        let box = {left: r.left, right: r.right, top: r.top, bottom: r.bottom}, cut = false;
        for (let e = of; e && e !== document.body; e = e.parentElement) {
            const style = getComputedStyle(e), edge = e.getBoundingClientRect();
            if (style.clipPath !== 'none' || style.clip !== 'auto') { box = null; break; }
            if (style.display === 'inline' || e.ownerSVGElement) continue;
            for (const [axis, low, high] of [['X', 'left', 'right'], ['Y', 'top', 'bottom']]) {
                const how = style['overflow' + axis];
                if (how === 'visible') continue;
                const out = box[low] < edge[low] - 1.5 || box[high] > edge[high] + 1.5;
                if (out && (how === 'hidden' || how === 'clip')) cut = true;
                box[low] = Math.max(box[low], edge[low]);
                box[high] = Math.min(box[high], edge[high]);
            }
            if (style.position === 'fixed') break;
        }
        if (!box || box.left >= box.right || box.top >= box.bottom) continue;
        for (let e = of; e && e !== document.body && !e.ownerSVGElement; e = e.parentElement) {
            const style = getComputedStyle(e), edge = e.getBoundingClientRect();
            if (style.display === 'inline' || !parseFloat(style.borderTopWidth)) continue;
            if (box.right > edge.right + 0.5 || box.left < edge.left - 0.5 ||
                box.bottom > edge.bottom + 2)
                wrong.push('sticks out: ' + quote(node));
            break;
        }
        if (cut) wrong.push('cut off: ' + quote(node));
        const fixed = !!of.closest('[data-floats]');
        // a line's box is higher than its letters
        const slack = (box.bottom - box.top) * 0.2;
        lines.push({node, fixed, ...box, top: box.top + slack, bottom: box.bottom - slack});
    }
}
lines.sort((a, b) => a.top - b.top);
for (let i = 0; i < lines.length; i++)
    for (let j = i + 1; j < lines.length && lines[j].top < lines[i].bottom; j++) {
        const a = lines[i], b = lines[j];
        if (a.node === b.node || a.fixed !== b.fixed) continue;  // what floats is over the rest
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2)
            wrong.push(quote(a.node) + ' and ' + quote(b.node) + ' overlap');
    }
return [...new Set(wrong)].slice(0, 20);
"""


class Page:
    """A page in headless Chromium. In a script: `page.js(code, *arguments)`, `page.keys(*keys)`,
    `page.find(css)`, `page.record` (the JSON of the element #record, if there is one)."""

    def __init__(self):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for flag in ("headless=new", "hide-scrollbars", "disable-gpu", "force-color-profile=srgb",
                     "disable-dev-shm-usage", "no-first-run", "disable-background-networking"):
            options.add_argument("--" + flag)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # root has none to use
        options.binary_location = shutil.which("chromium")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options,
                                       service=Service(shutil.which("chromedriver")))
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.setBlockedURLs",
                                    {"urls": ["http://*", "https://*", "ws://*", "wss://*"]})

    def open(self, file, width=1600, scheme="light"):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": HEIGHT.get(width, 900), "deviceScaleFactor": 1,
            "mobile": False})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"}]})
        self.width, self.scheme = width, scheme
        self.driver.get("about:blank")
        self.console()
        self.driver.get(pathlib.Path(file).resolve().as_uri())
        self.record = self.js("const r = document.getElementById('record');"
                              "return r && r.textContent")
        self.record = json.loads(self.record) if self.record else None

    def close(self):
        self.driver.quit()

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def console(self):
        """What came on the console since the last call."""
        return [f"console: {m['message']}" for m in self.driver.get_log("browser")]

    def complaints(self):
        """What is wrong with the page as it looks now."""
        wide = self.js("return document.documentElement.scrollWidth")
        wrong = [f"{wide} pixels wide"] if wide > self.width else []
        return self.console() + wrong + self.js(UNREADABLE)

    def screenshot(self, file, whole=True):
        import base64

        size = self.js("return [document.documentElement.scrollWidth,"
                       "document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {
            "captureBeyondViewport": whole, **({"clip": clip} if whole else {})})
        pathlib.Path(file).write_bytes(base64.b64decode(shot["data"]))


def missing():
    """What is not installed, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "python3-selenium"
    return next((p for p in ("chromium", "chromedriver") if not shutil.which(p)), None)


def check(file, script=None, screenshots=None):
    """The complaints about a page in all settings, each with its setting in front."""
    wrong = []
    page = Page()
    try:
        for width, scheme in SETTINGS:
            page.open(file, width, scheme)
            found = page.complaints()
            if script:
                try:
                    script(page)
                except AssertionError as error:
                    found.append(str(error))
                found += page.complaints()
            if screenshots:
                name = f"{pathlib.Path(file).stem}-{width}-{scheme}"
                page.screenshot(pathlib.Path(screenshots) / f"{name}.png")
            wrong += [f"{file}, {width} pixels, {scheme}: {what}" for what in dict.fromkeys(found)]
    finally:
        page.close()
    return wrong


def main():
    parser = argparse.ArgumentParser(description="what is wrong with a page in Chromium")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("missing", help="what is not installed; exit status 77 if something is")
    one = commands.add_parser("check")
    one.add_argument("page")
    one.add_argument("--script", choices=sorted(SCRIPTS), help="what to do with the page")
    one.add_argument("--screenshots", metavar="FOLDER", help="put pictures there")
    args = parser.parse_args()
    if missing():
        print(f"no {missing()} here; make browser installs it where Debian has it")
    if missing() or args.command == "missing":
        return 77 if missing() else 0
    if not os.path.isfile(args.page):
        parser.error(f"{args.page}: no such file")
    if args.screenshots:
        os.makedirs(args.screenshots, exist_ok=True)
    wrong = check(args.page, SCRIPTS.get(args.script), args.screenshots)
    print("\n".join(wrong) if wrong else f"{args.page}: nothing wrong in {len(SETTINGS)} settings")
    return 1 if wrong else 0


# What explain's page shows of a step.
SHOWN = """
const number = text => +text.replaceAll(',', '');
const count = css => document.querySelectorAll(css).length;
return {
    where: document.getElementById('where').textContent,
    slider: +document.getElementById('slider').value,
    counts: Object.fromEntries([...document.querySelectorAll('[data-count]')].map(
        e => [e.dataset.count, number(e.textContent)])),
    blocks: {used: count('.block.used'), cached: count('.block.cached'),
             taken: count('.tag.taken') + count('.tag.copy'), hit: count('.tag.hit'),
             freed: count('.tag.freed'), copied: count('.tag.copied')},
    drawn: [...document.querySelectorAll('#candidates tr.chosen')].map(e => +e.dataset.id),
    rows: count('#candidates tbody tr'),
    tables: Object.fromEntries([...document.querySelectorAll('[data-sequence]')].map(
        e => [e.dataset.sequence, [...e.querySelectorAll('.table b')].map(b => +b.textContent)])),
};
"""


def explain(page):
    """explain's page shows of each step what its record says, whichever way one goes there."""
    from selenium.webdriver import Keys

    record = page.record
    steps, last = record["steps"], len(record["steps"])
    tables = [[[] for _ in record["sequences"]]]  # after each step
    for step in steps:
        tables.append(list(tables[-1]))
        for i, table in step["tables"].items():
            tables[-1][int(i)] = table

    def expect(k):
        shown = page.js(SHOWN)
        step = steps[k - 1] if k else None
        assert shown["where"] == f"step {k} of {last}", f"{shown['where']} instead of step {k}"
        assert shown["slider"] == k, f"step {k}: the slider is at {shown['slider']}"
        counts = step["counts"] if k else dict(used=0, shared=0, cached=0, free=record["blocks"])
        assert shown["counts"] == counts, f"step {k}: {shown['counts']}, recorded {counts}"
        blocks = shown["blocks"]
        for state in ("used", "cached"):
            assert blocks[state] == counts[state], f"step {k}: {blocks[state]} blocks {state}"
        for i, table in shown["tables"].items():
            assert table == tables[k][int(i)], f"step {k}: table {table} of sequence {i}"
        if not k:
            return
        marks = {"hit": set(step["found"]), "freed": set(step["freed"]),
                 "taken": set(step["taken"]), "copied": {pair[0] for pair in step["copied"]}}
        for mark, of in marks.items():
            assert blocks[mark] == len(of), f"step {k}: {blocks[mark]} marked {mark}, {len(of)} are"
        if step["draws"]:
            ids = [d["id"] for d in step["draws"]]
            assert len(shown["drawn"]) == 1 and shown["drawn"][0] in ids, \
                f"step {k}: drew {ids}, the page shows {shown['drawn']}"
            assert shown["rows"] >= 10, f"step {k}: {shown['rows']} candidates"

    def readable():
        wrong = page.complaints()
        assert not wrong, "; ".join(wrong)

    expect(min(1, last))
    page.keys(Keys.HOME)
    expect(0)
    every = (page.width, page.scheme) == (1600, "light")
    for k in range(1, (last if every else min(3, last)) + 1):
        page.keys(Keys.ARROW_RIGHT)
        expect(k)
    page.keys(Keys.END, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    expect(last - 1)
    page.find("#next").click()
    expect(last)
    page.find("#slider").send_keys(Keys.ARROW_LEFT)
    expect(last - 1)
    for k in {k * last // 7 for k in range(1, 8)}:
        page.js("const s = document.getElementById('slider'); s.value = arguments[0];"
                "s.dispatchEvent(new Event('input'))", k)
        expect(k)
        readable()

    # a click in the middle of the timeline chooses the column that is there
    from selenium.webdriver import ActionChains

    page.keys(Keys.HOME)
    page.js("window.scrollTo(0, 0)")
    ActionChains(page.driver).click(page.find("#scroll")).perform()
    picked = page.js(SHOWN)["slider"]
    assert picked > 0, "a click into the timeline does nothing"
    expect(picked)
    cursor, timeline = page.find("#cursor").rect, page.find("#scroll").rect
    middle = timeline["x"] + timeline["width"] / 2
    assert cursor["x"] - 2 <= middle <= cursor["x"] + cursor["width"] + 2 or \
        timeline["width"] > 80 * last, f"a click at {middle} chose the column at {cursor['x']}"

    # what a prompt says is shown as text
    assert page.js("return document.images.length") == 0, "a prompt became an image"
    page.keys(Keys.END)
    shown = page.js("return [...document.querySelectorAll('.text')].map(e => e.textContent)")
    whole = page.js("return [...document.querySelectorAll('[data-sequence]')].map("
                    "e => textsOf(idsOf(+e.dataset.sequence)).join(''))")
    assert shown and shown == whole, f"texts {shown} instead of {whole}"

    # candidates after the first cut are all that the softmax leaves
    if page.js("return document.querySelectorAll('#stages button').length"):
        page.js("document.querySelector('#stages button').click()")
        assert page.js("return document.querySelectorAll('tr.cut').length") == 0, "cut before cuts"

    # a block tells what it holds; the other theme
    page.js("document.querySelector('.block').click()")
    assert "Block" in page.find("#detail").text
    readable()
    before = page.js("return getComputedStyle(document.body).backgroundColor")
    page.find("#theme").click()
    assert page.js("return getComputedStyle(document.body).backgroundColor") != before, "one theme"
    readable()


# Scripts by name: functions of a Page that is open.
SCRIPTS = {"explain": explain}

if __name__ == "__main__":
    sys.exit(main())
