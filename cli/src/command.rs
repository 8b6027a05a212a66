//! Commands that users give: run by `sh -c`, in a process group of their own, each with a time limit.
//!
//! What one prints goes to standard error, as standard output is for events and reports. One that takes too long ends
//! with its whole process group, so that a command that hangs holds up no hand-over for ever.

use pagewire::CancellationToken;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How often it is looked whether a command is still needed.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Runs a command, which is told what it is about by variables of its environment. It must succeed within `limit`, and
/// before `over` is cancelled.
pub(crate) fn run(
    command: &str,
    about: &[(&str, String)],
    limit: Duration,
    over: Option<&CancellationToken>,
) -> Result<(), String> {
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let mut child = Command::new("sh");
    child.arg("-c").arg(command).stdin(Stdio::null()).stdout(stderr).process_group(0);
    child.envs(about.iter().map(|(key, value)| (*key, value.as_str())));
    let mut child = child.spawn().map_err(|error| format!("{command}: {error}"))?;
    let group = rustix::process::Pid::from_child(&child);
    let (told, ended) = mpsc::channel();
    std::thread::spawn(move || told.send(child.wait()));
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match ended.recv_timeout(if over.is_some() { left.min(LOOK_EVERY) } else { left }) {
            Ok(Ok(status)) if status.success() => return Ok(()),
            Ok(Ok(status)) => return Err(format!("{command}: {status}")),
            Ok(Err(error)) => return Err(format!("{command}: {error}")),
            Err(RecvTimeoutError::Timeout) if !left.is_zero() && !over.is_some_and(CancellationToken::is_cancelled) => {
            }
            Err(_) => break,
        }
    }
    // What it started goes with it.
    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    let is_over = over.is_some_and(CancellationToken::is_cancelled);
    Err(if is_over { format!("{command}: ended") } else { format!("{command}: not done after {} s", limit.as_secs()) })
}
