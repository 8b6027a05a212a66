//! The rounds of a guest that runs, drawn: an SVG of two panels over time, from the report alone.
//!
//! Above are pages, sent and left, on a logarithmic scale, because rounds differ by powers of ten; below are bytes a
//! second, what the guest changes against what the link carries, on a linear one, because there a difference of two
//! decides. Every number that is drawn is finite, and every text that is not ours is escaped.

use pagewire::{Report, Round};
use std::fmt::Write;

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 856.0;
/// Top and bottom of the panel of pages.
const PAGES: (f64, f64) = (96.0, 272.0);
/// Top and bottom of the panel of bytes a second.
const RATES: (f64, f64) = (312.0, 488.0);
/// A round that took next to no time is as wide as this.
const ROUND_WIDTH_MIN: f64 = 2.0;
/// What the word takes: it stays right of the axis.
const SWITCHOVER_WIDTH: f64 = 72.0;
const PAGE_BYTES: f64 = 4096.0;

/// Colours by the reader's scheme; what has two colours differs in shape as well.
const STYLE: &str = "<style>
svg { --paper: #fff; --ink: #222; --grid: #ddd; --sent: #9db8d9; --left: #b4440c; --dirty: #b4440c; --link: #2361a8; \
--stop: #8a1c5c; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --paper: #16181c; --ink: #e4e4e4; --grid: #3a3d44; --sent: #40618c; \
--left: #ff9d5c; --dirty: #ff9d5c; --link: #7db4f5; --stop: #f08cc8; } }
text { fill: var(--ink); } .title { font-size: 15px; font-weight: 600; } .paper { fill: var(--paper); }
.grid { stroke: var(--grid); } .sent { fill: var(--sent); } .left { fill: var(--left); stroke: var(--left); }
path { fill: none; stroke-width: 2; } .dirty { stroke: var(--dirty); stroke-dasharray: 5 3; } .link { stroke: var(--link); }
.stop { stroke: var(--stop); stroke-dasharray: 2 3; } text.stop { stroke: none; fill: var(--stop); }
</style>
";

/// Draws the rounds of a live session, also of one that failed.
pub(crate) fn svg(report: &Report) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <title>{}</title>\n{STYLE}<rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n",
        escape(&report.name)
    );
    text(&mut out, (LEFT, 26.0), "title", "start", &report.name);
    text(&mut out, (LEFT, 46.0), "how", "start", &headline(report));
    if report.rounds.is_empty() {
        text(&mut out, (WIDTH / 2.0, HEIGHT / 2.0), "none", "middle", "no round was finished: nothing to draw");
    } else {
        let plot = Plot::new(&report.rounds);
        legend(&mut out);
        plot.axes(&mut out);
        plot.rounds(&mut out);
    }
    out + "</svg>\n"
}

/// How it ended, and the two downtimes.
fn headline(report: &Report) -> String {
    let judged = report.rounds.iter().rev().find(|round| !is_last(round));
    let predicted = judged.and_then(|round| round.predicted_downtime_seconds);
    let predicted = predicted.map_or("unknown".to_owned(), milliseconds);
    let real = match finite(report.downtime_seconds) {
        seconds if seconds > 0.0 => milliseconds(seconds),
        _ => "none".to_owned(),
    };
    format!("{}, guest: {}; downtime: predicted {predicted}, real {real}", report.outcome, report.guest_at)
}

/// The round in which the guest stood still left nothing, and nothing was expected of another.
fn is_last(round: &Round) -> bool {
    round.dirty == 0 && round.predicted_downtime_seconds.is_none()
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", finite(seconds * 1e3))
}

fn finite(number: f64) -> f64 {
    if number.is_finite() { number.max(0.0) } else { 0.0 }
}

/// The scales.
struct Plot<'a> {
    rounds: &'a [Round],
    seconds: f64,
    /// Decades of the pages' scale.
    decades: f64,
    /// Bytes a second at the top.
    rate: f64,
}

