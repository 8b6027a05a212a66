//! One host against anything: what it says and does is covered by its records, whatever comes.

use super::*;
use crate::digest::Digest;
use crate::error::GuestAt;
use crate::limits::{EPOCH_STEP_MAX, HANDOVERS_MAX};
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;
use std::collections::BTreeMap;

mod epochs;

const LINEAGE: LineageId = LineageId([7; 16]);
const ME: HostId = HostId([1; 32]);
const OTHER: HostId = HostId([2; 32]);
const THIRD: HostId = HostId([3; 32]);

fn binding(sender: HostId, receiver: HostId, epoch: u64) -> Handover {
    let (session, root) = ([4; 16], Digest([5; 32]));
    let epoch = Epoch::new(epoch);
    Handover { lineage: LINEAGE, session, epoch, root, sender, receiver, arbiter: false, post_copy: false }
}

fn outgoing(epoch: u64) -> Handover {
    binding(ME, OTHER, epoch)
}

fn incoming(epoch: u64) -> Handover {
    binding(OTHER, ME, epoch)
}

fn desk(records: &[Record]) -> Handovers {
    Handovers::restore(ME, LINEAGE, records, true).unwrap().0
}

fn record(kind: RecordKind, handover: Handover) -> Record {
    Record { kind, handover }
}

fn said(word: Word, handover: Handover) -> Input {
    Input::Message { from: OTHER, message: Message { word, handover } }
}

fn say(word: Word, handover: Handover) -> Output {
    Output::Send(Message { word, handover })
}

/// A desk with `handover` offered.
fn offering(handover: Handover) -> Handovers {
    let mut desk = desk(&[]);
    desk.open(handover.session).unwrap();
    desk.send(handover).unwrap();
    desk
}

/// A desk that is in doubt about `handover`.
fn in_doubt(handover: Handover) -> Handovers {
    desk(&[record(RecordKind::Handed, handover)])
}

fn refusal(outputs: &[Output]) -> Refusal {
    match outputs {
        [Output::Refuse(refusal)] => *refusal,
        other => panic!("no refusal: {other:?}"),
    }
}

// SPEC 11.5
#[test]
fn commits_when_handed_is_durable_and_not_before() {
    let handover = outgoing(1);
    let mut desk = offering(handover);
    assert_eq!(refusal(&desk.handle(Input::Commit)), Refusal::Nothing, "without READY");
    assert_eq!(desk.handle(said(Word::Ready, handover)), [Output::Verified(handover)]);
    let handed = record(RecordKind::Handed, handover);
    assert_eq!(desk.handle(Input::Commit), [Output::Persist(handed)]);
    assert_eq!(desk.handle(Input::Connected(OTHER)), []);
    assert_eq!(desk.handle(Input::Durable(handed)), [say(Word::Commit, handover)]);
    assert_eq!(desk.guest_at(&handover), Some(GuestAt::InDoubt));
    assert_eq!(desk.handle(Input::Connected(OTHER)), [say(Word::Commit, handover)]);
    assert_eq!(desk.handle(Input::Connected(THIRD)), []);
}

// SPEC 11.6
#[test]
fn stays_in_doubt_until_it_is_told() {
    let handover = outgoing(1);
    let mut desk = in_doubt(handover);
    assert_eq!(desk.handle(Input::Timeout), [Output::InDoubt(handover)]);
    assert_eq!(refusal(&desk.handle(Input::Cancel)), Refusal::TooLate(handover.epoch));
    assert_eq!(desk.open([9; 16]), Err(Refusal::Busy(handover.epoch)));
    assert_eq!(desk.whereabouts(), Whereabouts::InDoubt);
    assert_eq!(
        Refusal::TooLate(handover.epoch).to_string(),
        "hand-over 1 can no longer be cancelled: it is decided by the receiver now"
    );
}

