//! Hand-overs with pages absent: the sender's memory goes when the receiver lacks nothing, and not before.

use super::*;
use crate::digest::Digest;
use crate::error::GuestAt;
use alloc::vec;
use alloc::vec::Vec;

const LINEAGE: LineageId = LineageId([7; 16]);
const ME: HostId = HostId([1; 32]);
const OTHER: HostId = HostId([2; 32]);

fn binding(sender: HostId, receiver: HostId) -> Handover {
    let (session, root, epoch) = ([4; 16], Digest([5; 32]), Epoch::new(3));
    Handover { lineage: LINEAGE, session, epoch, root, sender, receiver, arbiter: false, post_copy: true }
}

fn record(kind: RecordKind, handover: Handover) -> Record {
    Record { kind, handover }
}

fn desk(kind: RecordKind, handover: Handover) -> Handovers {
    Handovers::restore(ME, LINEAGE, &[record(kind, handover)], true).unwrap().0
}

fn said(word: Word, handover: Handover) -> Input {
    Input::Message { from: OTHER, message: Message { word, handover } }
}

fn say(word: Word, handover: Handover) -> Output {
    Output::Send(Message { word, handover })
}

fn refused(why: Refusal) -> Vec<Output> {
    vec![Output::Refuse(why)]
}

/// A sender that has heard STARTED.
fn serving() -> (Handovers, Handover) {
    let handover = binding(ME, OTHER);
    let mut desk = desk(RecordKind::Handed, handover);
    assert_eq!(desk.handle(said(Word::Started, handover)), [Output::Fill(handover)]);
    (desk, handover)
}

/// A receiver whose guest runs.
fn filling() -> (Handovers, Handover) {
    let handover = binding(OTHER, ME);
    let (mut desk, _) = Handovers::restore(ME, LINEAGE, &[], true).unwrap();
    desk.receive(OTHER, handover);
    desk.handle(said(Word::Commit, handover));
    let run = desk.handle(Input::Durable(record(RecordKind::Started, handover)));
    assert_eq!(run, [Output::Run(handover), say(Word::Started, handover)]);
    (desk, handover)
}

// SPEC 11.18
#[test]
fn serves_what_is_absent_upon_started_and_releases_nothing() {
    let (mut desk, handover) = serving();
    assert_eq!((desk.guest_at(&handover), desk.whereabouts()), (Some(GuestAt::Receiver), Whereabouts::Serving));
    assert_eq!(desk.outgoing().and_then(Sender::durable), Some(RecordKind::Handed));
    assert_eq!(desk.handle(said(Word::Started, handover)), [Output::Fill(handover)], "as often as it is said");
    let unmoved = desk.clone();
    let gone = record(RecordKind::Gone, handover);
    for input in [
        Input::Timeout,
        Input::Connected(OTHER),
        said(Word::Ready, handover),
        said(Word::Reject, handover),
        Input::Granted(Grant { lineage: LINEAGE, epoch: handover.epoch, host: ME }),
        Input::Durable(gone),
        Input::Failed(gone),
    ] {
        assert_eq!(desk.handle(input).iter().find(|output| !matches!(output, Output::Refuse(_))), None, "{input:?}");
    }
    let too_late = refused(Refusal::TooLate(handover.epoch));
    let here = Input::Resolve(Resolve::Here(Fence { epoch: handover.epoch, host: OTHER }));
    for input in [Input::Cancel, Input::Commit, here] {
        assert_eq!(desk.handle(input), too_late, "{input:?}");
    }
    assert_eq!(desk, unmoved);
    assert_eq!(desk.open([9; 16]), Err(Refusal::Busy(handover.epoch)));
}

// SPEC 11.20
#[test]
fn gives_its_memory_up_when_the_receiver_lacks_nothing_and_gone_is_durable() {
    let (mut desk, handover) = serving();
    let gone = record(RecordKind::Gone, handover);
    assert_eq!(desk.handle(Input::Filled(handover)), [Output::Persist(gone)]);
    assert_eq!(desk.handle(Input::Filled(handover)), [], "said twice");
    assert_eq!(desk.handle(Input::Failed(gone)), [Output::Persist(gone)]);
    assert_eq!(desk.handle(Input::Durable(gone)), [Output::Release(handover), say(Word::Gone, handover)]);
    assert_eq!(desk.handle(said(Word::Started, handover)), [say(Word::Gone, handover)], "nothing is left to serve");
    assert_eq!(desk.whereabouts(), Whereabouts::There);
}

