use super::*;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::handover::{Epoch, Fence, Handover, Input, Message, Output, RecordKind, Refusal, Resolve, Word};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(super) const LINEAGE: LineageId = LineageId([7; 16]);
pub(super) const OTHER: HostId = HostId([2; 32]);

pub(super) fn handover(me: HostId, out: bool, epoch: u64) -> Handover {
    let (sender, receiver) = if out { (me, OTHER) } else { (OTHER, me) };
    let (session, root) = ([epoch as u8; 16], Digest([9; 32]));
    let epoch = Epoch::new(epoch);
    Handover { lineage: LINEAGE, session, epoch, root, sender, receiver, arbiter: false, post_copy: false }
}

pub(super) fn says(word: Word, handover: Handover) -> Input {
    Input::Message { from: OTHER, message: Message { word, handover } }
}

fn say(word: Word, handover: Handover) -> Output {
    Output::Send(Message { word, handover })
}

struct Home {
    dir: tempfile::TempDir,
    journal: Journal,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&dir.path().join("journal")).unwrap();
        journal.pause = Duration::ZERO;
        Self { dir, journal }
    }

    fn me(&self) -> HostId {
        self.journal.host()
    }

    fn guest(&self) -> GuestJournal {
        self.journal.guest(LINEAGE, None, true).unwrap()
    }

    fn refusal(&self) -> JournalError {
        self.journal.guest(LINEAGE, None, true).map(|_| ()).unwrap_err()
    }

    fn folder(&self) -> PathBuf {
        self.journal.path().join(hex(&LINEAGE.0))
    }

    fn file(&self, handover: &Handover) -> PathBuf {
        self.folder().join(file_of(handover))
    }

    /// In doubt about a guest that it has handed over.
    fn in_doubt(&self) -> Handover {
        let handover = handover(self.me(), true, 1);
        hand_over(&mut self.guest(), handover);
        handover
    }
}

fn hand_over(guest: &mut GuestJournal, handover: Handover) {
    assert_eq!(guest.open(handover.session), Ok(handover.epoch));
    guest.send(handover).unwrap();
    assert_eq!(guest.handle(says(Word::Ready, handover)), [Output::Verified(handover)]);
    assert_eq!(guest.handle(Input::Commit), [say(Word::Commit, handover)]);
}

#[test]
fn a_host_keeps_its_identity_and_closes_its_folders() {
    let home = Home::new();
    let again = Journal::open(home.journal.path()).unwrap();
    assert_eq!(again.host(), home.me());
    assert_ne!(home.me(), Home::new().me());
    drop(home.guest());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let handover = home.in_doubt();
    let files = [home.journal.path().join(HOST), home.file(&handover)];
    assert_eq!(files.map(|file| mode(&file)), [0o600; 2]);
    assert_eq!([home.journal.path().to_path_buf(), home.folder()].map(|folder| mode(&folder)), [0o700; 2]);
    assert!(Journal::existing(home.journal.path()).unwrap().is_some_and(|journal| journal.host() == home.me()));
    let none = home.dir.path().join("none");
    assert!(Journal::existing(&none).unwrap().is_none() && !none.exists());
}

#[test]
fn many_that_open_a_new_journal_at_once_find_one_identity() {
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("a/b/journal");
        let open = || Journal::open(&at).unwrap().host();
        let hosts: Vec<HostId> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(hosts.iter().all(|host| *host == hosts[0]), "{hosts:?}");
    }
}

#[test]
fn the_default_folder_is_the_users_state() {
    let dir = |state: Option<&str>, home: Option<&str>| default_dir(state.map(Into::into), home.map(Into::into));
    assert_eq!(dir(Some("/s"), Some("/h")).unwrap(), Path::new("/s/pagewire/journal"));
    for odd in [None, Some(""), Some("relative")] {
        assert_eq!(dir(odd, Some("/h")).unwrap(), Path::new("/h/.local/state/pagewire/journal"));
        assert!(dir(odd, odd).unwrap_err().to_string().contains("--journal"));
    }
}

