//! A network namespace whose loopback is capped to 1 Gbit/s, and this program again inside it.

use crate::{Failure, Setup};
use std::process::Command;

const INSIDE: &str = "PAGEWIRE_LIVE_CAPPED";

/// Whether this process is inside.
pub(crate) fn is_capped() -> bool {
    std::env::var_os(INSIDE).is_some()
}

struct Namespace(String);

impl Namespace {
    /// As `benches/links.py` makes it: frames of an Ethernet's size, as tbf drops what is larger than its burst.
    fn new() -> Result<Self, Failure> {
        let name = format!("pwlive{}", std::process::id());
        run(&format!("ip netns add {name}"))?;
        let namespace = Self(name);
        let name = &namespace.0;
        run(&format!("ip -n {name} link set lo mtu 1500 up"))?;
        run(&format!("tc -n {name} qdisc add dev lo root tbf rate 1gbit burst 128kb latency 50ms"))?;
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = run(&format!("ip netns del {}", self.0));
    }
}

fn run(line: &str) -> Result<(), Failure> {
    let mut words = line.split_whitespace();
    let status = Command::new(words.next().unwrap_or_default()).args(words).status()?;
    if status.success() { Ok(()) } else { Err(format!("{line}: {status}").into()) }
}

/// Runs one case inside; says whether its bars were met.
pub(crate) fn run_inside(case: &str, setup: &Setup) -> Result<bool, Failure> {
    let namespace = Namespace::new()?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", namespace.0)).arg(std::env::current_exe()?);
    command.args(["--runs", &setup.runs.to_string(), "--disk"]).arg(&setup.disk).arg(case).env(INSIDE, "1");
    let status = command.status()?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(format!("{case}: {status}").into()),
    }
}
