#!/usr/bin/env python3
"""Side-by-side benchmarks: whole `pagewire` commands against what a user would pick instead, in the same run.

Each benchmark runs both sides in turn (A B A B): one warm-up, then the counted runs. A ratio is the median of the
ratios of runs that were made side by side. After every run the destination is compared with the source. Needs root
(for network namespaces), rsync, socat, zstd, iproute2; redis-server for the real images. Exit code 1: a bar was missed.
"""
import sys

sys.dont_write_bytecode = True

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import cases
import images
import processes
import visits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Bench:
    """What all benchmarks of one run share."""

    def __init__(self, options, work):
        self.work, self.runs = work, options.runs
        self.pagewire = str(Path(options.pagewire).resolve())
        self.runs_pagewire = options.only != "alternative"
        self.runs_alternative = options.only != "pagewire"
        self.random_size = options.size << 20
        self.images = Path(options.images).resolve() if options.images else None

    def random_image(self):
        """Return the shared image of random pages, made when first asked for."""
        path = self.work / "random.img"
        if not path.exists():
            self.progress("making the random image")
            images.write_random(path, self.random_size)
        return path

    def real_images(self, which):
        """Return the paths of one program's image at the earlier and the later moment."""
        if self.images is None:
            self.images = self.work / "images"
            self.progress("making the real images")
            subprocess.run([sys.executable, str(HERE / "real-images.py"), str(self.images)], check=True, stdout=subprocess.DEVNULL)
        return tuple(self.images / f"{which}-t{moment}.img" for moment in (1, 2))

    def shown(self, argv):
        """Write a command as the output shows it, without this machine's paths."""
        line = shlex.join(argv)
        for path, word in ((self.pagewire, "pagewire"), (self.images, "$IMAGES"), (self.work, "$WORK")):
            if path:
                line = line.replace(str(path), word)
        return line

    @staticmethod
    def progress(text):
        """Tell whoever waits how far the work is."""
        print(text, file=sys.stderr, flush=True)


def machine(bench):
    """Return one line about the machine and the programs."""
    with open("/proc/cpuinfo", encoding="utf8") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    versions = [
        "rsync " + processes.output(["rsync", "--version"]).split()[2],
        "socat " + processes.output(["socat", "-V"]).split("version ", 1)[-1].split()[0],
        "zstd " + processes.output(["zstd", "--version"]).split(" v", 1)[-1].split(",")[0],
    ]
    if bench.runs_pagewire:
        versions.append(processes.output([bench.pagewire, "--version"]))
    load = os.getloadavg()[0]
    return f"Machine: {model}, {os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, TCP {control}; {', '.join(versions)}; load before the run {load:.2f}."


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--runs", type=int, default=visits.JUDGED_RUNS, help=f"counted runs (default {visits.JUDGED_RUNS}, and {visits.KEEP_PAIRS} at least for keep-cost; fewer than the default is only a self-test)")
    parser.add_argument("--only", choices=("pagewire", "alternative"), help="run one side alone")
    parser.add_argument("--pagewire", default=ROOT / "target/release/pagewire", help="the program (default: the release build)")
    parser.add_argument("--dir", help="folder for the work (default: a new one on /dev/shm)")
    parser.add_argument("--images", help="folder with the images of real-images.py (default: make them)")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="size of the random image; bars are meant for 1024")
    parser.add_argument("--output", help="append the markdown to this file as well")
    options = parser.parse_args()
    if unknown := set(options.names) - set(cases.ALL):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; --list shows them")
    if options.only != "alternative" and not options.list and not os.access(options.pagewire, os.X_OK):
        parser.error(f"no program at {options.pagewire}; build it, or use --pagewire or --only alternative")
    return options


def run_all(options, work):
    """Run what was asked for, print it, and return the bars that were missed."""
    bench = Bench(options, work)
    out = open(options.output, "a", encoding="utf8") if options.output else None

    def emit(text):
        for stream in filter(None, (sys.stdout, out)):
            print(text, file=stream, flush=True)

    emit(f"## Benchmarks, {time.strftime('%Y-%m-%d %H:%M')}, {options.runs} counted runs\n\n{machine(bench)}\n")
    emit("Values are medians (min – max); the ratio is the median of pairwise ratios.\n")
    failures = []
    for name in options.names or cases.ALL:
        table = cases.ALL[name](bench)
        emit(table.markdown())
        failures += table.failures
    judged = bench.runs_pagewire and bench.runs_alternative
    emit(("All bars hold.\n" if judged else "One side alone: bars that need both were not judged.\n") if not failures else "Bars missed:\n\n" + "".join(f"- {line}\n" for line in failures))
    return failures


def main():
    """Run the program; 1 means that a bar was missed, 3 that a transfer went wrong."""
    options = arguments()
    if options.list:
        for name, case in cases.ALL.items():
            print(f"{name:14} {case.__doc__}")
        return 0
    processes.guard()
    if options.dir:
        Path(options.dir).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="pagewire-bench-", dir=options.dir or "/dev/shm")).resolve()
    try:
        return 1 if run_all(options, work) else 0
    except (images.Mismatch, processes.Failed) as error:
        print(f"\nBENCHMARK STOPPED: {error}", file=sys.stderr)
        return 3
    finally:
        processes.end_all()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
