//! Live sessions by seed: a guest that writes in one of four patterns, and up to two of the project's fault points, each by
//! its name. First a phase in which anything may break and nobody may be harmed; then hosts that crashed are back, and
//! what stayed has to arrive.
//!
//! `PAGEWIRE_SEEDS` says how many there are, `PAGEWIRE_SEED` runs one alone; a seed and a commit replay everything.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{FrameKind, ImageName, LaneId, Role};
use pagewire_protocol::handover::{RecordKind, Word};
use pagewire_protocol::limits::STALL_SPAN_MAX;
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::time::{Span, Time};
use pagewire_sender::converge::{AtLimit, Limits};
use pagewire_sender::{ErrorKind, Tracking};
use pagewire_test_support::attempt::{Attempt, End};
use pagewire_test_support::guest::{Guest, Pattern};
use pagewire_test_support::host::{Lease, Point};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::Cut;
use pagewire_test_support::memory::{ImageBase, ImageSink, Neighbour, SinkFaults};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Decision, Fate, Harm, Outcome, When, WorldConfig};
use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::Mutex;

/// The project's fault points of live sessions that are not over a transport's own handshake (C03), and of a process that
/// stands still (C40).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    C01,
    C02,
    C04,
    C05,
    C06,
    C07,
    C08,
    C09,
    C10,
    C11,
    C12,
    C13,
    C14,
    C15,
    C16,
    C17,
    C18,
    C19,
    C20,
    C21,
    C22,
    C23,
    C24,
    C25,
    C26,
    C40,
}

impl Fault {
    const ALL: [Self; 26] = [
        Self::C01,
        Self::C02,
        Self::C04,
        Self::C05,
        Self::C06,
        Self::C07,
        Self::C08,
        Self::C09,
        Self::C10,
        Self::C11,
        Self::C12,
        Self::C13,
        Self::C14,
        Self::C15,
        Self::C16,
        Self::C17,
        Self::C18,
        Self::C19,
        Self::C20,
        Self::C21,
        Self::C22,
        Self::C23,
        Self::C24,
        Self::C25,
        Self::C26,
        Self::C40,
    ];
}

/// What is sent where, and how.
struct Plan {
    config: WorldConfig,
    image: Image,
    pattern: Pattern,
    tracking: Tracking,
    writes_a_second: u64,
    sink: ImageSink,
    writes_under_reads: bool,
}

/// One region or several, of every install size, the last page short or not; most of them small.
fn any_image(rng: &mut Rng) -> Image {
    let pages_max = if rng.chance(10) { 700 } else { 70 };
    let region = |rng: &mut Rng| Region {
        bytes: rng.between(1, pages_max * 4096),
        install_size: rng.pick(&[InstallSize::KIB_4, InstallSize::KIB_4, InstallSize::KIB_64, InstallSize::MIB_2]),
    };
    let regions = (0..rng.between(1, 3)).map(|_| region(rng)).collect();
    Image::filled(regions, Mix::MEMORY, rng)
}

fn blobs(rng: &mut Rng) -> Blobs {
    let mut blobs = Blobs::new();
    for name in ["device-state", "clock"] {
        let bytes = (0..rng.pick(&[0, 1, 700, 40_000])).map(|at: u32| at as u8).collect();
        blobs.insert(ImageName::new(name).unwrap(), 1, bytes).unwrap();
    }
    blobs
}

