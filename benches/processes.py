"""Starting, timing and ending the processes that a benchmark runs."""
import atexit
import os
import select
import signal
import socket
import subprocess
import time

TIMEOUT = 600
_running = []


class Failed(Exception):
    """A command that ended badly, did not end, or did not get ready."""


def start(argv, log):
    """Start a command with its output in the file log."""
    with open(log, "wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    process.log = log
    _running.append(process)
    return process


def finish(process):
    """Wait, without polling, until a process has ended well."""
    handle = os.pidfd_open(process.pid)
    try:
        ended = select.select([handle], [], [], TIMEOUT)[0]
    finally:
        os.close(handle)
    if not ended:
        stop(process)
        raise Failed(f"no end after {TIMEOUT} s: {process.args}\n{tail(process)}")
    code = process.wait()
    _running.remove(process)
    if code:
        raise Failed(f"exit code {code}: {process.args}\n{tail(process)}")


def stop(process):
    """End a process that may have ended already."""
    if process in _running:
        _running.remove(process)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(process):
    """Return the last of what a process has said."""
    return process.log.read_text(errors="replace")[-2000:]


def wait_until(process, ready, what):
    """Wait until ready() holds for a process that was just started."""
    deadline = time.monotonic() + 20
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{what}: not ready: {process.args}\n{tail(process)}")
        time.sleep(0.005)


def listens(process, port):
    """Tell whether somebody listens on a TCP port in the network namespace of a process."""
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{process.pid}/net/{table}", encoding="ascii") as lines:
                if any(f[1].endswith(f":{port:04X}") and f[3] == "0A" for f in map(str.split, lines)):
                    return True
        except OSError:
            pass
    return False


def free_port():
    """Return a TCP port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def output(argv):
    """Return what a short command prints, or why it cannot."""
    try:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except OSError as error:
        return str(error)
    return (result.stdout or result.stderr).strip()


def end_all():
    """End every child that still runs."""
    for process in list(_running):
        stop(process)


def guard():
    """End all children when this program ends, also by a signal."""
    atexit.register(end_all)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: exit(130))
