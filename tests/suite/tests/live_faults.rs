//! Crashes of hosts and words that are lost, said twice or replayed, while a guest is handed over: wherever it happens,
//! the guest is at one of the hosts in the end, or in a doubt that has a name. The ids are those of the project's list
//! of failures.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::digest::Digest;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::handover::{
    Handover, Handovers, HostId, Input, Message, Output, Record, RecordKind, Refusal, Resolve, Whereabouts, Word,
};
use pagewire_protocol::limits::STALL_SPAN_MAX;
use pagewire_protocol::time::{Span, Time};
use pagewire_sender::Tracking;
use pagewire_sender::converge::Limits;
use pagewire_test_support::attempt::{Attempt, End, left};
use pagewire_test_support::guest::{Guest, Pattern};
use pagewire_test_support::host::{Action, Host, Point, reconnect};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::LinkConfig;
use pagewire_test_support::live_peer::blobs;
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Fate, WorldConfig};
use std::collections::BTreeSet;

/// What goes wrong: where each host crashes, and what becomes of words.
#[derive(Clone, Debug, Default)]
struct Faults {
    dies: [Option<Point>; 2],
    fates: Vec<(Word, Fate)>,
}

impl Faults {
    fn crash(host: usize, point: Point) -> Self {
        let mut faults = Self::default();
        faults.dies[host] = Some(point);
        faults
    }

    fn word(word: Word, fate: Fate) -> Self {
        Self { fates: vec![(word, fate)], ..Self::default() }
    }
}

fn attempt(faults: &Faults) -> Attempt {
    let image = Image::random(16, Mix::MEMORY, &mut Rng::new(21));
    let guest = Guest::new(image, Pattern::Uniform, 20, Tracking::Dirty, 22);
    let sink = ImageSink::empty(&guest.state().image);
    again(guest, sink, [Host::new(1), Host::new(2)], faults, 23)
}

fn again(guest: Guest, sink: ImageSink, hosts: [Host; 2], faults: &Faults, seed: u64) -> Attempt {
    let mut config = WorldConfig::new(seed);
    config.live = Some(Limits { downtime: Span::from_millis(100), ..Limits::default() });
    config.link = LinkConfig::delaying(Span::from_millis(1));
    config.blobs = blobs();
    config.hosts = hosts;
    for (host, dies_at) in config.hosts.iter_mut().zip(faults.dies) {
        host.dies_at = dies_at;
    }
    config.fates.clone_from(&faults.fates);
    Attempt::new(guest, sink, config)
}

/// Every point that a host can reach on one side of a hand-over.
fn points(records: [RecordKind; 3], words: &[Word]) -> Vec<Option<Point>> {
    let records = records.into_iter().flat_map(|kind| [Some(Point::Writing(kind)), Some(Point::Written(kind))]);
    let words = words.iter().map(|word| Some(Point::Saying(*word)));
    std::iter::once(None).chain(records).chain(words).collect()
}

fn fates() -> Vec<Vec<(Word, Fate)>> {
    let words = [Word::Ready, Word::Commit, Word::Started, Word::Reject, Word::Gone];
    let each =
        words.into_iter().flat_map(|word| [Fate::Lost, Fate::Twice, Fate::Broken].map(|fate| vec![(word, fate)]));
    std::iter::once(Vec::new()).chain(each).collect()
}

/// C16 to C22, I1, I8: every pair of crash points, with every fate of every word, with files that outlive a crash and
/// with memory that does not.
#[test]
fn wherever_hosts_crash_and_words_are_lost_the_guest_is_at_one_of_them() {
    let senders = points([RecordKind::Handed, RecordKind::Returned, RecordKind::Gone], &[Word::Commit, Word::Gone]);
    let receivers = points(
        [RecordKind::Started, RecordKind::Rejected, RecordKind::Gone],
        &[Word::Ready, Word::Started, Word::Reject],
    );
    let (mut reached, mut ends) = (BTreeSet::new(), BTreeSet::new());
    for one in &senders {
        for other in &receivers {
            for fates in fates() {
                let faults = Faults { dies: [*one, *other], fates };
                for kept in [true, false] {
                    let mut attempt = attempt(&faults);
                    let end = attempt.settle(kept, &faults);
                    ends.insert(format!("{end:?}"));
                    for (host, (dies_at, left)) in faults.dies.iter().zip(attempt.hosts()).enumerate() {
                        if left.dies_at.is_none() && dies_at.is_some() {
                            reached.insert(format!("{host} {dies_at:?}"));
                        }
                    }
                }
            }
        }
    }
    assert_eq!(ends.len(), 3, "{ends:?}");
    assert_eq!(reached.len(), senders.len() + receivers.len() - 2, "{reached:?}");
}