impl<'a> Plot<'a> {
    fn new(rounds: &'a [Round]) -> Self {
        let most = rounds.iter().map(|round| round.pages.max(round.dirty)).max().unwrap_or(0);
        let fastest = rounds.iter().map(|round| dirtied(round).max(finite(round.rate))).fold(0.0, f64::max);
        Self {
            rounds,
            seconds: finite(rounds.iter().map(|round| finite(round.seconds)).sum()).max(1e-9),
            decades: (most as f64 + 1.0).log10().ceil().max(1.0),
            rate: fastest.max(1.0),
        }
    }

    fn x(&self, seconds: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (seconds / self.seconds).min(1.0)
    }

    fn pages(&self, pages: u64) -> f64 {
        PAGES.1 - (PAGES.1 - PAGES.0) * (pages as f64 + 1.0).log10() / self.decades
    }

    fn rate(&self, rate: f64) -> f64 {
        RATES.1 - (RATES.1 - RATES.0) * (rate / self.rate)
    }

    fn axes(&self, out: &mut String) {
        text(out, (LEFT, PAGES.0 - 8.0), "unit", "start", "pages of 4 KiB");
        for decade in (0..20).map(f64::from).take_while(|decade| *decade <= self.decades) {
            // The scale is of one page more than there are, so that zero has a place on it.
            let label = if decade == 0.0 { "0".to_owned() } else { short(10f64.powf(decade)) };
            grid(out, PAGES.1 - (PAGES.1 - PAGES.0) * decade / self.decades, &label);
        }
        text(out, (LEFT, RATES.0 - 8.0), "unit", "start", "bytes a second");
        for at in ticks(self.rate) {
            grid(out, self.rate(at), &short(at));
        }
        for at in ticks(self.seconds) {
            text(out, (self.x(at), RATES.1 + 18.0), "tick", "middle", &plain(at));
        }
        text(out, (RIGHT, RATES.1 + 38.0), "unit", "end", "seconds since round 0 began");
    }

    fn rounds(&self, out: &mut String) {
        let (mut since, mut dirty, mut link) = (0.0, String::new(), String::new());
        for (number, round) in self.rounds.iter().enumerate() {
            let until = since + finite(round.seconds);
            let start = self.x(since).min(RIGHT - ROUND_WIDTH_MIN);
            let end = self.x(until).max(start + ROUND_WIDTH_MIN);
            let last = number > 0 && is_last(round);
            let (top, width) = (self.pages(round.pages), end - start);
            let _ = write!(
                out,
                "<g class=\"round\"><title>{}</title>\
                 <rect class=\"sent\" x=\"{start:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{:.1}\"/>",
                told(number, round, last),
                PAGES.1 - top
            );
            let left = self.pages(round.dirty);
            let _ = writeln!(out, "<circle class=\"left\" cx=\"{end:.1}\" cy=\"{left:.1}\" r=\"3\"/></g>");
            if last {
                switchover(out, start);
            } else {
                step(&mut dirty, self.rate(dirtied(round)), start, end);
            }
            step(&mut link, self.rate(finite(round.rate)), start, end);
            since = until;
        }
        for (class, path) in [("link", link), ("dirty", dirty)].iter().filter(|(_, path)| !path.is_empty()) {
            let _ = writeln!(out, "<path class=\"{class}\" d=\"{path}\"/>");
        }
    }
}

/// Bytes a second that the guest changes.
fn dirtied(round: &Round) -> f64 {
    finite(finite(round.dirty_rate) * PAGE_BYTES)
}

fn step(path: &mut String, y: f64, start: f64, end: f64) {
    let move_or_line = if path.is_empty() { 'M' } else { 'L' };
    let _ = write!(path, "{move_or_line}{start:.1} {y:.1}H{end:.1}");
}

/// What a pointer that rests on a round shows.
fn told(number: usize, round: &Round, last: bool) -> String {
    let name = if last { "switchover, round" } else { "round" };
    format!(
        "{name} {number}: {} pages sent in {} s, {} left; the guest changes {}B a second, the link carries {}B",
        round.pages,
        plain(finite(round.seconds)),
        round.dirty,
        short(dirtied(round)),
        short(finite(round.rate))
    )
}

