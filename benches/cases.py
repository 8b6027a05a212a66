"""The benchmarks themselves; each fills one table."""
import os
import subprocess
from contextlib import ExitStack, closing
from dataclasses import dataclass

import guests
import images
import processes
import visits
from links import CappedLink, Loopback
from sides import PagewireCopy, PagewireNetwork, RsyncCopy, RsyncNetwork, SocatNetwork, ZstdPipe
from tables import Table, percent, plain, size
from watch import Watch

INPLACE = ("-I", "--inplace", "--no-whole-file")
ASIDE = ("-I", "--no-whole-file")
ZSTD = ("-z", "--compress-choice=zstd", *INPLACE)
REAL = ("redis", "python")


@dataclass
class Pair:
    """The samples of both sides, run by run."""

    mine: list
    other: list

    def both(self, what):
        """Return one measure of all runs, of both sides."""
        return [getattr(s, what) for s in self.mine], [getattr(s, what) for s in self.other]

    @property
    def walls(self):
        """The wall times of both sides."""
        return self.both("wall")

    @property
    def wires(self):
        """The wire bytes that both sides report."""
        return self.both("wire")

    @property
    def counters(self):
        """The wire bytes that the interfaces counted for both sides."""
        return self.both("counted")


def compare(bench, table, mine, other, source, prepare):
    """Run both sides in turn, one warm-up and then the counted runs, and check each destination."""
    sides = [side for side, wanted in ((mine, bench.runs_pagewire), (other, bench.runs_alternative)) if wanted]
    samples = {mine: [], other: []}
    with ExitStack() as stack:
        for side in sides:
            stack.callback(side.stop)
            side.start()
        for turn in range(bench.runs + 1):
            for side in sides:
                prepare(side.destination)
                sample = side.run(source)
                images.verify(source, side.destination, f"{table.name}, {side.name}, run {turn}")
                if turn:
                    samples[side].append(sample)
                bench.progress(f"{table.name} {source.name} {side.name} {'run %d' % turn if turn else 'warm-up'}: {sample.wall:.3f} s")
    for side in sides:
        left = sorted(entry.name for entry in side.destination.parent.iterdir() if entry != side.destination)
        if left:
            table.notes.append(f"{side.name} left beside the image: {', '.join(left)}")
        side.destination.unlink()
        table.commands += side.commands
    describe(table, source, samples[mine])
    return Pair(samples[mine], samples[other])


def describe(table, source, samples):
    """Note what pagewire's last report says it did."""
    if samples:
        report = samples[-1].report
        table.notes.append(f"pagewire, {source.name}, last run: pages {report.get('pages')}, wants {report.get('wants')}, decisions {report.get('decisions')}")


def unchanged(bench):
    """1 GiB of random pages onto an equal destination."""
    source = bench.random_image()
    total = os.path.getsize(source)
    table = Table("unchanged", f"{size(total)} of random pages onto an equal destination.", ("pagewire", "rsync --inplace"))
    link = Loopback()
    keep = lambda destination: images.restore_in_place(source, destination)
    over_tcp = compare(bench, table, PagewireNetwork(bench, link, inplace=True), RsyncNetwork(bench, link, INPLACE), source, keep)
    local = compare(bench, table, PagewireCopy(bench, inplace=True), RsyncCopy(bench, INPLACE), source, keep)
    table.faster("wall, loopback TCP", *over_tcp.walls, bar=2.8)
    table.costs("wire, loopback TCP", *over_tcp.wires, write=size)
    table.within("wire of the image", [s.wire / total for s in over_tcp.mine], bar=0.0001)
    table.faster("wall, local copy", *local.walls)
    return table