/// C16, I5: a receiver that dies before READY: the guest runs on at once, and the next attempt loses nothing.
#[test]
fn c16_a_receiver_that_dies_before_ready_leaves_the_guest_running() {
    let faults = Faults::crash(1, Point::Saying(Word::Ready));
    let mut attempt = attempt(&faults);
    assert!(attempt.outcome.sender.is_err() && attempt.guest.state().runs());
    assert!(attempt.outcome.sender_over < Time::ZERO + Span::from_secs(5), "downtime is bounded");
    assert_eq!(attempt.settle(true, &faults), End::Here);
    let Attempt { guest, sink, outcome } = attempt;
    let base = ImageSink::holding(sink.state().image.clone());
    let mut second = again(guest, base, outcome.hosts, &Faults::default(), 24);
    assert_eq!(second.settle(true, &Faults::default()), End::There);
}

/// C16: nor does the guest stand still for ever when READY is lost and the receiver goes on to give signs of life.
#[test]
fn c16_a_ready_that_never_comes_leaves_the_guest_running() {
    let faults = Faults::word(Word::Ready, Fate::Lost);
    let mut attempt = attempt(&faults);
    assert!(attempt.guest.state().runs());
    assert!(attempt.outcome.sender_over <= Time::ZERO + STALL_SPAN_MAX + Span::from_secs(5));
    assert_eq!(attempt.settle(true, &faults), End::Here);
}

#[test]
fn c17_a_sender_that_dies_before_handed_never_gave_the_guest_away() {
    let faults = Faults::crash(0, Point::Writing(RecordKind::Handed));
    let mut attempt = attempt(&faults);
    assert_eq!((attempt.hosts()[0].records.len(), attempt.hosts()[1].told_to_run), (0, 0));
    assert_eq!(attempt.settle(true, &faults), End::Here);
    assert_eq!(attempt.hosts()[0].handovers.whereabouts(), Whereabouts::Unrecorded, "a restart runs it");
    assert_eq!(attempt.hosts()[1].told_to_run, 0);
}

#[test]
fn c18_a_sender_that_dies_after_handed_is_in_doubt_until_it_has_asked() {
    for point in [Point::Written(RecordKind::Handed), Point::Saying(Word::Commit)] {
        let faults = Faults::crash(0, point);
        let mut attempt = attempt(&faults);
        let host = &mut attempt.hosts()[0];
        host.restart(true);
        assert_eq!(host.handovers.whereabouts(), Whereabouts::InDoubt);
        assert!(host.handle(Input::Timeout).is_empty() && left(host), "no time ends it");
        assert_eq!(attempt.settle(true, &faults), End::Here, "nobody has heard COMMIT");
        assert_eq!(attempt.hosts()[0].told_to_run, 1);
    }
}

#[test]
fn c19_a_commit_that_is_lost_leaves_one_runner() {
    for fate in [Fate::Lost, Fate::Broken] {
        let faults = Faults::word(Word::Commit, fate);
        let mut attempt = attempt(&faults);
        assert_eq!(attempt.hosts()[0].handovers.whereabouts(), Whereabouts::InDoubt);
        assert!(!attempt.guest.state().runs());
        assert_eq!(attempt.settle(true, &faults), End::Here, "the receiver had given up");
        // One that waits still is told again, and runs it.
        let mut hosts = [Host::new(1), Host::new(2)];
        let handover = offered(&mut hosts);
        let ready = hosts[1].ready(handover);
        assert_eq!(hosts[0].hear(hosts[1].id, word_of(&ready)).len(), 1, "COMMIT, which is lost");
        let [one, other] = &mut hosts;
        reconnect(one, other);
        assert!(other.has_guest() && other.told_to_run == 1 && one.told_to_run == 0);
    }
}