// SPEC 11.16, 11.17
#[test]
fn a_session_goes_on_where_the_records_say() {
    let home = Home::new();
    let there = home.in_doubt();
    assert_eq!(Record::decode(&fs::read(home.file(&there)).unwrap()).unwrap().kind, RecordKind::Handed);
    let mut guest = home.guest();
    assert_eq!(guest.handovers().whereabouts(), Whereabouts::InDoubt);
    assert_eq!(guest.handle(Input::Cancel), [Output::Refuse(Refusal::TooLate(there.epoch))]);
    let outputs = guest.handle(says(Word::Started, there));
    assert_eq!(outputs, [Output::Release(there), say(Word::Gone, there)]);
    drop(guest);

    let back = handover(home.me(), false, 2);
    let mut guest = home.guest();
    let over = guest.handovers().may_receive(Epoch::new(1));
    assert_eq!(over.map_err(|refusal| refusal.to_string().len() > 9), Err(true));
    assert_eq!(guest.receive(OTHER, back), [say(Word::Ready, back)]);
    assert_eq!(guest.handle(says(Word::Commit, back)), [Output::Run(back), say(Word::Started, back)]);
    assert!(!home.file(&there).exists(), "forgotten: a later record says where the guest is");
    drop(guest);
    let lost = home.journal.guest(LINEAGE, None, false).unwrap();
    assert_eq!(lost.handovers().whereabouts(), Whereabouts::Lost);
}

#[test]
fn a_guest_that_was_started_and_lost_is_said_to_be_neither_here_nor_rejected() {
    let home = Home::new();
    let handover = handover(home.me(), false, 1);
    let mut guest = home.guest();
    guest.receive(OTHER, handover);
    guest.handle(says(Word::Commit, handover));
    drop(guest);
    let mut guest = home.journal.guest(LINEAGE, None, false).unwrap();
    let lost = [Output::Refuse(Refusal::Lost(handover.epoch))];
    assert_eq!(guest.handle(Input::Connected(OTHER)), lost);
    assert_eq!(guest.handle(says(Word::Commit, handover)), lost);
    assert_eq!(guest.handle(Input::Resolve(Resolve::There(handover.epoch))), [say(Word::Reject, handover)]);
    drop(guest);
    assert_eq!(home.journal.guests().unwrap()[0].records[0].kind, RecordKind::Rejected);
}

// SPEC 11.16, 11.18
#[test]
fn a_guest_with_absent_pages_lives_as_long_as_the_process_that_started_it() {
    let home = Home::new();
    let handover = Handover { post_copy: true, ..handover(home.me(), false, 1) };
    let mut guest = home.guest();
    guest.receive(OTHER, handover);
    assert_eq!(guest.handle(says(Word::Commit, handover)), [Output::Run(handover), say(Word::Started, handover)]);
    drop(guest);
    let started = [say(Word::Started, handover)];
    assert_eq!(home.guest().handle(says(Word::Commit, handover)), started, "a session later");
    assert_eq!(home.journal.guests().unwrap()[0].whereabouts, Some(Whereabouts::Filling));

    let restarted = Journal::open(home.journal.path()).unwrap();
    let mut guest = restarted.guest(LINEAGE, None, true).unwrap();
    let lost = [Output::Refuse(Refusal::Lost(handover.epoch))];
    assert_eq!(guest.handle(says(Word::Commit, handover)), lost, "another process");
    assert_eq!(guest.handle(says(Word::Gone, handover)), lost);
    drop(guest);
    home.journal.lose(&handover);
    assert_eq!(home.guest().handle(says(Word::Commit, handover)), lost, "given up");
}

