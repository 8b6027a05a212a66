//! `pagewire demo`, small.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::Value;
use std::fs;
use support::*;

#[test]
fn shows_the_table_with_nothing_prepared() {
    let output = pagewire(&["demo", "--scale", "0.01"]);
    let (said, progress) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{progress}");
    let rows: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    let skipped = progress.contains("SKIPPED: the leg in post-copy");
    for guests in ["5", "10", "15"] {
        // What moved, how they ran meanwhile, and what followed a guest in post-copy.
        let of_these = rows.iter().filter(|row| row.first() == Some(&guests));
        assert_eq!(of_these.filter(|row| row.len() > 10).count(), if skipped { 2 } else { 3 }, "{said}");
    }
    for heading in ["rounds", "changed", "downtime"] {
        assert!(said.lines().any(|line| line.contains(heading)), "{said}");
    }
    assert!(said.contains("compared page by page after each leg: equal"), "{said}");
    let headings = ["waits", "touched", "p99"];
    assert!(
        if skipped { said.contains("SKIPPED") } else { headings.iter().all(|heading| said.contains(heading)) },
        "{said}"
    );
    assert!(progress.contains("scale 0.01") && progress.contains("row 3 of 3, 15 guests: all move back"), "{progress}");
}

#[test]
fn tells_all_figures_as_one_json_object_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let output = pagewire(&["demo", "--scale", "0.02", "--json", "--dir", dir.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&told["schema"], &told["scale"], &told["equal"]),
        (&"pagewire.demo/1".into(), &0.02.into(), &true.into())
    );
    let rows = told["rows"].as_array().unwrap();
    let guests: Vec<u64> = rows.iter().map(|row| row["guests"].as_u64().unwrap()).collect();
    assert_eq!(guests, [5, 10, 15]);
    for (row, share) in rows.iter().zip([21.0, 21.0, 64.0]) {
        let count = |pointer: &str| row.pointer(pointer).and_then(Value::as_u64).unwrap();
        let (pages, rewritten) = (count("/pages_total"), count("/pages_rewritten"));
        assert_eq!(count("/back/pages/inline"), rewritten, "only what was written anew travelled: {row}");
        assert!(count("/out/pages/inline") > pages * 8 / 10, "{row}");
        for of in ["bytes", "pages"] {
            let percent = row[format!("back_percent_of_{of}")].as_f64().unwrap();
            assert!((percent - share).abs() < 4.0, "{of}: {row}");
        }
        assert!(count("/memory_peak_bytes") > 0 && row["out"]["seconds"].as_f64().unwrap() > 0.0);
        for leg in ["out", "back"] {
            let leg = &row[leg];
            let rounds = (leg["rounds_min"].as_u64().unwrap(), leg["rounds_max"].as_u64().unwrap());
            assert!(2 <= rounds.0 && rounds.0 <= rounds.1, "they moved while they ran: {leg}");
            let (downtime, all) = (leg["downtime_seconds_max"].as_f64().unwrap(), leg["seconds"].as_f64().unwrap());
            assert!(0.0 < downtime && downtime < all, "{leg}");
            assert!(leg["dirty_pages_a_second"].as_f64().unwrap() >= 0.0, "{leg}");
            assert!(leg["pages_rewritten"].as_u64().unwrap() > 0, "they wrote before they were paused: {leg}");
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn rejects_a_scale_that_is_none_and_a_folder_that_is_none() {
    for scale in ["0", "1.5", "-1", "NaN", "much"] {
        fails(2, &["demo", &format!("--scale={scale}")]);
    }
    let said = fails(1, &["demo", "--dir", "/nonexistent"]);
    assert!(said.contains("/nonexistent"), "{said}");
}

#[test]
fn runs_as_large_as_there_is_room_for() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mounted) = Mounted::tmpfs(dir.path(), "size=400m") else { return };
    let at = dir.path().to_str().unwrap();
    let said = fails(1, &["demo", "--scale", "1", "--dir", at]);
    assert!(said.contains("--scale 1 is too much") && said.contains(at), "{said}");
    let output = pagewire(&["demo", "--json", "--dir", at]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!((0.005..0.02).contains(&told["scale"].as_f64().unwrap()), "{told}");
    assert!(text(&output.stderr).contains("has room for"), "{}", text(&output.stderr));
}

#[test]
fn a_signal_ends_it_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let running = Running::start(&["demo", "--scale", "0.2", "--dir", dir.path().to_str().unwrap()]);
    wait_until("guests are there", || fs::read_dir(dir.path()).unwrap().count() > 0);
    std::thread::sleep(std::time::Duration::from_millis(500));
    running.signal("-INT");
    let (status, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{said}");
}
