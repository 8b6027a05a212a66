//! Messages of the kernel, read and taken into account.

use super::install::Installed;
use super::places::{Piece, Places, Taken};
use super::{Fault, HUGE, PostcopyError, PostcopyMemory, SMALL, Served, failed, lock, place_of, places, size};
use crate::memory::uffd::{FaultKind, Filled, Message, Uffd, Wake};
use pagewire_protocol::page::RegionId;
use pagewire_protocol::time::Time;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{PoisonError, RwLockWriteGuard};

/// Reads of 64 messages in one gathering: a flood does not keep the caller for longer.
const READS_MAX: u32 = 16;
/// Messages of one read.
const READ_MESSAGES: usize = 64;
/// Odd messages that are kept word for word; beyond that they are counted.
const ODD_MAX: usize = 16;
/// How often somebody is woken for one page that is there before it counts as lost. Each thread may come once too late
/// to see a page that was just put in, and a page that was thrown away is known by then.
const WAKES_MAX: u32 = 1024;
/// Pages whose wakes are counted at a time.
const WOKEN_MAX: usize = 1024;

/// A message that cannot be answered: who waits goes on waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Odd {
    /// A fault outside of every region.
    Outside {
        /// The address.
        address: u64,
        /// The thread, if the kernel tells.
        thread: Option<u32>,
    },
    /// A fault of a kind that this memory was not registered for.
    Unexpected {
        /// The address.
        address: u64,
        /// The kind.
        kind: FaultKind,
    },
    /// A page was there and is missing, though nobody said that it was thrown away.
    Lost {
        /// Its region.
        region: RegionId,
        /// The page.
        page: u64,
    },
    /// A message that no kernel should send.
    Message {
        /// Its kind.
        kind: u8,
    },
}

/// What messages said.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Messages that were read.
    pub messages: u64,
    /// Faults on units that nobody waited for yet: so many more can be had by [`next_fault`](PostcopyMemory::next_fault).
    pub faults: u64,
    /// Faults on units that somebody waits for already.
    pub folded: u64,
    /// Faults on pages that had come meanwhile: woken.
    pub woken: u64,
    /// Faults on pages that the guest threw away: answered with zeros.
    pub zeroed: u64,
    /// Pages that were thrown away before they came: nobody has to bring them.
    pub removed_pages: u64,
    /// Pages that were unmapped before they came.
    pub unmapped_pages: u64,
    /// Times that memory was moved.
    pub remaps: u64,
    /// Who waited for units that are complete since pages of them were thrown away.
    pub served: Vec<Served>,
    /// Messages that cannot be answered.
    pub odd: u64,
    /// The first of these.
    pub odds: Vec<Odd>,
    /// Descriptors of children of the process, whose memory is as much missing as the process's. While they are open, the
    /// children wait; there are as many as this process may have descriptors.
    pub children: Vec<OwnedFd>,
    /// Whether there may be more to read at once.
    pub more: bool,
}

impl Gathered {
    fn odd(&mut self, odd: Odd) {
        self.odd = self.odd.saturating_add(1);
        if self.odds.len() < ODD_MAX {
            self.odds.push(odd);
        }
    }
}

/// What is left to do when loaders may go on.
#[derive(Default)]
struct ToDo {
    faults: Vec<(u64, FaultKind, bool, Option<u32>)>,
    wake: Vec<Range<u64>>,
}

