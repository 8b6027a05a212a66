//! `docs/SPEC.md` against the code: every MUST has a place in the code that names it, every place names a clause that
//! exists, and the tables of SPEC hold what the code does.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its inputs has failed")]

use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::FrameKind;
use pagewire_protocol::limits;
use pagewire_protocol::time::Span;
use pagewire_test_suite::{files, read};
use std::collections::{BTreeMap, BTreeSet};

/// Clauses with a MUST that no code names yet. It only ever gets shorter.
const PENDING: &[&str] = &[];

type Number = (u32, u32);

/// A number `n.m` at the start of `text`, and what follows it.
fn number(text: &str) -> Option<(Number, &str)> {
    let digits = |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (section, rest) = text.split_at(digits(text));
    let rest = rest.strip_prefix('.')?;
    let (clause, rest) = rest.split_at(digits(rest));
    Some(((section.parse().ok()?, clause.parse().ok()?), rest))
}

fn shown(numbers: impl IntoIterator<Item = Number>) -> Vec<String> {
    numbers.into_iter().map(|(section, clause)| format!("{section}.{clause}")).collect()
}

/// The clauses of SPEC in their order: `**n.m** text`, up to the next clause or heading.
fn clauses() -> Vec<(Number, String)> {
    let mut clauses: Vec<(Number, String)> = Vec::new();
    let mut inside = false;
    for line in read("docs/SPEC.md").unwrap().lines() {
        let begins = line.strip_prefix("**").and_then(number).filter(|(_, rest)| rest.starts_with("**"));
        if let Some((number, rest)) = begins {
            clauses.push((number, rest.to_owned()));
            inside = true;
        } else if line.starts_with('#') {
            inside = false;
        } else if let Some((_, text)) = clauses.last_mut().filter(|_| inside) {
            text.push_str(line);
            text.push('\n');
        }
    }
    clauses
}

/// Where the code names which clause: `SPEC n.m`, or several with commas between them.
fn named() -> BTreeMap<Number, String> {
    let mut named = BTreeMap::new();
    for file in files(".rs").unwrap() {
        for (line, text) in file.text.lines().enumerate() {
            let mut rest = text;
            while let Some((_, after)) = rest.split_once("SPEC ") {
                rest = after;
                while let Some((number, after)) = number(rest) {
                    named.entry(number).or_insert_with(|| format!("{}:{}", file.path, line + 1));
                    rest = after.strip_prefix(", ").unwrap_or(after);
                }
            }
        }
    }
    named
}

/// The rows of the table of SPEC whose first column is called `first`, cut into cells.
fn table(first: &str) -> Vec<Vec<String>> {
    let spec = read("docs/SPEC.md").unwrap();
    let head = format!("| {first} |");
    let rows =
        spec.lines().skip_while(|line| !line.starts_with(&head)).skip(2).take_while(|line| line.starts_with('|'));
    let cells = |row: &str| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    rows.map(cells).collect()
}

#[test]
fn clauses_are_numbered_without_gaps() {
    let mut expected = (1, 1);
    for (number, _) in clauses() {
        if number.0 == expected.0 + 1 {
            expected = (number.0, 1);
        }
        assert_eq!(number, expected, "after {expected:?} comes {number:?}");
        expected.1 += 1;
    }
    assert_eq!(expected.0, 13, "SPEC has thirteen sections");
}

#[test]
fn every_must_is_named_in_the_code() {
    let named = named();
    let pending: BTreeSet<Number> = PENDING.iter().map(|text| number(text).unwrap().0).collect();
    let musts = clauses().into_iter().filter(|(_, text)| text.contains("MUST")).map(|(number, _)| number);
    let musts: BTreeSet<Number> = musts.collect();
    let open = musts.iter().copied().filter(|number| !named.contains_key(number) && !pending.contains(number));
    assert_eq!(shown(open), [""; 0], "clauses with a MUST that no `SPEC n.m` comment names");
    let stale = pending.into_iter().filter(|number| !musts.contains(number) || named.contains_key(number));
    assert_eq!(shown(stale), [""; 0], "clauses that need not stand in PENDING any more");
}