#[test]
fn a_guest_of_which_nothing_is_absent_outlives_its_process() {
    let home = Home::new();
    let handover = Handover { post_copy: true, ..handover(home.me(), false, 1) };
    let mut guest = home.guest();
    guest.receive(OTHER, handover);
    guest.handle(says(Word::Commit, handover));
    assert_eq!(guest.handle(says(Word::Gone, handover)), []);
    drop(guest);
    assert!(home.journal.living.with(|living| living.is_empty()));
    assert_eq!(home.guest().handovers().whereabouts(), Whereabouts::Here);
}

// SPEC 11.19, 11.20
#[test]
fn memory_that_is_served_is_given_up_when_the_other_host_lacks_nothing() {
    let home = Home::new();
    let handover = Handover { post_copy: true, ..handover(home.me(), true, 1) };
    let mut guest = home.guest();
    hand_over(&mut guest, handover);
    assert_eq!(guest.filled(handover), [Output::Refuse(Refusal::NotStarted(handover.epoch))]);
    assert_eq!(guest.serving(), None);
    assert_eq!(guest.handle(says(Word::Started, handover)), [Output::Fill(handover)]);
    assert_eq!(guest.serving(), Some(handover));
    drop(guest);
    let mut guest = home.guest();
    assert_eq!((guest.serving(), guest.handovers().whereabouts()), (None, Whereabouts::InDoubt));
    assert_eq!(guest.handle(says(Word::Started, handover)), [Output::Fill(handover)]);
    let other = Handover { session: [5; 16], ..handover };
    assert_eq!(guest.filled(other), [Output::Refuse(Refusal::Unknown(other.epoch))]);
    assert_eq!(Record::decode(&fs::read(home.file(&handover)).unwrap()).unwrap().kind, RecordKind::Handed);
    assert_eq!(guest.filled(handover), [Output::Release(handover), say(Word::Gone, handover)]);
    assert_eq!(Record::decode(&fs::read(home.file(&handover)).unwrap()).unwrap().kind, RecordKind::Gone);
    assert_eq!(guest.serving(), None);
}

#[test]
fn an_operator_with_a_fence_gets_the_guest_back() {
    let home = Home::new();
    let handover = home.in_doubt();
    let mut guest = home.guest();
    let here = |host| Input::Resolve(Resolve::Here(Fence { epoch: Epoch::new(1), host }));
    assert_eq!(guest.handle(here(HostId([3; 32]))), [Output::Refuse(Refusal::WrongFence(handover.epoch))]);
    assert_eq!(guest.handle(here(OTHER)), [Output::Resume(handover)]);
    drop(guest);
    assert_eq!(home.guest().handovers().whereabouts(), Whereabouts::Here);
}

/// C25: within a process as between processes, as a lock belongs to an open folder.
#[test]
fn one_session_at_a_time_decides_about_a_guest() {
    let home = Home::new();
    let name = ImageName::new("web-1").unwrap();
    let first = home.journal.guest(LINEAGE, Some(&name), true).unwrap();
    let other = Journal::open(home.journal.path()).unwrap();
    let busy = other.guest(LINEAGE, None, true).map(|_| ()).unwrap_err();
    assert!(matches!(&busy, JournalError::Busy { guest } if guest == "web-1"), "{busy}");
    drop(other.guest(LineageId([8; 16]), None, true).unwrap());
    drop(first);
    let again = other.guest(LINEAGE, None, true).unwrap();
    assert_eq!(again.name(), Some(&name), "kept for people");
    let renamed = ImageName::new("web-2").unwrap();
    drop(again);
    drop(other.guest(LINEAGE, Some(&renamed), true).unwrap());
    assert_eq!(other.guests().unwrap()[0].name, Some(renamed));
}

