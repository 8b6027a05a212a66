//! The command that slows a guest down: told each percentage in its order, never waited for while the session goes on.

use crate::command::run;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// The longest the command may take for one percentage.
const THROTTLE_MAX: Duration = Duration::from_secs(10);

/// A command that slows a guest down.
pub(crate) struct Throttle {
    command: String,
    about: Vec<(&'static str, String)>,
    worker: Option<Worker>,
}

/// The thread that runs the command, from the first percentage to the last.
struct Worker {
    percents: Sender<u8>,
    thread: JoinHandle<Vec<String>>,
}

impl Throttle {
    pub(crate) fn new(command: String, about: Vec<(&'static str, String)>) -> Self {
        Self { command, about, worker: None }
    }

    /// Slows the guest down to `percent` less; this begins, and is not waited for. With 0 it ends: the guest is let run
    /// at its full speed, which is waited for.
    ///
    /// # Errors
    /// With 0, whatever went wrong with any percentage.
    pub(crate) fn set(&mut self, percent: u8) -> Result<(), String> {
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => self.start()?,
        };
        worker.percents.send(percent).map_err(|_| "--on-throttle: its thread has ended".to_owned())?;
        if percent > 0 {
            self.worker = Some(worker);
            return Ok(());
        }
        drop(worker.percents);
        let failed = worker.thread.join().map_err(|_| "--on-throttle: its thread panicked".to_owned())?;
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    fn start(&self) -> Result<Worker, String> {
        let (percents, told) = mpsc::channel();
        let (command, about) = (self.command.clone(), self.about.clone());
        let thread = std::thread::Builder::new()
            .name("pagewire-throttle".to_owned())
            .spawn(move || follow(&told, &command, &about))
            .map_err(|error| format!("--on-throttle: {error}"))?;
        Ok(Worker { percents, thread })
    }
}

/// Runs the command for each percentage, and says what failed. One that was overtaken while the command ran for another
/// is left out: only the newest counts.
fn follow(told: &Receiver<u8>, command: &str, about: &[(&'static str, String)]) -> Vec<String> {
    let mut failed = Vec::new();
    while let Ok(percent) = told.recv() {
        let percent = told.try_iter().last().unwrap_or(percent);
        let mut about = about.to_vec();
        about.push(("PAGEWIRE_THROTTLE", percent.to_string()));
        let result = run(command, &about, THROTTLE_MAX, None);
        failed.extend(result.err().map(|why| format!("--on-throttle at {percent} %: {why}")));
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_command_the_newest_percentage_and_zero_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let command = format!("sleep 0.05; echo $PAGEWIRE_NAME $PAGEWIRE_THROTTLE >> {}", log.display());
        let mut throttle = Throttle::new(command, vec![("PAGEWIRE_NAME", "vm".to_owned())]);
        throttle.set(20).unwrap();
        while !log.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        throttle.set(30).unwrap();
        throttle.set(40).unwrap();
        throttle.set(0).unwrap();
        let log = std::fs::read_to_string(log).unwrap();
        assert!(log.starts_with("vm 20\n") && log.ends_with("vm 0\n"), "{log}");
    }

    #[test]
    fn what_failed_is_told_in_the_end_and_zero_is_tried_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let command = format!("echo $PAGEWIRE_THROTTLE >> {}; [ $PAGEWIRE_THROTTLE = 0 ]", log.display());
        let mut throttle = Throttle::new(command, Vec::new());
        throttle.set(20).unwrap();
        while !log.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let why = throttle.set(0).unwrap_err();
        assert!(why.contains("--on-throttle at 20 %") && why.contains("exit status: 1"), "{why}");
        assert_eq!(std::fs::read_to_string(log).unwrap(), "20\n0\n");
    }
}
