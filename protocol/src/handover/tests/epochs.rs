//! Epochs are used once, and a host that forgot one is told.

use super::*;

// SPEC 11.12
/// C17: a sender that died before HANDED has no record of the epoch that its receiver gave up. It is let in where it harms
/// nobody, and REJECT makes it use the epoch up.
#[test]
fn a_sender_that_forgot_an_epoch_is_let_in_to_be_told() {
    let given_up = record(RecordKind::Rejected, incoming(1));
    let mut receiver = desk(&[given_up]);
    let again = Handover { session: [9; 16], ..incoming(1) };
    assert_eq!(receiver.may_receive(again.epoch), Err(Refusal::EpochOver { epoch: again.epoch, floor: again.epoch }));
    assert_eq!(receiver.may_begin(again.epoch), Ok(()));
    assert_eq!(receiver.receive(OTHER, again)[1], say(Word::Reject, again));
    let mut sender = desk(&[]);
    let out = Handover { session: [9; 16], ..outgoing(1) };
    sender.open(out.session).unwrap();
    sender.send(out).unwrap();
    sender.handle(said(Word::Reject, out));
    sender.handle(Input::Durable(record(RecordKind::Returned, out)));
    assert_eq!(sender.open([8; 16]), Ok(Epoch::new(2)));
    assert_eq!(receiver.may_begin(Epoch::new(2)), Ok(()));
    // Not where it would be written over.
    let mut here = desk(&[record(RecordKind::Started, incoming(5))]);
    for epoch in [1, 5, 6] {
        assert_eq!(here.may_begin(Epoch::new(epoch)), Err(Refusal::IsHere));
    }
    here.handle(Input::Cancel);
    let (lost, _) = Handovers::restore(ME, LINEAGE, &[record(RecordKind::Started, incoming(5))], false).unwrap();
    assert_eq!(lost.may_begin(Epoch::new(1)), Err(Refusal::IsHere));
    let far = Epoch::new(2 + EPOCH_STEP_MAX);
    assert_eq!(receiver.may_begin(far), Err(Refusal::EpochFar { epoch: far, floor: again.epoch }));
}

// SPEC 11.12
#[test]
fn an_epoch_stays_over_while_its_record_is_replaced() {
    let handover = incoming(6);
    let records = [record(RecordKind::Started, handover)];
    let (mut desk, _) = Handovers::restore(ME, LINEAGE, &records, false).unwrap();
    desk.handle(Input::Resolve(Resolve::There(handover.epoch)));
    let refused = Refusal::EpochOver { epoch: Epoch::new(5), floor: handover.epoch };
    assert_eq!(desk.receive(OTHER, incoming(5)), [Output::Refuse(refused), say(Word::Reject, incoming(5))]);
}
