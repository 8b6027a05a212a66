"""Many guests that come back at once: what one receiver and its senders take for themselves."""
import os
import shutil

import images
import processes
from links import Loopback
from sides import PagewireSide
from tables import Table, size
from watch import Watch

GUESTS = 15
BYTES = 128 << 20


class Fleet(PagewireSide):
    """Two hosts with a store each, one receiver for all guests, a sender for each."""

    def __init__(self, bench, count, keep):
        super().__init__(bench)
        self.names = [f"vm{number}" for number in range(count)]
        self.keep = keep

    def move(self, source, target, flags, keep, watch=None):
        """Move all guests at once from the folder of images `source` to a host; ends when all is kept."""
        here, there = source.name, target.name
        spot = f"127.0.0.1:{processes.free_port()}"
        receive = [self.bench.pagewire, "receive", "--listen", spot, "--into", str(target), "--store", str(self.folder / f"store-{there}"), *flags]
        self.say(receive)
        server = processes.start(receive, self.folder / "receive.log")
        processes.wait_until(server, lambda: "listening on" in processes.tail(server), "pagewire receive")
        if watch:
            watch.add("receiver", server)
            watch.start()
        senders = []
        for name in self.names:
            send = [self.bench.pagewire, "send", str(source / name), "--to", f"tcp://{spot}", "--name", name, "--store", str(self.folder / f"store-{here}"), "--keep", keep]
            if name == self.names[0]:
                self.say(send)
            senders.append(processes.start(send, self.folder / f"send-{name}.log"))
            if watch:
                watch.add(name, senders[-1])
        for sender in senders:
            processes.finish(sender)
        # Told to stop, it ends what it has begun: what arrived is kept by then.
        processes.stop(server)
        if watch:
            watch.done.set()
            watch.join()

    def come_back(self, bases):
        """Let all guests leave A for B, change one page in a hundred there, and watch them come back."""
        a, b = self.folder / "a", self.folder / "b"
        for folder in (a, b, self.folder / "store-a", self.folder / "store-b"):
            shutil.rmtree(folder, ignore_errors=True)
        a.mkdir()
        b.mkdir()
        for name, base in zip(self.names, bases):
            os.link(base, a / name)
        self.move(a, b, ["--keep", self.keep], "visit")
        for name, base in zip(self.names, bases):
            (a / name).unlink()
            images.write_changed(base, b / name, 100)
        watch = Watch()
        self.move(b, a, [], "none", watch)
        for name in self.names:
            images.verify(b / name, a / name, f"guests, {name}")
        return watch


def guests(bench):
    """15 guests that come back at once: RssAnon of the receiver beside that for one, and of each sender."""
    pages = BYTES // images.PAGE
    title = f"Peak RssAnon (sampled every 10 ms) while guests of {size(BYTES)} come back with 1 % of their pages changed; a store on both sides, loopback TCP, one `receive`. The guests' memory is in files, so none of it is in these figures."
    table = Table("guests", title, (f"{GUESTS} guests", "one guest"))
    if not bench.runs_pagewire:
        table.notes.append("pagewire only; there is no alternative to measure")
        return table
    bases = []
    for number in range(GUESTS):
        bases.append(bench.work / f"guest-{number}.img")
        images.write_random(bases[-1], BYTES)
    for keep in ("manifest", "visit"):
        seen = {}
        for count in (1, GUESTS):
            fleet = Fleet(bench, count, keep)
            seen[count] = []
            for turn in range(1, bench.runs + 1):
                peak = fleet.come_back(bases[:count]).anon
                seen[count].append((peak.pop("receiver"), max(peak.values())))
                bench.progress(f"guests {count}, B kept the {keep}, run {turn}: receiver {size(seen[count][-1][0])}, largest sender {size(seen[count][-1][1])}")
            shutil.rmtree(fleet.folder)
        table.commands += fleet.commands[:4]
        for at, role in enumerate(("receiver", "largest sender")):
            one, all_of_them = ([peaks[at] for peaks in seen[count]] for count in (1, GUESTS))
            more = (GUESTS - 1) * ((8 << 20) + 48 * pages) if role == "receiver" else None
            table.beside(f"B kept the {keep}: {role}", all_of_them, one, more)
    for base in bases:
        base.unlink()
    return table


ALL = {"guests": guests}
