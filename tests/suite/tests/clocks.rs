//! C40: the wall clock may jump by years, and nothing is decided by it. Sessions and hand-overs know spans of a monotonic
//! clock only; what the wall clock says is for people, and for nothing that could harm a guest.
#![expect(clippy::panic, reason = "a test that cannot read its inputs has failed")]

use pagewire_test_suite::files;
use std::collections::BTreeSet;
use syn::visit::{self, Visit};

/// What tells of the wall clock, as a path or a method: itself, and times of files, which come from it.
const WALL: &[&str] = &[
    "SystemTime",
    "UNIX_EPOCH",
    "Realtime",
    "RealtimeCoarse",
    "Tai",
    "gettimeofday",
    "UTIME_NOW",
    "modified",
    "accessed",
    "created_at",
    "mtime",
    "mtime_nsec",
    "atime",
    "ctime",
    "st_mtime",
    "st_mtime_nsec",
    "st_atime",
    "st_ctime",
    "chrono",
    "OffsetDateTime",
    "futimens",
    "utimensat",
];

/// Who may look at it, and for what.
const MAY: &[(&str, &str)] = &[
    (
        "store/src/store.rs",
        "a visit's date: for people, and which of several visits is looked at, or makes room, first",
    ),
    ("store/src/visit.rs", "when a visit was last of use: which one makes room first, and no other question"),
    ("sender/src/memory/file.rs", "whether a file's times are those that they were, never which is later"),
];

/// Finds names in paths, fields, methods and imports.
#[derive(Default)]
struct Names(BTreeSet<String>);

impl<'ast> Visit<'ast> for Names {
    fn visit_ident(&mut self, ident: &'ast syn::Ident) {
        self.0.insert(ident.to_string());
    }

    fn visit_macro(&mut self, node: &'ast syn::Macro) {
        // What macros are given is tokens.
        let tokens = node.tokens.to_string();
        let words = tokens.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
        self.0.extend(words.map(str::to_owned));
        visit::visit_macro(self, node);
    }
}

fn names(text: &str) -> BTreeSet<String> {
    let file = syn::parse_file(text).unwrap_or_else(|error| panic!("{error}"));
    let mut names = Names::default();
    names.visit_file(&file);
    names.0
}

fn is_product(path: &str) -> bool {
    let is_test = path.contains("/tests/") || path.starts_with("tests/") || path.ends_with("tests.rs");
    !is_test && !path.starts_with("benches/") && !path.starts_with("fuzz/")
}

#[test]
fn c40_the_wall_clock_is_looked_at_where_nothing_is_decided_by_it() {
    let mut found = BTreeSet::new();
    for file in files(".rs").unwrap().into_iter().filter(|file| is_product(&file.path)) {
        let names = names(&file.text);
        if WALL.iter().any(|word| names.contains(*word)) {
            found.insert(file.path);
        }
    }
    let may: BTreeSet<String> = MAY.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(found, may, "who looks at the wall clock, and who may");
}

/// Nor is it hidden from the test above.
#[test]
fn the_search_sees_what_it_must() {
    for text in [
        "use std::time::{Duration as D, SystemTime as S};",
        "fn a() { let b = std::time::SystemTime::now(); }",
        "fn a(file: File) { println!(\"{}\", file.metadata().unwrap().mtime()); }",
        "fn a() { clock_gettime(ClockId::Realtime); }",
    ] {
        assert!(WALL.iter().any(|word| names(text).contains(*word)), "{text}");
    }
    assert!(!WALL.iter().any(|word| names("fn a() { std::time::Instant::now(); }").contains(*word)));
}