// SPEC 11.20
#[test]
fn pages_are_not_taken_for_filled_before_started_or_of_another_hand_over() {
    let handover = binding(ME, OTHER);
    let early = refused(Refusal::NotStarted(handover.epoch));
    let (mut offering, _) = Handovers::restore(ME, LINEAGE, &[], true).unwrap();
    let handover = Handover { epoch: offering.open(handover.session).unwrap(), ..handover };
    offering.send(handover).unwrap();
    let early_there = refused(Refusal::NotStarted(handover.epoch));
    assert_eq!(offering.handle(Input::Filled(handover)), early_there, "offered");
    offering.handle(said(Word::Ready, handover));
    assert_eq!(offering.handle(Input::Filled(handover)), early_there, "ready");
    offering.handle(Input::Commit);
    assert_eq!(offering.handle(Input::Filled(handover)), early_there, "being handed");
    let handover = binding(ME, OTHER);
    assert_eq!(desk(RecordKind::Handed, handover).handle(Input::Filled(handover)), early, "in doubt");
    let back = refused(Refusal::Conflict(handover.epoch));
    assert_eq!(desk(RecordKind::Returned, handover).handle(Input::Filled(handover)), back, "taken back");

    let (mut desk, handover) = serving();
    let unmoved = desk.clone();
    let other = Epoch::new(4);
    for altered in [
        Handover { session: [9; 16], ..handover },
        Handover { epoch: other, ..handover },
        Handover { root: Digest([9; 32]), ..handover },
        Handover { lineage: LineageId([9; 16]), ..handover },
        Handover { receiver: HostId([9; 32]), ..handover },
        Handover { post_copy: false, ..handover },
        binding(OTHER, ME),
    ] {
        assert_eq!(desk.handle(Input::Filled(altered)), refused(Refusal::Unknown(altered.epoch)));
        assert_eq!(desk, unmoved, "{altered:?}");
    }
    let (mut receiver, handover) = filling();
    assert_eq!(receiver.handle(Input::Filled(handover)), refused(Refusal::Unknown(handover.epoch)), "the sender's");
}

// SPEC 11.19
#[test]
fn a_restarted_sender_is_in_doubt_until_started_is_said_again() {
    let handover = binding(ME, OTHER);
    let mut desk = desk(RecordKind::Handed, handover);
    assert_eq!(desk.whereabouts(), Whereabouts::InDoubt);
    assert_eq!(desk.handle(Input::Connected(OTHER)), [say(Word::Commit, handover)]);
    assert_eq!(desk.handle(said(Word::Started, handover)), [Output::Fill(handover)]);
    // SPEC 11.14: who says that it is the other's says that nothing of it is needed here.
    let there = Input::Resolve(Resolve::There(handover.epoch));
    assert_eq!(desk.handle(there), [Output::Persist(record(RecordKind::Gone, handover))]);
}

// SPEC 11.16
#[test]
fn a_restarted_receiver_has_lost_a_guest_with_absent_pages_whatever_was_kept() {
    let (mut living, handover) = filling();
    assert_eq!(living.handle(said(Word::Commit, handover)), [say(Word::Started, handover)]);
    assert_eq!(living.whereabouts(), Whereabouts::Filling);
    let lost = refused(Refusal::Lost(handover.epoch));
    let mut desk = desk(RecordKind::Started, handover);
    let here = Input::Resolve(Resolve::Here(Fence { epoch: handover.epoch, host: OTHER }));
    // SPEC 11.21: GONE among them, as an operator can have had it said.
    for input in [Input::Connected(OTHER), said(Word::Commit, handover), said(Word::Gone, handover), here] {
        assert_eq!(desk.handle(input), lost, "{input:?}");
        assert_eq!(desk.whereabouts(), Whereabouts::Lost);
    }
    assert_eq!(desk.open([9; 16]), Err(Refusal::Lacking), "for all that is known here");
    let plain = Handover { post_copy: false, ..handover };
    assert_eq!(self::desk(RecordKind::Started, plain).whereabouts(), Whereabouts::Here);
    assert_eq!(self::desk(RecordKind::Gone, handover).whereabouts(), Whereabouts::Here, "nothing is absent any more");
}

#[test]
fn a_guest_whose_process_lives_is_not_lost() {
    let handover = binding(OTHER, ME);
    let mut desk = desk(RecordKind::Started, handover);
    desk.keep(&Handover { session: [9; 16], ..handover });
    assert_eq!(desk.whereabouts(), Whereabouts::Lost);
    desk.keep(&handover);
    assert_eq!(desk.handle(said(Word::Commit, handover)), [say(Word::Started, handover)]);
    let plain = Handover { post_copy: false, ..handover };
    let (mut lost, _) = Handovers::restore(ME, LINEAGE, &[record(RecordKind::Started, plain)], false).unwrap();
    lost.keep(&plain);
    assert_eq!(lost.whereabouts(), Whereabouts::Lost, "its memory is gone, whoever lives");
}

// SPEC 11.21
#[test]
fn a_guest_with_absent_pages_is_not_sent_on_and_not_settled_by_an_operator() {
    let (mut ready, _) = Handovers::restore(ME, LINEAGE, &[], true).unwrap();
    let (mut desk, handover) = filling();
    assert_eq!(desk.open([9; 16]), Err(Refusal::Lacking));
    ready.receive(OTHER, handover);
    let here = Input::Resolve(Resolve::Here(Fence { epoch: handover.epoch, host: OTHER }));
    assert_eq!(ready.handle(here), refused(Refusal::Lacking), "nobody would serve what is absent");
    assert_eq!(desk.handle(here), refused(Refusal::Lacking));
    let gone = record(RecordKind::Gone, handover);
    assert_eq!(desk.handle(said(Word::Gone, handover)), [Output::Persist(gone)]);
    assert_eq!(desk.open([9; 16]), Err(Refusal::Lacking), "until GONE is durable");
    desk.handle(Input::Durable(gone));
    assert_eq!((desk.whereabouts(), desk.open([9; 16])), (Whereabouts::Here, Ok(Epoch::new(4))));
}