def sparse_change(bench):
    """1 page in 1,000 of 1 GiB changed at random places."""
    base = bench.random_image()
    source = bench.work / "changed.img"
    changed = images.write_changed(base, source, 1000) * images.PAGE
    total = os.path.getsize(source)
    table = Table("sparse-change", f"{size(total)} of random pages, {changed // images.PAGE} of them changed at random places.", ("pagewire", "rsync --inplace"))
    link = Loopback()
    restore = lambda destination: images.restore_in_place(base, destination)
    pair = compare(bench, table, PagewireNetwork(bench, link, inplace=True), RsyncNetwork(bench, link, INPLACE), source, restore)
    source.unlink()
    over = [s.wire - changed for s in pair.mine]
    table.faster("wall, loopback TCP", *pair.walls)
    table.costs("wire", *pair.wires, write=size)
    table.within("wire beside the changed pages, of the image", [o / total for o in over], bar=0.01)
    table.within("the same, of the changed bytes", [o / changed for o in over])
    for name, samples in (("pagewire", pair.mine), ("rsync", pair.other)):
        table.notes.append(f"{name}: wire beside the changed pages: {plain([s.wire - changed for s in samples], size)}")
    return table


def warm(bench):
    """Real images t1 to t2: the destination holds the earlier moment."""
    table = Table("warm", "Real images of two moments; the destination holds t1, the source is t2; loopback TCP.", ("pagewire", "rsync"))
    link = Loopback()
    for which in REAL:
        base, source = bench.real_images(which)
        restore = lambda destination, base=base: images.copy_sparse(base, destination)
        for inplace, bar in ((True, 5), (False, 3)):
            how = f"{which}, {'--inplace' if inplace else 'aside'}"
            rsync = RsyncNetwork(bench, link, INPLACE if inplace else ASIDE)
            pair = compare(bench, table, PagewireNetwork(bench, link, inplace=inplace), rsync, source, restore)
            table.faster(f"{how}: wall", *pair.walls, bar=bar)
            table.costs(f"{how}: wire", *pair.wires, write=size)
    return table


def note_rate(bench, table, link, source):
    """Measure with a plain socat what the capped link carries and note it."""
    with closing(SocatNetworkOnce(bench, link)) as socat:
        rate = socat.rate(source)
    judge_rate(table, link, [rate])
    table.commands += link.setup


def judge_rate(table, link, rates):
    """Note the payload rate of the link, and whether it is an honest one."""
    low, high = link.payload
    honest = all(low <= rate <= high for rate in rates)
    verdict = "honest" if honest else f"**NOT what an honest {link.rate} carries ({low / 1e6:.0f} – {high / 1e6:.1f} MB/s)**"
    table.notes.append(f"{link.rate} by tbf: plain socat moved {plain(rates, lambda r: f'{r / 1e6:.1f} MB/s')} of payload: {verdict}")


class SocatNetworkOnce(SocatNetwork):
    """One plain copy, to learn the rate of a link."""

    def rate(self, source):
        """Return the payload bytes a second of one copy."""
        images.fill_with_other(self.destination, os.path.getsize(source))
        return os.path.getsize(source) / self.run(source).wall

    def close(self):
        """Free the destination."""
        self.destination.unlink(missing_ok=True)


def warm_1gbit(bench):
    """The warm images in place over a link of 1 Gbit/s, against rsync with zstd."""
    table = Table("warm-1gbit", "Real images t1 to t2 in place over 1 Gbit/s; wire bytes by interface counters, both directions.", ("pagewire", "rsync -z zstd --inplace"))
    with closing(CappedLink()) as link:
        note_rate(bench, table, link, bench.real_images(REAL[0])[1])
        for which in REAL:
            base, source = bench.real_images(which)
            restore = lambda destination, base=base: images.copy_sparse(base, destination)
            pair = compare(bench, table, PagewireNetwork(bench, link, inplace=True), RsyncNetwork(bench, link, ZSTD), source, restore)
            table.costs(f"{which}: wire, interface counters", *pair.counters, bar=1, write=size)
            table.costs(f"{which}: wire, as reported", *pair.wires, write=size)
            table.faster(f"{which}: wall", *pair.walls)
    return table


def cold(bench):
    """1 GiB of random pages into a file whose pages exist, nothing known."""
    source = bench.random_image()
    total = os.path.getsize(source)
    table = Table("cold", f"{size(total)} of random pages over loopback TCP into a file whose pages exist, its content ignored.", ("pagewire", "socat"))
    link = Loopback()
    fill = lambda destination: images.fill_with_other(destination, total)
    pair = compare(bench, table, PagewireNetwork(bench, link, inplace=True, fresh=True), SocatNetwork(bench, link), source, fill)
    table.costs("wall", *pair.walls, bar=1.5)
    table.costs("wire (socat: payload)", *pair.wires, write=size)
    return table