impl PostcopyMemory {
    /// Reads the messages that are there, never waiting for any, and takes them into account: faults on pages that have
    /// come are woken, those on pages that the guest threw away are answered with zeros, and all others are for
    /// [`next_fault`](Self::next_fault), dated `now`.
    ///
    /// # Errors
    /// It is not armed, or messages cannot be read; so it is while there is no descriptor free for a child's.
    pub fn gather(&self, now: Time) -> Result<Gathered, PostcopyError> {
        self.read_messages(now)?;
        let mut news = std::mem::take(&mut *lock(&self.news));
        if news.removed_pages > 0 || news.unmapped_pages > 0 {
            let mut installed = Installed::default();
            let done = self.install_all_staged(now, &mut installed);
            news.served = installed.served;
            // What could not be put in now is tried when more of it comes, or is thrown away.
            match done {
                Ok(()) | Err(PostcopyError::Busy | PostcopyError::NoMemory) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(news)
    }

    /// As [`gather`](Self::gather), and keeps what they said for the next of those.
    pub(super) fn read_messages(&self, now: Time) -> Result<(), PostcopyError> {
        let uffd = self.uffd()?;
        let mut messages = lock(&self.reader);
        for _ in 0..READS_MAX {
            let mut todo = ToDo::default();
            let read = {
                let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
                messages.clear();
                let read = uffd.read(&mut messages).map_err(failed("messages of userfaultfd cannot be read"))?;
                let mut news = lock(&self.news);
                messages.drain(..).for_each(|message| self.take(message, &mut news, &mut todo));
                read
            };
            let mut news = lock(&self.news);
            news.messages = news.messages.saturating_add(read as u64);
            for addresses in todo.wake {
                // Addresses that are gone have nobody to wake.
                let _ = uffd.wake(addresses);
            }
            for (address, kind, write, thread) in todo.faults {
                self.fault(uffd, address, kind, (write, thread, now), &mut news);
            }
            news.more = read >= READ_MESSAGES;
            if !news.more {
                break;
            }
        }
        Ok(())
    }

    /// Takes a message into account, while no loader is at work.
    fn take(&self, message: Message, news: &mut Gathered, todo: &mut ToDo) {
        match message {
            Message::Fault { address, kind, write, thread } => todo.faults.push((address, kind, write, thread)),
            Message::Removed(addresses) => {
                for piece in self.places().at(&addresses) {
                    let places = self.inside(&piece);
                    self.removed.insert_range(places.clone());
                    news.removed_pages = news.removed_pages.saturating_add(self.settle(places.clone()));
                    self.forget_faults(&piece);
                }
                todo.wake.push(addresses);
            }
            Message::Unmapped(addresses) => {
                let Taken { taken, lost } = self.places_mut().take(&addresses);
                self.unmapped(&[taken, lost].concat(), news);
                todo.wake.push(addresses);
            }
            Message::Remapped { from, to, bytes } => {
                let gone = self.places_mut().remap(from, to, bytes);
                self.unmapped(&gone, news);
                news.remaps = news.remaps.saturating_add(1);
                todo.wake.push(from..from.saturating_add(bytes));
            }
            Message::Forked(child) => news.children.push(child),
            Message::Odd { kind, .. } => news.odd(Odd::Message { kind }),
        }
    }

    fn places_mut(&self) -> RwLockWriteGuard<'_, Places> {
        self.places.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmapped(&self, pieces: &[Piece], news: &mut Gathered) {
        for piece in pieces {
            news.unmapped_pages = news.unmapped_pages.saturating_add(self.settle(self.inside(piece)));
            self.forget_faults(piece);
        }
    }

    /// The places of the pages of a piece that are inside the region: a huge page may end behind it.
    fn inside(&self, piece: &Piece) -> Range<u64> {
        let pages = places::pages(&(piece.offset..piece.offset.saturating_add(piece.bytes)));
        let places = self.places_of(piece.region, pages);
        let end = self.all_places(piece.region).end;
        places.start.min(end)..places.end.min(end)
    }

    /// Units of a piece of which nothing has to be brought any more are not waited for: who did will be woken.
    fn forget_faults(&self, piece: &Piece) {
        let all = self.all_places(piece.region);
        let unit = self.unit_pages(piece.region);
        let inside = self.inside(piece);
        let start = inside.start.saturating_sub(inside.start.saturating_sub(all.start) % unit);
        let mut faults = lock(&self.faults);
        let waiting: Vec<u64> = faults.waiting_in(start..inside.end);
        for place in waiting {
            let end = place.saturating_add(unit).min(all.end);
            if self.present.runs(place..end, false).is_empty() {
                faults.forget(place);
            }
        }
    }

    pub(super) fn unit_pages(&self, region: RegionId) -> u64 {
        self.layout.region(region).map_or(1, |region| u64::from(region.install_size.pages()))
    }

    fn fault(
        &self,
        uffd: &Uffd,
        address: u64,
        kind: FaultKind,
        (write, thread, now): (bool, Option<u32>, Time),
        news: &mut Gathered,
    ) {
        let Some((region, offset)) = self.places().find(address) else {
            return news.odd(Odd::Outside { address, thread });
        };
        if kind != FaultKind::Missing {
            return news.odd(Odd::Unexpected { address, kind });
        }
        let all = self.all_places(region);
        let (page, unit) = (offset / SMALL, self.unit_pages(region));
        let first = page.saturating_sub(page % unit);
        // What of a huge page lies behind the region's end counts as its last page.
        let place = self.places_of(region, page..page).start.min(all.end.saturating_sub(1));
        let first_place = self.places_of(region, first..first).start;
        if !self.present.contains(place) {
            let pages = unit.min(all.end.saturating_sub(first_place));
            let (pages, page) = (u32::try_from(pages).unwrap_or(1), place.saturating_sub(all.start));
            let fault = Fault { region, first, pages, page, write, thread, since: now };
            let is_first = lock(&self.faults).add(first_place, fault);
            if !self.present.contains(place) {
                let count = if is_first { &mut news.faults } else { &mut news.folded };
                *count = count.saturating_add(1);
                return;
            }
            // It came just now, perhaps before anybody could know of this fault.
            lock(&self.faults).forget(first_place);
        }
        self.answer(uffd, region, place, address, news);
    }

    /// Whether all of a page of the kernel's was thrown away. Where a table says that pages are huge and they are small,
    /// zeros for one of them would be zeros for its neighbours.
    fn is_removed(&self, region: RegionId, place: u64) -> bool {
        let (all, pages) = (self.all_places(region), self.page_bytes(region) / SMALL);
        let start = place.saturating_sub(place.saturating_sub(all.start) % pages);
        self.removed.runs(start..start.saturating_add(pages).min(all.end), false).is_empty()
    }

    /// Somebody waits for a page that nobody has to bring.
    fn answer(&self, uffd: &Uffd, region: RegionId, place: u64, address: u64, news: &mut Gathered) {
        let page_bytes = self.page_bytes(region);
        let start = address.saturating_sub(address % page_bytes);
        let addresses = start..start.saturating_add(page_bytes);
        if self.is_removed(region, place) {
            let filled = put_zeros(uffd, addresses.clone(), page_bytes);
            if filled.stop.is_some() {
                // Whatever it was, the thread comes again if it still misses the page.
                let _ = uffd.wake(addresses);
            }
            news.zeroed = news.zeroed.saturating_add(1);
            return;
        }
        let mut woken = lock(&self.woken);
        if woken.len() >= WOKEN_MAX && !woken.contains_key(&place) {
            woken.clear();
        }
        let wakes = woken.entry(place).or_default();
        *wakes = wakes.saturating_add(1);
        if *wakes > WAKES_MAX {
            let (region, page) = self.layout.locate(place_of(place));
            return news.odd(Odd::Lost { region, page: page.0 });
        }
        let _ = uffd.wake(addresses);
        news.woken = news.woken.saturating_add(1);
    }
}

/// Puts zeros in where nothing is.
pub(super) fn put_zeros(uffd: &Uffd, addresses: Range<u64>, page_bytes: u64) -> Filled {
    if page_bytes == SMALL {
        return uffd.zero(addresses, Wake::Now);
    }
    let zeros = vec![0; size(HUGE)];
    let mut all = Filled::default();
    while addresses.start.saturating_add(all.bytes()) < addresses.end && all.stop.is_none() {
        let one = uffd.copy(addresses.start.saturating_add(all.bytes()), &zeros, page_bytes, Wake::Now);
        all.installed = all.installed.saturating_add(one.installed);
        all.present = all.present.saturating_add(one.present);
        all.stop = one.stop;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::Backing;
    use super::*;
    use crate::memory::uffd::FaultsOf;
    use pagewire_protocol::bitmap::PageBitmap;
    use pagewire_protocol::page::{InstallSize, Layout, Region};
    use std::io::{self, Write};
    use std::sync::Arc;
    use std::thread::{sleep, spawn};
    use std::time::Duration;

    const MAIN: RegionId = RegionId(0);

    fn armed() -> Option<Arc<PostcopyMemory>> {
        let layout = Layout::new(vec![Region { bytes: 8 * SMALL, install_size: InstallSize::KIB_4 }]).unwrap();
        let memory = PostcopyMemory::new(layout, Backing::Private).unwrap();
        let skip = |error| {
            io::stderr().write_all(format!("SKIPPED: the order of messages and pages: {error}\n").as_bytes()).unwrap()
        };
        memory.arm(&PageBitmap::full(8), FaultsOf::Programs).map_err(skip).ok()?;
        Some(Arc::new(memory))
    }

    /// What keeps old bytes out of a page that was just thrown away, however the threads run.
    #[test]
    fn messages_are_not_read_while_a_loader_is_at_work_and_the_other_way_round() {
        let Some(memory) = armed() else { return };
        let balloon = spawn({
            let memory = memory.clone();
            move || memory.discard(MAIN, 2, 1).unwrap()
        });
        // A loader has looked at the state of a page, and has not put it in yet.
        let looked = memory.gate.read().unwrap();
        let gatherer = spawn({
            let memory = memory.clone();
            move || memory.gather(Time::ZERO).unwrap()
        });
        sleep(Duration::from_millis(50));
        assert!(!gatherer.is_finished() && !balloon.is_finished() && !memory.is_present(MAIN, 2));
        drop(looked);
        let mut removed = gatherer.join().unwrap().removed_pages;
        while !balloon.is_finished() {
            removed += memory.gather(Time::ZERO).unwrap().removed_pages;
        }
        assert_eq!(removed, 1);
        // Messages are read, and not taken into account yet.
        let read = memory.gate.write().unwrap();
        let loader = spawn({
            let memory = memory.clone();
            move || memory.install(MAIN, 0, &[1; 8 * SMALL as usize], Time::ZERO).unwrap()
        });
        sleep(Duration::from_millis(50));
        assert!(!loader.is_finished() && memory.absent_pages() == 7);
        drop(read);
        let installed = loader.join().unwrap();
        assert_eq!((installed.pages, installed.already), (7, 1));
    }

    #[test]
    fn a_unit_that_a_loader_has_is_left_to_it() {
        let Some(memory) = armed() else { return };
        assert!(memory.claimed.insert(3));
        let installed = memory.install(MAIN, 0, &[1; 8 * SMALL as usize], Time::ZERO).unwrap();
        assert_eq!((installed.pages, installed.elsewhere, installed.already), (7, 1, 0));
        memory.claimed.remove(3);
        assert_eq!(memory.install_zeros(MAIN, 3, 1, Time::ZERO).unwrap().pages, 1);
        assert!(memory.claimed.runs(0..8, true).is_empty(), "no claim is left behind");
    }
}
