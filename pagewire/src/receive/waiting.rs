//! Guests that may run here before all of their pages are there: what is kept of them stays readable until they are.

use super::{Arriving, ServerEvent, Shared, Tell, clock, is_fresh, no_memory, refusal, refused, seed};
use crate::entrance::Entrant;
use crate::ground::{Ground, Search};
use crate::handed::{HandedNews, HandedSink, Handing};
use crate::live::MemorySlot;
use crate::observe::Event;
use crate::report::{Outcome, Report};
use crate::reuse::Came;
use pagewire_protocol::error::{CloseCode, chain};
use pagewire_protocol::frame::Open;
use pagewire_receiver::Offer;
use pagewire_receiver::driver::Refusal;
use pagewire_receiver::memory::uffd::FaultsOf;
use pagewire_receiver::memory::{Backing, Beside, PostcopyMemory, PostcopySink};
use pagewire_store::{Landing, LandingOptions};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// What memory of this process is made of.
#[derive(Clone, Copy)]
pub(super) enum Memory<'a> {
    Of(Backing),
    /// A file in this folder.
    In(&'a Path),
}

impl Memory<'_> {
    fn make(self, open: &Open) -> Result<(Arc<PostcopyMemory>, Option<Landing>), Refusal> {
        let layout = open.layout.clone();
        match self {
            Self::Of(backing) => {
                let memory = PostcopyMemory::new(layout, backing).map_err(|error| no_memory(&error))?;
                Ok((Arc::new(memory), None))
            }
            Self::In(folder) => {
                let landing = LandingOptions { inplace: false, fresh: true };
                let landing = Landing::start(folder, OsStr::new(open.name.as_str()), layout.bytes(), landing);
                let mut landing = landing.map_err(|error| refusal(&error))?;
                let memory = landing.to_map().and_then(|file| PostcopyMemory::in_file(layout, &file));
                Ok((Arc::new(memory.map_err(|error| no_memory(&error))?), Some(landing)))
            }
        }
    }
}

impl Shared {
    /// What the store has of a guest that is offered, to be read beside its memory.
    fn beside(&self, offer: &Offer, warnings: &mut Vec<String>) -> Result<Ground<Option<Beside>>, Refusal> {
        match self.options.reuse.as_ref().filter(|_| !is_fresh(offer, &self.options)) {
            Some(reuse) => Ok(Search { reuse, open: &offer.open, seed: seed()?, warnings }.beside()),
            None => Ok(Ground::plain(None)),
        }
    }

    /// Keeps what arrived: of its pages none, as the guest has written to them since.
    fn keep_run(&self, came: &Came<'_>, report: &mut Report) {
        self.keep(came, None, report);
    }

    /// Runs one session into memory that a guest can run in before all of it is there, or one that fills such a guest.
    pub(super) fn receive_post_copy(
        &self,
        arriving: Arriving,
        entrant: Entrant,
        (of, faults_of): (Memory<'_>, FaultsOf),
        observe: impl FnMut(&Event),
    ) -> (bool, Outcome) {
        let slot = MemorySlot::default();
        let place = |offer: &Offer, warnings: &mut Vec<String>| {
            if offer.open.live.is_none() {
                return Err(refused("this memory is for guests that run: send it with --live"));
            }
            let (memory, landing) = of.make(&offer.open)?;
            let _ = slot.set(Arc::clone(&memory));
            let sink = PostcopySink::new(memory, faults_of, clock());
            let sink = landing.into_iter().fold(sink, PostcopySink::landing);
            Ok(self.beside(offer, warnings)?.landed(|beside| sink.over(beside)))
        };
        let at = Some((Arc::clone(&slot), &self.parking));
        self.run(arriving, entrant, place, at, |came, report| self.keep_run(came, report), observe)
    }

    /// Runs one session into the memory of a hypervisor, or one that fills a guest there.
    pub(super) fn receive_handed(
        &self,
        arriving: Arriving,
        entrant: Entrant,
        (dir, session): (&Path, u64),
        tell: &Tell,
    ) -> (bool, Outcome) {
        let place = |offer: &Offer, warnings: &mut Vec<String>| {
            if !offer.open.live.is_some_and(|live| live.post_copy) {
                return Err(refused(
                    "this memory comes with a guest that runs in it: send it with --live --post-copy now",
                ));
            }
            let [_] = offer.open.layout.regions() else {
                return Err(refused("this memory is for images of one region"));
            };
            let name = offer.open.name.to_string();
            let path = dir.join(format!("{name}.sock"));
            let (tell, peer) = (Arc::clone(tell), path.display().to_string());
            let told = move |news: HandedNews<'_>| match news {
                HandedNews::Come(memory) => tell(ServerEvent::HandedOver { session, name: &name, memory }),
                HandedNews::Refused(why) => tell(ServerEvent::Stranger { peer: &peer, why }),
            };
            let handing = Handing::listen(&path, offer.open.layout.clone(), told).map_err(|error| {
                let reason = format!("no hypervisor can be waited for at {}: {}", path.display(), chain(&error));
                Refusal { code: CloseCode::DESTINATION, reason }
            })?;
            Ok(self.beside(offer, warnings)?.landed(|beside| HandedSink::new(handing, beside)))
        };
        let observe = |event: &Event| tell(ServerEvent::Progress { session, event });
        let waiting = Some((MemorySlot::default(), &self.handed));
        self.run(arriving, entrant, place, waiting, |came, report| self.keep_run(came, report), observe)
    }
}