// SPEC 11.9
#[test]
fn resumes_when_returned_is_durable() {
    let handover = outgoing(1);
    let mut desk = in_doubt(handover);
    let returned = record(RecordKind::Returned, handover);
    assert_eq!(desk.handle(said(Word::Reject, handover)), [Output::Persist(returned)]);
    assert_eq!(desk.handle(said(Word::Started, handover)), [Output::Refuse(Refusal::Conflict(handover.epoch))]);
    assert_eq!(desk.handle(Input::Failed(returned)), [Output::Persist(returned)]);
    assert_eq!(desk.handle(Input::Durable(returned)), [Output::Resume(handover)]);
    assert_eq!(desk.handle(Input::Durable(returned)), [], "once");
    assert_eq!(desk.open([9; 16]), Ok(Epoch::new(2)));
}

// SPEC 11.10
#[test]
fn resumes_at_once_before_handed_and_uses_the_epoch_up() {
    for input in [Input::Cancel, Input::Timeout, said(Word::Reject, outgoing(1))] {
        let handover = outgoing(1);
        let mut desk = offering(handover);
        let returned = record(RecordKind::Returned, handover);
        assert_eq!(desk.handle(input), [Output::Resume(handover), Output::Persist(returned)]);
        assert_eq!(desk.guest_at(&handover), Some(GuestAt::Sender));
        assert_eq!(desk.handle(Input::Durable(returned)), []);
        assert_eq!(desk.open([9; 16]), Ok(Epoch::new(2)));
    }
}

#[test]
fn a_reject_while_handed_is_being_written_returns_without_a_commit() {
    let handover = outgoing(1);
    let mut desk = offering(handover);
    desk.handle(said(Word::Ready, handover));
    desk.handle(Input::Commit);
    assert_eq!(desk.handle(said(Word::Reject, handover)), []);
    let returned = record(RecordKind::Returned, handover);
    assert_eq!(desk.handle(Input::Durable(record(RecordKind::Handed, handover))), [Output::Persist(returned)]);
    assert_eq!(desk.handle(Input::Durable(returned)), [Output::Resume(handover)]);
}

#[test]
fn releases_when_gone_is_durable() {
    let handover = outgoing(1);
    let mut desk = in_doubt(handover);
    let gone = record(RecordKind::Gone, handover);
    assert_eq!(desk.handle(said(Word::Started, handover)), [Output::Persist(gone)]);
    assert_eq!(desk.handle(Input::Durable(gone)), [Output::Release(handover), say(Word::Gone, handover)]);
    assert_eq!(desk.handle(said(Word::Started, handover)), [say(Word::Gone, handover)]);
    assert_eq!(desk.handle(said(Word::Reject, handover)), [], "too late to be true");
    assert_eq!((desk.whereabouts(), desk.open([9; 16])), (Whereabouts::There, Err(Refusal::NotHere)));
}

// SPEC 11.7
#[test]
fn runs_when_started_is_durable_and_says_so_until_gone() {
    let handover = incoming(1);
    let mut desk = desk(&[]);
    assert_eq!(desk.receive(OTHER, handover), [say(Word::Ready, handover)]);
    let started = record(RecordKind::Started, handover);
    assert_eq!(desk.handle(said(Word::Commit, handover)), [Output::Persist(started)]);
    assert_eq!(desk.handle(said(Word::Commit, handover)), []);
    assert_eq!(refusal(&desk.handle(Input::Cancel)), Refusal::TooLate(handover.epoch));
    assert_eq!(desk.handle(Input::Durable(started)), [Output::Run(handover), say(Word::Started, handover)]);
    assert_eq!(desk.handle(Input::Connected(OTHER)), [say(Word::Started, handover)]);
    let gone = record(RecordKind::Gone, handover);
    assert_eq!(desk.handle(said(Word::Gone, handover)), [Output::Persist(gone)]);
    assert_eq!(desk.handle(Input::Durable(gone)), []);
    assert_eq!((desk.handle(Input::Connected(OTHER)), desk.whereabouts()), (vec![], Whereabouts::Here));
    assert_eq!(desk.receive(OTHER, incoming(2)), [Output::Refuse(Refusal::IsHere)]);
}