#[test]
fn nothing_is_decided_on_records_that_are_damaged_foreign_or_swapped() {
    type Damage<'a> = (&'a str, &'a dyn Fn(&Home, &Handover));
    let damage: [Damage<'_>; 6] = [
        ("bit", &|home, handover| {
            let mut bytes = fs::read(home.file(handover)).unwrap();
            bytes[100] ^= 1;
            fs::write(home.file(handover), bytes).unwrap();
        }),
        ("truncated", &|home, handover| {
            fs::File::options().write(true).open(home.file(handover)).unwrap().set_len(100).unwrap()
        }),
        ("longer", &|home, handover| {
            let bytes = fs::read(home.file(handover)).unwrap();
            fs::write(home.file(handover), [bytes, vec![0]].concat()).unwrap();
        }),
        ("another guest's", &|home, handover| {
            let foreign = Handover { lineage: LineageId([8; 16]), ..*handover };
            let record = Record { kind: RecordKind::Handed, handover: foreign };
            fs::write(home.folder().join(file_of(&foreign)), record.encode()).unwrap();
        }),
        ("under another's name", &|home, handover| {
            let other = Handover { session: [5; 16], ..*handover };
            fs::rename(home.file(handover), home.file(&other)).unwrap();
        }),
        ("no record", &|home, _| fs::write(home.folder().join("notes"), b"?").unwrap()),
    ];
    for (what, damage) in damage {
        let home = Home::new();
        let handover = home.in_doubt();
        damage(&home, &handover);
        let error = home.refusal();
        let path = error.path().unwrap_or_else(|| panic!("{what}: {error}")).to_path_buf();
        assert!(path.starts_with(home.folder()) && path.exists(), "{what}: it names the file: {error}");
        let status = &home.journal.guests().unwrap()[0];
        assert_eq!((status.damaged.len(), status.whereabouts), (1, None), "{what}: {status:?}");
        assert_eq!(status.damaged[0].path(), Some(&*path), "{what}");
    }
}

#[test]
fn nothing_planted_is_followed_or_written_through() {
    for kind in ["symlink", "hard link", "folder"] {
        for place in ["record", "record.new", "name", "name.new", "host", "guest", "journal"] {
            let home = Home::new();
            let handover = home.in_doubt();
            let victim = home.dir.path().join("victim");
            let bytes = Record { kind: RecordKind::Returned, handover }.encode();
            fs::write(&victim, &bytes).unwrap();
            let record = home.file(&handover);
            let at = match place {
                "record" => record,
                "record.new" => PathBuf::from(format!("{}.new", record.display())),
                "host" => home.journal.path().join(HOST),
                "guest" => home.folder(),
                "journal" => home.journal.path().to_path_buf(),
                name => home.folder().join(name),
            };
            if at.exists() {
                fs::rename(&at, home.dir.path().join("aside")).unwrap();
            }
            match kind {
                "symlink" => symlink(&victim, &at).unwrap(),
                "hard link" => fs::hard_link(&victim, &at).unwrap(),
                _ => fs::create_dir(&at).unwrap(),
            }
            let name = ImageName::new("web").unwrap();
            let opened =
                Journal::open(home.journal.path()).and_then(|journal| journal.guest(LINEAGE, Some(&name), true));
            // What only people read, and what was never whole, is replaced; a folder is in the way.
            let replaced = ["name", "name.new", "record.new"].contains(&place) && kind != "folder";
            assert_eq!(opened.is_ok(), replaced, "{kind} as {place}: {opened:?}");
            if let Ok(mut guest) = opened {
                assert_eq!(guest.handle(Input::Timeout), [Output::InDoubt(handover)], "{kind} as {place}");
                guest.handle(says(Word::Started, handover));
            }
            assert_eq!(fs::read(&victim).unwrap(), bytes, "{kind} as {place}");
        }
    }
}

