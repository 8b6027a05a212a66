"""The peak memory of processes, by looking at them again and again."""
import threading
import time


class Watch(threading.Thread):
    """Samples the memory of processes every 10 ms until told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.processes, self.anon, self.high, self.done = {}, {}, {}, threading.Event()

    def add(self, role, process):
        """Watch a process under the name of its role."""
        self.processes[role] = process
        self.anon[role] = self.high[role] = 0

    def run(self):
        """Sample until stopped."""
        while not self.done.is_set():
            self.sample()
            time.sleep(0.01)

    def sample(self):
        """Look at each process once."""
        for role, process in list(self.processes.items()):
            try:
                with open(f"/proc/{process.pid}/status", encoding="ascii") as lines:
                    fields = dict(line.split(":", 1) for line in lines)
            except OSError:
                continue
            if "RssAnon" in fields:
                self.anon[role] = max(self.anon[role], int(fields["RssAnon"].split()[0]) * 1024)
                self.high[role] = max(self.high[role], int(fields["VmHWM"].split()[0]) * 1024)