#[test]
fn rejects_when_started_cannot_be_written() {
    let handover = incoming(1);
    let mut desk = desk(&[]);
    desk.receive(OTHER, handover);
    desk.handle(said(Word::Commit, handover));
    let rejected = record(RecordKind::Rejected, handover);
    assert_eq!(desk.handle(Input::Failed(record(RecordKind::Started, handover))), [Output::Persist(rejected)]);
    assert_eq!(desk.handle(said(Word::Commit, handover)), []);
    assert_eq!(desk.handle(Input::Durable(rejected)), [say(Word::Reject, handover)]);
    assert_eq!(desk.handle(said(Word::Commit, handover)), [say(Word::Reject, handover)]);
}

// SPEC 11.8
#[test]
fn rejects_durably_what_it_does_not_know() {
    let handover = incoming(3);
    let mut desk = desk(&[]);
    let rejected = record(RecordKind::Rejected, handover);
    assert_eq!(desk.handle(said(Word::Commit, handover)), [Output::Persist(rejected)]);
    assert_eq!(desk.handle(Input::Durable(rejected)), [say(Word::Reject, handover)]);
    assert_eq!(desk.handle(said(Word::Commit, incoming(2))), [say(Word::Reject, incoming(2))], "below the floor");
    let far = incoming(3 + EPOCH_STEP_MAX + 1);
    let floor = Epoch::new(3);
    assert_eq!(refusal(&desk.handle(said(Word::Commit, far))), Refusal::EpochFar { epoch: far.epoch, floor });
}

// SPEC 11.12
#[test]
fn rejects_a_session_of_an_epoch_that_is_over() {
    let mut desk = desk(&[record(RecordKind::Rejected, incoming(3))]);
    let late = Handover { session: [9; 16], ..incoming(3) };
    let refused = Refusal::EpochOver { epoch: late.epoch, floor: Epoch::new(3) };
    assert_eq!(desk.receive(OTHER, late), [Output::Refuse(refused), say(Word::Reject, late)]);
    assert_eq!(desk.receive(OTHER, incoming(3)), [say(Word::Reject, incoming(3))]);
    assert_eq!(desk.receive(OTHER, incoming(4)), [say(Word::Ready, incoming(4))]);
    let newer = Handover { session: [9; 16], ..incoming(4) };
    assert_eq!(
        desk.receive(OTHER, newer),
        [say(Word::Ready, newer)],
        "a new session takes the place of one that broke"
    );
    assert_eq!(desk.guest_at(&incoming(4)), None);
}

// SPEC 11.3
#[test]
fn messages_of_other_hosts_guests_and_hand_overs_change_nothing() {
    let handover = outgoing(2);
    for word in [Word::Ready, Word::Started, Word::Reject] {
        let desk = in_doubt(handover);
        let altered = [
            (OTHER, Handover { lineage: LineageId([8; 16]), ..handover }),
            (OTHER, Handover { session: [8; 16], ..handover }),
            (OTHER, Handover { root: Digest([8; 32]), ..handover }),
            (OTHER, Handover { epoch: Epoch::new(3), ..handover }),
            (OTHER, Handover { sender: THIRD, ..handover }),
            (OTHER, Handover { receiver: THIRD, ..handover }),
            (OTHER, Handover { arbiter: true, ..handover }),
            (OTHER, Handover { post_copy: true, ..handover }),
            (THIRD, handover),
            (ME, handover),
        ];
        for (from, handover) in altered {
            let mut told = desk.clone();
            let outputs = told.handle(Input::Message { from, message: Message { word, handover } });
            assert!(outputs.iter().all(|output| !matches!(output, Output::Persist(_) | Output::Resume(_))));
            assert_eq!(told, desk, "{word:?} {handover:?}");
        }
    }
}

#[test]
fn a_receiver_that_starts_without_commit_is_not_believed() {
    let handover = outgoing(1);
    let mut desk = offering(handover);
    assert_eq!(refusal(&desk.handle(said(Word::Started, handover))), Refusal::Early(handover.epoch));
    assert_eq!(desk.guest_at(&handover), Some(GuestAt::Sender));
}

