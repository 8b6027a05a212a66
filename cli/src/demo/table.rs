//! The table, for people and for programs.

use super::place::Place;
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
    let peak = match rows.iter().all(|row| row.memory_peak_is_of_this_row) {
        true => "of this process with both hosts (VmHWM) in that row",
        false => "of this process with both hosts (VmHWM) since it began",
    };
    text + "\nmoved: bytes on the wire, both directions, uncompressed; back/out, pages: those that travelled with bytes\n\
            time: from connecting to the last guest started on the other host; what the stores still keep then is not in it\n\
            rounds: with the last one, for which a guest stands still; changed: pages that all guests write while they move\n\
            downtime: of the guest that stood still for the longest, until it is the other host's\n"
        + &format!("memory peak: {peak}\n")
        + "all guests' memory was compared page by page after each leg: equal\n"
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
