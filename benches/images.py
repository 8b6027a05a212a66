"""Image files for the benchmarks: making, restoring and comparing them."""
import os
import random
import subprocess

PAGE = 4096
CHUNK = 1 << 20


class Mismatch(Exception):
    """A destination that differs from its source after a transfer."""


def write_random(path, size):
    """Make a file of distinct, incompressible pages."""
    source = random.Random(os.urandom(16))
    with open(path, "wb", buffering=0) as out:
        for at in range(0, size, 16 * CHUNK):
            out.write(source.randbytes(min(16 * CHUNK, size - at)))


def write_changed(base, path, one_in):
    """Copy base to path with one page in one_in replaced at random places; return the number of changed pages."""
    copy_sparse(base, path)
    pages = os.path.getsize(path) // PAGE
    chosen = random.Random(os.urandom(16)).sample(range(pages), max(1, pages // one_in))
    with open(path, "r+b", buffering=0) as out:
        for page in chosen:
            os.pwrite(out.fileno(), os.urandom(PAGE), page * PAGE)
    return len(chosen)


def data_ranges(fd, size):
    """Yield (offset, length) of the parts of a file that are not holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at - start


def copy_sparse(base, path):
    """Make path a new file equal to base, holes included."""
    path.unlink(missing_ok=True)
    size = os.path.getsize(base)
    with open(base, "rb", buffering=0) as read, open(path, "wb", buffering=0) as out:
        out.truncate(size)
        for start, length in data_ranges(read.fileno(), size):
            for at in range(start, start + length, CHUNK):
                os.pwrite(out.fileno(), os.pread(read.fileno(), min(CHUNK, start + length - at), at), at)


def restore_in_place(base, path):
    """Make path equal to base, keeping its memory and writing only what differs."""
    if not path.exists() or os.path.getsize(path) != os.path.getsize(base):
        return copy_sparse(base, path)
    with open(base, "rb", buffering=0) as read, open(path, "r+b", buffering=0) as out:
        for at in range(0, os.path.getsize(base), CHUNK):
            wanted = os.pread(read.fileno(), CHUNK, at)
            if os.pread(out.fileno(), CHUNK, at) != wanted:
                os.pwrite(out.fileno(), wanted, at)


def fill_with_other(path, size):
    """Make path a file of size bytes with all its memory placed and content that no source image has."""
    block = os.urandom(CHUNK)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as out:
        out.truncate(size)
        for at in range(0, size, CHUNK):
            os.pwrite(out.fileno(), block[: size - at], at)


def verify(source, destination, who):
    """Raise Mismatch unless both files hold the same bytes."""
    result = subprocess.run(["cmp", str(source), str(destination)], capture_output=True, text=True)
    if result.returncode:
        raise Mismatch(f"{who}: the destination DIFFERS from the source: {(result.stdout + result.stderr).strip()}")