fn switchover(out: &mut String, x: f64) {
    for (top, bottom) in [PAGES, RATES] {
        let _ = writeln!(out, "<line class=\"stop\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>");
    }
    text(out, ((x - 4.0).max(LEFT + SWITCHOVER_WIDTH), PAGES.0 + 12.0), "stop", "end", "switchover");
}

fn legend(out: &mut String) {
    let y = 66.0;
    let _ = writeln!(
        out,
        "<rect class=\"sent\" x=\"{LEFT}\" y=\"{}\" width=\"14\" height=\"10\"/>\
         <circle class=\"left\" cx=\"237\" cy=\"{y}\" r=\"3\"/>\
         <path class=\"dirty\" d=\"M390 {y}h22\"/><path class=\"link\" d=\"M570 {y}h22\"/>",
        y - 5.0
    );
    let names =
        [(96.0, "pages sent"), (246.0, "pages left"), (418.0, "changed by the guest"), (598.0, "carried by the link")];
    for (x, name) in names {
        text(out, (x, y + 4.0), "legend", "start", name);
    }
}

fn grid(out: &mut String, y: f64, label: &str) {
    let _ = writeln!(out, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
    text(out, (LEFT - 8.0, y + 4.0), "tick", "end", label);
}

/// Round numbers from zero to `most`: at most six of them.
fn ticks(most: f64) -> impl Iterator<Item = f64> {
    let unit = 10f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|times| times * unit).into_iter().find(|step| most / step <= 5.0);
    let step = step.unwrap_or(most);
    (0..=5).map(move |at| f64::from(at) * step).take_while(move |at| *at <= most)
}

/// A number with at most three digits that matter and the prefix of its power of a thousand.
fn short(number: f64) -> String {
    let prefixes = [
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
        (1e-9, "n"),
    ];
    let fits = prefixes.into_iter().find(|(scale, _)| number >= scale * 0.9995);
    let (scale, prefix) = fits.unwrap_or((1.0, ""));
    let scaled = number / scale;
    if scaled >= 1e4 {
        return format!("{scaled:.1e}{prefix}");
    }
    let places = if scaled >= 99.95 {
        0
    } else if scaled >= 9.995 {
        1
    } else {
        2
    };
    trimmed(format!("{scaled:.places$}")) + prefix
}

/// A number of seconds, to the microsecond.
fn plain(number: f64) -> String {
    if number >= 1e6 { short(number) } else { trimmed(format!("{number:.6}")) }
}