#[test]
fn c20_a_receiver_that_dies_before_started_rejects_when_it_is_asked() {
    let faults = Faults::crash(1, Point::Writing(RecordKind::Started));
    let mut attempt = attempt(&faults);
    assert_eq!(attempt.hosts()[0].handovers.whereabouts(), Whereabouts::InDoubt);
    assert_eq!(attempt.settle(true, &faults), End::Here);
    let [one, other] = attempt.hosts();
    assert_eq!((one.told_to_run, other.told_to_run), (1, 0));
    assert_eq!(other.records.first().map(|record| record.kind), Some(RecordKind::Rejected));
}

/// C21, I4: with files a restart runs it; with memory it is lost, which has a name, and an operator can have the copy.
#[test]
fn c21_a_receiver_that_dies_after_started_has_the_guest_or_says_that_it_is_lost() {
    let faults = Faults::crash(1, Point::Written(RecordKind::Started));
    let mut kept = attempt(&faults);
    assert_eq!(kept.hosts()[0].handovers.whereabouts(), Whereabouts::InDoubt);
    assert_eq!(kept.settle(true, &faults), End::There);

    let mut lost = attempt(&faults);
    assert_eq!(lost.settle(false, &faults), End::Lost);
    let [one, other] = lost.hosts();
    assert_eq!(one.handovers.whereabouts(), Whereabouts::InDoubt, "the frozen copy is kept");
    let epoch = other.records.first().unwrap().handover.epoch;
    other.handle(Input::Resolve(Resolve::There(epoch)));
    reconnect(one, other);
    assert!(!left(one) && one.told_to_run == 1 && !other.has_guest());
}

#[test]
fn c22_a_started_that_is_lost_is_learned_of_on_the_next_connection() {
    for fate in [Fate::Lost, Fate::Broken] {
        let faults = Faults::word(Word::Started, fate);
        let mut attempt = attempt(&faults);
        assert!(attempt.outcome.sender.is_err() && !attempt.guest.state().runs());
        assert_eq!(attempt.hosts()[0].handovers.whereabouts(), Whereabouts::InDoubt);
        assert_eq!(attempt.settle(true, &faults), End::There);
        assert_eq!(attempt.hosts()[0].handovers.whereabouts(), Whereabouts::There);
    }
}

/// C23: no time ends a doubt, however often it passes; both hosts say where they stand.
#[test]
fn c23_a_partition_of_ten_times_every_timeout_ends_with_one_runner() {
    for (word, end) in [(Word::Commit, End::Here), (Word::Started, End::There), (Word::Ready, End::Here)] {
        let faults = Faults::word(word, Fate::Lost);
        let mut attempt = attempt(&faults);
        for _ in 0..10 {
            attempt.hosts().iter_mut().for_each(|host| drop(host.handle(Input::Timeout)));
            attempt.judge(&faults);
        }
        let [one, other] = attempt.hosts();
        let expected = if word == Word::Ready { Whereabouts::Here } else { Whereabouts::InDoubt };
        assert_eq!(one.handovers.whereabouts(), expected, "{word:?}");
        assert_eq!(other.has_guest(), end == End::There, "{word:?}");
        assert_eq!(attempt.settle(true, &faults), end);
    }
}

/// Both hosts ready for a hand-over: all was stated, and READY not said.
fn offered(hosts: &mut [Host; 2]) -> Handover {
    let live = hosts[0].open([9; 16]);
    let handover = Handover {
        lineage: live.guest,
        session: [9; 16],
        epoch: live.epoch,
        root: Digest([3; 32]),
        sender: hosts[0].id,
        receiver: hosts[1].id,
        arbiter: false,
        post_copy: false,
    };
    hosts[0].offer(handover);
    handover
}

