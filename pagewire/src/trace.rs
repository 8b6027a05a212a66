//! What a guest wrote while it was sent, in a file: kept by a live session, read by simulations. `docs/TRACE.md` has the
//! format.
//!
//! No guest waits for its trace. What is seen goes to a thread that writes; if that falls too far behind, or the file
//! becomes too long, or writing fails, the trace ends there and the report has a warning.

use pagewire_protocol::error::DecodeError;
use pagewire_protocol::page::Layout;
pub use pagewire_protocol::trace::{Seen, TraceRecord};
use pagewire_protocol::trace::{TRACE_BYTES_MAX, TRACE_RECORDS_WAITING_MAX, TraceParser, encode_header};
use pagewire_sender::Trace;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use thiserror::Error;

/// A trace that cannot be read on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    /// Its bytes are not there.
    #[error("trace")]
    Io(#[from] io::Error),
    /// They are no trace.
    #[error("trace, in front of byte {at}")]
    Decode {
        /// Where the part ends that is wrong.
        at: u64,
        /// What is wrong.
        source: DecodeError,
    },
    /// It ends inside of a record, as that of a host that crashed does; the records in front of it are whole.
    #[error("trace: ends inside of a record, at byte {0}")]
    Cut(u64),
}

/// Reads a trace, whoever wrote it: no more is held than one bitmap of an image of 1 TiB, and its bytes.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    parser: TraceParser,
    layout: Layout,
    part: Vec<u8>,
    at: u64,
}

impl Reader<io::BufReader<File>> {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read, or is no trace.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        Self::new(io::BufReader::new(File::open(path)?))
    }
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let (mut parser, mut part, mut at) = (TraceParser::default(), Vec::new(), 0);
        let layout = loop {
            if let Some(layout) = parser.layout() {
                break layout.clone();
            }
            read_part(&mut input, &mut parser, &mut part, &mut at)?;
        };
        Ok(Self { input, parser, layout, part, at })
    }

    /// The image whose pages the records name.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The next record; none at the end.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn next_record(&mut self) -> Result<Option<TraceRecord>, TraceError> {
        loop {
            match read_part(&mut self.input, &mut self.parser, &mut self.part, &mut self.at)? {
                Part::Record(record) => return Ok(Some(record)),
                Part::End => return Ok(None),
                Part::More => {}
            }
        }
    }
}

/// What a part was.
enum Part {
    Record(TraceRecord),
    More,
    End,
}

fn read_part(
    input: &mut impl Read,
    parser: &mut TraceParser,
    part: &mut Vec<u8>,
    at: &mut u64,
) -> Result<Part, TraceError> {
    let wanted = parser.wants();
    part.clear();
    // Grows with what is there, not with what is said to be.
    input.take(wanted as u64).read_to_end(part)?;
    *at = at.saturating_add(part.len() as u64);
    if part.is_empty() && parser.may_end() {
        return Ok(Part::End);
    }
    if part.len() < wanted {
        return Err(TraceError::Cut(*at));
    }
    let record = parser.part(part).map_err(|source| TraceError::Decode { at: *at, source })?;
    Ok(record.map_or(Part::More, Part::Record))
}

/// A trace that is being written.
#[derive(Debug)]
pub(crate) struct Recording {
    path: PathBuf,
    is_cut_short: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

/// The session's end of it.
#[derive(Debug)]
struct Tap {
    to: Option<SyncSender<TraceRecord>>,
    is_cut_short: Arc<AtomicBool>,
}

impl Trace for Tap {
    fn seen(&mut self, record: TraceRecord) {
        // A thread that is gone says itself why.
        if let Some(Err(error)) = self.to.as_ref().map(|to| to.try_send(record)) {
            self.is_cut_short.store(matches!(error, TrySendError::Full(_)), Ordering::Relaxed);
            self.to = None;
        }
    }
}

impl Recording {
    /// Begins a trace in a file of the owner's alone; one that exists is written anew.
    ///
    /// # Errors
    /// Why there will be none.
    pub(crate) fn begin(path: &Path, layout: &Layout) -> Result<(Self, Box<dyn Trace>), String> {
        let failed = |error: &dyn std::error::Error| told(path, &error.to_string());
        let header = encode_header(layout).map_err(|error| failed(&error))?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = file.map_err(|error| failed(&error))?;
        let (to, from) = sync_channel(TRACE_RECORDS_WAITING_MAX);
        let write = move || write(BufWriter::new(file), &header, &from, TRACE_BYTES_MAX);
        let thread = std::thread::Builder::new().name("pagewire-trace".to_owned()).spawn(write);
        let thread = thread.map_err(|error| failed(&error))?;
        let is_cut_short = Arc::new(AtomicBool::new(false));
        let tap = Tap { to: Some(to), is_cut_short: Arc::clone(&is_cut_short) };
        Ok((Self { path: path.to_path_buf(), is_cut_short, thread }, Box::new(tap)))
    }

    /// The session is over and has dropped its end: whatever waits is written. Says what went wrong.
    pub(crate) fn end(self) -> Option<String> {
        let result = self.thread.join().unwrap_or_else(|_| Err("its thread panicked".to_owned()));
        let result = match result {
            Ok(()) if self.is_cut_short.load(Ordering::Relaxed) => Err("it was written too slowly".to_owned()),
            result => result,
        };
        result.err().map(|why| told(&self.path, &why))
    }
}

fn told(path: &Path, why: &str) -> String {
    format!("the trace {} is not whole: {why}", path.display())
}

/// Writes what comes until the session drops its end, or `most` bytes would be passed.
fn write(mut out: impl Write, header: &[u8], from: &Receiver<TraceRecord>, most: u64) -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    let mut written = header.len() as u64;
    out.write_all(header).map_err(failed)?;
    for record in from {
        let bytes = record.encode();
        written = written.saturating_add(bytes.len() as u64);
        if written > most {
            out.flush().map_err(failed)?;
            return Err(format!("it would take more than {most} bytes"));
        }
        out.write_all(&bytes).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "test code: a failed expectation is a failed test")]
