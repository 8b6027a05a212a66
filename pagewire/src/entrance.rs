//! Counts who is inside: connections that have not named what they are about, and sessions that have.
//!
//! The former are strangers, of whom few are let in; the latter are bounded by whoever runs the server.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Connections that have not said yet what they are.
const STRANGERS_MAX: usize = 64;

/// How many are inside.
#[derive(Debug, Default)]
pub(crate) struct Entrance {
    strangers: AtomicUsize,
    sessions: AtomicUsize,
}

impl Entrance {
    /// Whether nobody is let in who might be another stranger.
    pub(crate) fn is_crowded(&self) -> bool {
        self.strangers.load(Ordering::Relaxed) >= STRANGERS_MAX
    }

    /// Lets a connection in. It is a stranger.
    pub(crate) fn admit(self: &Arc<Self>) -> Entrant {
        self.strangers.fetch_add(1, Ordering::Relaxed);
        Entrant { entrance: Arc::clone(self), named: Cell::new(false) }
    }
}

/// A connection that is inside, until this goes.
#[derive(Debug)]
pub(crate) struct Entrant {
    entrance: Arc<Entrance>,
    /// It has said what it is about.
    named: Cell<bool>,
}

impl Entrant {
    /// It has said what it is about, and is no stranger any more; how many other sessions are open.
    pub(crate) fn name(&self) -> usize {
        let Entrance { strangers, sessions } = &*self.entrance;
        if self.named.replace(true) {
            return sessions.load(Ordering::Relaxed).saturating_sub(1);
        }
        strangers.fetch_sub(1, Ordering::Relaxed);
        sessions.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Entrant {
    fn drop(&mut self) {
        let Entrance { strangers, sessions } = &*self.entrance;
        let counted = if self.named.get() { sessions } else { strangers };
        counted.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inside(entrance: &Entrance) -> (usize, usize) {
        (entrance.strangers.load(Ordering::Relaxed), entrance.sessions.load(Ordering::Relaxed))
    }

    #[test]
    fn who_has_said_what_it_is_about_is_no_stranger_and_counts_as_a_session_once() {
        let entrance = Arc::new(Entrance::default());
        let mut entrants: Vec<Entrant> = (0..STRANGERS_MAX).map(|_| entrance.admit()).collect();
        assert!(entrance.is_crowded());
        assert_eq!([entrants[0].name(), entrants[1].name(), entrants[1].name()], [0, 1, 1]);
        assert_eq!((inside(&entrance), entrance.is_crowded()), ((STRANGERS_MAX - 2, 2), false));
        entrants.truncate(3);
        assert_eq!(inside(&entrance), (1, 2));
        entrants.remove(0);
        assert_eq!(inside(&entrance), (1, 1));
        entrants.clear();
        assert_eq!(inside(&entrance), (0, 0));
    }
}