def zstd_size(path):
    """Return the bytes that `zstd -1` makes of a file."""
    with subprocess.Popen(["zstd", "-1", "-c", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as packer:
        return sum(len(part) for part in iter(lambda: packer.stdout.read(1 << 20), b""))


def cold_1gbit(bench):
    """Cold real images over 1 Gbit/s, against the time that their zstd -1 size takes at the link's rate."""
    table = Table("cold-1gbit", "Cold real images over 1 Gbit/s; ideal = bytes of `zstd -1` / payload rate of the plain socat copy beside it.", ("pagewire", "ideal"))
    with closing(CappedLink()) as link:
        table.commands += link.setup
        for which in REAL:
            source = bench.real_images(which)[1]
            total, packed = os.path.getsize(source), zstd_size(source)
            fill = lambda destination, total=total: images.fill_with_other(destination, total)
            pair = compare(bench, table, PagewireNetwork(bench, link, inplace=True, fresh=True), SocatNetwork(bench, link), source, fill)
            judge_rate(table, link, [total / s.wall for s in pair.other])
            walls, ideals = [s.wall for s in pair.mine], [packed * s.wall / total for s in pair.other]
            table.costs(f"{which}: wall", walls, ideals, bar=1.15)
            table.costs(f"{which}: wire (ideal: zstd -1)", pair.wires[0], [packed] * len(pair.mine or pair.other), write=size)
            table.costs(f"{which}: wall by plain socat's", *pair.walls)
            pipe = compare(bench, table, PagewireNetwork(bench, link, inplace=True, fresh=True), ZstdPipe(bench, link), source, fill)
            table.costs(f"{which}: wall by that of zstd -1 -T2, socat, zstd -d", *pipe.walls)
    return table


def watched_run(side, source):
    """Run one transfer with processes of its own and return the watch over them."""
    watch = Watch()
    try:
        side.start()
        watch.add("receiver", side.server)
        watch.start()
        side.run(source, watch=lambda process: watch.add("sender", process))
        processes.finish(side.server)
    finally:
        watch.done.set()
        side.stop()
    watch.join()
    return watch


def memory(bench):
    """Peak anonymous memory of both processes: 64 MiB + 8 MiB + 48 bytes a page."""
    table = Table("memory", "Peak RssAnon (sampled every 10 ms) of processes made for each run, random pages, loopback TCP.", ("pagewire", ""))
    if not bench.runs_pagewire:
        table.notes.append("pagewire only; there is no alternative to measure")
        return table
    for total, fresh in ((256 << 20, True), (256 << 20, False), (4 << 30, True)):
        source = bench.work / "memory.img"
        images.write_random(source, total)
        side = PagewireNetwork(bench, Loopback(), inplace=fresh, fresh=fresh, once=True)
        how = f"{size(total)}, {'cold, in place' if fresh else 'unchanged, aside'}"
        seen = []
        for turn in range(1, bench.runs + 1):
            if fresh:
                images.fill_with_other(side.destination, total)
            else:
                images.restore_in_place(source, side.destination)
            seen.append(watched_run(side, source))
            images.verify(source, side.destination, f"memory, {how}, run {turn}")
            bench.progress(f"memory {how} run {turn}: " + ", ".join(f"{role} {size(value)}" for role, value in seen[-1].anon.items()))
        bar = (72 << 20) + 48 * (total // images.PAGE)
        for role in ("sender", "receiver"):
            table.within(f"{how}: {role} RssAnon", [w.anon[role] for w in seen], bar=bar, write=size, worst=True)
            table.within(f"{how}: {role} VmHWM (files and shared included)", [w.high[role] for w in seen], write=size)
        table.commands += side.commands[:2]
        side.destination.unlink()
        source.unlink()
    return table


ALL = {
    "unchanged": unchanged,
    "sparse-change": sparse_change,
    "warm": warm,
    "warm-1gbit": warm_1gbit,
    "cold": cold,
    "cold-1gbit": cold_1gbit,
    "memory": memory,
    **visits.ALL,
    **guests.ALL,
}