#[test]
fn refuses_folders_that_are_not_its_own() {
    for mode in [0o755, 0o720, 0o702, 0o777] {
        let home = Home::new();
        fs::set_permissions(home.journal.path(), fs::Permissions::from_mode(mode)).unwrap();
        assert!(Journal::open(home.journal.path()).unwrap_err().to_string().contains("chmod 700"), "{mode:o}");
    }
    let home = Home::new();
    fs::remove_file(home.journal.path().join(HOST)).unwrap();
    drop(home.guest());
    for error in [Journal::open(home.journal.path()).unwrap_err(), Journal::existing(home.journal.path()).unwrap_err()]
    {
        assert!(error.to_string().contains("no identity"), "guests are there: {error}");
    }
    for odd in [&[][..], &[1; 31], &[1; 33], &[0; 32]] {
        fs::write(home.journal.path().join(HOST), odd).unwrap();
        fs::set_permissions(home.journal.path().join(HOST), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Journal::open(home.journal.path()).unwrap_err().to_string().contains("damaged"));
    }
}

#[test]
fn reads_no_more_files_than_it_makes() {
    let home = Home::new();
    drop(home.guest());
    for number in 0..=FILES_MAX {
        fs::write(home.folder().join(format!("{number}.new")), b"").unwrap();
    }
    assert!(matches!(home.refusal(), JournalError::Crowded { max: FILES_MAX, .. }));
}

#[derive(Debug, Default)]
struct Broken(AtomicBool);

impl disk::Watch for Broken {
    fn before(&self, _: &disk::Change<'_>) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

// SPEC 11.9
#[test]
fn a_disk_that_fails_keeps_the_guest_frozen_until_it_works_again() {
    let dir = tempfile::tempdir().unwrap();
    let broken = Arc::new(Broken::default());
    let mut journal = Journal::open_watched(&dir.path().join("journal"), Some(broken.clone())).unwrap();
    journal.pause = Duration::ZERO;
    let mut guest = journal.guest(LINEAGE, None, true).unwrap();
    let handover = handover(journal.host(), true, 1);
    assert_eq!(guest.open(handover.session), Ok(handover.epoch));
    guest.send(handover).unwrap();
    guest.handle(says(Word::Ready, handover));
    broken.0.store(true, Ordering::Relaxed);
    assert_eq!(guest.handle(Input::Commit), [], "neither COMMIT, nor run on: HANDED may be there");
    assert_eq!(guest.retry(), []);
    assert!(guest.owed().is_some_and(|error| error.path().is_some()));
    assert_eq!(guest.handle(Input::Timeout), []);
    broken.0.store(false, Ordering::Relaxed);
    assert_eq!(guest.handle(Input::Connected(OTHER)), [Output::Resume(handover)]);
    assert!(guest.owed().is_none() && guest.retry().is_empty());
    drop(guest);
    assert_eq!(journal.guests().unwrap()[0].records[0].kind, RecordKind::Returned);
}

#[test]
fn a_receiver_whose_disk_fails_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let broken = Arc::new(Broken::default());
    let mut journal = Journal::open_watched(&dir.path().join("journal"), Some(broken.clone())).unwrap();
    journal.pause = Duration::ZERO;
    let mut guest = journal.guest(LINEAGE, None, true).unwrap();
    let handover = handover(journal.host(), false, 1);
    guest.receive(OTHER, handover);
    broken.0.store(true, Ordering::Relaxed);
    assert_eq!(guest.handle(says(Word::Commit, handover)), []);
    broken.0.store(false, Ordering::Relaxed);
    assert_eq!(guest.retry(), [say(Word::Reject, handover)]);
}

#[test]
fn two_hand_overs_of_one_epoch_and_session_have_two_files() {
    let home = Home::new();
    let (honest, altered) = (handover(home.me(), false, 1), handover(home.me(), false, 1));
    let altered = Handover { root: Digest([1; 32]), ..altered };
    let mut guest = home.guest();
    guest.receive(OTHER, honest);
    assert_eq!(guest.handle(says(Word::Commit, altered)), [say(Word::Reject, altered)]);
    let outputs = guest.handle(says(Word::Commit, honest));
    assert_eq!(outputs, [Output::Run(honest), say(Word::Started, honest)]);
    drop(guest);
    assert_eq!(home.guest().handovers().whereabouts(), Whereabouts::Here, "what is forgotten is not what was started");
}
