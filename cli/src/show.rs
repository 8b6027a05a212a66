//! What people and programs see: a progress bar on a terminal, JSON lines where they are asked for, a summary.

use crate::args::Output;
use crate::plot;
use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use pagewire::{Event, Faults, Observer, Outcome, Phase, Report, Role};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::path::Path;

/// Shows one transfer.
pub(crate) struct Show {
    bar: Option<ProgressBar>,
    json: bool,
}

impl Show {
    pub(crate) fn new(json: bool) -> Self {
        let style = ProgressStyle::with_template("{bar:32} {percent:>3} %  {bytes}/{total_bytes}  {msg}  {eta} left");
        let bar = (!json && std::io::stderr().is_terminal()).then(|| ProgressBar::new(0));
        if let (Some(bar), Ok(style)) = (&bar, style) {
            bar.set_style(style);
        }
        Self { bar, json }
    }

    /// Takes the bar away; says whether there was one.
    pub(crate) fn end(&self) -> bool {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.bar.is_some()
    }
}

impl Observer for Show {
    fn event(&mut self, event: &Event) {
        if self.json {
            print_json(event);
        }
        let Some(bar) = &self.bar else { return };
        match event {
            Event::Started { bytes_total, .. } => bar.set_length(*bytes_total),
            Event::Progress { pages, sent_bytes, received_bytes, .. } => {
                bar.set_position(pages.saturating_mul(4096));
                bar.set_message(format!("{} on the wire", size(sent_bytes.saturating_add(*received_bytes))));
            }
            Event::Phase { .. } | Event::Round { .. } | Event::Decision(_) => {}
        }
        if let Some(line) = line(event) {
            bar.println(line);
        }
    }
}

/// What stays on a terminal of an event: all but how far it is.
fn line(event: &Event) -> Option<String> {
    Some(match event {
        Event::Started { .. } | Event::Progress { .. } => return None,
        Event::Phase { seconds, phase } => format!("{seconds:9.3} s  {}", phase_line(*phase)),
        Event::Decision(decision) => format!("{:9.3} s  {}", decision.seconds, decision.what),
        Event::Round { number, round } => {
            let predicted = round.predicted_downtime_seconds;
            let predicted =
                predicted.map_or(String::new(), |seconds| format!(", downtime now: {:.1} ms", seconds * 1e3));
            format!(
                "   round {number}: {} of {} pages sent, {} in {:.3} s; {:.0} change a second, the link carries {}/s{predicted}",
                round.pages,
                round.looked_at,
                size(round.bytes),
                round.seconds,
                round.dirty_rate,
                rate(round.rate),
            )
        }
    })
}

/// Bytes a second as people read them.
fn rate(bytes: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
    size(bytes as u64)
}

fn phase_line(phase: Phase) -> String {
    match phase {
        Phase::Sending => "the receiver is there: pages go".to_owned(),
        Phase::Throttled { percent: 0 } => "the guest is let run at its full speed".to_owned(),
        Phase::Throttled { percent } => format!("the guest is slowed down by {percent} %"),
        Phase::Pausing => "the guest is being paused".to_owned(),
        Phase::Paused => "the guest stands still: the last round goes".to_owned(),
        Phase::Offered => "all of it was sent".to_owned(),
        Phase::Ready => "the receiver has all of it, verified and synced".to_owned(),
        Phase::Waiting => "--pause-before-switchover is asked whether to go on".to_owned(),
        Phase::Handed => "handed over: the receiver may start it".to_owned(),
        Phase::Started => "the guest is the receiver's".to_owned(),
        Phase::Filling { pages } => format!("the guest runs there and lacks {pages} pages: they follow"),
        Phase::Filled => "the guest has all of its pages: its memory here can go".to_owned(),
        Phase::Stays => "the guest stays here, and was told to run on".to_owned(),
        Phase::InDoubt => "the receiver does not answer: it is asked where the guest is".to_owned(),
    }
}

/// One line; a reader that went away is no error.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// Bytes as people name them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One JSON line.
pub(crate) fn print_json(value: &impl serde::Serialize) {
    if let Ok(line) = serde_json::to_string(value) {
        // A reader that went away is no reason to stop a transfer.
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }
}

/// Bytes as people read them.
pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// One line for people; nobody needs to read it.
pub(crate) fn warn(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "pagewire: {line}");
}

/// Prints the end of a transfer and writes its report where that was asked for. The guest is where it is: what cannot be
/// written is a warning, and changes no exit code.
///
/// `seen` says that whoever reads it has seen what was decided as it was.
pub(crate) fn finish(outcome: &Outcome, output: &Output, seen: bool) {
    if let Some(path) = &output.report {
        let text = serde_json::to_string_pretty(&outcome.report).map_err(std::io::Error::from);
        if let Err(error) = text.and_then(|text| std::fs::write(path, text + "\n")) {
            warn(&format!("warning: --report {}: {error}", path.display()));
        }
    }
    for warning in &outcome.report.warnings {
        warn(&format!("warning: {warning}"));
    }
    if output.json {
        print_json(&json!({"event": "finished", "report": outcome.report}));
    } else if outcome.error.is_none() {
        let _ = write!(std::io::stdout().lock(), "{}", summary(&outcome.report, seen));
    }
}

