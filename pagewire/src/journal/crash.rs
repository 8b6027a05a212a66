//! A host that dies before any single change to its disk, by a kill or by a power cut, twice: what it has said or let
//! happen is always covered by what the next one finds.

use super::disk::{Change, Watch};
use super::tests::{LINEAGE, OTHER, handover, says};
use super::{GuestJournal, Journal, JournalError, KEY, hex, key};
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::handover::{Handover, Input, Output, RecordKind, Word};
use pagewire_store::Lineage;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How to take a change back whose folder was not synced.
#[derive(Debug)]
enum Undo {
    Remove(PathBuf),
    RemoveFolder(PathBuf),
    /// The old bytes of what a rename took the place of, or of what was removed.
    Put(PathBuf, Option<Vec<u8>>),
}

impl Undo {
    fn parent(&self) -> &Path {
        let (Self::Remove(path) | Self::RemoveFolder(path) | Self::Put(path, _)) = self;
        path.parent().unwrap()
    }
}

/// What a disk has not got yet, and when the host dies.
#[derive(Debug, Default)]
struct Power {
    done: usize,
    dies_at: usize,
    undo: Vec<Undo>,
    unsynced: Vec<PathBuf>,
}

#[derive(Debug, Default)]
struct Host(Mutex<Power>);

