//! What must hold when a session is over, whatever happened on the way.

use crate::image::Image;
use crate::memory::ImageSink;
use crate::world::Outcome;
use pagewire_protocol::limits::WANTS_A_PAGE_MAX;

/// Checks a session that may have been harmed: no wrong image, no success that only one side believes in.
pub fn check_safety(outcome: &Outcome, image: &Image, sink: &ImageSink) {
    let state = sink.state();
    if outcome.receiver.is_ok() {
        assert!(state.finished, "the receiver is content before its image lasts");
        check_equal(&state.image, image);
    }
    if outcome.sender.is_ok() {
        assert!(outcome.receiver.is_ok(), "the sender is content, the receiver is not: {:?}", outcome.receiver);
    }
    let bound = image.pages() * WANTS_A_PAGE_MAX;
    assert!(outcome.received.wants <= bound + 1024, "{} wants for {} pages", outcome.received.wants, image.pages());
    assert!(outcome.sent.wants <= bound + 1024);
}

/// Checks a session that nobody harmed: it succeeds, and its counts are those of the image.
pub fn check_success(outcome: &Outcome, image: &Image, sink: &ImageSink) {
    check_safety(outcome, image, sink);
    assert!(outcome.sender.is_ok() && outcome.receiver.is_ok(), "{:?} {:?}", outcome.sender, outcome.receiver);
    check_counts(outcome, image);
}

/// Every page is counted once, by both sides.
pub fn check_counts(outcome: &Outcome, image: &Image) {
    let (sent, received) = (outcome.sent, outcome.received);
    let came = received.zero + received.base + received.reference + received.inline + received.delta;
    assert_eq!(came, image.pages(), "pages at the receiver: {received:?}");
    let stated = sent.zero + sent.base + sent.reference + sent.inline + sent.delta;
    assert_eq!(stated, image.pages(), "pages at the sender: {sent:?}");
    assert_eq!(sent.wants, received.wants);
    if received.wants == 0 {
        let at_receiver = [received.zero, received.base, received.reference, received.inline, received.delta];
        assert_eq!([sent.zero, sent.base, sent.reference, sent.inline, sent.delta], at_receiver);
    }
}

/// Two images are the same, byte for byte; says where they differ.
pub fn check_equal(got: &Image, expected: &Image) {
    assert_eq!(got.regions, expected.regions);
    for region in 0..expected.regions.len() {
        for page in 0..expected.regions[region].pages() {
            assert!(got.page(region, page) == expected.page(region, page), "page {page} of region {region} is wrong");
        }
    }
}