// SPEC 11.11
#[test]
fn one_session_at_a_time_sends_the_guest() {
    let mut desk = desk(&[]);
    assert_eq!(desk.open([1; 16]), Ok(Epoch::new(1)));
    assert_eq!(desk.open([2; 16]), Err(Refusal::Sending));
    assert_eq!(desk.receive(OTHER, incoming(1)), [Output::Refuse(Refusal::Sending)]);
    desk.close([2; 16]);
    assert_eq!(desk.open([2; 16]), Err(Refusal::Sending));
    desk.close([1; 16]);
    let handover = outgoing(1);
    assert_eq!(desk.send(handover), Err(Refusal::Sending), "not opened");
    desk.open(handover.session).unwrap();
    assert_eq!(desk.send(incoming(1)), Err(Refusal::Foreign));
    desk.send(handover).unwrap();
    assert_eq!(desk.open([2; 16]), Err(Refusal::Busy(handover.epoch)));
}

// SPEC 11.13
#[test]
fn an_arbiter_is_asked_before_anybody_starts() {
    let handover = Handover { arbiter: true, ..incoming(1) };
    let mut receiver = desk(&[]);
    receiver.receive(OTHER, handover);
    let ask = [Output::AskArbiter(handover)];
    assert_eq!(receiver.handle(said(Word::Commit, handover)), ask);
    let grant = |epoch, host| Input::Granted(Grant { lineage: LINEAGE, epoch: Epoch::new(epoch), host });
    assert_eq!(refusal(&receiver.handle(grant(2, ME))), Refusal::Unknown(Epoch::new(2)));
    assert_eq!(refusal(&receiver.handle(grant(1, THIRD))), Refusal::Unknown(Epoch::new(1)));
    let mut denied = receiver.clone();
    assert_eq!(denied.handle(grant(1, OTHER)), [Output::Persist(record(RecordKind::Rejected, handover))]);
    assert_eq!(receiver.handle(grant(1, ME)), [Output::Persist(record(RecordKind::Started, handover))]);

    let handover = Handover { arbiter: true, ..outgoing(1) };
    let mut sender = in_doubt(handover);
    assert_eq!(sender.handle(Input::Timeout), [Output::InDoubt(handover), Output::AskArbiter(handover)]);
    assert_eq!(sender.handle(grant(1, OTHER)), [Output::InDoubt(handover)]);
    assert_eq!(sender.handle(grant(1, ME)), [Output::Persist(record(RecordKind::Returned, handover))]);
}

// SPEC 11.14
#[test]
fn an_operator_ends_the_doubt_with_a_fence_around_the_other_host() {
    let handover = outgoing(1);
    let here = |host| Input::Resolve(Resolve::Here(Fence { epoch: Epoch::new(1), host }));
    let mut desk = in_doubt(handover);
    assert_eq!(refusal(&desk.handle(here(THIRD))), Refusal::WrongFence(handover.epoch));
    assert_eq!(refusal(&desk.handle(Input::Resolve(Resolve::There(Epoch::new(2))))), Refusal::Nothing);
    let mut there = desk.clone();
    assert_eq!(desk.handle(here(OTHER)), [Output::Persist(record(RecordKind::Returned, handover))]);
    let there = there.handle(Input::Resolve(Resolve::There(Epoch::new(1))));
    assert_eq!(there, [Output::Persist(record(RecordKind::Gone, handover))]);

    let handover = incoming(1);
    let mut ready = self::desk(&[]);
    ready.receive(OTHER, handover);
    assert_eq!(ready.handle(here(OTHER)), [Output::Persist(record(RecordKind::Started, handover))]);
    assert_eq!(refusal(&offering(outgoing(1)).handle(here(OTHER))), Refusal::Nothing, "cancel is the word for that");
}

#[test]
fn what_was_started_and_lost_is_neither_said_to_run_nor_rejected() {
    let handover = incoming(1);
    let records = [record(RecordKind::Started, handover)];
    let (mut desk, _) = Handovers::restore(ME, LINEAGE, &records, false).unwrap();
    assert_eq!(desk.whereabouts(), Whereabouts::Lost);
    assert_eq!(refusal(&desk.handle(said(Word::Commit, handover))), Refusal::Lost(handover.epoch));
    let back = desk.handle(Input::Resolve(Resolve::There(handover.epoch)));
    assert_eq!(back, [Output::Persist(record(RecordKind::Rejected, handover))]);
}

