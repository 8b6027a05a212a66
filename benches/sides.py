"""The programs that are compared, each as one side with the same shape: start, run, stop."""
import json
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import processes

NAME = "image"


@dataclass
class Sample:
    """What one counted run has shown."""

    wall: float
    wire: int | None = None
    counted: int | None = None
    report: dict = field(default_factory=dict)


class Side:
    """One program with a destination of its own."""

    name = "?"

    def __init__(self, bench):
        self.bench = bench
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=bench.work))
        (self.folder / "into").mkdir()
        self.destination = self.folder / "into" / NAME
        self.commands = []
        self.server = None

    def start(self):
        """Start what serves all runs."""

    def run(self, source, watch=None):
        """Transfer source to the destination once; watch, if given, is called with the sending process."""
        raise NotImplementedError

    def stop(self):
        """End what serves all runs."""
        if self.server:
            processes.stop(self.server)
            self.server = None

    def say(self, argv):
        """Keep a command, once, for the commands that the output shows."""
        line = self.bench.shown(argv)
        if line not in self.commands:
            self.commands.append(line)

    def timed(self, argv, log="run.log", watch=None):
        """Run a command to its end and return its wall time in seconds and its output."""
        self.say(argv)
        begin = time.perf_counter()
        process = processes.start(argv, self.folder / log)
        if watch:
            watch(process)
        processes.finish(process)
        wall = time.perf_counter() - begin
        return wall, process.log.read_text(errors="replace")


class PagewireSide(Side):
    """What pagewire's two forms share."""

    name = "pagewire"

    def sample(self, argv, link=None, watch=None):
        """Run a pagewire command that writes a report and return its sample."""
        path = self.folder / "report.json"
        path.unlink(missing_ok=True)
        before = link.counted() if link else None
        wall, _ = self.timed([*argv, "--report", str(path)], watch=watch)
        counted = None if before is None else link.counted() - before
        report = json.loads(path.read_text())
        wire = report["wire"]["sent_bytes"] + report["wire"]["received_bytes"]
        return Sample(wall, wire, counted, report)


class PagewireNetwork(PagewireSide):
    """`pagewire send` to a `pagewire receive` that is ready."""

    def __init__(self, bench, link, inplace=False, fresh=False, once=False):
        super().__init__(bench)
        self.link = link
        self.receive_flags = ["--inplace"] * inplace + ["--fresh"] * fresh + ["--once"] * once + [*link.plaintext]
        self.send_flags = ["--fresh"] * fresh + [*link.plaintext]

    def start(self):
        """Start the receiver and wait until it says that it listens."""
        self.port = processes.free_port()
        self.spot = f"{self.link.address}:{self.port}"
        argv = [*self.link.receiver, self.bench.pagewire, "receive", "--listen", self.spot, "--into", str(self.destination.parent), *self.receive_flags]
        self.say(argv)
        self.server = processes.start(argv, self.folder / "receive.log")
        processes.wait_until(self.server, lambda: "listening on" in processes.tail(self.server), "pagewire receive")

    def run(self, source, watch=None):
        """Time `pagewire send` from its start to its exit."""
        argv = [*self.link.sender, self.bench.pagewire, "send", str(source), "--to", f"tcp://{self.spot}", "--name", NAME, *self.send_flags]
        try:
            return self.sample(argv, self.link, watch)
        except processes.Failed as error:
            raise processes.Failed(f"{error}\nthe receiver said:\n{processes.tail(self.server)}") from None


class PagewireCopy(PagewireSide):
    """`pagewire copy` on this host."""

    def __init__(self, bench, inplace=False, fresh=False):
        super().__init__(bench)
        self.flags = ["--inplace"] * inplace + ["--fresh"] * fresh

    def run(self, source, watch=None):
        """Time `pagewire copy`."""
        return self.sample([self.bench.pagewire, "copy", str(source), str(self.destination), *self.flags], watch=watch)


