//! One attempt to bring a guest from one host to another, and what must hold of it: first while everything may be broken,
//! then when hosts that crashed are back and can talk.

use crate::guest::Guest;
use crate::host::{Host, reconnect};
use crate::memory::ImageSink;
use crate::world::{Outcome, World, WorldConfig};
use pagewire_protocol::handover::{Input, Whereabouts};
use std::fmt::Debug;

/// An attempt, and what it came to.
pub struct Attempt {
    /// The guest at the first host.
    pub guest: Guest,
    /// What the second one has of it.
    pub sink: ImageSink,
    /// How the session ended, and the hosts.
    pub outcome: Outcome,
}

/// What came of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// It runs where it was.
    Here,
    /// It runs at the other host.
    There,
    /// It had started at the other host, and a crash has taken its memory: the first one is in doubt.
    Lost,
}

/// Whether a host knows that it must not run the guest.
pub fn left(host: &Host) -> bool {
    matches!(host.handovers.whereabouts(), Whereabouts::There | Whereabouts::InDoubt)
}

impl Attempt {
    /// Sends `guest` to `sink` in a world as `config` says.
    pub fn new(guest: Guest, sink: ImageSink, mut config: WorldConfig) -> Self {
        config.guest = Some(guest.clone());
        let image = guest.state().image.clone();
        let outcome = World::new(&image, &sink, config).run();
        Self { guest, sink, outcome }
    }

    /// Where the guest was, and where it was to go.
    pub fn hosts(&mut self) -> &mut [Host; 2] {
        &mut self.outcome.hosts
    }

    /// I1, I3: what runs now, before anybody has been restarted or reached again.
    ///
    /// # Panics
    /// Something does not hold; `faults` are named then.
    pub fn judge(&self, faults: &impl Debug) {
        let [one, other] = &self.outcome.hosts;
        let runs = self.guest.state().runs();
        assert!(!(runs && other.told_to_run > 0), "two runners: {faults:?}");
        assert!(!(runs && left(one)), "it runs though it has left: {faults:?}");
        assert!(other.told_to_run <= 1 && one.told_to_run <= 1, "told to run it again: {faults:?}");
        if self.outcome.sender.is_ok() {
            assert!(other.has_guest() && other.told_to_run == 1, "success is the other host's: {faults:?}");
        }
    }

    /// I1, I2, I8: hosts that crashed start again, and both can talk: where the guest is for good. `kept` says that a
    /// guest which was started outlives a crash of its host. What stays runs on.
    ///
    /// # Panics
    /// It is at none of them, at both, not whole, or nobody lets it run; `faults` are named then.
    pub fn settle(&mut self, kept: bool, faults: &impl Debug) -> End {
        self.judge(faults);
        let [one, other] = self.hosts();
        for _ in 0..4 {
            [&mut *one, &mut *other].into_iter().filter(|host| host.dead).for_each(|host| host.restart(kept));
            reconnect(one, other);
        }
        assert!(!one.dead && !other.dead, "each crashes once: {faults:?}");
        let (here, there) = (!left(one), other.has_guest());
        assert!(!(here && other.told_to_run > 0), "it ran there: {faults:?} {:?} {:?}", one.records, other.records);
        let end = match (here, there, other.handovers.whereabouts()) {
            (true, false, _) => End::Here,
            (false, true, _) => End::There,
            (false, false, Whereabouts::Lost) if !kept => End::Lost,
            nobody => panic!("{nobody:?}: {faults:?} {:?} {:?}", one.records, other.records),
        };
        let let_run = one.told_to_run > 0 || one.restarts > 0;
        let mut state = self.guest.state();
        if end == End::Here {
            assert!(state.runs() || let_run, "nobody lets it run on: {faults:?}");
            state.resume();
        } else {
            assert!(!state.runs() && self.sink.state().image == state.image, "all of it: {faults:?}");
        }
        end
    }

    /// I10: all words of this attempt, said again to either host, change nothing; nor does any time that passes. A host that
    /// knows nothing of it may reject it.
    ///
    /// # Panics
    /// They do; `faults` are named then.
    pub fn replay(&mut self, faults: &impl Debug) {
        let words = self.outcome.words.clone();
        let [one, other] = self.hosts();
        let state = |host: &Host| (host.told_to_run, left(host), host.has_guest());
        let before = [state(one), state(other)];
        for (to_receiver, message) in words {
            if to_receiver {
                other.hear(one.id, message)
            } else {
                one.hear(other.id, message)
            };
            one.handle(Input::Timeout);
            other.handle(Input::Timeout);
        }
        assert_eq!(before, [state(one), state(other)], "old words change nothing: {faults:?}");
    }
}