#[test]
fn receives_nothing_while_a_failed_started_may_be_on_the_disk() {
    let handover = incoming(5);
    let mut desk = desk(&[]);
    desk.receive(OTHER, handover);
    desk.handle(said(Word::Commit, handover));
    desk.handle(Input::Failed(record(RecordKind::Started, handover)));
    let other = Handover { session: [9; 16], ..incoming(6) };
    assert_eq!(desk.receive(OTHER, other), [Output::Refuse(Refusal::Busy(handover.epoch))]);
    desk.handle(Input::Durable(record(RecordKind::Rejected, handover)));
    assert_eq!(desk.receive(OTHER, other), [say(Word::Ready, other)]);
}

// SPEC 11.15
#[test]
fn forgets_what_is_settled_when_a_newer_record_says_as_much() {
    let away = record(RecordKind::Gone, outgoing(1));
    let (mut desk, forgotten) = Handovers::restore(ME, LINEAGE, &[away], true).unwrap();
    assert_eq!(forgotten, []);
    let back = incoming(2);
    desk.receive(OTHER, back);
    desk.handle(said(Word::Commit, back));
    let outputs = desk.handle(Input::Durable(record(RecordKind::Started, back)));
    assert_eq!(outputs.last(), Some(&Output::Forget(outgoing(1))));
    assert_eq!(desk.handle(said(Word::Started, outgoing(1))), [say(Word::Gone, outgoing(1))], "as it said before");
    // A record that does not say where the guest is never takes the place of one that does.
    let stray = incoming(9);
    desk.handle(said(Word::Commit, stray));
    assert_eq!(desk.handle(Input::Durable(record(RecordKind::Rejected, stray))), [say(Word::Reject, stray)]);
    assert_eq!(desk.whereabouts(), Whereabouts::Here);
    assert_eq!(desk.handle(Input::Connected(OTHER)), [say(Word::Started, back), say(Word::Reject, stray)]);
}

#[test]
fn keeps_no_more_hand_overs_than_its_limit() {
    let started: Vec<Record> =
        (1..=HANDOVERS_MAX as u64).map(|epoch| record(RecordKind::Started, incoming(epoch))).collect();
    let mut desk = desk(&started);
    assert_eq!(desk.open([9; 16]), Err(Refusal::Full(HANDOVERS_MAX)));
    assert_eq!(refusal(&desk.handle(said(Word::Commit, incoming(99)))), Refusal::Full(HANDOVERS_MAX));
}

#[test]
fn refuses_records_that_it_cannot_have_written() {
    let refused = |records: &[Record]| Handovers::restore(ME, LINEAGE, records, true).unwrap_err();
    for bad in [
        record(RecordKind::Handed, incoming(1)),
        record(RecordKind::Started, outgoing(1)),
        record(RecordKind::Gone, binding(OTHER, THIRD, 1)),
        record(RecordKind::Gone, Handover { lineage: LineageId([8; 16]), ..outgoing(1) }),
    ] {
        assert_eq!(refused(&[bad]), RecordError::Foreign(bad.handover.epoch));
    }
    let good = record(RecordKind::Handed, outgoing(1));
    assert_eq!(refused(&[good, good]), RecordError::Twice(good.handover.epoch));
}