fn plan(seed: u64, rng: &mut Rng) -> Plan {
    let image = any_image(rng);
    let mut config = WorldConfig::new(seed);
    config.live = Some(Limits {
        downtime: Span::from_millis(rng.between(1, 80)),
        rounds: rng.between(1, 8) as u32,
        at_limit: rng.pick(&[AtLimit::Cancel, AtLimit::Force]),
        throttles: rng.chance(30),
        ..Limits::default()
    });
    config.link.delay = Span::from_nanos(rng.pick(&[0, 100_000, 1_000_000, 40_000_000]));
    config.link.rate = Some(rng.between(1, 40) * 250_000);
    config.link.buffer = rng.pick(&[4_096, 64 << 10, 256 << 10]);
    config.link.piece_max = rng.pick(&[700, 16 << 10, usize::MAX]);
    config.sender.lanes = rng.between(1, 4) as u8;
    config.sender.single_stream = rng.chance(20);
    config.job_span_max = Span::from_nanos(rng.pick(&[0, 50_000, 3_000_000]));
    config.pause_span = Span::from_millis(rng.below(10));
    config.blobs = blobs(rng);
    if rng.chance(25) {
        let lease = Lease::failing(rng.below(3));
        config.hosts.iter_mut().for_each(|host| host.lease = Some(lease.clone()));
    }
    let sink = if rng.chance(50) { ImageSink::empty(&image) } else { ImageSink::holding(image.clone()) };
    Plan {
        config,
        image,
        pattern: rng.pick(&Pattern::ALL),
        tracking: rng.pick(&[Tracking::Dirty, Tracking::Dirty, Tracking::Unknown]),
        writes_a_second: rng.below(300),
        sink,
        writes_under_reads: false,
    }
}

/// At any moment of a session: most of them in its rounds, the others around its end.
fn any_moment(rng: &mut Rng) -> When {
    match rng.below(10) {
        0..=3 => When::Frames(rng.between(1, 60)),
        4 | 5 => When::Rounds(rng.between(1, 4) as usize),
        6 => When::Pausing,
        7 => When::Offered,
        _ => When::Said(rng.pick(&[Word::Ready, Word::Commit, Word::Started, Word::Gone])),
    }
}

fn in_rounds(rng: &mut Rng) -> When {
    if rng.chance(50) { When::Frames(rng.between(1, 40)) } else { When::Rounds(rng.between(1, 3) as usize) }
}

fn any_lane(rng: &mut Rng) -> LaneId {
    rng.pick(&[LaneId::CONTROL, LaneId::bulk(0), LaneId::bulk(1)])
}

impl Plan {
    fn dies_at(&mut self, host: usize, rng: &mut Rng, points: &[Point]) {
        self.config.hosts[host].dies_at = Some(rng.pick(points));
    }

    fn fate(&mut self, rng: &mut Rng, word: Word, fates: &[Fate]) {
        self.config.fates.push((word, rng.pick(fates)));
    }

    fn harm(&mut self, role: Role, when: When, harm: Harm) {
        self.config.harms.push((role, when, harm));
    }

    fn cut(&mut self, rng: &mut Rng, cut: fn(u64) -> Cut) {
        let (lane, to_receiver, bytes) = (any_lane(rng), rng.chance(50), rng.pick(&[300, 5_000, 200_000]));
        self.config.cuts.push((lane, to_receiver, cut(rng.below(bytes))));
    }

    fn apply(&mut self, fault: Fault, rng: &mut Rng) {
        match fault {
            Fault::C01 => self.config.cuts.push((LaneId::CONTROL, true, Cut::Bytes(0))),
            Fault::C02 => self.mismatch(rng),
            Fault::C04 => self.harm(Role::Receiver, in_rounds(rng), Harm::Dies),
            Fault::C05 => self.harm(Role::Sender, in_rounds(rng), Harm::Dies),
            Fault::C06 => self.cut(rng, Cut::Bytes),
            Fault::C07 => self.cut(rng, Cut::Silence),
            Fault::C08 => {
                self.config.link.trickles_from = Some(Time::ZERO + Span::from_millis(1000 + rng.below(1000)));
            }
            Fault::C09 => {
                let when = any_moment(rng);
                self.harm(Role::Sender, when, Harm::Stops);
                self.harm(Role::Sender, when, Harm::Stops);
            }
            Fault::C10 => self.harm(Role::Receiver, any_moment(rng), Harm::Stops),
            Fault::C11 => self.writes_a_second = 40 * self.image.pages(),
            Fault::C12 | Fault::C13 | Fault::C14 => self.damage(fault, rng),
            Fault::C15 => self.writes_under_reads = true,
            Fault::C23 => {
                let begin = Time::ZERO + Span::from_millis(1000 + rng.below(1000));
                let span = Span::from_nanos(STALL_SPAN_MAX.as_nanos() * 10);
                self.config.stall = Some((begin, begin + span));
            }
            Fault::C24 => {
                for word in [Word::Ready, Word::Commit, Word::Started, Word::Reject, Word::Gone] {
                    self.fate(rng, word, &[Fate::Twice]);
                }
            }
            Fault::C25 => self.harm(Role::Sender, any_moment(rng), Harm::OpensAgain),
            Fault::C26 => self.harm(Role::Sender, When::Said(Word::Commit), Harm::Stops),
            Fault::C40 => {
                let span = Span::from_millis(rng.pick(&[100, 9_000, 16_000, 31_000, 130_000, 600_000]));
                let harm = Harm::Sleeps { span, clock_runs: rng.chance(70) };
                self.harm(rng.pick(&[Role::Sender, Role::Receiver]), any_moment(rng), harm);
            }
            _ => self.switchover(fault, rng),
        }
    }