fn word_of(actions: &[Action]) -> Message {
    let said = actions.iter().find_map(|action| match action {
        Action::Say(message) => Some(*message),
        Action::Run | Action::Release | Action::Fill(_) => None,
    });
    said.expect("something is said")
}

/// All that a host is, to see that nothing has changed.
fn all_of(host: &Host) -> (Handovers, Vec<Record>, u64) {
    (host.handovers.clone(), host.records.clone(), host.told_to_run)
}

/// SPEC 11.3; I10, A24: READY with another root, session, epoch, host, guest or arbiter, or from another host.
#[test]
fn c24_a_word_about_something_else_changes_nothing() {
    let mut hosts = [Host::new(1), Host::new(2)];
    let honest = offered(&mut hosts);
    let others = [
        Handover { root: Digest([4; 32]), ..honest },
        Handover { session: [8; 16], ..honest },
        Handover { epoch: honest.epoch.next().unwrap(), ..honest },
        Handover { sender: HostId([7; 32]), ..honest },
        Handover { receiver: HostId([7; 32]), ..honest },
        Handover { lineage: LineageId([7; 16]), ..honest },
        Handover { arbiter: true, ..honest },
    ];
    let told = |host: &mut Host, from: HostId, message: Message| {
        let before = all_of(host);
        let actions = host.hear(from, message);
        assert!(!actions.contains(&Action::Run) && !actions.contains(&Action::Release), "{message:?}");
        assert_eq!(all_of(host), before, "{message:?}");
    };
    let [one, other] = &mut hosts;
    for word in [Word::Ready, Word::Started, Word::Reject] {
        others.iter().for_each(|&handover| told(one, other.id, Message { word, handover }));
        told(one, HostId([7; 32]), Message { word, handover: honest });
    }
    // STARTED before COMMIT is refused as early.
    told(one, other.id, Message { word: Word::Started, handover: honest });
    other.ready(honest);
    for word in [Word::Commit, Word::Gone] {
        // A COMMIT of another epoch or session is answered by REJECTED, which starts nothing; the rest is nobody's.
        others[3..6].iter().for_each(|&handover| told(other, one.id, Message { word, handover }));
        told(other, HostId([7; 32]), Message { word, handover: honest });
    }
    for &handover in &others {
        let mut asked = other.clone();
        let actions = asked.hear(one.id, Message { word: Word::Commit, handover });
        assert!(!actions.contains(&Action::Run) && asked.told_to_run == 0 && !asked.has_guest(), "{handover:?}");
    }
    // REJECT after STARTED comes too late.
    let commit = word_of(&one.hear(other.id, Message { word: Word::Ready, handover: honest }));
    let started =
        word_of(&other.hear(one.id, commit).into_iter().filter(|action| *action != Action::Run).collect::<Vec<_>>());
    one.hear(other.id, started);
    told(one, other.id, Message { word: Word::Reject, handover: honest });
    assert!(left(one) && other.has_guest());
}

/// Every order of `rest`, each word twice.
fn orders(rest: &[(bool, Message)], begun: &mut Vec<(bool, Message)>, each: &mut impl FnMut(&[(bool, Message)])) {
    if rest.is_empty() {
        return each(begun);
    }
    for at in 0..rest.len() {
        let mut left = rest.to_vec();
        let word = left.remove(at);
        begun.extend([word, word]);
        orders(&left, begun, each);
        begun.truncate(begun.len() - 2);
    }
}

