"""Where sender and receiver meet: loopback, or a capped link between two network namespaces."""
import atexit
import json
import os
import subprocess
import time


class Loopback:
    """Both ends on this host, over 127.0.0.1."""

    address = "127.0.0.1"
    sender = receiver = ()
    plaintext = ()
    setup = ()

    def counted(self):
        """Loopback keeps no counters that tell a transfer apart."""
        return None

    def close(self):
        """Nothing to undo."""


class CappedLink:
    """Two network namespaces joined by a veth pair, capped by tbf at both ends."""

    address = "10.201.0.2"
    plaintext = ("--insecure-plaintext",)
    rate = "1gbit"
    payload = (112e6, 120e6)  # bytes a second; headers leave 119.55e6 to TCP at best

    def __init__(self):
        self.names = [f"pwbench{os.getpid()}{end}" for end in "sr"]
        self.sender, self.receiver = (("nsenter", f"--net=/run/netns/{name}") for name in self.names)
        self.setup = []
        atexit.register(self.close)
        for name in self.names:
            self._run(f"ip netns add {name}")
            self._run(f"ip netns exec {name} sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
        self._run("ip link add pw0 netns {} type veth peer name pw1 netns {}".format(*self.names))
        for end, name in enumerate(self.names):
            self._run(f"ip -n {name} addr add 10.201.0.{end + 1}/30 dev pw{end}")
            self._run(f"ip -n {name} link set lo up")
            self._run(f"ip -n {name} link set pw{end} up")
            self._run(f"tc -n {name} qdisc add dev pw{end} root tbf rate {self.rate} burst 128kb latency 50ms")

    def _run(self, line):
        self.setup.append(line)
        subprocess.run(line.split(), check=True)

    def _read(self):
        total = 0
        for end, name in enumerate(self.names):
            found = subprocess.run(f"ip -n {name} -j -s link show dev pw{end}".split(), check=True, capture_output=True)
            total += json.loads(found.stdout)[0]["stats64"]["tx"]["bytes"]
        return total

    def counted(self):
        """Return the bytes that both interfaces have sent, once they are silent."""
        before = -1
        while (now := self._read()) != before:
            before = now
            time.sleep(0.1)
        return now

    def close(self):
        """Remove both namespaces, and with them the link."""
        for name in self.names:
            if os.path.exists(f"/run/netns/{name}"):
                subprocess.run(["ip", "netns", "del", name], check=False)
        atexit.unregister(self.close)


class CappedLoopback:
    """A network namespace of its own whose loopback is capped by tbf: a slow link that counts as local."""

    address = "127.0.0.1"
    plaintext = ()
    rate = "1gbit"

    def __init__(self):
        self.name = f"pwbench{os.getpid()}lo"
        self.sender = self.receiver = ("nsenter", f"--net=/run/netns/{self.name}")
        self.setup = []
        atexit.register(self.close)
        # Frames of an Ethernet's size: tbf drops what is larger than its burst.
        for line in ("ip netns add {}", "ip -n {} link set lo mtu 1500 up", f"tc -n {{}} qdisc add dev lo root tbf rate {self.rate} burst 128kb latency 50ms"):
            self.setup.append(line.format(self.name))
            subprocess.run(self.setup[-1].split(), check=True)

    def counted(self):
        """Both directions share the interface: its counters do not tell them apart."""
        return None

    def close(self):
        """Remove the namespace."""
        if os.path.exists(f"/run/netns/{self.name}"):
            subprocess.run(["ip", "netns", "del", self.name], check=False)
        atexit.unregister(self.close)