// SPEC 11.4, 11.17
#[test]
fn records_and_bindings_are_judged_to_the_last_bit() {
    for kind in RecordKind::ALL {
        let good = record(kind, Handover { arbiter: true, post_copy: true, ..outgoing(1) });
        let bytes = good.encode();
        assert_eq!((bytes.len(), Record::decode(&bytes)), (Record::BYTES, Ok(good)));
        for at in 0..bytes.len() {
            assert_eq!(Record::decode(&bytes[..at]), Err(RecordError::Length(at)));
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                assert!(Record::decode(&bad).is_err(), "byte {at}, bit {bit}");
            }
        }
        let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
        assert_eq!(Record::decode(&longer), Err(RecordError::Length(Record::BYTES + 1)));
    }
    let sealed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = record(RecordKind::Handed, outgoing(1)).encode();
        bytes.truncate(160);
        change(&mut bytes);
        let check = crate::digest::record_check(&bytes);
        bytes.extend_from_slice(&check);
        Record::decode(&bytes)
    };
    assert!(sealed(&|_| ()).is_ok());
    assert!(sealed(&|bytes| bytes[153] = 1).is_ok_and(|record| record.handover.post_copy));
    assert_eq!(sealed(&|bytes| bytes[8] = 2), Err(RecordError::Version(2)));
    for (at, value) in [(10, 0), (10, 6), (11, 1), (152, 2), (153, 2), (153, 255), (154, 1), (159, 1)] {
        assert!(matches!(sealed(&|bytes| bytes[at] = value), Err(RecordError::Malformed(_))), "byte {at} = {value}");
    }
    assert!(sealed(&|bytes| bytes[16..32].fill(0)).is_err(), "no guest");
    assert!(sealed(&|bytes| bytes[48..56].fill(0)).is_err(), "no epoch");
    assert!(sealed(&|bytes| bytes.copy_within(88..120, 120)).is_err(), "one host on both sides");
}

/// One of a few hand-overs, so that a random walk meets the same one again.
fn any_handover() -> impl Strategy<Value = Handover> {
    (any::<bool>(), 1u64..4, 0u8..2, any::<[bool; 2]>()).prop_map(|(out, epoch, session, [arbiter, post_copy])| {
        let handover = if out { outgoing(epoch) } else { incoming(epoch) };
        Handover { session: [session; 16], arbiter, post_copy, ..handover }
    })
}

#[derive(Clone, Debug)]
enum Step {
    Input(Input),
    Written,
    Fails,
    Open(u8),
    Send(Handover),
    Receive(Handover),
    Restart(bool),
}

fn any_step() -> impl Strategy<Value = Step> {
    let word = prop::sample::select(Word::ALL.to_vec());
    let host = prop::sample::select(vec![ME, OTHER, THIRD]);
    let message = (word, any_handover()).prop_map(|(word, handover)| Step::Input(said(word, handover)));
    let grant = (1u64..4, host.clone()).prop_map(|(epoch, host)| {
        Step::Input(Input::Granted(Grant { lineage: LINEAGE, epoch: Epoch::new(epoch), host }))
    });
    let resolve = (1u64..4, host, any::<bool>()).prop_map(|(epoch, host, here)| {
        let epoch = Epoch::new(epoch);
        Step::Input(Input::Resolve(if here { Resolve::Here(Fence { epoch, host }) } else { Resolve::There(epoch) }))
    });
    let plain = prop::sample::select(vec![Input::Commit, Input::Cancel, Input::Timeout, Input::Connected(OTHER)]);
    prop_oneof![
        6 => message,
        4 => Just(Step::Written),
        1 => Just(Step::Fails),
        1 => grant,
        1 => resolve,
        1 => any_handover().prop_map(|handover| Step::Input(Input::Filled(handover))),
        3 => plain.prop_map(Step::Input),
        2 => (0u8..2).prop_map(Step::Open),
        2 => any_handover().prop_map(Step::Send),
        3 => any_handover().prop_map(Step::Receive),
        1 => any::<bool>().prop_map(Step::Restart),
    ]
}

/// A host with a disk: it holds every output against what is on it.
#[derive(Debug)]
struct Driven {
    desk: Handovers,
    disk: BTreeMap<Handover, RecordKind>,
    writing: Vec<Record>,
    /// The highest epoch that was ever on the disk.
    floor: Epoch,
    /// Hand-overs of which it was told that the receiver lacks nothing, and by operators that it has the guest.
    told: Vec<(Epoch, Option<Handover>)>,
    /// Those with STARTED on the disk when the host was restarted.
    outlived: Vec<Handover>,
}