/// Without the zeros that say nothing.
fn trimmed(digits: String) -> String {
    if !digits.contains('.') {
        return digits;
    }
    digits.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn text(out: &mut String, (x, y): (f64, f64), class: &str, anchor: &str, what: &str) {
    let what = escape(what);
    let _ = writeln!(out, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>");
}

/// As XML may hold it: its own signs by name, and what it may not hold at all replaced.
fn escape(what: &str) -> String {
    let mut out = String::with_capacity(what.len());
    for sign in what.chars() {
        match sign {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            sign if sign.is_control() => out.push('\u{fffd}'),
            sign => out.push(sign),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "test code: a failed expectation is a failed test")]
mod tests {
    use super::*;
    use pagewire::{Faults, Pages, ReuseCounts, Role, WireBytes};

    fn round(pages: u64, seconds: f64, dirty: u64, predicted: Option<f64>) -> Round {
        let rate = 1e8;
        let (bytes, looked_at) = (pages * 4096, pages);
        Round {
            pages,
            bytes,
            seconds,
            dirty_rate: 5000.0,
            looked_at,
            dirty,
            rate,
            predicted_downtime_seconds: predicted,
        }
    }

    fn report(name: &str, rounds: Vec<Round>) -> Report {
        Report {
            schema: "pagewire.report/1",
            role: Role::Sender,
            outcome: "done",
            guest_at: "receiver",
            error: None,
            name: name.to_owned(),
            seconds: 3.0,
            downtime_seconds: 0.0987,
            bytes_total: 1 << 30,
            pages_total: 1 << 18,
            pages: Pages::default(),
            wants: 0,
            wire: WireBytes::default(),
            rounds,
            faults: Faults::default(),
            image: None,
            decisions: Vec::new(),
            reuse: ReuseCounts::default(),
            warnings: Vec::new(),
        }
    }

    fn moved() -> Report {
        let rounds = vec![
            round(262_144, 10.5, 40_000, Some(1.6)),
            round(40_000, 1.6, 900, Some(0.09)),
            Round { dirty_rate: 0.0, ..round(900, 0.04, 0, None) },
        ];
        report("guest-7", rounds)
    }

    /// Elements that open and close as they should, quoted attributes, no sign out of place: well enough formed for what
    /// is written here. Returns the elements' names and attributes.
    fn elements(svg: &str) -> Vec<(String, Vec<(String, String)>)> {
        let (mut open, mut seen) = (Vec::<String>::new(), Vec::new());
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let (between, tag) = rest.split_at(at);
            is_text(between);
            assert!(!open.is_empty() || between.trim().is_empty(), "text outside of the root: {between}");
            let end = tag.find('>').unwrap();
            let inside = &tag[1..end];
            rest = &tag[end + 1..];
            if let Some(name) = inside.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
                continue;
            }
            let alone = inside.ends_with('/');
            let inside = inside.strip_suffix('/').unwrap_or(inside);
            let (name, mut attributes) = inside.split_once(' ').unwrap_or((inside, ""));
            let mut pairs = Vec::new();
            while let Some((key, behind)) = attributes.split_once("=\"") {
                let (value, behind) = behind.split_once('"').unwrap();
                assert!(key.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{key}");
                is_text(value);
                pairs.push((key.to_owned(), value.to_owned()));
                attributes = behind.trim_start();
            }
            assert!(attributes.is_empty(), "{attributes}");
            assert!(!open.is_empty() || seen.is_empty(), "two roots");
            seen.push((name.to_owned(), pairs));
            if !alone {
                open.push(name.to_owned());
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
        seen
    }

    fn is_text(text: &str) {
        assert!(!text.contains(['<', '>']), "{text}");
        assert!(text.chars().all(|sign| sign == '\n' || !sign.is_control()), "{text}");
        for name in text.split('&').skip(1) {
            let name = name.split_once(';').unwrap_or_else(|| panic!("a bare & in {text}")).0;
            assert!(["amp", "lt", "gt", "quot"].contains(&name), "{name}");
        }
    }

    /// Every coordinate is a number and lies on the paper.
    fn assert_drawable(svg: &str) {
        for (name, attributes) in elements(svg) {
            for (key, value) in attributes {
                let numbers: Vec<f64> = match key.as_str() {
                    "x" | "y" | "x1" | "x2" | "y1" | "y2" | "cx" | "cy" | "r" | "width" | "height" => {
                        vec![value.parse().unwrap()]
                    }
                    "d" => value
                        .split(['M', 'L', 'H', 'h', ' '])
                        .filter(|part| !part.is_empty())
                        .map(|part| part.parse().unwrap())
                        .collect(),
                    _ => continue,
                };
                assert!(numbers.iter().all(|number| (0.0..=WIDTH).contains(number)), "{name} {key}: {value}");
            }
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn draws_every_round_with_axes_legend_and_both_downtimes() {
        let svg = svg(&moved());
        assert_drawable(&svg);
        let rounds = elements(&svg).iter().filter(|(name, _)| name == "g").count();
        assert_eq!(rounds, 3);
        assert!(svg.contains("<title>round 1: 40000 pages sent in 1.6 s, 900 left"), "{svg}");
        assert!(svg.contains("<title>switchover, round 2: 900 pages sent in 0.04 s, 0 left"), "{svg}");
        assert_eq!(svg.matches(">switchover</text>").count(), 1);
        assert!(svg.contains("done, guest: receiver; downtime: predicted 90.0 ms, real 98.7 ms"), "{svg}");
        for words in
            ["guest-7", "pages of 4 KiB", "bytes a second", "seconds since round 0 began", "carried by the link"]
        {
            assert!(svg.contains(words), "{words}");
        }
    }

    #[test]
    fn bars_follow_each_other_and_end_where_the_time_does() {
        let svg = svg(&moved());
        let of = |pairs: &[(String, String)], key: &str| {
            pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.parse::<f64>().unwrap())
        };
        let elements = elements(&svg);
        let bars: Vec<(f64, f64)> = elements
            .iter()
            .skip_while(|(name, _)| name != "g")
            .filter(|(name, _)| name == "rect")
            .map(|(_, pairs)| (of(pairs, "x").unwrap(), of(pairs, "width").unwrap()))
            .collect();
        assert_eq!(bars.len(), 3);
        assert!((bars[0].0 - LEFT).abs() < 0.1);
        for pair in bars.windows(2) {
            assert!((pair[0].0 + pair[0].1 - pair[1].0).abs() <= 0.2, "{bars:?}");
        }
        assert!((bars[2].0 + bars[2].1 - RIGHT).abs() <= 0.2, "{bars:?}");
    }

    #[test]
    fn a_session_that_failed_is_drawn_without_a_switchover() {
        let failed = Report { outcome: "failed", guest_at: "sender", downtime_seconds: 0.0, ..moved() };
        let rounds = failed.rounds[..2].to_vec();
        let svg = svg(&Report { rounds, ..failed });
        assert_drawable(&svg);
        assert_eq!(svg.matches("class=\"round\"").count(), 2);
        assert!(!svg.contains(">switchover<"));
        assert!(svg.contains("failed, guest: sender; downtime: predicted 90.0 ms, real none"), "{svg}");
    }

    #[test]
    fn says_so_when_there_is_no_round() {
        let svg = svg(&report("guest", Vec::new()));
        assert_drawable(&svg);
        assert!(svg.contains("no round was finished: nothing to draw"));
        assert!(!svg.contains("class=\"round\""));
    }

    #[test]
    fn numbers_stay_finite_whatever_was_measured() {
        for odd in [0.0, f64::INFINITY, f64::NAN, f64::MAX, f64::MIN_POSITIVE, -1.0] {
            let odd_round = |pages, dirty| Round {
                pages,
                seconds: odd,
                dirty,
                dirty_rate: odd,
                rate: odd,
                predicted_downtime_seconds: Some(odd),
                ..Round::default()
            };
            let rounds = vec![odd_round(0, 0), odd_round(u64::MAX, u64::MAX), round(1, 1.0, 1, None), odd_round(3, 0)];
            let svg = svg(&Report { downtime_seconds: odd, ..report("guest", rounds) });
            assert_drawable(&svg);
            assert_eq!(svg.matches("class=\"round\"").count(), 4, "{odd}");
        }
        assert_drawable(&svg(&report("guest", vec![Round::default(); 300])));
    }

    #[test]
    fn escapes_names() {
        let svg = svg(&report("</title><script>&\"'\u{0}\u{1b}\u{ffff}", moved().rounds));
        assert_drawable(&svg);
        assert!(!svg.contains("<script"));
        assert!(svg.contains("&lt;/title&gt;&lt;script&gt;&amp;&quot;'\u{fffd}\u{fffd}\u{fffd}"), "{svg}");
    }

    #[test]
    fn shortens_numbers_by_powers_of_a_thousand() {
        for (number, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (999.0, "999"),
            (1000.0, "1k"),
            (1536.0, "1.54k"),
            (2.5e8, "250M"),
            (12.34e9, "12.3G"),
        ] {
            assert_eq!(short(number), text);
        }
        assert_eq!(ticks(10.0).map(plain).collect::<Vec<_>>(), ["0", "2", "4", "6", "8", "10"]);
    }
}