    fn switchover(&mut self, fault: Fault, rng: &mut Rng) {
        use RecordKind::{Handed, Started};
        let lost = &[Fate::Lost, Fate::Broken];
        match fault {
            Fault::C16 if rng.chance(50) => self.dies_at(1, rng, &[Point::Saying(Word::Ready)]),
            Fault::C16 => self.fate(rng, Word::Ready, lost),
            Fault::C17 if rng.chance(50) => self.harm(Role::Sender, When::Offered, Harm::Dies),
            Fault::C17 => self.dies_at(0, rng, &[Point::Writing(Handed)]),
            Fault::C18 => self.dies_at(0, rng, &[Point::Written(Handed), Point::Saying(Word::Commit)]),
            Fault::C19 => self.fate(rng, Word::Commit, lost),
            Fault::C20 => self.dies_at(1, rng, &[Point::Writing(Started)]),
            Fault::C21 => self.dies_at(1, rng, &[Point::Written(Started)]),
            Fault::C22 if rng.chance(30) => self.dies_at(1, rng, &[Point::Saying(Word::Started)]),
            Fault::C22 => self.fate(rng, Word::Started, lost),
            other => panic!("{other:?} is not of the switchover"),
        }
    }

    fn mismatch(&mut self, rng: &mut Rng) {
        match rng.below(3) {
            0 => (self.config.receiver_policy.version_min, self.config.receiver_policy.version_max) = (2, 3),
            1 => self.config.receiver_policy.features_required = 1 << 40,
            _ => self.config.decision = Decision::Refuse(CloseCode::REFUSED, "8192 bytes there, 4096 here".to_owned()),
        }
    }

    /// Storage that fails or lies. Only what fails where the guest is to go ends a session.
    fn damage(&mut self, fault: Fault, rng: &mut Rng) {
        let key = self.config.sender.domain_key;
        let mut earlier = self.image.clone();
        earlier.touch(30, Mix::MEMORY, rng);
        let after = Some(rng.below(30));
        match fault {
            Fault::C12 => {
                let faults = match rng.below(3) {
                    0 => SinkFaults { fail_write_after: after, ..SinkFaults::default() },
                    1 => SinkFaults { fail_read_after: after, ..SinkFaults::default() },
                    _ => SinkFaults { fail_finish: true, ..SinkFaults::default() },
                };
                let pages = self.image.regions.iter().map(Region::pages).collect();
                self.sink = ImageSink::new(earlier, pages, true, faults);
            }
            Fault::C13 => {
                let mut base = ImageBase::whole(&earlier, key);
                (base.lost, base.bytes) = (rng.chance(50), None);
                self.sink = ImageSink::claiming(&earlier, key, earlier.clone(), false);
                self.config.bases = vec![base];
            }
            _ => {
                let mut rotten = earlier.clone();
                let mix = Mix::MEMORY;
                rotten.touch(40, mix, rng);
                self.sink = ImageSink::claiming(&earlier, key, rotten, rng.chance(50));
                self.config.bases = vec![ImageBase::whole(&earlier, key)];
                let others = Neighbour { image: earlier, key, rotten: true };
                self.config.others = Some(Box::new(others));
            }
        }
    }
}