def rsync_wire(text):
    """Return sent plus received bytes from the output of rsync --stats."""
    return sum(int(re.search(rf"Total bytes {way}: ([\d,]+)", text)[1].replace(",", "")) for way in ("sent", "received"))


class RsyncNetwork(Side):
    """`rsync` to an rsync daemon of our own."""

    name = "rsync"

    def __init__(self, bench, link, flags):
        super().__init__(bench)
        self.link, self.flags = link, flags

    def start(self):
        """Write a configuration and start the daemon on it."""
        self.port = processes.free_port()
        config = self.folder / "rsyncd.conf"
        config.write_text(
            f"use chroot = no\nuid = root\ngid = root\nreverse lookup = no\nlog file = {self.folder}/rsyncd.log\n"
            f"[into]\npath = {self.destination.parent}\nread only = no\n"
        )
        argv = [*self.link.receiver, "rsync", "--daemon", "--no-detach", f"--config={config}", f"--address={self.link.address}", f"--port={self.port}"]
        self.say(argv)
        self.server = processes.start(argv, self.folder / "daemon.log")
        processes.wait_until(self.server, lambda: processes.listens(self.server, self.port), "rsync --daemon")

    def run(self, source, watch=None):
        """Time `rsync` to the daemon."""
        before = self.link.counted()
        target = f"rsync://{self.link.address}:{self.port}/into/{NAME}"
        wall, text = self.timed([*self.link.sender, "rsync", *self.flags, "--stats", str(source), target], watch=watch)
        counted = None if before is None else self.link.counted() - before
        return Sample(wall, rsync_wire(text), counted)


class RsyncCopy(Side):
    """`rsync` from file to file on this host, over its own pipe."""

    name = "rsync"

    def __init__(self, bench, flags):
        super().__init__(bench)
        self.flags = flags

    def run(self, source, watch=None):
        """Time the local `rsync`."""
        wall, text = self.timed(["rsync", *self.flags, "--stats", str(source), str(self.destination)], watch=watch)
        return Sample(wall, rsync_wire(text))


class SocatNetwork(Side):
    """`socat` from file to TCP to an existing file."""

    name = "socat"

    def __init__(self, bench, link):
        super().__init__(bench)
        self.link = link

    def receiver(self, listen):
        """Return the command that fills the destination from what listen brings."""
        return [*listen.split(), f"OPEN:{self.destination},wronly"]

    def sender(self, source, to):
        """Return the command that sends the source."""
        return ["socat", "-u", "-b", "1048576", f"OPEN:{source},rdonly", to]

    def run(self, source, watch=None):
        """Time both socats from the start of the sender until both have ended."""
        port = processes.free_port()
        receive = [*self.link.receiver, *self.receiver(f"socat -u -b 1048576 TCP-LISTEN:{port},reuseaddr")]
        send = [*self.link.sender, *self.sender(source, f"TCP:{self.link.address}:{port}")]
        if not self.commands:
            self.say(receive)
            self.say(send)
        before = self.link.counted()
        receiver = processes.start(receive, self.folder / "receive.log")
        processes.wait_until(receiver, lambda: processes.listens(receiver, port), "socat")
        begin = time.perf_counter()
        sender = processes.start(send, self.folder / "send.log")
        processes.finish(sender)
        processes.finish(receiver)
        wall = time.perf_counter() - begin
        counted = None if before is None else self.link.counted() - before
        return Sample(wall, os.path.getsize(source), counted)


class ZstdPipe(SocatNetwork):
    """`zstd -1` on two threads, `socat`, `zstd -d`: what a shell user would write."""

    name = "zstd-pipe"

    def receiver(self, listen):
        """Decompress on the way into the destination's pages."""
        return ["sh", "-c", f"{listen} - | zstd -q -d -c 1<>{self.destination}"]

    def sender(self, source, to):
        """Compress on the way out."""
        return ["sh", "-c", f"zstd -1 -T2 -q -c {source} | socat -u -b 1048576 - {to}"]