/// C24, A24, I10: all that was ever said of a hand-over, twice and in every order, after it and at each step of the next.
#[test]
fn c24_words_of_an_older_hand_over_change_nothing() {
    let mut first = attempt(&Faults::default());
    let words = first.outcome.words.clone();
    assert_eq!(first.settle(true, &Faults::default()), End::There);
    assert_eq!(words.len(), 4, "{words:?}");
    let [mut one, mut other] = first.outcome.hosts;
    let replay = |one: &mut Host, other: &mut Host, words: &[(bool, Message)]| {
        let before = (all_of(one), all_of(other));
        for (to_receiver, message) in words {
            if *to_receiver {
                other.hear(one.id, *message)
            } else {
                one.hear(other.id, *message)
            };
        }
        assert_eq!((all_of(one), all_of(other)), before, "{words:?}");
    };
    let mut count = 0;
    orders(&words, &mut Vec::new(), &mut |order| {
        count += 1;
        replay(&mut one, &mut other, order);
    });
    assert_eq!(count, 24);
    // The guest goes back, and somebody replays the way it came.
    let mut hosts = [other, one];
    let handover = offered(&mut hosts);
    let [from, to] = &mut hosts;
    replay(to, from, &words);
    let ready = to.ready(handover);
    replay(to, from, &words);
    let mut said: Vec<(bool, Message)> = vec![(false, word_of(&ready))];
    while let Some((forward, message)) = said.pop() {
        let (actions, forth) =
            if forward { (to.hear(from.id, message), false) } else { (from.hear(to.id, message), true) };
        said.extend(actions.iter().filter_map(|action| match action {
            Action::Say(message) => Some((forth, *message)),
            Action::Run | Action::Release | Action::Fill(_) => None,
        }));
        replay(to, from, &words);
    }
    assert!(to.has_guest() && left(from) && to.told_to_run == 1);
}

#[test]
fn c24_words_that_are_said_twice_change_nothing() {
    for word in [Word::Ready, Word::Commit, Word::Started, Word::Gone] {
        let faults = Faults::word(word, Fate::Twice);
        let mut attempt = attempt(&faults);
        assert!(attempt.outcome.sender.is_ok() && attempt.outcome.receiver.is_ok(), "{word:?}");
        assert_eq!(attempt.settle(true, &faults), End::There);
        assert_eq!(attempt.hosts()[1].told_to_run, 1);
    }
}

#[test]
fn c25_a_guest_leaves_by_one_session_and_comes_by_one() {
    let mut hosts = [Host::new(1), Host::new(2)];
    hosts[0].open([9; 16]);
    assert_eq!(hosts[0].handovers.open([8; 16]), Err(Refusal::Sending));
    let handover = offered(&mut hosts);
    assert_eq!(hosts[0].handovers.open([8; 16]), Err(Refusal::Busy(handover.epoch)));
    let ready = word_of(&hosts[1].ready(handover));
    let other = hosts[1].id;
    let commit = word_of(&hosts[0].hear(other, ready));
    assert_eq!(hosts[0].handovers.open([8; 16]), Err(Refusal::Busy(handover.epoch)), "in doubt");
    // A third host that is offered the same guest has a hand-over of its own, which the first never committed to.
    let mut third = Host::new(3);
    third.ready(Handover { receiver: third.id, ..handover });
    let one = hosts[0].id;
    third.hear(one, commit);
    assert!(!third.has_guest() && third.told_to_run == 0);
    hosts[1].hear(one, commit);
    let next = handover.epoch.next().unwrap();
    assert_eq!(hosts[1].handovers.may_receive(next), Err(Refusal::IsHere));
    assert!(hosts[1].has_guest());
}

/// C26, I9
#[test]
fn c26_a_cancel_after_commit_is_refused_and_the_receiver_runs_the_guest() {
    let mut hosts = [Host::new(1), Host::new(2)];
    let handover = offered(&mut hosts);
    let ready = word_of(&hosts[1].ready(handover));
    let [one, other] = &mut hosts;
    let commit = word_of(&one.hear(other.id, ready));
    let before = all_of(one);
    assert_eq!(one.handovers.handle(Input::Cancel), [Output::Refuse(Refusal::TooLate(handover.epoch))]);
    assert_eq!(all_of(one), before);
    let actions = other.hear(one.id, commit);
    assert_eq!(actions.first(), Some(&Action::Run));
    assert_eq!(other.handovers.handle(Input::Cancel), [Output::Refuse(Refusal::Nothing)]);
    reconnect(one, other);
    assert!(left(one) && other.has_guest() && one.told_to_run == 0);
}
