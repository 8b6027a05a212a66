//! The guest's memory: what a real image holds, as often as it takes to fill it.

use crate::{Failure, PAGE};
use pagewire::Mapping;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A guest's memory, twice: as the sender's host maps it, and as it is expected at the receiver.
pub(crate) struct Image {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) bytes: Vec<u8>,
}

impl Image {
    /// `pages` pages with what the file at `path` holds, or with noise. Every page but zeros ends with its number: no
    /// two are equal, so that what finds duplicates gains nothing by the repetition.
    pub(crate) fn new(path: Option<&Path>, pages: usize) -> Result<Self, Failure> {
        let mut source = match path {
            Some(path) => std::fs::read(path)?,
            None => noise(pages),
        };
        source.truncate(source.len() / PAGE * PAGE);
        if source.is_empty() {
            return Err("an image of less than a page".into());
        }
        let mut bytes: Vec<u8> = source.chunks_exact(PAGE).cycle().take(pages).flatten().copied().collect();
        for (number, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
            if let Some(last) = page.last_chunk_mut::<8>().filter(|last| **last != [0; 8]) {
                *last = number.to_le_bytes();
            } else if page.iter().any(|byte| *byte != 0) {
                page.last_chunk_mut::<8>().into_iter().for_each(|last| *last = number.to_le_bytes());
            }
        }
        let mapping = Arc::new(Mapping::private(bytes.len())?);
        for (at, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            mapping.byte(at).into_iter().for_each(|place| place.store(*byte, Ordering::Relaxed));
        }
        Ok(Self { mapping, bytes })
    }

    pub(crate) fn pages(&self) -> usize {
        self.bytes.len() / PAGE
    }
}

fn noise(pages: usize) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    (0..pages * PAGE / 8).flat_map(|_| random.word().to_le_bytes()).collect()
}

/// Numbers that only have to differ.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.word() % (end.max(1) as u64)).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, values: &mut [T]) {
        for at in (1..values.len()).rev() {
            values.swap(at, self.below(at + 1));
        }
    }
}

/// `count` different pages of `pages`, in an order that means nothing.
pub(crate) fn random_pages(pages: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..pages).collect();
    Random(seed | 1).shuffle(&mut all);
    all.truncate(count);
    all
}
