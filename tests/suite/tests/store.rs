//! `docs/STORE.md` against the code: clauses without gaps, and a place in the code for every MUST.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot read its inputs has failed")]

use pagewire_test_suite::{files, read};
use std::collections::BTreeSet;

/// The clauses in their order: number and text.
fn clauses() -> Vec<(String, String)> {
    let text = read("docs/STORE.md").unwrap();
    let parts = text.split("\n**").skip(1).filter_map(|part| part.split_once("**"));
    let is_number = |text: &str| text.split('.').count() == 2 && text.chars().all(|c| c.is_ascii_digit() || c == '.');
    parts.filter(|(number, _)| is_number(number)).map(|(number, text)| (number.to_owned(), text.to_owned())).collect()
}

#[test]
fn clauses_are_numbered_without_gaps() {
    let mut expected = (1, 1);
    for (number, _) in clauses() {
        let next =
            [expected, (expected.0 + 1, 1)].into_iter().find(|(section, at)| number == format!("{section}.{at}"));
        let (section, at) = next.unwrap_or_else(|| panic!("{number} does not follow"));
        expected = (section, at + 1);
    }
    assert!(expected > (5, 1));
}

#[test]
fn every_must_has_a_place_in_the_code_and_every_place_a_clause() {
    let mut named = BTreeSet::new();
    for file in files(".rs").unwrap().into_iter().filter(|file| file.path.starts_with("store/src/")) {
        for part in file.text.split("// STORE ").skip(1) {
            let end = part.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(part.len());
            named.insert(part[..end].trim_end_matches('.').to_owned());
        }
    }
    let all: BTreeSet<String> = clauses().into_iter().map(|(number, _)| number).collect();
    let must: BTreeSet<String> =
        clauses().into_iter().filter(|(_, text)| text.contains("MUST")).map(|(number, _)| number).collect();
    assert_eq!(must.difference(&named).collect::<Vec<_>>(), Vec::<&String>::new(), "no place in the code");
    assert_eq!(named.difference(&all).collect::<Vec<_>>(), Vec::<&String>::new(), "no such clause");
}