/// What a seed came to.
struct Run {
    /// Its faults, and whether each was reached.
    faults: Vec<(Fault, bool)>,
    end: End,
    /// The sender's session failed, whatever became of the guest.
    failed: bool,
}

/// Whether a fault had anything to do with what came.
fn is_reached(fault: Fault, attempt: &Attempt) -> bool {
    use Fault as F;
    let outcome = &attempt.outcome;
    let said = |word| outcome.words.iter().any(|(_, message)| message.word == word);
    let harmed = |role, harm| outcome.harmed.contains(&(role, harm));
    let died = outcome.hosts.iter().any(|host| host.dead && host.dies_at.is_none());
    let failed = outcome.sender.is_err() || outcome.receiver.is_err();
    let pages = outcome.frames.iter().filter(|(_, kind, _)| *kind == FrameKind::PAGES).count();
    match fault {
        F::C01 | F::C02 => failed && pages == 0,
        F::C04 => harmed(Role::Receiver, Harm::Dies),
        F::C05 => harmed(Role::Sender, Harm::Dies),
        F::C09 => harmed(Role::Sender, Harm::Stops),
        F::C10 => harmed(Role::Receiver, Harm::Stops),
        F::C25 => harmed(Role::Sender, Harm::OpensAgain),
        F::C26 => harmed(Role::Sender, Harm::Stops) && said(Word::Commit),
        F::C40 => outcome.harmed.iter().any(|(_, harm)| matches!(harm, Harm::Sleeps { .. })),
        F::C06 | F::C07 | F::C08 | F::C12 => failed && pages > 0,
        F::C11 => outcome.rounds.iter().any(|round| round.dirty > round.pages / 2),
        F::C13 | F::C14 | F::C15 => pages > 0,
        F::C16 => died || said(Word::Ready),
        F::C17 | F::C18 | F::C20 | F::C21 => died,
        F::C19 => said(Word::Commit),
        F::C22 => died || said(Word::Started),
        F::C23 => outcome.sender_over > Time::ZERO + STALL_SPAN_MAX || failed,
        F::C24 => said(Word::Gone),
    }
}

/// The same guest again, with nothing in its way: from where it is to the other host.
fn once_more(attempt: Attempt, end: End, seed: u64, faults: &impl std::fmt::Debug) {
    let Attempt { guest, sink, mut outcome } = attempt;
    let back = end == End::There;
    if back {
        // What was started there is what arrived.
        guest.state().resume();
        outcome.hosts.reverse();
    }
    let mut last = Attempt { guest, sink, outcome };
    // A sender that died before HANDED has forgotten the epoch that its receiver gave up: one REJECT tells it.
    for _ in 0..2 {
        last = afresh(last, seed);
        if last.outcome.sender.as_ref().is_err_and(|error| matches!(error.kind, ErrorKind::Rejected)) {
            assert_eq!(last.settle(true, faults), End::Here, "{faults:?}");
            continue;
        }
        let Outcome { sender, receiver, .. } = &last.outcome;
        assert!(sender.is_ok() && receiver.is_ok(), "{sender:?} {receiver:?}, after {faults:?}");
        break;
    }
    assert_eq!(last.settle(true, faults), End::There, "it has to arrive now, after {faults:?}");
}

/// Another attempt of the same hosts, with nothing in its way.
fn afresh(attempt: Attempt, seed: u64) -> Attempt {
    let Attempt { guest, sink, outcome } = attempt;
    let base = ImageSink::holding(sink.state().image.clone());
    let mut config = WorldConfig::new(seed ^ 0xa9a1_0000_0000);
    config.live = Some(Limits { at_limit: AtLimit::Force, ..Limits::default() });
    config.link.rate = Some(20_000_000);
    config.hosts = outcome.hosts;
    for host in &mut config.hosts {
        (host.told_to_run, host.dies_at) = (0, None);
        host.lease.iter().for_each(Lease::mend);
    }
    Attempt::new(guest, base, config)
}

