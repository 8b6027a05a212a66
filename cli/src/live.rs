//! Guests that run, driven by commands: how a script stops one, lets it run on, and starts it.
//!
//! `PAGEWIRE_NAME`, and where there is one `PAGEWIRE_STATE`, `PAGEWIRE_EPOCH` and `PAGEWIRE_THROTTLE`, tell a command what
//! it is about.

use crate::args::{AtLimit, Live, PostCopy, Take};
use crate::command::run;
use crate::throttle::Throttle;
use anyhow::{Context, Result};
use pagewire::{
    Arbiter, Blobs, CancellationToken, GuestHooks, GuestStarter, ImageName, Journal, Lease, LiveOptions, Operator,
    Started, TakeOptions, device_state_name,
};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The longest a command may take.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A start is waited for only as long as its sender surely waits for the answer.
const START_MAX: Duration = Duration::from_secs(10);
/// Whoever embeds the session waits for less.
const APPROVAL_MAX: Duration = Duration::from_secs(600);
/// The folder of device states, in the folder of images. No image is called so: a name that begins with a dot can be, but
/// a folder is never replaced by one.
const STATES: &str = ".device-states";
/// Bytes of a state file: one more than a blob may have tells that it is too long.
const STATE_MAX: u64 = (16 << 20) + 1;

/// Where hand-overs are recorded.
pub(crate) fn journal(dir: Option<&Path>) -> Result<Arc<Journal>> {
    let dir = dir.map_or_else(Journal::default_dir, |dir| Ok(dir.to_path_buf()))?;
    Ok(Arc::new(Journal::open(&dir).context("--journal")?))
}

/// Who grants guests, if a lease is named.
fn arbiter(lease: Option<&Path>) -> Option<Arc<dyn Arbiter>> {
    lease.map(|path| Arc::new(Lease::new(path)) as Arc<dyn Arbiter>)
}

/// The options of a live session, and the guest as its commands reach it.
pub(crate) fn live(args: &Live, name: &ImageName) -> Result<(LiveOptions, Box<dyn GuestHooks>)> {
    let mut options = LiveOptions::new(journal(args.journal.as_deref())?);
    options.lease = arbiter(args.lease.as_deref());
    options.limits.downtime = pagewire::milliseconds(args.downtime);
    options.limits.rounds = args.rounds;
    options.patience = args.patience;
    options.trace.clone_from(&args.record_trace);
    options.limits.at_limit = match args.at_limit {
        AtLimit::Cancel => pagewire::AtLimit::Cancel,
        AtLimit::Force => pagewire::AtLimit::Force,
        AtLimit::PostCopy => pagewire::AtLimit::PostCopy,
    };
    options.post_copy = match (args.post_copy, args.at_limit) {
        (Some(PostCopy::Now), _) => pagewire::PostCopy::Now,
        (Some(PostCopy::Auto), _) | (None, AtLimit::PostCopy) => pagewire::PostCopy::Auto,
        (Some(PostCopy::Never) | None, _) => pagewire::PostCopy::Never,
    };
    let mut about = vec![("PAGEWIRE_NAME", name.to_string())];
    about.extend(args.state.iter().map(|state| ("PAGEWIRE_STATE", state.display().to_string())));
    options.pause_before_switchover = args
        .pause_before_switchover
        .clone()
        .map(|command| Arc::new(Approval { command, about: about.clone() }) as Arc<dyn Operator>);
    let commands = Commands {
        on_pause: args.on_pause.clone().unwrap_or_default(),
        on_resume: args.on_resume.clone(),
        throttle: args.on_throttle.clone().map(|command| Throttle::new(command, about.clone())),
        state: args.state.clone(),
        about,
    };
    Ok((options, Box::new(commands)))
}

/// How guests are taken over, if they are.
pub(crate) fn take(args: &Take, images: Images) -> Result<Option<TakeOptions>> {
    if args.on_start.is_none() && !args.leave_paused {
        return Ok(None);
    }
    let starter = Arc::new(Starter { on_start: args.on_start.clone(), images });
    Ok(Some(TakeOptions { journal: journal(args.journal.as_deref())?, lease: arbiter(args.lease.as_deref()), starter }))
}

/// A guest at the sender.
struct Commands {
    on_pause: String,
    on_resume: Option<String>,
    throttle: Option<Throttle>,
    state: Option<PathBuf>,
    about: Vec<(&'static str, String)>,
}

impl GuestHooks for Commands {
    fn pause(&mut self) -> Result<Blobs, String> {
        run(&self.on_pause, &self.about, PAUSE_MAX, None)?;
        let mut blobs = Blobs::new();
        let (Some(path), Some(name)) = (&self.state, device_state_name()) else { return Ok(blobs) };
        let failed = |error: std::io::Error| format!("--state {}: {error}", path.display());
        let mut bytes = Vec::new();
        File::open(path).map_err(failed)?.take(STATE_MAX).read_to_end(&mut bytes).map_err(failed)?;
        blobs.insert(name, 0, bytes).map_err(|error| format!("--state {}: {error}", path.display()))?;
        Ok(blobs)
    }

    fn resume(&mut self) -> Result<(), String> {
        let Some(command) = &self.on_resume else {
            return Err("no --on-resume was given: let it run yourself".to_owned());
        };
        run(command, &self.about, PAUSE_MAX, None)
    }

