//! A workload whose data live in guest memory: a hash table that is read, changed and filled, an array that is sorted,
//! and a database. The image is made at the sender; whoever runs it knows the right answer.

use super::{PAGE, database, noise};
use pagewire::{PostcopyMemory, RegionId};

/// Slots of the table, of a key and a value, and the entries that are in it from the beginning and in the end.
const SLOTS: u64 = 1 << 16;
const ENTRIES: u64 = 25_000;
const ENTRIES_LATER: u64 = 40_000;
const TABLE_BYTES: u64 = SLOTS * 16;
/// Numbers to be sorted.
const NUMBERS: u64 = 1 << 17;
const NUMBERS_BYTES: u64 = NUMBERS * 8;
/// Of noise that is only read, behind both.
const NOISE_PAGES: usize = 1200;
/// Where the database is, behind all.
const DATABASE_AT: u64 = TABLE_BYTES + NUMBERS_BYTES + (NOISE_PAGES * PAGE) as u64;

/// All of it.
pub(crate) const BYTES: u64 = DATABASE_AT + database::BYTES as u64;
/// What a hypervisor with two regions has in the first.
pub(crate) const FIRST_BYTES: u64 = TABLE_BYTES + NUMBERS_BYTES / 2;

fn mixed(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Never zero: that is an empty slot.
fn key(entry: u64) -> u64 {
    mixed(entry + 1) | 1 << 63
}

fn number(at: u64) -> u64 {
    mixed(at ^ 0x5555_0000)
}

/// Words that can be read and written, wherever they are.
trait Words {
    fn load(&self, offset: u64) -> u64;
    fn put(&mut self, offset: u64, word: u64);
}

impl Words for Vec<u8> {
    fn load(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self[offset as usize..][..8].try_into().unwrap())
    }

    fn put(&mut self, offset: u64, word: u64) {
        self[offset as usize..][..8].copy_from_slice(&word.to_le_bytes());
    }
}

/// Memory of two regions that is being served: whoever touches a page that is absent waits.
impl Words for &PostcopyMemory {
    fn load(&self, offset: u64) -> u64 {
        let (region, offset) = place(offset);
        let mut word = [0; 8];
        self.read(region, offset, &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    fn put(&mut self, offset: u64, word: u64) {
        let (region, offset) = place(offset);
        PostcopyMemory::store(self, region, offset, word).unwrap();
    }
}

fn place(offset: u64) -> (RegionId, u64) {
    if offset < FIRST_BYTES { (RegionId(0), offset) } else { (RegionId(1), offset - FIRST_BYTES) }
}

/// Where the slot of a key is, or where it goes.
fn slot(words: &impl Words, key: u64) -> u64 {
    let probes = (0..SLOTS).map(|step| (mixed(key) + step) % SLOTS * 16);
    probes.into_iter().find(|slot| [0, key].contains(&words.load(*slot))).unwrap()
}

fn insert(words: &mut impl Words, key: u64, value: u64) {
    let slot = slot(words, key);
    words.put(slot, key);
    words.put(slot + 8, value);
}

/// The memory as the guest leaves it.
pub(crate) fn image() -> Vec<u8> {
    let mut image = vec![0; (TABLE_BYTES + NUMBERS_BYTES) as usize];
    (0..ENTRIES).for_each(|entry| insert(&mut image, key(entry), entry));
    (0..NUMBERS).for_each(|at| image.put(TABLE_BYTES + at * 8, number(at)));
    image.extend(noise(11, NOISE_PAGES * PAGE));
    image.extend(database::image());
    image
}

/// Reads each entry, changes it, and puts others in; then counts and checks all.
fn fill_table(mut words: &PostcopyMemory) -> Result<(), String> {
    for entry in 0..ENTRIES_LATER {
        let key = key(entry * 7919 % ENTRIES_LATER);
        let entry = entry * 7919 % ENTRIES_LATER;
        let slot = slot(&words, key);
        let expected = if entry < ENTRIES { (key, entry) } else { (0, 0) };
        let found = (words.load(slot), words.load(slot + 8));
        if found != expected {
            return Err(format!("entry {entry}: {found:?} in place of {expected:?}"));
        }
        insert(&mut words, key, entry * 3 + 1);
    }
    let wrong = (0..ENTRIES_LATER).find(|&entry| words.load(slot(&words, key(entry)) + 8) != entry * 3 + 1);
    let full = (0..SLOTS).filter(|slot| words.load(slot * 16) != 0).count() as u64;
    if wrong.is_none() && full == ENTRIES_LATER {
        Ok(())
    } else {
        Err(format!("{wrong:?} is wrong, {full} slots are full"))
    }
}

/// Sorts the numbers where they are, by a heap, which touches them in no order.
fn sort(mut words: &PostcopyMemory) -> Result<(), String> {
    let at = |index: u64| TABLE_BYTES + index * 8;
    let sink = |words: &mut &PostcopyMemory, mut root: u64, end: u64| {
        let value = words.load(at(root));
        loop {
            let left = 2 * root + 1;
            let children = (left..(left + 2).min(end)).map(|child| (words.load(at(child)), child));
            match children.max().filter(|(child, _)| *child > value) {
                Some((child, index)) => {
                    words.put(at(root), child);
                    root = index;
                }
                None => return words.put(at(root), value),
            }
        }
    };
    (0..NUMBERS / 2).rev().for_each(|root| sink(&mut words, root, NUMBERS));
    for end in (1..NUMBERS).rev() {
        let (first, last) = (words.load(at(0)), words.load(at(end)));
        words.put(at(end), first);
        words.put(at(0), last);
        sink(&mut words, 0, end);
    }
    let mut expected: Vec<u64> = (0..NUMBERS).map(number).collect();
    expected.sort_unstable();
    match (0..NUMBERS).zip(expected).find(|(index, expected)| words.load(at(*index)) != *expected) {
        None => Ok(()),
        Some((index, _)) => Err(format!("number {index} is wrong")),
    }
}

/// Reads the noise, which was never written.
fn read(words: &PostcopyMemory) -> Result<(), String> {
    let expected = noise(11, NOISE_PAGES * PAGE);
    let start = TABLE_BYTES + NUMBERS_BYTES;
    let differs = |at: &u64| words.load(start + at) != expected.load(*at);
    (0..expected.len() as u64).step_by(8).find(differs).map_or(Ok(()), |at| Err(format!("byte {at} of the noise")))
}

/// What SQLite does with the database, in the second region.
fn query(memory: &PostcopyMemory) -> Result<(), String> {
    let [_, second] = memory.table()[..] else { return Err("there are two regions".to_owned()) };
    database::run(second.address + DATABASE_AT - FIRST_BYTES)
}

/// Runs all of it at once, to the right answer.
pub(crate) fn run(memory: &PostcopyMemory) -> Result<(), String> {
    std::thread::scope(|scope| {
        let threads = [fill_table, sort, read, query].map(|work| scope.spawn(move || work(memory)));
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("it panicked".to_owned())))
    })
}
