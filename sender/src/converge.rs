//! What comes after a round: a pure function of what was measured and of what the caller allows.
//!
//! The prediction rests on the last round: what a page that had to be looked at cost in time and in bytes, and how fast
//! bytes reach the receiver. The sender pauses the guest only when what is left fits the downtime; where one more round
//! would leave less than half of that, it is made first.

use pagewire_protocol::time::Span;

/// What to do when the limits are reached and the guest cannot be stopped for as short as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtLimit {
    /// Give up; the guest runs on where it is.
    Cancel,
    /// Switch over all the same, however long it takes.
    Force,
    /// Let it run at the receiver while the rest follows.
    PostCopy,
}

/// What the caller allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest the guest may stand still.
    pub downtime: Span,
    /// Rounds at most, the last one not counted.
    pub rounds: u32,
    /// Time from the first page to the switchover.
    pub total: Option<Span>,
    /// What to do when one of them is reached, or the guest writes faster than it can be followed.
    pub at_limit: AtLimit,
    /// The guest can be slowed down.
    pub throttles: bool,
    /// Pages that the guest writes all the time wait for the last round, if all of them fit the downtime. Otherwise each
    /// round sends them again, which only costs where somebody else needs them early.
    pub defer_hot: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Span::from_millis(300),
            rounds: 30,
            total: None,
            at_limit: AtLimit::Cancel,
            throttles: false,
            defer_hot: true,
        }
    }
}

/// What is known when a round has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Facts {
    /// The round, counted from 0.
    pub round: u32,
    /// Since the session began to send.
    pub elapsed: Span,
    /// How long the last round would take with the guest standing still, and what is under way before it.
    pub predicted: Span,
    /// The same after another round, during which the guest goes on writing as it does.
    pub after_another: Span,
    /// A round was made already though what was left fitted the downtime.
    pub shortened: bool,
    /// Pages that changed, a second.
    pub dirty_rate: f64,
    /// Bytes that reach the receiver, a second.
    pub rate: f64,
    /// Rounds in a row, this one the last, that left nearly as much to send as they had sent.
    pub stuck: u32,
    /// How much the guest is slowed down, in per cent.
    pub throttled: u8,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Another round.
    Again,
    /// Another round, with the guest slowed down to so many per cent less.
    Throttle(u8),
    /// Pause the guest and send the rest.
    SwitchOver,
    /// As that, though it will take longer than it should.
    Force(Reason),
    /// Let the guest run at the receiver while the rest follows.
    PostCopy(Reason),
    /// Leave it where it is.
    GiveUp(Reason),
}

/// Why the downtime cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest changes pages as fast as they are sent.
    Dirtying,
    /// There were as many rounds as are allowed.
    Rounds,
    /// It took as long as is allowed.
    Total,
    /// Nobody tells what the guest writes, and reading all of its memory again takes longer than it may stand still.
    Scan,
}

impl Verdict {
    /// The same, for another reason.
    #[must_use]
    pub fn because(self, reason: Reason) -> Self {
        match self {
            Self::Force(_) => Self::Force(reason),
            Self::PostCopy(_) => Self::PostCopy(reason),
            Self::GiveUp(_) => Self::GiveUp(reason),
            verdict => verdict,
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dirtying => "the guest writes faster than it can be followed",
            Self::Rounds => "the rounds that are allowed are over",
            Self::Total => "the time that is allowed is over",
            Self::Scan => {
                "nobody tells what the guest writes, and to read all of its memory again takes longer than that"
            }
        })
    }
}

/// A round that leaves more than this share of what it sent brings the end no nearer.
pub(crate) const STUCK_SHARE: f64 = 0.9;
/// Such rounds in a row until it is believed: one can be chance.
const STUCK_ROUNDS: u32 = 2;
/// A downtime that is not worth another round: records and messages of a hand-over take as long.
const SHORTENED_FROM: Span = Span::from_millis(3);
/// How much a guest is slowed down at first and then in each step, and at most, in per cent: QEMU's figures.
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const THROTTLE_MAX: u8 = 99;

