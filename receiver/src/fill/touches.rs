//! The order in which a guest first touched what was not there: kept for the next time it comes, when it will want the
//! same first.
//!
//! What came before the guest touched it leaves no trace of its own. So the pages of the trace that a session began with
//! stay in it, before what was touched now: they came ahead, and that is why nobody waited for them.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::frame::Want;
use pagewire_protocol::page::{Layout, Place};
use std::collections::VecDeque;

/// Pages in the order of their first touch, each once: four bytes and a bit a page at most.
#[derive(Debug)]
pub(crate) struct Touches {
    order: Vec<Place>,
    known: PageBitmap,
}

impl Touches {
    pub(crate) fn new(pages: u64) -> Self {
        Self { order: Vec::new(), known: PageBitmap::new(pages) }
    }

    /// A page was touched, or is expected to be.
    pub(crate) fn note(&mut self, place: Place) {
        let at = u64::from(place.0);
        if at < self.known.len() && self.known.insert(at) {
            self.order.push(place);
        }
    }

    pub(crate) fn order(&self) -> &[Place] {
        &self.order
    }
}

/// Those of `places` that are lacking, as whole install pages in that order, each once; neighbours in a row are one
/// want. A trace is from another time: what is not in this image is no page of it.
pub(super) fn ahead(layout: &Layout, lacking: &PageBitmap, places: &[Place]) -> VecDeque<Want> {
    let mut wants: VecDeque<Want> = VecDeque::new();
    let mut named = PageBitmap::new(layout.pages());
    for place in places.iter().filter(|place| u64::from(place.0) < layout.pages()) {
        let (region, page) = layout.locate(*place);
        let Some(known) = layout.region(region) else { continue };
        let install = u64::from(known.install_size.pages()).max(1);
        let first = page.0 / install * install;
        let start = u64::from(layout.place(region, first).0);
        let pages = install.min(known.pages().saturating_sub(first));
        if lacking.gaps(start..start.saturating_add(pages)).next().is_some() || !named.insert(start) {
            continue;
        }
        let count = u32::try_from(pages).unwrap_or(1);
        match wants.back_mut() {
            Some(last) if last.region == region.0 && last.first.saturating_add(u64::from(last.count)) == first => {
                last.count = last.count.saturating_add(count);
            }
            _ => wants.push_back(Want { region: region.0, first, count }),
        }
    }
    wants
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::page::{InstallSize, Region};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn layout() -> Layout {
        let region = |pages: u64, install_size| Region { bytes: pages * 4096, install_size };
        Layout::new(vec![region(100, InstallSize::KIB_4), region(1100, InstallSize::MIB_2)]).unwrap()
    }

    fn places(numbers: &[u32]) -> Vec<Place> {
        numbers.iter().copied().map(Place).collect()
    }

    #[test]
    fn each_page_is_noted_once_in_the_order_of_its_first_touch() {
        let mut touches = Touches::new(10);
        places(&[7, 2, 7, 9, 10, u32::MAX, 2, 0]).into_iter().for_each(|place| touches.note(place));
        assert_eq!(touches.order(), places(&[7, 2, 9, 0]));
    }

    #[test]
    fn what_is_lacking_is_wanted_in_order_and_neighbours_are_one_want() {
        let (layout, mut lacking) = (layout(), PageBitmap::full(1200));
        lacking.remove_range(50..60);
        // 700 and 1000 lie in the second and third install page of the other region, the last of which is cut.
        let wants = ahead(&layout, &lacking, &places(&[5, 6, 7, 3, 55, 6, 700, 99, 100, 1100, 1199, 1200, 4]));
        let as_read: Vec<_> = wants.iter().map(|want| (want.region, want.first, want.count)).collect();
        assert_eq!(as_read, [(0, 5, 3), (0, 3, 1), (1, 512, 512), (0, 99, 1), (1, 0, 512), (1, 1024, 76), (0, 4, 1)]);
    }

    proptest! {
        /// A trace may be anything: what is wanted is legal, lacking, and named once.
        #[test]
        fn any_trace_makes_legal_wants(
            trace in prop::collection::vec(prop_oneof![0u32..1300, any::<u32>()], 0..400),
            gone in prop::collection::vec(0u64..1200, 0..20),
        ) {
            let (layout, mut lacking) = (layout(), PageBitmap::full(1200));
            gone.iter().for_each(|place| _ = lacking.remove_range(*place..place + 1));
            let mut seen = BTreeSet::new();
            for want in ahead(&layout, &lacking, &places(&trace)) {
                let range = layout.range(want.region, want.first, want.count).unwrap();
                let first = layout.place(range.region, want.first).0;
                for place in first..first + want.count {
                    prop_assert!(seen.insert(place) && lacking.contains(u64::from(place)));
                }
            }
            let all = trace.iter().filter(|place| **place < 100 && lacking.contains(u64::from(**place)));
            prop_assert!(all.into_iter().all(|place| seen.contains(place)), "small pages are all wanted");
        }
    }
}