#[test]
fn every_clause_named_in_the_code_exists() {
    let known: BTreeSet<Number> = clauses().into_iter().map(|(number, _)| number).collect();
    let unknown: Vec<_> = named().into_iter().filter(|(number, _)| !known.contains(number)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[test]
fn clauses_that_spec_refers_to_exist() {
    let known: BTreeSet<Number> = clauses().into_iter().map(|(number, _)| number).collect();
    for (clause, text) in clauses() {
        for word in text.split(|c: char| !(c.is_ascii_digit() || c == '.')) {
            // Numbers with a dot are clauses, all of them: SPEC says versions and fractions in other ways.
            let Some((number, "" | ".")) = number(word) else { continue };
            assert!(known.contains(&number), "{} refers to {word}", shown([clause]).concat());
        }
    }
}

#[test]
fn frame_kinds_are_those_of_the_code() {
    let rows: Vec<_> = table("kind").into_iter().map(|row| row[..3].join(" ")).collect();
    let code: Vec<_> =
        FrameKind::ALL.iter().map(|kind| format!("{} {} {}", kind.0, kind.name(), kind.size_max())).collect();
    assert_eq!(rows, code);
}

#[test]
fn close_codes_are_those_of_the_code() {
    let rows: Vec<_> = table("code").into_iter().map(|row| row[..3].join(" ")).collect();
    let retry = |code: &CloseCode| if code.retry() { "yes" } else { "no" };
    let code: Vec<_> =
        CloseCode::ALL.iter().map(|code| format!("{} {} {}", code.0, code.name(), retry(code))).collect();
    assert_eq!(rows, code);
}

/// The value of a limit in SPEC's units.
trait InUnits {
    fn in_units(self, unit: &str) -> u64;
}

impl InUnits for Span {
    fn in_units(self, unit: &str) -> u64 {
        self.as_nanos() / if unit == "s" { 1_000_000_000 } else { 1_000_000 }
    }
}

macro_rules! count_in_units {
    ($($kind:ty),*) => {
        $(impl InUnits for $kind {
            fn in_units(self, _unit: &str) -> u64 {
                u64::try_from(self).unwrap()
            }
        })*
    };
}

count_in_units!(u8, u32, u64, usize);

/// The limit of this name; a new one has to be added to SPEC and here.
fn limit(name: &str, unit: &str) -> Option<u64> {
    macro_rules! limits {
        ($($name:ident)*) => {
            match name {
                $(stringify!($name) => Some(limits::$name.in_units(unit)),)*
                _ => None,
            }
        };
    }
    limits! {
        PAGE_BYTES SUBTREE_PAGES SUBTREE_BYTES BATCH_PAGES_MAX COVER_PAGES_MAX RUNS_MAX PAGES_BODY_MAX CONTROL_BODY_MAX
        REGIONS_MAX IMAGE_PAGES_MAX IMAGE_BYTES_DEFAULT NAME_BYTES_MAX REASON_BYTES_MAX AGENT_BYTES_MAX EXTENSIONS_MAX
        EXTENSION_BYTES_MAX BULK_LANES_MAX HAVE_DIGESTS_MAX ROOTS_MAX WANTS_MAX WANTS_A_PAGE_MAX WAITING_PAGES_MAX
        WINDOW_BYTES ACK_BYTES ACK_DELAY_MAX HANDSHAKE_SPAN_MAX JOIN_SPAN_MAX PING_AFTER SILENCE_MAX STALL_SPAN_MAX PROGRESS_SPAN PROGRESS_BYTES_MIN
        HANDOVERS_MAX EPOCH_STEP_MAX BLOBS_MAX BLOB_BYTES_MAX BLOB_PART_BYTES_MAX
        LACKING_BYTES_MAX FAULTS_A_PAGE_MAX AHEAD_RUNS_MAX FIRST_TOUCHES_MAX
    }
}

#[test]
fn limits_are_those_of_the_code() {
    let rows = table("limit");
    for row in &rows {
        let [name, value, unit, ..] = row.as_slice() else { panic!("{row:?}") };
        assert_eq!(limit(name, unit), Some(value.parse().unwrap()), "{name} in {unit}");
    }
    let listed: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
    let code = read("protocol/src/limits.rs").unwrap();
    let consts = code.lines().filter_map(|line| line.strip_prefix("pub const ")?.split(':').next());
    let unlisted: Vec<&str> = consts.filter(|name| !listed.contains(name)).collect();
    assert!(unlisted.is_empty(), "not in SPEC 9.1's table: {unlisted:?}");
}