/// Decides what comes after a round.
pub fn decide(facts: &Facts, limits: &Limits) -> Verdict {
    let rounds_are_over = facts.round.saturating_add(1) >= limits.rounds;
    if facts.predicted <= limits.downtime {
        // It takes as long as the downtime that it shortens, and the guest runs meanwhile. One is the most that is worth
        // its bytes: a second one has less than half to gain.
        let pays = facts.after_another + facts.after_another <= facts.predicted && facts.predicted >= SHORTENED_FROM;
        let in_time = limits.total.is_none_or(|total| facts.elapsed + facts.predicted < total);
        let again = pays && in_time && !facts.shortened && !rounds_are_over;
        return if again { Verdict::Again } else { Verdict::SwitchOver };
    }
    let reason = if rounds_are_over {
        Reason::Rounds
    } else if limits.total.is_some_and(|total| facts.elapsed >= total) {
        Reason::Total
    } else if facts.stuck >= STUCK_ROUNDS {
        if limits.throttles && facts.throttled < THROTTLE_MAX {
            let next =
                if facts.throttled == 0 { THROTTLE_FIRST } else { facts.throttled.saturating_add(THROTTLE_STEP) };
            return Verdict::Throttle(next.min(THROTTLE_MAX));
        }
        Reason::Dirtying
    } else {
        return Verdict::Again;
    };
    match limits.at_limit {
        AtLimit::Cancel => Verdict::GiveUp(reason),
        AtLimit::Force => Verdict::Force(reason),
        AtLimit::PostCopy => Verdict::PostCopy(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(round: u32, predicted: u64, stuck: u32) -> Facts {
        let predicted = Span::from_millis(predicted);
        Facts { round, predicted, after_another: predicted, stuck, ..Facts::default() }
    }

    #[test]
    fn switches_over_as_soon_as_the_rest_fits_the_downtime() {
        let limits = Limits::default();
        assert_eq!(decide(&facts(0, 300, 0), &limits), Verdict::SwitchOver);
        assert_eq!(decide(&facts(0, 301, 0), &limits), Verdict::Again);
        assert_eq!(decide(&facts(40, 299, 9), &limits), Verdict::SwitchOver, "whatever else is over");
    }

    #[test]
    fn makes_one_more_round_where_that_halves_the_downtime() {
        let limits = Limits { rounds: 5, total: Some(Span::from_secs(9)), ..Limits::default() };
        let facts = Facts { after_another: Span::from_millis(40), elapsed: Span::from_secs(8), ..facts(1, 80, 0) };
        let on = |facts: Facts| decide(&facts, &limits);
        assert_eq!(on(facts), Verdict::Again);
        assert_eq!(
            on(Facts { after_another: Span::from_millis(41), ..facts }),
            Verdict::SwitchOver,
            "it gains too little"
        );
        assert_eq!(on(Facts { shortened: true, ..facts }), Verdict::SwitchOver, "one was made");
        assert_eq!(on(Facts { round: 4, ..facts }), Verdict::SwitchOver, "no round is left");
        let late = Span::from_millis(8_920);
        assert_eq!(on(Facts { elapsed: late, ..facts }), Verdict::SwitchOver, "it would end too late");
        let short = Facts { predicted: Span::from_millis(2), after_another: Span::ZERO, ..facts };
        assert_eq!(on(short), Verdict::SwitchOver, "there is nothing to gain");
    }

    #[test]
    fn does_at_the_limit_as_it_was_told() {
        let at = |at_limit, facts: Facts| decide(&facts, &Limits { at_limit, rounds: 5, ..Limits::default() });
        assert_eq!(at(AtLimit::Cancel, facts(3, 999, 1)), Verdict::Again);
        assert_eq!(at(AtLimit::Cancel, facts(4, 999, 0)), Verdict::GiveUp(Reason::Rounds));
        assert_eq!(at(AtLimit::Force, facts(4, 999, 0)), Verdict::Force(Reason::Rounds));
        assert_eq!(at(AtLimit::PostCopy, facts(2, 999, 2)), Verdict::PostCopy(Reason::Dirtying));
        let late = Facts { elapsed: Span::from_secs(9), ..facts(1, 999, 0) };
        let limits = Limits { total: Some(Span::from_secs(9)), ..Limits::default() };
        assert_eq!(decide(&late, &limits), Verdict::GiveUp(Reason::Total));
        assert_eq!(decide(&Facts { elapsed: Span::from_secs(8), ..late }, &limits), Verdict::Again);
    }

    #[test]
    fn slows_a_guest_down_step_by_step_before_it_gives_up() {
        let limits = Limits { throttles: true, ..Limits::default() };
        let mut throttled = 0;
        let mut steps = Vec::new();
        while let Verdict::Throttle(next) = decide(&Facts { throttled, ..facts(3, 999, 2) }, &limits) {
            steps.push(next);
            throttled = next;
        }
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        let end = decide(&Facts { throttled, ..facts(12, 999, 2) }, &limits);
        assert_eq!(end, Verdict::GiveUp(Reason::Dirtying));
    }
}
