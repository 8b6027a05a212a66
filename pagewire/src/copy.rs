//! Copies an image on this host: both engines in one process, joined by a socket pair.

use crate::error::ErrorKind;
use crate::observe::Observer;
use crate::receive::{Arriving, refusal, session};
use crate::report::{Outcome, Report, Role};
use crate::send::{SendOptions, Sent, run};
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::framing::Framer;
use pagewire_receiver::Offer;
use pagewire_receiver::driver::Landed;
use pagewire_receiver::memory::FileSink;
use pagewire_sender::driver::Route;
use pagewire_sender::memory::FileMemory;
use pagewire_store::{Landing, LandingOptions};
use pagewire_transport::{Sessions, Socket};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How to copy.
#[derive(Clone, Debug, Default)]
pub struct CopyOptions {
    /// How to send.
    pub send: SendOptions,
    /// Change the destination where it lies.
    pub inplace: bool,
}

/// Copies the image `source` to `destination`: a file, which is the base if it exists, or a folder to put it into.
pub fn copy(source: &Path, destination: &Path, options: &CopyOptions, observer: &mut dyn Observer) -> Outcome {
    let name = source.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let prepared = prepare(source, destination, options);
    match prepared {
        Ok((memory, place, here, there)) => join(memory, &place, here, there, options, observer),
        Err(kind) => Report::new(Role::Sender, name).close(Some(kind.at_sender())),
    }
}

type Prepared = (FileMemory, PathBuf, Socket, Socket);

fn prepare(source: &Path, destination: &Path, options: &CopyOptions) -> Result<Prepared, ErrorKind> {
    let failed = |error| ErrorKind::Source { path: source.to_path_buf(), source: error };
    let memory = FileMemory::open(source, options.send.install_size).map_err(failed)?;
    let mut place = destination.to_path_buf();
    if destination.is_dir() {
        place.push(source.file_name().ok_or_else(|| ErrorKind::NoName(source.to_path_buf()))?);
    }
    let ends_in_slash = destination.as_os_str().as_encoded_bytes().ends_with(b"/") && !destination.is_dir();
    if place.file_name().is_none() || ends_in_slash {
        return Err(ErrorKind::NoName(place));
    }
    let identity = |path: &Path| fs::metadata(path).map(|info| (info.dev(), info.ino())).ok();
    if identity(source).is_some_and(|source| identity(&place) == Some(source)) {
        return Err(ErrorKind::SameFile(place));
    }
    let (here, there) = Socket::pair().map_err(|source| ErrorKind::Local { what: "socket pair", source })?;
    Ok((memory, place, here, there))
}

fn join(
    memory: FileMemory,
    place: &Path,
    here: Socket,
    there: Socket,
    options: &CopyOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    let (dir, file) = (place.parent().filter(|dir| !dir.as_os_str().is_empty()), place.file_name().unwrap_or_default());
    let dir = dir.unwrap_or(Path::new("."));
    // The offered name is for people only: the place is known here.
    let name = ImageName::new(&file.to_string_lossy()).or_else(|_| ImageName::new("image"));
    let name = match name {
        Ok(name) => name,
        Err(error) => return Report::new(Role::Sender, String::new()).close(Some(ErrorKind::Name(error).at_sender())),
    };
    let landing = LandingOptions { inplace: options.inplace, fresh: options.send.fresh };
    let decide = |offer: &Offer| {
        let landing = Landing::start(dir, file, offer.open.layout.bytes(), landing).map_err(|error| refusal(&error))?;
        Ok(Landed { sink: FileSink::new(landing, offer.open.layout.clone()), agreed: None, others: None })
    };
    let arriving =
        Arriving { socket: there, framer: Framer::new(), single_stream: true, lanes: 1, start: Instant::now() };
    let options = SendOptions { lanes: 1, ..options.send.clone() };
    std::thread::scope(|scope| {
        let sessions = Sessions::default();
        let receiver = scope.spawn(move || {
            session(arriving, (&sessions, &Default::default()), (None, None), decide, |_, _| (), |_| ())
        });
        let sent = run(Sent { memory, source: None, guest: None }, &name, Route::Over(here), &options, observer);
        drop(receiver.join());
        sent
    })
}
