//! An arbiter that is a file on storage which both hosts reach: whoever asks first is granted the guest.
//!
//! A lease is decided once for each epoch of a guest, by a file `LEASE.LINEAGE.EPOCH` that nobody changes or removes:
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | magic | `pwlease` and a zero byte |
//! | 8..10 | version | 1 |
//! | 10..16 | reserved | zero |
//! | 16..160 | hand-over | the binding that was asked about |
//! | 160..192 | host | who may start the guest: one of its two |
//! | 192..224 | check | as in a record of a hand-over, over bytes 0..192 |
//!
//! The file is written aside, synced, and given its name by a hard link, which fails if the name is there: it appears
//! whole, once, and everybody reads the same. Whoever can write to the folder is the arbiter; what was decided holds as
//! long as the storage keeps files, and a decision is believed only when the folder is synced.

use crate::entropy::random;
use crate::live::Arbiter;
use pagewire_protocol::digest::record_check;
use pagewire_protocol::handover::{Grant, Handover, HostId};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"pwlease\0";
const VERSION: u16 = 1;
/// Bytes before the granted host.
const HEAD_BYTES: usize = 16 + Handover::BYTES;
const CHECKED_BYTES: usize = HEAD_BYTES + 32;
const BYTES: usize = CHECKED_BYTES + 32;
const OPEN: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// Decides by files that begin with one name.
#[derive(Clone, Debug)]
pub struct Lease {
    path: PathBuf,
}

impl Lease {
    /// Leases called `path`, a dot, the guest's lineage, a dot, and the epoch. The folder has to be there, on storage
    /// that both hosts see, with hard links.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// The folder, and what the lease is called in it.
    fn place(&self, handover: &Handover) -> io::Result<(OwnedFd, OsString)> {
        let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "a lease needs the name of a file");
        let mut name = self.path.file_name().ok_or_else(no_name)?.to_owned();
        let lineage: String = handover.lineage.0.iter().map(|byte| format!("{byte:02x}")).collect();
        name.push(format!(".{lineage}.{}", handover.epoch));
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let opened = fs::open(parent, OFlags::CLOEXEC | OFlags::DIRECTORY, Mode::empty());
        let fail = |errno: Errno| {
            let error = io::Error::from(errno);
            io::Error::new(error.kind(), format!("{}: {error}", parent.display()))
        };
        Ok((opened.map_err(fail)?, name))
    }
}

impl Arbiter for Lease {
    // SPEC 11.13
    /// Who may start the guest of this hand-over: the first who asks, which `me` may be now.
    ///
    /// # Errors
    /// Storage that cannot be written or read, and a lease that is damaged, or is about another hand-over. Nothing is
    /// granted then; whoever asks later may learn that `me` was granted it.
    fn ask(&self, handover: &Handover, me: HostId) -> io::Result<Grant> {
        if me != handover.sender && me != handover.receiver {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this host has no part in the hand-over"));
        }
        let (folder, name) = self.place(handover)?;
        let named = |error: io::Error| {
            let file = self.path.with_file_name(&name);
            io::Error::new(error.kind(), format!("{}: {error}", file.display()))
        };
        decide(&folder, &name, handover, me).map_err(named)
    }
}

fn decide(folder: &OwnedFd, name: &OsString, handover: &Handover, me: HostId) -> io::Result<Grant> {
    let decided = match read(folder, name)? {
        Some(bytes) => bytes,
        None => {
            propose(folder, name, handover, me)?;
            // Whatever the link said, over a network an answer can be lost: the file tells who was first.
            read(folder, name)?.ok_or(io::ErrorKind::NotFound)?
        }
    };
    let host = judge(&decided, handover)?;
    // By whomever it was decided: a decision that a power cut takes back must not have been told.
    fs::fsync(folder)?;
    Ok(Grant { lineage: handover.lineage, epoch: handover.epoch, host })
}

/// Gives the name to a decision for `me`, unless there is one.
fn propose(folder: &OwnedFd, name: &OsString, handover: &Handover, me: HostId) -> io::Result<()> {
    let salt = random::<8>().map_err(|_| io::Error::other("no randomness from the system"))?;
    let mut aside = name.clone();
    aside.push(format!(".{:016x}.new", u64::from_be_bytes(salt)));
    let flags = OPEN | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let mut file = File::from(fs::openat(folder, &aside, flags, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH)?);
    let written = file.write_all(&encode(handover, me)).and_then(|()| file.sync_all());
    let linked = written.and_then(|()| match fs::linkat(folder, &aside, folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    });
    // What stays of it is a second name of the lease, or nothing that is ever read.
    let _ = fs::unlinkat(folder, &aside, AtFlags::empty());
    linked
}

fn read(folder: impl AsFd, name: &OsString) -> io::Result<Option<Vec<u8>>> {
    let file = match fs::openat(folder, name, OPEN | OFlags::RDONLY, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if FileType::from_raw_mode(fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(damaged("is no file"));
    }
    let mut bytes = Vec::with_capacity(BYTES);
    file.take(BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

fn encode(handover: &Handover, host: HostId) -> Vec<u8> {
    let mut bytes = head(handover);
    bytes.extend_from_slice(&host.0);
    let check = record_check(&bytes);
    bytes.extend_from_slice(&check);
    bytes
}

/// What a lease of a hand-over begins with, whoever is granted it.
fn head(handover: &Handover) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 6]);
    handover.encode(&mut bytes);
    bytes
}

