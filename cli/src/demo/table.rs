//! The table, for people and for programs.

use super::place::Place;
use super::postcopy::PostCopyLeg;
use super::row::{Leg, Row};
use serde_json::{Value, json};

/// In powers of ten, as the paper's table counts.
pub(super) fn megabytes(bytes: u64) -> String {
    let megabytes = bytes as f64 / 1e6;
    if megabytes < 10.0 { format!("{megabytes:.2} MB") } else { format!("{megabytes:.0} MB") }
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// A column: two lines of heading, and how a row reads.
type Column = (&'static str, &'static str, fn(&Row) -> String);

/// What moved.
const MOVED: [Column; 9] = [
    ("", "guests", |row| row.guests.to_string()),
    ("memory", "in all", |row| megabytes(row.memory_bytes)),
    ("moved", "out", |row| megabytes(row.out.wire_bytes)),
    ("moved", "back", |row| megabytes(row.back.wire_bytes)),
    ("back/out", "bytes", |row| format!("{:.1} %", percent(row.back.wire_bytes, row.out.wire_bytes))),
    ("back/out", "pages", |row| format!("{:.1} %", percent(row.back.pages_travelled, row.out.pages_travelled))),
    ("time", "out", |row| format!("{:.2} s", row.out.seconds)),
    ("time", "back", |row| format!("{:.2} s", row.back.seconds)),
    ("memory", "peak", |row| row.memory_peak_bytes.map_or_else(|| "?".to_owned(), megabytes)),
];

/// How the guests ran meanwhile.
const RAN: [Column; 7] = [
    ("", "guests", |row| row.guests.to_string()),
    ("rounds", "out", |row| rounds(&row.out)),
    ("rounds", "back", |row| rounds(&row.back)),
    ("changed", "out", |row| format!("{:.0} /s", row.out.dirty_pages_a_second)),
    ("changed", "back", |row| format!("{:.0} /s", row.back.dirty_pages_a_second)),
    ("downtime", "out", |row| format!("{:.1} ms", row.out.downtime_seconds_max * 1e3)),
    ("downtime", "back", |row| format!("{:.1} ms", row.back.downtime_seconds_max * 1e3)),
];

/// How one guest moved in post-copy.
const FOLLOWED: [Column; 10] = [
    ("", "guests", |row| row.guests.to_string()),
    ("memory", "of one", |row| of(row, |leg| megabytes(leg.memory_bytes))),
    ("runs", "after", |row| of(row, |leg| format!("{:.1} ms", leg.downtime_seconds * 1e3))),
    ("all there", "after", |row| of(row, |leg| format!("{:.2} s", leg.seconds))),
    ("pages", "touched", |row| of(row, |leg| leg.faults.remote.to_string())),
    ("came by", "itself", |row| of(row, |leg| leg.faults.background.to_string())),
    ("found", "on B", |row| of(row, |leg| leg.faults.local.to_string())),
    ("waits", "p50", |row| of(row, |leg| format!("{:.0} us", leg.faults.p50_us))),
    ("waits", "p99", |row| of(row, |leg| format!("{:.0} us", leg.faults.p99_us))),
    ("waits", "longest", |row| of(row, |leg| format!("{:.0} us", leg.faults.max_us))),
];

/// A cell of the leg in post-copy, where there was one.
fn of(row: &Row, cell: impl Fn(&PostCopyLeg) -> String) -> String {
    row.post_copy.as_ref().map_or_else(|| "-".to_owned(), cell)
}

fn rounds(leg: &Leg) -> String {
    let Leg { rounds_min, rounds_max, .. } = leg;
    if rounds_min == rounds_max { rounds_max.to_string() } else { format!("{rounds_min} to {rounds_max}") }
}

fn table(columns: &[Column], rows: &[Row]) -> String {
    let line = |cell: &dyn Fn(&Column) -> String| {
        let cells: String = columns.iter().map(|column| format!("{:>10}", cell(column))).collect();
        format!("{}\n", cells.get(2..).unwrap_or_default())
    };
    let mut text = line(&|column| column.0.to_owned()) + &line(&|column| column.1.to_owned());
    for row in rows {
        text += &line(&|column| (column.2)(row));
    }
    text
}

/// The table as people read it.
pub(super) fn text(rows: &[Row]) -> String {
    let text = table(&MOVED, rows) + "\n" + &table(&RAN, rows);
    let followed = match rows.iter().any(|row| row.post_copy.is_some()) {
        true => {
            "\none guest of each row moves to B once more, in post-copy: it runs there before its memory comes\n"
                .to_owned()
                + &table(&FOLLOWED, rows)
        }
        false => "\nSKIPPED: no guest moved in post-copy: this system has no userfaultfd for us\n".to_owned(),
    };
    let peak = match rows.iter().all(|row| row.memory_peak_is_of_this_row) {
        true => "of this process with both hosts (VmHWM) in that row",
        false => "of this process with both hosts (VmHWM) since it began",
    };
    text + "\nmoved: bytes on the wire, both directions, uncompressed; back/out, pages: those that travelled with bytes\n\
            time: from connecting to the last guest started on the other host; what the stores still keep then is not in it\n\
            rounds: with the last one, for which a guest stands still; changed: pages that all guests write a second\n\
            downtime: of the guest that stood still for the longest, until it is the other host's\n"
        + &format!("memory peak: {peak}\n")
        + &followed
        + "\nall guests' memory was compared page by page after each leg: equal\n"
}

/// The table with all figures behind it.
pub(super) fn json(place: &Place, rows: &[Row]) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut value = json!(row);
            value["back_percent_of_bytes"] = json!(percent(row.back.wire_bytes, row.out.wire_bytes));
            value["back_percent_of_pages"] = json!(percent(row.back.pages_travelled, row.out.pages_travelled));
            value
        })
        .collect();
    json!({
        "schema": "pagewire.demo/1",
        "scale": place.scale(),
        "in_memory": place.in_memory,
        "equal": true,
        "rows": rows,
    })
}
