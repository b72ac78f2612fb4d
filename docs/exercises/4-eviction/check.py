"""Cache(count, reuse, fifo) against a plain model of both policies, on random and on chosen workloads."""
import random

from checking import *

BLOCK = 16


class Reference:
    """What cache.hpp does, with the free block to take picked by looking at all of them."""

    def __init__(self, count, fifo):
        self.fifo, self.clock, self.chains = fifo, count, 0
        # when is what decides: of the last release, or, first in, first out, of the last taking
        self.blocks = [dict(refs=0, key=None, chain=0, when=i) for i in range(count)]
        self.known, self.tables = {}, {}

    def free(self):
        return sum(b["refs"] == 0 for b in self.blocks)

    def tick(self, block, is_taking):
        if is_taking == self.fifo:
            self.blocks[block]["when"] = self.clock
            self.clock += 1

    def start(self, name, ids):
        chain, table = 0, []
        for end in range(BLOCK, len(ids), BLOCK):
            block = self.known.get((chain, *ids[end - BLOCK:end]))
            if block is None:
                break
            self.blocks[block]["refs"] += 1
            table.append(block)
            chain = self.blocks[block]["chain"]
        found = len(table)
        need = -(-len(ids) // BLOCK) - found
        self.tables[name] = table
        if need > self.free():
            self.end(name)
            return -1
        for _ in range(need):
            block = min((b["when"], i) for i, b in enumerate(self.blocks) if b["refs"] == 0)[1]
            self.known.pop(self.blocks[block]["key"], None)
            self.blocks[block].update(refs=1, key=None)
            self.tick(block, True)
            table.append(block)
        for i in range(found, len(ids) // BLOCK):
            key = (chain, *ids[i * BLOCK:(i + 1) * BLOCK])
            if key not in self.known:
                self.known[key] = table[i]
                self.chains += 1
                self.blocks[table[i]].update(key=key, chain=self.chains)
            chain = self.blocks[table[i]]["chain"] = self.blocks[self.known[key]]["chain"]
        return found * BLOCK

    def end(self, name):
        table = self.tables[name]
        while table:
            block = table.pop()
            self.blocks[block]["refs"] -= 1
            if self.blocks[block]["refs"] == 0:
                self.tick(block, False)


def play(blocks, fifo, events):
    """Hits of the real cache and of the model, as (tokens found, blocks free) for each event."""
    text = f"{blocks} {int(fifo)}\n"
    reference, wanted = Reference(blocks, fifo), []
    for sign, name, *ids in events:
        text += " ".join(map(str, [sign, name, *ids])) + "\n"
        found = reference.start(name, ids) if sign == "+" else reference.end(name) or 0
        wanted.append([found, reference.free()])
    result = run(program="build/exercises/4-eviction", text=text)
    if result.returncode:
        need("Cache takes (int count, bool reuse, bool fifo), and plays a workload", False,
             "exit status 0", result.stdout + result.stderr)
    return [list(map(int, line.split())) for line in result.stdout.splitlines()], wanted


def compare(what, blocks, events):
    for fifo in (False, True):
        came, wanted = play(blocks, fifo, events)
        wrong = next((i for i, (a, b) in enumerate(zip(came, wanted)) if a != b), None)
        expect(f"{what}, {'FIFO' if fifo else 'LRU'}: hits and free blocks after {len(events)} events",
               came == wanted,
               wanted if wrong is None else f"{wanted[wrong]} (tokens found, free) at event {wrong}",
               came if wrong is None else came[wrong])


def beginning(name, tokens):
    return [hash_of(name) * 1000 + i for i in range(tokens)]


def hash_of(name):
    return sum((i + 1) * ord(c) for i, c in enumerate(str(name)))


def one_by_one(prompts):
    return [event for p in prompts for event in (("+", "s", *p), ("-", "s"))]


make("build/exercises/4-eviction")

# Three one-block sequences, a used again, then room for a fourth: what has to go?
a, b, c, d = ([i] * BLOCK + [0] for i in (1, 2, 3, 4))
events = one_by_one([a[:17], b[:17], c[:17], a[:17], d[:17], a[:17]])
compare("used again, then a newcomer", 7, events)

draw = random.Random(1)
for round in range(6):
    running, events = [], []
    for i in range(400):
        if running and draw.random() < (0.5 if len(running) < 5 else 0.9):
            events.append(("-", running.pop(draw.randrange(len(running)))))
        else:
            ids = [draw.randrange(2 + round)] * BLOCK * draw.randrange(4)
            ids += [draw.randrange(3) for _ in range(draw.randrange(1, 3)) for _ in range(BLOCK)]
            events.append(("+", f"s{i}", *ids, 7))
            running.append(f"s{i}")
    events += [("-", name) for name in running]
    compare(f"random workload {round}", 12 + 6 * round, events)

# A system prompt of 8 blocks, used by every second of 200 requests; what else is asked comes once.
prompts = [(beginning("system", 128) if i % 2 else []) + beginning(f"question {i}", 192)
           for i in range(200)]
rates = []
print("200 questions of 192 tokens, every second behind the same 128; memory for 1,024:")
for fifo in (False, True):
    came, wanted = play(64, fifo, one_by_one(prompts))
    rates.append(sum(found for found, _ in came) / sum(map(len, prompts)))
    print(f"        {'FIFO' if fifo else 'LRU '}: {100 * rates[-1]:.1f}% of the tokens are found")
    equal("as many as in the model", sum(found for found, _ in wanted), sum(found for found, _ in came))
expect("LRU keeps what is used all the time, FIFO does not", rates[0] > rates[1],
       "a higher rate of hits with LRU", rates)
done()