mod tests {
    use super::*;
    use pagewire_protocol::bitmap::PageBitmap;
    use pagewire_protocol::page::{InstallSize, Region};
    use pagewire_protocol::time::Span;

    fn layout(bytes: u64) -> Layout {
        Layout::new(vec![Region { bytes, install_size: InstallSize::KIB_4 }]).unwrap()
    }

    fn record(at: u64, first: u64) -> TraceRecord {
        let mut pages = PageBitmap::new(256);
        pages.insert_range(first..first + 2);
        TraceRecord { at: Span::from_nanos(at), seen: Seen::Harvest, pages }
    }

    fn read(bytes: &[u8]) -> Result<Vec<TraceRecord>, TraceError> {
        let mut reader = Reader::new(bytes)?;
        std::iter::from_fn(|| reader.next_record().transpose()).collect()
    }

    /// The golden trace: three records, by runs and as a bitmap.
    fn golden() -> (Vec<u8>, Vec<TraceRecord>) {
        let mut pages = PageBitmap::new(256);
        (0..128).for_each(|page| {
            pages.insert(2 * page);
        });
        let last = TraceRecord { at: Span::from_millis(2500), seen: Seen::Compare, pages };
        let records = vec![record(1_000_000, 0), record(1_000_000_000, 254), last];
        let mut bytes = encode_header(&layout(1 << 20)).unwrap();
        records.iter().for_each(|record| bytes.extend(record.encode()));
        (bytes, records)
    }

    #[test]
    fn the_golden_trace_stays_what_it_is() {
        let (bytes, records) = golden();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/trace.txt");
        let hex: Vec<String> =
            bytes.chunks(16).map(|row| row.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        let text = hex.join("\n") + "\n";
        if std::env::var_os("PAGEWIRE_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap().replace("\r\n", "\n"), text);
        assert_eq!(read(&bytes).unwrap(), records);
    }

    #[test]
    fn what_a_session_shows_can_be_read_and_a_file_that_was_there_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        std::fs::write(&path, [9; 4096]).unwrap();
        let (recording, mut tap) = Recording::begin(&path, &layout(1 << 20)).unwrap();
        tap.seen(record(1, 7));
        tap.seen(record(2, 9));
        drop(tap);
        assert_eq!(recording.end(), None);
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(reader.layout(), &layout(1 << 20));
        assert_eq!(reader.next_record().unwrap(), Some(record(1, 7)));
        assert_eq!(reader.next_record().unwrap(), Some(record(2, 9)));
        assert_eq!(reader.next_record().unwrap(), None);
    }

    #[test]
    fn a_crash_leaves_the_records_that_were_whole() {
        let (bytes, records) = golden();
        let mut reader = Reader::new(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(reader.next_record().unwrap().as_ref(), Some(&records[0]));
        assert_eq!(reader.next_record().unwrap().as_ref(), Some(&records[1]));
        assert!(matches!(reader.next_record(), Err(TraceError::Cut(at)) if at == bytes.len() as u64 - 1));
        assert!(matches!(Reader::new(&bytes[..20]), Err(TraceError::Cut(20))));
        assert!(matches!(Reader::new(&b"no trace, but long"[..]), Err(TraceError::Decode { at: 16, .. })));
    }

    #[test]
    fn ends_at_a_record_where_it_would_become_too_long() {
        let (to, from) = sync_channel(4);
        [record(1, 7), record(2, 9)].into_iter().for_each(|record| to.send(record).unwrap());
        drop(to);
        let header = encode_header(&layout(1 << 20)).unwrap();
        let (mut out, most) = (Vec::new(), header.len() + record(1, 7).encode().len());
        let why = write(&mut out, &header, &from, most as u64).unwrap_err();
        assert!(why.contains("more than"), "{why}");
        assert_eq!(read(&out).unwrap(), [record(1, 7)]);
    }

    #[test]
    fn a_disk_that_is_too_slow_ends_the_trace_and_holds_nobody_up() {
        let (to, from) = sync_channel(1);
        let is_cut_short = Arc::new(AtomicBool::new(false));
        let mut tap = Tap { to: Some(to), is_cut_short: Arc::clone(&is_cut_short) };
        (0..3).for_each(|at| tap.seen(record(at, 7)));
        assert_eq!(from.iter().collect::<Vec<_>>(), [record(0, 7)]);
        let thread = std::thread::spawn(|| Ok(()));
        let warning = Recording { path: "t".into(), is_cut_short, thread }.end();
        assert_eq!(warning.as_deref(), Some("the trace t is not whole: it was written too slowly"));
    }

    #[test]
    fn says_why_there_is_no_trace() {
        let none = |path: &str, bytes| Recording::begin(Path::new(path), &layout(bytes)).map(drop).unwrap_err();
        assert!(none("/nowhere/trace", 4096).contains("/nowhere/trace"));
        assert!(none("/nowhere/trace", 2 << 40).contains("pages: 536870912 > 268435456"));
        // A device that takes nothing: the session goes on, and the end says so.
        let (recording, mut tap) = Recording::begin(Path::new("/dev/full"), &layout(1 << 20)).unwrap();
        (0..9).for_each(|at| tap.seen(record(at, 7)));
        drop(tap);
        let why = recording.end().unwrap();
        assert!(why.starts_with("the trace /dev/full is not whole: "), "{why}");
    }
}
