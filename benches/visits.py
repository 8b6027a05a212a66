"""The benchmarks of memory reuse: guests that come back to a host that kept what they left."""
import os
import re
import shutil
import time
from contextlib import closing
from pathlib import Path

import images
import processes
from links import CappedLoopback, Loopback
from sides import NAME, PagewireSide, Sample, Side
from tables import Table, percent, size

# Runs of a pair differ by a tenth and more; so many tell a difference of some per cent from noise.
KEEP_PAIRS = 15
# Bars are meant for so many runs, the default. Who asks for fewer wants to see that it works, and gets as few of those.
JUDGED_RUNS = 5


class Hosts(PagewireSide):
    """Two hosts with a store each: a guest leaves A for B and comes back."""

    def __init__(self, bench, link, keep="manifest", return_flags=("--inplace",)):
        super().__init__(bench)
        self.link, self.keep, self.return_flags = link, keep, list(return_flags)
        self.destination = self.folder / "a" / NAME

    def receive(self, host, flags):
        """Start a receiver for one session and return its address."""
        port = processes.free_port()
        spot = f"127.0.0.1:{port}"
        argv = [*self.link.receiver, self.bench.pagewire, "receive", "--listen", spot, "--into", str(self.folder / host), "--store", str(self.folder / f"store-{host}"), "--once", *flags, "--report", str(self.folder / "received.json")]
        self.say(argv)
        server = processes.start(argv, self.folder / f"receive-{host}.log")
        processes.wait_until(server, lambda: "listening on" in processes.tail(server), "pagewire receive")
        return server, f"tcp://{spot}"

    def send(self, host, source, to, flags):
        """Send an image from a host and return the sample."""
        argv = [*self.link.sender, self.bench.pagewire, "send", str(source), "--to", to, "--name", NAME, "--store", str(self.folder / f"store-{host}"), *flags]
        return self.sample(argv)

    def leave(self, image, flags=()):
        """Move an image from A to B; A keeps the visit, B what it was told to."""
        for name in ("a", "b", "store-a", "store-b"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("a", "b"):
            (self.folder / name).mkdir()
        server, to = self.receive("b", ["--keep", self.keep])
        sample = self.send("a", image, to, list(flags))
        processes.finish(server)
        return sample

    def come_back(self, image):
        """Move an image from B to A and return the sample."""
        server, to = self.receive("a", self.return_flags)
        sample = self.send("b", image, to, ["--keep", "none"])
        processes.finish(server)
        return sample


class PatchPipe(Side):
    """`zstd -1 --patch-from` on one side, `zstd -d --patch-from` on the other, both with the old image at hand."""

    name = "zstd-patch"

    def __init__(self, bench, link, old):
        super().__init__(bench)
        self.link, self.old = link, old

    def run(self, source, watch=None):
        """Time the pipeline from its start until the new image is there."""
        port = processes.free_port()
        wire = self.folder / "wire"
        receive = [*self.link.receiver, "sh", "-c", f"socat -u -b 1048576 TCP-LISTEN:{port},reuseaddr - | tee {wire} | zstd -q -d -f --long=31 --patch-from={self.old} -o {self.destination}"]
        send = [*self.link.sender, "sh", "-c", f"zstd -1 -q -c --patch-from={self.old} {source} | socat -u -b 1048576 - TCP:127.0.0.1:{port}"]
        if not self.commands:
            self.say(receive)
            self.say(send)
        receiver = processes.start(receive, self.folder / "receive.log")
        time.sleep(0.3)
        begin = time.perf_counter()
        sender = processes.start(send, self.folder / "send.log")
        processes.finish(sender)
        processes.finish(receiver)
        return Sample(time.perf_counter() - begin, os.path.getsize(wire))


def batch_rate(bench):
    """Return the digest rate of one core in bytes a second: the widest level that the digest benchmark shows."""
    text = processes.output([str(Path(bench.pagewire).parent / "digest")])
    return float(re.findall(r"^\| \w[\w.]* \| ([\d.]+) \|", text, re.M)[-1]) * 1e9


def return_unchanged(bench):
    """4 GiB that come back as they left, both manifests known, both sides verifying."""
    total = 4 * os.path.getsize(bench.random_image())
    source = bench.work / "visit.img"
    images.write_random(source, total)
    table = Table("return-unchanged", f"{size(total)} of random pages come back unchanged; loopback TCP, in place; both sides read and digest all of it.", ("pagewire", "one core's batch digests"))
    hosts = Hosts(bench, Loopback())
    samples, rates = [], []
    for turn in range(bench.runs + 1):
        hosts.leave(source)
        (hosts.folder / "b" / NAME).unlink()
        sample, rate = hosts.come_back(source), batch_rate(bench)
        images.verify(source, hosts.destination, f"return-unchanged, run {turn}")
        bench.progress(f"return-unchanged run {turn}: {sample.wall:.3f} s, {sample.wire} B")
        if turn:
            samples.append(sample)
            rates.append(rate)
    table.costs("wall beside the time of digesting alone", [s.wall for s in samples], [total / rate for rate in rates], bar=2)
    table.within("wire of the image", [s.wire / total for s in samples], bar=0.0001)
    table.notes.append(f"last run: pages {samples[-1].report['pages']}")
    table.commands += hosts.commands[-2:]
    source.unlink()
    shutil.rmtree(hosts.folder)
    return table


def return_real(bench):
    """Real images over 1 Gbit/s, the arrival visit kept on both sides, against zstd --patch-from."""
    table = Table("return-real", "Real images: t1 left A for B, which kept it too; t2 comes back over loopback capped to 1 Gbit/s.", ("pagewire", "zstd -1 --patch-from"))
    with closing(CappedLoopback()) as link:
        table.commands += link.setup
        for which in ("redis", "python"):
            old, new = bench.real_images(which)
            hosts, patch = Hosts(bench, link, keep="visit", return_flags=()), PatchPipe(bench, link, old)
            mine, other = [], []
            for turn in range(bench.runs + 1):
                hosts.leave(old)
                sample = hosts.come_back(new)
                images.verify(new, hosts.destination, f"return-real {which}, run {turn}")
                against = patch.run(new)
                images.verify(new, patch.destination, f"return-real {which}, zstd, run {turn}")
                bench.progress(f"return-real {which} run {turn}: {sample.wall:.3f} s {sample.wire} B, zstd {against.wall:.3f} s {against.wire} B")
                if turn:
                    mine.append(sample)
                    other.append(against)
            table.costs(f"{which}: wire", [s.wire for s in mine], [s.wire for s in other], bar=1.3, write=size)
            table.faster(f"{which}: wall", [s.wall for s in mine], [s.wall for s in other], bar=5)
            table.notes.append(f"{which}, last run: pages {mine[-1].report['pages']}, decisions {mine[-1].report['decisions']}")
            table.commands += hosts.commands[-2:] + patch.commands
            shutil.rmtree(hosts.folder)
    return table


def keep_cost(bench):
    """What keeping a visit costs a guest that arrives: it runs before anything is kept."""
    source = bench.random_image()
    runs = max(bench.runs, KEEP_PAIRS) if bench.runs >= JUDGED_RUNS else bench.runs
    table = Table("keep-cost", f"{size(os.path.getsize(source))} of random pages arrives; the time until it is there, with the visit kept afterwards and with nothing kept. {runs} times three runs, whose order changes; nothing kept is measured twice, so the second row is noise alone.", ("pagewire", "--keep none"))
    sides = {side: Hosts(bench, Loopback(), keep=side.split()[0]) for side in ("visit", "none", "none again")}
    walls = {side: [] for side in sides}
    for turn in range(runs + 1):
        order = list(sides)[turn % 3:] + list(sides)[:turn % 3]
        for side in order:
            sample = sides[side].leave(source, ["--keep", "none"])
            bench.progress(f"keep-cost {side} run {turn}: {sample.report['seconds']:.3f} s")
            if turn:
                walls[side].append(sample.report["seconds"])
            # What is kept of this run is no part of the next one's memory.
            shutil.rmtree(sides[side].folder / "store-b", ignore_errors=True)
    table.costs("time until the image is there, --keep visit", walls["visit"], walls["none"], bar=1.02)
    table.costs("the same, --keep none once more", walls["none again"], walls["none"])
    for hosts in sides.values():
        table.commands += hosts.commands[:2]
        shutil.rmtree(hosts.folder)
    return table


ALL = {"return-unchanged": return_unchanged, "return-real": return_real, "keep-cost": keep_cost}