fn run(seed: u64) -> Run {
    let mut rng = Rng::new(seed ^ 0x11fe);
    let mut plan = plan(seed, &mut rng);
    let mut faults: Vec<Fault> = (0..rng.pick(&[0, 1, 1, 1, 2])).map(|_| rng.pick(&Fault::ALL)).collect();
    faults.dedup();
    faults.iter().for_each(|fault| plan.apply(*fault, &mut rng));
    let what = (seed, &faults, plan.pattern, plan.tracking);
    let guest = Guest::new(plan.image, plan.pattern, plan.writes_a_second, plan.tracking, seed);
    guest.state().writes_under_reads = plan.writes_under_reads;
    let mut attempt = Attempt::new(guest, plan.sink, plan.config);
    let reached = faults.iter().map(|&fault| (fault, is_reached(fault, &attempt))).collect();
    let failed = attempt.outcome.sender.is_err();
    {
        // I5: what a session that failed had taken from the dirty log is there again.
        let (state, outcome) = (attempt.guest.state(), &attempt.outcome);
        assert!(!state.tracked, "nobody watches it any more: {what:?}");
        let taken = outcome.rounds.iter().map(|round| round.dirty).max().unwrap_or_default();
        let counts = failed && !outcome.hosts[0].dead && plan.tracking == Tracking::Dirty;
        assert!(!counts || state.dirty.count() >= taken, "dirty bits are given back: {what:?}");
    }
    let end = attempt.settle(rng.chance(70), &what);
    if end != End::Lost {
        attempt.replay(&what);
        attempt.guest.state().writes_under_reads = false;
        once_more(attempt, end, seed, &what);
    }
    Run { faults: reached, end, failed }
}

/// I1 to I10, C01 to C26, C40: 2,000 worlds by seed; the long run has 100,000.
#[test]
fn guests_of_every_kind_arrive_whole_or_run_on() {
    if let Ok(seed) = std::env::var("PAGEWIRE_SEED") {
        run(seed.parse().unwrap());
        return;
    }
    let seeds: u64 = std::env::var("PAGEWIRE_SEEDS").map_or(2_000, |seeds| seeds.parse().unwrap());
    let (reached, ends) = (Mutex::new(BTreeMap::new()), Mutex::new(BTreeMap::new()));
    let failed_seeds = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let (reached, ends, failed_seeds) = (&reached, &ends, &failed_seeds);
            scope.spawn(move || {
                for seed in (first..seeds).step_by(threads as usize) {
                    let Ok(Run { faults, end, failed }) = catch_unwind(|| run(seed)) else {
                        failed_seeds.lock().unwrap().push(seed);
                        continue;
                    };
                    for (fault, is_reached) in faults {
                        *reached.lock().unwrap().entry(fault).or_insert(0u64) += u64::from(is_reached);
                    }
                    *ends.lock().unwrap().entry((end, failed)).or_insert(0u64) += 1;
                }
            });
        }
    });
    let failed_seeds = failed_seeds.into_inner().unwrap();
    assert!(failed_seeds.is_empty(), "PAGEWIRE_SEED runs one alone of {failed_seeds:?}");
    let (reached, ends) = (reached.into_inner().unwrap(), ends.into_inner().unwrap());
    println!("{seeds} seeds: {ends:?}\nreached: {reached:?}");
    // Each of 26 faults is in one seed of 26; what masks them, and what never gets there, is allowed for.
    for fault in Fault::ALL {
        let count = reached.get(&fault).copied().unwrap_or_default();
        assert!(count * 150 >= seeds, "{fault:?} was reached {count} times in {seeds} seeds");
    }
    let count = |end, failed| ends.get(&(end, failed)).copied().unwrap_or_default();
    assert!(count(End::There, false) > seeds / 5 && count(End::Here, true) > seeds / 5, "{ends:?}");
    assert!(count(End::There, true) > 0 && count(End::Lost, true) > 0, "{ends:?}");
}