/// Who is granted what this hand-over is about.
fn judge(bytes: &[u8], handover: &Handover) -> io::Result<HostId> {
    let (checked, check) = bytes.split_at_checked(CHECKED_BYTES).ok_or_else(|| damaged("is damaged: too short"))?;
    if record_check(checked) != check {
        return Err(damaged("is damaged: its check does not fit"));
    }
    let (begin, host) = checked.split_at(HEAD_BYTES);
    if begin != head(handover) {
        return Err(damaged("is about another hand-over of this epoch, or of another version"));
    }
    let host = <[u8; 32]>::try_from(host).map(HostId).map_err(|_| damaged("is damaged"))?;
    let is_part = host == handover.sender || host == handover.receiver;
    if is_part { Ok(host) } else { Err(damaged("grants the guest to a host that has no part in it")) }
}

fn damaged(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::digest::Digest;
    use pagewire_protocol::domain::LineageId;
    use pagewire_protocol::handover::Epoch;
    use std::os::unix::fs::symlink;
    use std::sync::Barrier;

    const SENDER: HostId = HostId([1; 32]);
    const RECEIVER: HostId = HostId([2; 32]);

    fn handover(epoch: u64) -> Handover {
        Handover {
            lineage: LineageId([7; 16]),
            session: [3; 16],
            epoch: Epoch::new(epoch),
            root: Digest([9; 32]),
            sender: SENDER,
            receiver: RECEIVER,
            arbiter: true,
            post_copy: false,
        }
    }

    fn file(dir: &Path, epoch: u64) -> PathBuf {
        dir.join(format!("lease.{}.{epoch}", "07".repeat(16)))
    }

    // SPEC 11.13
    #[test]
    fn of_two_hosts_that_ask_at_once_one_is_granted_and_both_hear_who() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::new(&dir.path().join("lease"));
        let mut won = [0; 2];
        for epoch in 1..=300 {
            let barrier = Barrier::new(4);
            let ask = |me| {
                barrier.wait();
                lease.ask(&handover(epoch), me).unwrap()
            };
            let grants: Vec<Grant> = std::thread::scope(|scope| {
                let hosts = [SENDER, RECEIVER, SENDER, RECEIVER];
                let threads = hosts.map(|me| scope.spawn(move || ask(me)));
                threads.map(|thread| thread.join().unwrap()).into()
            });
            assert!(grants.iter().all(|grant| *grant == grants[0]), "{grants:?}");
            assert_eq!((grants[0].lineage, grants[0].epoch), (LineageId([7; 16]), Epoch::new(epoch)));
            won[usize::from(grants[0].host == RECEIVER)] += 1;
            for me in [SENDER, RECEIVER] {
                assert_eq!(lease.ask(&handover(epoch), me).unwrap(), grants[0], "for ever");
            }
        }
        assert_eq!(won[0] + won[1], 300);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 300, "nothing else stays");
    }

    #[test]
    fn a_damaged_lease_grants_nothing_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::new(&dir.path().join("lease"));
        assert_eq!(lease.ask(&handover(1), RECEIVER).unwrap().host, RECEIVER);
        let at = file(dir.path(), 1);
        let good = std::fs::read(&at).unwrap();
        assert_eq!(good.len(), BYTES);
        let refused = |bytes: &[u8]| {
            std::fs::write(&at, bytes).unwrap();
            for me in [SENDER, RECEIVER] {
                let error = lease.ask(&handover(1), me).unwrap_err().to_string();
                assert!(error.contains(at.to_str().unwrap()), "{error}");
                assert_eq!(std::fs::read(&at).unwrap(), bytes, "it is not mended");
            }
        };
        for byte in 0..BYTES {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            refused(&bad);
        }
        (0..BYTES).for_each(|len| refused(&good[..len]));
        refused(&[&good[..], &[0]].concat());
        refused(&encode(&handover(1), HostId([3; 32])));
        refused(&encode(&handover(2), RECEIVER));
        refused(&encode(&Handover { session: [4; 16], ..handover(1) }, RECEIVER));
        std::fs::write(&at, good).unwrap();
        assert_eq!(lease.ask(&handover(1), SENDER).unwrap().host, RECEIVER);
    }

    #[test]
    fn what_a_crash_left_before_the_name_was_given_decides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::new(&dir.path().join("lease"));
        let whole = encode(&handover(1), SENDER);
        for len in [0, 100, BYTES] {
            let left = file(dir.path(), 1).with_extension(format!("1.{len:016x}.new"));
            std::fs::write(left, &whole[..len]).unwrap();
        }
        assert_eq!(lease.ask(&handover(1), RECEIVER).unwrap().host, RECEIVER);
        // And behind it: the name is there, its author gone before it could tell anybody.
        std::fs::hard_link(file(dir.path(), 1), dir.path().join("left")).unwrap();
        assert_eq!(lease.ask(&handover(1), SENDER).unwrap().host, RECEIVER);
    }

    #[test]
    fn nothing_planted_is_followed_and_no_stranger_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::new(&dir.path().join("lease"));
        let victim = dir.path().join("victim");
        std::fs::write(&victim, encode(&handover(1), RECEIVER)).unwrap();
        symlink(&victim, file(dir.path(), 1)).unwrap();
        symlink(dir.path().join("nothing"), file(dir.path(), 2)).unwrap();
        std::fs::create_dir(file(dir.path(), 3)).unwrap();
        for epoch in 1..=3 {
            assert!(lease.ask(&handover(epoch), RECEIVER).is_err(), "{epoch}");
        }
        assert!(!dir.path().join("nothing").exists());
        assert!(lease.ask(&handover(4), HostId([5; 32])).is_err());
        assert!(Lease::new(&dir.path().join("none/lease")).ask(&handover(4), RECEIVER).is_err());
        assert!(Lease::new(Path::new("/")).ask(&handover(4), RECEIVER).is_err());
    }
}
