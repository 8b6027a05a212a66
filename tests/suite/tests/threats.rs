//! `docs/THREATS.md` against the repository: every file that it names is there, and every test that it cites is in the file
//! that it cites it from.
//!
//! A citation is a span of code: `path::test`, where the path is one from the root or below `tests/suite/tests/`; `test` by
//! itself is in the file that was named last in the same row or paragraph.

use pagewire_test_suite::{read, root};

/// What is named by a word that could be a test's.
const NO_TESTS: &[&str] = &["handover_model"];

/// Rows of tables, and paragraphs.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in text.lines() {
        let goes_on = !line.is_empty() && !line.starts_with(['|', '-', '#']);
        if !goes_on {
            blocks.push(String::new());
        }
        if let Some(block) = blocks.last_mut() {
            *block += &format!("{line}\n");
        }
    }
    blocks
}

/// The spans of code of a block, in order.
fn spans(block: &str) -> Vec<&str> {
    block.split('`').skip(1).step_by(2).collect()
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// A span that says where something is; what others write to is not the repository's.
fn is_path(span: &str) -> bool {
    let is_file = [".rs", ".md", ".toml", ".sh"].iter().any(|ending| span.ends_with(ending));
    let is_plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    is_plain && span.starts_with(|c: char| c.is_ascii_alphanumeric()) && (is_file || span.contains('/'))
}

/// The path from the root of what THREATS names.
fn resolved(path: &str) -> Option<String> {
    [path.to_owned(), format!("tests/suite/tests/{path}")].into_iter().find(|path| root().join(path).exists())
}

/// What is wrong with a test that is cited from a file.
fn missing(file: Option<&str>, test: &str) -> Option<String> {
    let Some(file) = file else { return Some(format!("{test}: no file is named before it")) };
    let text = read(file).unwrap_or_default();
    (!text.contains(&format!("fn {test}("))).then(|| format!("{file}::{test}: no such test"))
}

#[test]
fn every_file_that_is_named_and_every_test_that_is_cited_is_there() {
    let (mut wrong, mut cited) = (Vec::new(), 0);
    for block in blocks(&read("docs/THREATS.md").unwrap()) {
        let mut last: Option<String> = None;
        for span in spans(&block) {
            let (path, test) = match span.split_once("::") {
                Some((path, test)) => (Some(path), Some(test)),
                None if is_path(span) => (Some(span), None),
                None if is_word(span) && span.contains('_') && !NO_TESTS.contains(&span) => (None, Some(span)),
                None => continue,
            };
            if let Some(path) = path {
                last = resolved(path);
                wrong.extend(last.is_none().then(|| format!("{path}: no such file")));
            }
            if let Some(test) = test {
                cited += 1;
                wrong.extend(missing(last.as_deref(), test));
            }
        }
    }
    assert!(cited > 150, "{cited} tests are cited: they are not found");
    assert!(wrong.is_empty(), "docs/THREATS.md cites what is not there:\n  {}", wrong.join("\n  "));
}

#[test]
fn citations_are_told_from_other_code() {
    let block = "| A1 | `ends.rs::a_test`, `another_one`, `--flag`, `/dev/shm`, `GoneAtStarted`, `sender/src/lib.rs` |";
    assert_eq!(spans(block).len(), 6);
    assert!(is_path("sender/src/lib.rs") && is_path("deny.toml") && is_path("protocol/src/handover/"));
    assert!(!is_path("/dev/shm") && !is_path(".device-states/NAME") && !is_path("send --live") && !is_path("touches"));
    assert!(is_word("another_one") && !is_word("GoneAtStarted") && !is_word("READY_SPAN_MAX") && !is_word("sh -c"));
    assert_eq!(resolved("spec.rs").as_deref(), Some("tests/suite/tests/spec.rs"));
    assert_eq!((resolved("nowhere.rs"), missing(None, "a").is_some()), (None, true));
    assert!(missing(Some("tests/suite/tests/threats.rs"), "is_word").is_none());
    assert!(missing(Some("tests/suite/tests/threats.rs"), "is_no_word").is_some());
}