/// Draws the rounds where that was asked for. The guest is where it is: a drawing that fails is no failure of its move.
pub(crate) fn draw(report: &Report, path: Option<&Path>) {
    if let Some(path) = path
        && let Err(error) = std::fs::write(path, plot::svg(report))
    {
        warn(&format!("warning: --plot {}: {error}", path.display()));
    }
}

/// A report in a few lines.
fn summary(report: &Report, seen: bool) -> String {
    let Report { pages, wire, .. } = report;
    let verb = if report.role == Role::Sender { "sent" } else { "received" };
    let travelled = wire.sent_bytes.saturating_add(wire.received_bytes);
    let share = 100.0 * travelled as f64 / report.bytes_total.max(1) as f64;
    let mut text = format!(
        "{verb} {}: {} in {:.2} s, {} on the wire ({share:.2} %)\n",
        report.name,
        size(report.bytes_total),
        report.seconds,
        size(travelled)
    );
    let total = report.pages_total;
    let ways = [
        ("zero", pages.zero),
        ("unchanged", pages.base),
        ("found there", pages.reference),
        ("with bytes", pages.inline),
        ("by what differs", pages.delta),
    ];
    let ways = ways.map(|(name, count)| format!("{count} {name}")).join(", ");
    text += &format!("{total} pages: {ways}\n");
    if report.reuse.unverified > 0 {
        text += &format!("{} unchanged pages were taken on trust and never read\n", report.reuse.unverified);
    }
    if report.reuse.unkept > 0 {
        text += &format!("{} pages had changed before they could be kept, and were left out\n", report.reuse.unkept);
    }
    if report.downtime_seconds > 0.0 {
        text += &format!("the guest stood still for {:.1} ms\n", report.downtime_seconds * 1e3);
    }
    text += &faults(&report.faults, report.role);
    for decision in report.decisions.iter().skip(1).filter(|_| !seen) {
        text += &format!("  at {:.3} s: {}\n", decision.seconds, decision.what);
    }
    text
}

/// What came while the guest ran at the receiver, if something did.
fn faults(faults: &Faults, role: Role) -> String {
    let Faults { count, remote, local, background, sessions, lacking, .. } = faults;
    if role == Role::Sender && *sessions > 0 {
        let seconds = faults.seconds;
        return format!(
            "it ran there while its memory followed, for {seconds:.2} s in {sessions} sessions; {count} pages were waited for\n"
        );
    }
    if role == Role::Sender || count.saturating_add(*background).saturating_add(*local) == 0 {
        return String::new();
    }
    let mut text = format!(
        "while it ran here {remote} pages came as it waited for them, {background} in the background, {local} were found \
         here; {lacking} are lacking\n"
    );
    if *count > 0 {
        text += &format!(
            "it waited {:.0} µs (half of the times no longer), {:.0} µs (99 of 100), {:.0} µs (the longest), {:.2} s in all\n",
            faults.p50_us, faults.p99_us, faults.max_us, faults.blocked_seconds
        );
    }
    for waits in &faults.threads {
        text += &format!("  thread {}: {} times, {:.2} s\n", waits.thread, waits.count, waits.seconds);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire::{Decision, Round, ThreadWaits};

    #[test]
    fn a_summary_of_post_copy_says_who_waited() {
        let threads = vec![ThreadWaits { thread: 77, count: 5, seconds: 0.25 }];
        let there = Faults { count: 5, remote: 5, background: 90, p50_us: 150.0, threads, ..Faults::default() };
        let text = faults(&there, Role::Receiver);
        for figure in ["5 pages came as it waited", "90 in the background", "150 µs", "thread 77: 5 times, 0.25 s"] {
            assert!(text.contains(figure), "{figure}: {text}");
        }
        let here = Faults { count: 5, sessions: 3, seconds: 1.5, ..Faults::default() };
        assert!(faults(&here, Role::Sender).contains("1.50 s in 3 sessions; 5 pages"));
        assert_eq!(faults(&Faults::default(), Role::Sender) + &faults(&Faults::default(), Role::Receiver), "");
    }

    #[test]
    fn a_terminal_keeps_a_line_of_all_but_how_far_it_is() {
        let progress = Event::Progress { pages: 1, pages_total: 2, sent_bytes: 3, received_bytes: 4 };
        assert_eq!(line(&progress), None);
        let decision = Decision { seconds: 0.25, what: "after round 1: switch over".to_owned() };
        assert_eq!(line(&Event::Decision(decision)).unwrap(), "    0.250 s  after round 1: switch over");
        let phase = Event::Phase { seconds: 12.0, phase: Phase::Throttled { percent: 30 } };
        assert_eq!(line(&phase).unwrap(), "   12.000 s  the guest is slowed down by 30 %");
        let round = Round {
            pages: 40,
            bytes: 163_840,
            seconds: 0.5,
            dirty_rate: 80.4,
            looked_at: 50,
            dirty: 20,
            rate: 1024.0 * 1024.0,
            predicted_downtime_seconds: Some(0.0123),
        };
        let told = line(&Event::Round { number: 2, round }).unwrap();
        for figure in ["round 2: 40 of 50", "160.0 KiB in 0.500 s", "80 change", "1.0 MiB/s", "12.3 ms"] {
            assert!(told.contains(figure), "{figure}: {told}");
        }
        let last = Round { predicted_downtime_seconds: None, ..round };
        assert!(!line(&Event::Round { number: 3, round: last }).unwrap().contains("downtime"));
    }
}