impl Driven {
    fn check(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            let on_disk = |handover: &Handover| self.disk.get(handover).copied();
            match output {
                Output::Persist(record) => {
                    if record.kind == RecordKind::Gone && record.handover.sender == ME && record.handover.post_copy {
                        let of_this = |told: &(Epoch, Option<Handover>)| {
                            told.0 == record.handover.epoch && told.1.is_none_or(|filled| filled == record.handover)
                        };
                        assert!(self.told.iter().any(of_this), "{record:?}");
                    }
                    self.writing.push(record);
                }
                Output::Fill(handover) => {
                    assert!(handover.post_copy && on_disk(&handover) == Some(RecordKind::Handed), "{handover:?}");
                }
                Output::Forget(handover) => drop(self.disk.remove(&handover)),
                Output::Run(handover) => assert_eq!(on_disk(&handover), Some(RecordKind::Started)),
                Output::Release(handover) => assert_eq!(on_disk(&handover), Some(RecordKind::Gone)),
                Output::Resume(handover) => {
                    assert!(matches!(on_disk(&handover), None | Some(RecordKind::Returned)), "{handover:?}");
                }
                Output::Send(Message { word, handover }) => {
                    let record = on_disk(&handover);
                    let is_over = record.is_none() && handover.epoch <= self.floor;
                    let covered = match word {
                        Word::Ready => record.is_none(),
                        Word::Commit => record == Some(RecordKind::Handed),
                        Word::Started if record == Some(RecordKind::Started) => {
                            !handover.post_copy || !self.outlived.contains(&handover)
                        }
                        Word::Started => record == Some(RecordKind::Gone),
                        Word::Reject => record == Some(RecordKind::Rejected) || is_over,
                        Word::Gone => record == Some(RecordKind::Gone) || is_over,
                    };
                    assert!(covered, "{word:?} with {record:?}");
                }
                _ => {}
            }
        }
    }

    fn step(&mut self, step: Step) {
        let outputs = match step {
            Step::Input(input) => {
                match input {
                    Input::Filled(handover) => self.told.push((handover.epoch, Some(handover))),
                    Input::Resolve(Resolve::There(epoch)) => self.told.push((epoch, None)),
                    _ => {}
                }
                self.desk.handle(input)
            }
            Step::Written | Step::Fails if self.writing.is_empty() => return,
            Step::Written => {
                let record = self.writing.remove(0);
                self.disk.insert(record.handover, record.kind);
                self.floor = self.floor.max(record.handover.epoch);
                self.desk.handle(Input::Durable(record))
            }
            Step::Fails => {
                let record = self.writing.remove(0);
                self.desk.handle(Input::Failed(record))
            }
            Step::Open(session) => {
                let _ = self.desk.open([session; 16]);
                return;
            }
            Step::Send(handover) => {
                let _ = self.desk.send(handover);
                return;
            }
            Step::Receive(handover) => self.desk.receive(OTHER, handover),
            Step::Restart(kept) => {
                let records: Vec<Record> = self.disk.iter().map(|(handover, kind)| record(*kind, *handover)).collect();
                self.writing.clear();
                let started = records.iter().filter(|record| record.kind == RecordKind::Started);
                self.outlived.extend(started.map(|record| record.handover));
                let (desk, outputs) = Handovers::restore(ME, LINEAGE, &records, kept).unwrap();
                self.desk = desk;
                outputs
            }
        };
        self.check(outputs);
    }
}

proptest! {
    /// Whatever a peer, an operator, a disk and a power cut do: nothing is said or done without its record.
    #[test]
    fn every_word_and_deed_is_covered_by_a_record(steps in prop::collection::vec(any_step(), 0..80)) {
        let (disk, writing, floor) = (BTreeMap::new(), vec![], Epoch::ZERO);
        let mut driven = Driven { desk: desk(&[]), disk, writing, floor, told: vec![], outlived: vec![] };
        for step in steps {
            driven.step(step);
            // One hand-over that is open at the most, and no record lost that the desk still relies on.
            prop_assert!(driven.disk.len() <= HANDOVERS_MAX);
            let handed = driven.disk.values().filter(|kind| **kind == RecordKind::Handed).count();
            prop_assert!(handed <= 1);
        }
    }
}