    fn throttles(&self) -> bool {
        self.throttle.is_some()
    }

    fn throttle(&mut self, percent: u8) -> Result<(), String> {
        self.throttle.as_mut().map_or(Ok(()), |throttle| throttle.set(percent))
    }
}

/// A command that has the last word.
#[derive(Debug)]
struct Approval {
    command: String,
    about: Vec<(&'static str, String)>,
}

impl Operator for Approval {
    fn approve(&self, over: &CancellationToken) -> Result<(), String> {
        let said = run(&self.command, &self.about, APPROVAL_MAX, Some(over));
        said.map_err(|why| format!("--pause-before-switchover: {why}"))
    }
}

/// Guests at the receiver.
#[derive(Debug)]
struct Starter {
    on_start: Option<String>,
    images: Images,
}

/// Where guests land.
#[derive(Debug)]
pub(crate) enum Images {
    /// Each in a file of this folder.
    Folder(PathBuf),
    /// In this file.
    File(PathBuf),
    /// Each in a hypervisor's memory, which is handed over at a socket in this folder.
    Sockets(PathBuf),
}

impl Images {
    fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(dir) | Self::Sockets(dir) => Some(dir),
            Self::File(_) => None,
        }
    }

    /// What tells the start of a guest where its memory is.
    fn place(&self, name: &ImageName) -> (&'static str, PathBuf) {
        match self {
            Self::Folder(dir) => ("PAGEWIRE_IMAGE", dir.join(name.as_str())),
            Self::File(path) => ("PAGEWIRE_IMAGE", path.clone()),
            Self::Sockets(dir) => ("PAGEWIRE_SOCKET", dir.join(format!("{name}.sock"))),
        }
    }

    /// Where a guest's device state is kept: beside the one file, or in a folder where no image can land.
    fn state(&self, name: &ImageName) -> PathBuf {
        if let Some(dir) = self.folder() {
            return dir.join(STATES).join(name.as_str());
        }
        let (_, path) = self.place(name);
        let mut path = path.into_os_string();
        path.push(".device-state");
        path.into()
    }
}

impl GuestStarter for Starter {
    fn prepare(&self, name: &ImageName, blobs: &Blobs) -> Result<(), String> {
        let path = self.images.state(name);
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        if let Some(unknown) = blobs.iter().find(|blob| Some(blob.name()) != device_state_name().as_ref()) {
            return Err(format!("nobody here knows what blob {} is for", unknown.name()));
        }
        if let Some(folder) = path.parent().filter(|_| self.images.folder().is_some()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        }
        match blobs.iter().next() {
            Some(state) => put(&path, state.bytes()).map_err(failed),
            // That of an earlier visit is of no use.
            None => std::fs::remove_file(&path).or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(failed(error)),
            }),
        }
    }

    fn has(&self, name: &ImageName) -> bool {
        match self.images.place(name) {
            // What a hypervisor has is gone or there as it is; the record of a guest that lacks pages knows its own end.
            _ if matches!(self.images, Images::Sockets(_)) => true,
            (_, path) => path.exists(),
        }
    }

    fn start(&self, started: &Started<'_>) -> Result<(), String> {
        let Some(command) = &self.on_start else { return Ok(()) };
        let (what, place) = self.images.place(started.name);
        let mut about = vec![
            ("PAGEWIRE_NAME", started.name.to_string()),
            (what, place.display().to_string()),
            ("PAGEWIRE_EPOCH", started.handover.epoch.to_string()),
        ];
        let state = self.images.state(started.name);
        about.extend(state.exists().then(|| ("PAGEWIRE_STATE", state.display().to_string())));
        run(command, &about, START_MAX, None)
    }
}

/// Writes a file that is whole and lasts once it has its name.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(aside.as_os_str(), flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&aside, path)?;
    File::open(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;
    use std::time::Instant;

    /// The limits of a minute and of ten seconds are held by this; cli/tests/live_ends.rs waits for the shorter one.
    #[test]
    fn a_command_that_hangs_ends_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let command = format!("echo $$ > {0}; sleep 1000 & echo $! >> {0}; wait", pids.display());
        let began = Instant::now();
        let error = run(&command, &[], Duration::from_secs(2), None).unwrap_err();
        assert!(error.contains("not done after 2 s") && began.elapsed() < Duration::from_secs(60), "{error}");
        let is_gone = |pid: &str| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            // A zombie has only not been waited for.
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        let pids = std::fs::read_to_string(pids).unwrap();
        assert_eq!(pids.lines().count(), 2, "{pids}");
        while !pids.lines().all(is_gone) {
            assert!(began.elapsed() < Duration::from_secs(60), "{pids}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_command_is_told_what_it_is_about_and_says_how_it_failed() {
        let about = [("PAGEWIRE_NAME", "vm $(exit 4)".to_owned())];
        assert_eq!(run("test \"$PAGEWIRE_NAME\" = 'vm $(exit 4)'", &about, PAUSE_MAX, None), Ok(()));
        assert!(run("exit 3", &[], PAUSE_MAX, None).unwrap_err().contains("exit status: 3"));
        assert!(run("kill -9 $$", &[], PAUSE_MAX, None).unwrap_err().contains("signal: 9"));
        // Nothing can be read from the terminal of whoever started it.
        assert_eq!(run("! read line", &[], PAUSE_MAX, None), Ok(()));
    }
}
