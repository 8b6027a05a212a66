//! `pagewire demo`: 5, 10 and 15 guests that run move from host A to host B at once, are busy there, and move back.
//!
//! It repeats, on one machine, the table of the paper that pagewire comes from. The hosts are two folders, each with a
//! store, a journal and a real receiver on loopback TCP; a guest is a thread that writes to a file that stands for its
//! memory, also while it moves. In the end one guest of each row goes to B once more, in post-copy. After each leg all images are compared page by page: a difference is a failure of the
//! demo, never a footnote.

mod guest;
mod host;
mod peak;
mod place;
mod postcopy;
mod row;
mod running;
mod table;

use crate::args::Demo;
use crate::show::print_json;
use crate::signals;
use anyhow::{Context, Result};
use pagewire::CancellationToken;
use place::Place;
use row::{Row, Scene};
use std::io::Write;
use std::process::ExitCode;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
struct Plan {
    guests: usize,
    /// Of all guests together, at full scale.
    memory: u64,
    /// Of the pages in use, what the guests write anew on host B.
    rewritten_percent: u64,
}

/// Guests, memory and shares are those of the paper's table. There memory ran out at 15 guests, and three times the
/// share came back; here all 15 arrive, so what they write anew has to make that share.
const PLANS: [Plan; 3] = [
    Plan { guests: 5, memory: 587_000_000, rewritten_percent: 20 },
    Plan { guests: 10, memory: 1_143_000_000, rewritten_percent: 20 },
    Plan { guests: 15, memory: 1_874_000_000, rewritten_percent: 60 },
];

/// The code of a demo that somebody stopped: as a shell counts SIGINT.
const CANCELLED: u8 = 130;

/// One line of progress. On standard error, as the table may go elsewhere; a reader that went away is no error.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Runs the demo.
pub(crate) fn run(args: &Demo) -> Result<ExitCode> {
    let cancel = CancellationToken::new();
    // The folder may take gigabytes: it goes away, too, when somebody stops the demo.
    signals::cancel_on_signal(cancel.clone()).context("signals cannot be watched")?;
    let largest = PLANS.iter().map(|plan| plan.memory).max().unwrap_or(0);
    let place = Place::find(args.dir.as_deref(), args.scale, largest)?;
    say(&place.told());
    let rows = rows(&place, &cancel);
    if cancel.is_cancelled() {
        say("pagewire: stopped; what the demo made is removed");
        return Ok(ExitCode::from(CANCELLED));
    }
    let rows = rows?;
    if args.json {
        print_json(&table::json(&place, &rows));
    } else {
        let _ = write!(std::io::stdout().lock(), "{}", table::text(&rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(place: &Place, cancel: &CancellationToken) -> Result<Vec<Row>> {
    let row = |(plan, number): (&Plan, usize)| {
        let title = format!("row {number} of {}, {} guests", PLANS.len(), plan.guests);
        let scene = Scene::set(*plan, place, title.clone(), cancel);
        scene.and_then(|scene| scene.play()).with_context(|| title)
    };
    PLANS.iter().zip(1..).map(row).collect()
}