impl Watch for Host {
    fn before(&self, change: &Change<'_>) -> io::Result<()> {
        let mut power = self.0.lock().unwrap();
        if power.done >= power.dies_at {
            return Err(io::Error::other("dead"));
        }
        power.done += 1;
        match *change {
            Change::MakeFolder(path) if !path.exists() => power.undo.push(Undo::RemoveFolder(path.into())),
            Change::Create(path) => power.undo.push(Undo::Remove(path.into())),
            Change::Unlink(path) if path.exists() => power.undo.push(Undo::Put(path.into(), fs::read(path).ok())),
            Change::Write(path) => power.unsynced.push(path.into()),
            Change::Sync(path) => power.unsynced.retain(|other| other != path),
            Change::Rename(from, to) => {
                power.undo.push(Undo::Put(to.into(), fs::read(to).ok()));
                power.unsynced.iter_mut().filter(|path| *path == from).for_each(|path| *path = to.into());
            }
            Change::SyncFolder(folder) => power.undo.retain(|undo| undo.parent() != folder),
            Change::SyncAll => {
                power.undo.clear();
                power.unsynced.clear();
            }
            _ => {}
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// The process is gone; its files are as it left them.
    Kill,
    /// Bytes that were not synced are torn, but names are there.
    Torn,
    /// Nothing that was not synced is there.
    Cut,
}

impl Host {
    /// Changes nothing on the disk from the `count`th further one on.
    fn lives_for(&self, count: usize) {
        let mut power = self.0.lock().unwrap();
        power.done = 0;
        power.dies_at = count;
    }

    fn is_dead(&self) -> bool {
        let power = self.0.lock().unwrap();
        power.done >= power.dies_at
    }

    fn end(&self, end: End) {
        let mut power = self.0.lock().unwrap();
        if end == End::Kill {
            return;
        }
        for path in power.unsynced.drain(..) {
            if let Ok(file) = File::options().write(true).open(&path) {
                file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            }
        }
        for undo in power.undo.drain(..).rev().filter(|_| end == End::Cut) {
            match undo {
                Undo::Remove(path) | Undo::Put(path, None) => drop(fs::remove_file(path)),
                Undo::RemoveFolder(path) => drop(fs::remove_dir_all(path)),
                Undo::Put(path, Some(bytes)) => fs::write(path, bytes).unwrap(),
            }
        }
    }
}

/// What a session is digested with that leaves pages behind.
const KEPT: Lineage = Lineage { id: LineageId([3; 16]), key: [4; 32] };

/// What a host goes through, from one side of one hand-over.
#[derive(Clone, Copy, Debug)]
enum Story {
    Sends(Word),
    /// Sends it with pages absent, and serves them.
    Serves,
    Receives,
    Rejects,
}

impl Story {
    /// Goes through it, from wherever the records say that it is.
    fn tell(self, guest: &mut GuestJournal, handover: Handover, told: &mut Vec<Output>) {
        let session = handover.session;
        let inputs = match self {
            Self::Sends(answer) => {
                let begins = guest.open(session) == Ok(handover.epoch);
                // Without its key a session that may leave pages behind does not begin.
                if begins && (!handover.post_copy || guest.keep_key(session, &KEPT).is_ok()) {
                    guest.send(handover).unwrap();
                }
                vec![says(Word::Ready, handover), Input::Commit, Input::Connected(OTHER), says(answer, handover)]
            }
            Self::Serves => {
                Self::Sends(Word::Started).tell(guest, handover, told);
                vec![Input::Filled(handover)]
            }
            Self::Receives => {
                told.extend(guest.receive(OTHER, handover));
                vec![says(Word::Commit, handover), Input::Connected(OTHER), says(Word::Gone, handover)]
            }
            Self::Rejects => vec![says(Word::Commit, handover), Input::Connected(OTHER)],
        };
        inputs.into_iter().for_each(|input| told.extend(guest.handle(input)));
    }

    /// Runs a process of the host until it ends, or dies.
    fn run(self, dir: &Path, host: &Arc<Host>, told: &mut Vec<Output>) -> Result<(), JournalError> {
        let mut journal = Journal::open_watched(dir, Some(host.clone()))?;
        journal.pause = Duration::ZERO;
        let mut guest = journal.guest(LINEAGE, Some(&ImageName::new("web").unwrap()), true)?;
        let out = matches!(self, Self::Sends(_) | Self::Serves);
        let post_copy = matches!(self, Self::Serves);
        self.tell(&mut guest, Handover { post_copy, ..handover(journal.host(), out, 1) }, told);
        Ok(())
    }
}

/// Every word and deed against the record that the next process finds.
fn check(dir: &Path, told: &[Output], what: &str) {
    let journal = Journal::existing(dir).unwrap_or_else(|error| panic!("{what}: {error}"));
    let guests = journal.map(|journal| journal.guests().unwrap()).unwrap_or_default();
    assert!(guests.iter().all(|guest| guest.damaged.is_empty()), "{what}: {guests:?}");
    let kind = |handover: &Handover| {
        let mut records = guests.iter().flat_map(|guest| &guest.records);
        records.find(|record| record.handover == *handover).map(|record| record.kind)
    };
    use RecordKind as R;
    for record in guests.iter().flat_map(|guest| &guest.records) {
        let serves = record.kind == R::Handed && record.handover.post_copy;
        assert!(!serves || key_in(dir, &record.handover).as_ref() == Some(&KEPT), "{what}: pages can be brought");
    }
    for output in told {
        let (record, covered): (_, &[Option<R>]) = match output {
            Output::Send(message) => (
                kind(&message.handover),
                match message.word {
                    Word::Ready => continue,
                    Word::Commit => &[Some(R::Handed), Some(R::Returned), Some(R::Gone)],
                    Word::Started => &[Some(R::Started), Some(R::Gone)],
                    Word::Reject => &[Some(R::Rejected)],
                    Word::Gone => &[Some(R::Gone)],
                },
            ),
            Output::Run(handover) => (kind(handover), &[Some(R::Started), Some(R::Gone)]),
            Output::Fill(handover) => (kind(handover), &[Some(R::Handed), Some(R::Gone)]),
            Output::Release(handover) => (kind(handover), &[Some(R::Gone)]),
            Output::Resume(handover) => (kind(handover), &[None, Some(R::Returned)]),
            _ => continue,
        };
        assert!(covered.contains(&record), "{what}: {output:?} with {record:?}");
    }
}

/// What the pages of a session are digested with, as the journal in `dir` says.
fn key_in(dir: &Path, handover: &Handover) -> Option<Lineage> {
    let journal = Journal::existing(dir).unwrap().unwrap();
    let folder = journal.folder.folder(&hex(&handover.lineage.0)).unwrap().unwrap();
    key::get(&folder, handover.session).unwrap()
}

fn home() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// Every first death, every second one after it, each of every kind.
fn dies_everywhere(story: Story, last: RecordKind) {
    let (mut first, mut deaths) = (0, 0);
    loop {
        let mut second = 0;
        let finished = loop {
            let dir = home();
            let at = dir.path().join("state/journal");
            let (host, mut told) = (Arc::new(Host::default()), vec![]);
            host.lives_for(first);
            let _ = story.run(&at, &host, &mut told);
            let finished = !host.is_dead();
            let ends = [End::Kill, End::Torn, End::Cut];
            let what = format!("{story:?} until {first}, {second}");
            host.end(ends[(first + second) % 3]);
            // A rename that was not synced is seen by the next process, and still lost in a power cut.
            host.lives_for(second);
            let _ = story.run(&at, &host, &mut told);
            let second_finished = !host.is_dead();
            host.end(ends[(first / 3 + second + 2) % 3]);
            check(&at, &told, &what);
            host.lives_for(usize::MAX);
            story.run(&at, &host, &mut told).unwrap_or_else(|error| panic!("{what}: {error}"));
            host.end(End::Cut);
            check(&at, &told, &what);
            let guests = Journal::open(&at).unwrap().guests().unwrap();
            assert_eq!(guests[0].records.last().map(|record| record.kind), Some(last), "{what}: it ends");
            drop(Journal::open(&at).unwrap().guest(LINEAGE, None, true).unwrap());
            assert!(!at.join(hex(&LINEAGE.0)).join(KEY).exists(), "{what}: the key goes with the need for it");
            assert_eq!(guests[0].name.as_ref().map(|name| name.as_str()), Some("web"), "{what}");
            deaths += 1;
            if second_finished {
                break finished;
            }
            second += 1;
        };
        if finished {
            break;
        }
        first += 1;
    }
    assert!(first > 15 && deaths > 100, "{first} changes, {deaths} pairs of deaths: the disk was watched");
}

#[test]
fn a_sender_that_dies_anywhere_has_said_nothing_without_its_record() {
    dies_everywhere(Story::Sends(Word::Started), RecordKind::Gone);
}

#[test]
fn a_sender_that_dies_anywhere_while_it_serves_gives_nothing_up_without_its_record() {
    dies_everywhere(Story::Serves, RecordKind::Gone);
}

#[test]
fn a_sender_that_dies_while_it_takes_the_guest_back_runs_it_only_with_a_record() {
    dies_everywhere(Story::Sends(Word::Reject), RecordKind::Returned);
}

#[test]
fn a_receiver_that_dies_anywhere_has_started_nothing_without_its_record() {
    // Whoever dies before STARTED has verified everything anew, or rejects what it no longer knows.
    dies_everywhere(Story::Receives, RecordKind::Gone);
}

#[test]
fn a_receiver_that_dies_anywhere_has_rejected_nothing_without_its_record() {
    dies_everywhere(Story::Rejects, RecordKind::Rejected);
}

/// A single change that fails, and all after it succeed: nothing is said ahead of the disk, and nothing is forgotten.
#[test]
fn any_single_change_may_fail() {
    #[derive(Debug)]
    struct Once(Mutex<usize>);
    impl Watch for Once {
        fn before(&self, _: &Change<'_>) -> io::Result<()> {
            let mut left = self.0.lock().unwrap();
            *left = left.wrapping_sub(1);
            if *left == usize::MAX { Err(io::Error::other("no")) } else { Ok(()) }
        }
    }
    for (story, out) in [(Story::Sends(Word::Started), true), (Story::Receives, false)] {
        for at in 0.. {
            let dir = home();
            let folder = dir.path().join("journal");
            let once = Arc::new(Once(Mutex::new(at)));
            let mut told = vec![];
            let opened = Journal::open_watched(&folder, Some(once.clone()));
            let opened = opened.and_then(|mut journal| {
                journal.pause = Duration::ZERO;
                Ok((journal.host(), journal.guest(LINEAGE, None, true)?))
            });
            if let Ok((me, mut guest)) = opened {
                story.tell(&mut guest, handover(me, out, 1), &mut told);
                assert!(guest.owed().is_none(), "one failure is tried over, change {at}");
                assert!(told.iter().any(|output| matches!(output, Output::Run(_) | Output::Release(_))), "{told:?}");
            }
            check(&folder, &told, &format!("{story:?} without change {at}"));
            if *once.0.lock().unwrap() < usize::MAX / 2 {
                break;
            }
        }
    }
}
