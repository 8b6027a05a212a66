//! The command line. What stands here is what `--help` teaches.

use bytesize::ByteSize;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use pagewire::{Address, ImageName, InstallSize};
use std::path::PathBuf;
use std::time::Duration;

/// Moves memory images between hosts and sends only what the other side does not have.
///
/// Zero pages, duplicates, and pages that the destination holds already are not sent. An interrupted transfer resumes
/// when it is started again. Try it: `pagewire demo`.
#[derive(Debug, Parser)]
#[command(name = "pagewire", version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed, the guest is at the sender; 2 wrong usage; 3 the guest \
                          is in doubt, see `pagewire status`; 4 it runs at the receiver and lacks pages, see \
                          `pagewire resume`; 5 it is at the receiver, and that is not recorded here; 130 cancelled.";

const RESUME_CODES: &str = "Exit codes: 0 done: the guest has all of its pages, and SRC can go; 1 failed: nothing is to be \
                            brought, or SRC cannot be read; 2 wrong usage; 3 the guest is in doubt still: it may run \
                            there; 4 it lacks pages still: keep SRC, and try again; 5 it has all, and that cannot be \
                            recorded here: try again.";

const SEND_CODES: &str = "Exit codes: 0 done: a guest that ran is the receiver's and must not run here; 1 failed: the \
                          guest is here, and runs on, except when it is said to be at the receiver already; 2 wrong \
                          usage, nothing was touched; 3 the guest is in doubt: keep it paused, and see `pagewire \
                          status`; 4 the guest runs at the receiver and lacks pages: keep SRC, and bring them by \
                          `pagewire resume`; 5 the guest is at the receiver, and that cannot be recorded here; 130 \
                          cancelled: as 1.";

const RECEIVE_CODES: &str = "Exit codes with --once: 0 the image is here; 1 failed: it is at the sender; 3 nobody knows \
                             where the guest is, see `pagewire status`. Without it: 0, when a signal ends it.";

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show what it does: 5, 10 and 15 guests move from host A to host B and back while they run, on this machine.
    ///
    /// They come back changed, and what did not change never travels again: it is in the store of the host they left.
    /// They stand still for the last round alone. One guest of each row moves once more in post-copy: it runs on B at once,
    /// and its memory follows. Takes less than a minute and, at full scale, 6 GB of memory or disk while it runs.
    Demo(Demo),
    /// Copy an image to another file on this host; if that exists, only what differs is written.
    Copy(Copy),
    /// Wait for images, and for guests that run, and put them into a folder.
    #[command(after_help = RECEIVE_CODES)]
    Receive(Receive),
    /// Send an image, or with --live a guest that runs, to a receiver.
    #[command(after_help = SEND_CODES)]
    Send(Send),
    /// Say what an image consists of, and what a transfer of it would cost.
    Inspect(Inspect),
    /// Look after what this host keeps of images that were here.
    ///
    /// A store keeps visits: an image that left or came, as a plain file with holes, and a manifest with the digest of
    /// each page. A guest that comes back then sends only what changed elsewhere. Every visit belongs to one guest, and
    /// a newer visit of the same guest supersedes the older ones.
    Store(Store),
    /// Show where guests are that were handed over from here or to here, as this host's records say.
    ///
    /// It only looks. Ends with code 3 if a guest is in doubt, and with 1 if files of the journal are damaged.
    Status(Status),
    /// End the doubt about a guest, as its operator.
    ///
    /// A guest is in doubt when it was handed over and no answer came: the other host may run it, or may not. It stays
    /// frozen here until the other host answers; whoever knows more can say where it is.
    ///
    /// --ask asks the other host at the address where it receives now, on this host, from which the guest was sent. That
    /// is the way to take if the other host is up.
    ///
    /// --here takes it back. Before you say it, make sure that the other host neither runs the guest nor ever will: it
    /// is switched off, or cut off from the guest's disks and network, and does not come back before its own records
    /// are dealt with (`pagewire resolve GUEST --there` there). Name it with --fenced. Nothing can check that for you:
    /// if it is not so, the guest runs twice, and its disks are lost.
    ///
    /// --there gives it away for good: the other host has it, and what is here is not needed any more. On the host that
    /// was to receive it, it says that the guest does not run there and never will by this hand-over.
    #[command(after_help = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the guest is still in doubt.")]
    Resolve(Resolve),
    /// Bring what a guest lacks that runs at the receiver, after `send --post-copy` ended with code 4, 3, or not at all.
    ///
    /// The guest runs there, and waits where it touches a page that is not there. SRC is the memory that it left, and must
    /// be as it was then: nothing can check that. The journal's record names the hand-over; if this host has not heard
    /// that the guest was started, the receiver is asked first, as `pagewire resolve --ask` does. Any number of times:
    /// what is there is not sent again.
    #[command(after_help = RESUME_CODES)]
    Resume(Resume),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Resume {
    /// The memory that the guest left: the file that it was sent from.
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// The receiver, where it listens now: tcp://HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: Address,
    /// What the guest was called when it was sent.
    #[arg(long, value_name = "NAME", value_parser = ImageName::new)]
    pub(crate) name: ImageName,
    /// Where the hand-over is recorded [default: ~/.local/state/pagewire/journal]
    #[arg(long, value_name = "DIR")]
    pub(crate) journal: Option<PathBuf>,
    /// How long the receiver is tried again when nothing goes on, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) patience: Duration,
    /// Connections that carry pages.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) lanes: u8,
    /// Send at most this many bytes a second, as in 125MB.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth_limit: Option<u64>,
    /// What is installed at once at the destination: as it was sent with.
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    pub(crate) page_size: PageSize,
    /// Never compress.
    #[arg(long)]
    pub(crate) no_compress: bool,
    /// Allow memory to cross a network in the clear (there is no TLS yet).
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    #[command(flatten)]
    pub(crate) keeping: Keeping,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Where this host's records are.
#[derive(Debug, ClapArgs)]
pub(crate) struct JournalAt {
    /// The folder of this host's records. By default $XDG_STATE_HOME/pagewire/journal, or else
    /// ~/.local/state/pagewire/journal.
    #[arg(long = "journal", value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) at: JournalAt,
}

#[derive(Debug, ClapArgs)]
#[group(id = "where", required = true, args = ["ask", "here", "there"])]
pub(crate) struct Resolve {
    /// The guest: its name, or the first digits of its lineage, as `pagewire status` shows them.
    #[arg(value_name = "GUEST")]
    pub(crate) guest: String,
    /// Ask the other host, where it receives: its records know. Nothing is transferred.
    #[arg(long, value_name = "ADDR")]
    pub(crate) ask: Option<Address>,
    /// How long it is asked, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, requires = "ask")]
    pub(crate) patience: Duration,
    /// It is this host's, and the other host is fenced off.
    #[arg(long, requires = "fenced")]
    pub(crate) here: bool,
    /// It is the other host's.
    #[arg(long)]
    pub(crate) there: bool,
    /// The host that is fenced off, as `pagewire status` shows it; its first 8 digits are enough.
    #[arg(long, value_name = "HOST", value_parser = host_digits, conflicts_with_all = ["there", "ask"])]
    pub(crate) fenced: Option<String>,
    /// The hand-over. By default the one that is in doubt.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) epoch: Option<u64>,
    #[command(flatten)]
    pub(crate) at: JournalAt,
}

#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "What is shown")]
pub(crate) struct Output {
    /// Print events and the report as JSON lines on standard output.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the report to FILE as one JSON object ("schema": "pagewire.report/1").
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "How pages travel")]
pub(crate) struct Transfer {
    /// Send at most this many bytes a second, as in 125MB.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth_limit: Option<u64>,
    /// What is installed at once at the destination.
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    pub(crate) page_size: PageSize,
    /// Ignore what is at the destination.
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Send duplicates again instead of referring to the first.
    #[arg(long)]
    pub(crate) no_dedup: bool,
    /// Never compress. By default pages are compressed where the link is slower than compressing.
    #[arg(long)]
    pub(crate) no_compress: bool,
    /// Give up after this many seconds; what has arrived is kept and resumed.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) deadline: Option<Duration>,
}

/// What this host keeps of guests, and how transfers use it.
#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "What is kept of guests")]
pub(crate) struct Keeping {
    /// Keep what leaves and what arrives in the store DIR, and send only what changed when a guest comes back. Made if
    /// it is not there: yours, and closed to others. Used on loopback and Unix sockets alone until there is TLS.
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// What of an image stays: by default the pages of what leaves, and the manifest (digests) of what arrives.
    #[arg(long, value_name = "WHAT", requires = "store")]
    pub(crate) keep: Option<Keep>,
    /// Bytes on disk that each dedup domain may take, as in 20GiB; what was used longest ago goes first.
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "store")]
    pub(crate) store_budget: Option<u64>,
}

/// Whose pages are matched.
#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "What is kept of guests")]
pub(crate) struct Matching {
    /// Match pages with those of all guests that are sent with this name, on both sides. By default a guest's pages are
    /// matched with its own earlier ones alone: whoever may send within a domain can find out what its guests hold.
    #[arg(long, value_name = "NAME", requires = "store")]
    pub(crate) domain: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Keep {
    /// Nothing.
    None,
    /// The digests of its pages.
    Manifest,
    /// The digests and the pages.
    Visit,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PageSize {
    #[value(name = "4KiB", aliases = ["4k", "4K", "4096"])]
    Kib4,
    #[value(name = "64KiB", aliases = ["64k", "64K", "65536"])]
    Kib64,
    #[value(name = "2MiB", aliases = ["2m", "2M", "2097152"])]
    Mib2,
}

impl From<PageSize> for InstallSize {
    fn from(size: PageSize) -> Self {
        match size {
            PageSize::Kib4 => Self::KIB_4,
            PageSize::Kib64 => Self::KIB_64,
            PageSize::Mib2 => Self::MIB_2,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Demo {
    /// Size of the guests, from 0.001 to 1. By default 1, or what fits into half of the memory and space that is free.
    #[arg(long, value_name = "FACTOR", value_parser = scale)]
    pub(crate) scale: Option<u32>,
    /// Put the two hosts' folders below DIR. By default they are in /dev/shm, as guests' memory is memory, or in the
    /// system's temporary folder if that has too little room.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Print the table as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Copy {
    /// The image.
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// A file, or a folder to put it into. A file that exists is the base; it stays until the new one replaces it.
    #[arg(value_name = "DST")]
    pub(crate) destination: PathBuf,
    /// Change DST where it lies: nothing unchanged is written, but until it is whole DST is absent.
    #[arg(long)]
    pub(crate) inplace: bool,
    #[command(flatten)]
    pub(crate) transfer: Transfer,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Send {
    /// The image: a file that is at rest; with --live the file that is the guest's memory.
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// The receiver: tcp://HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: Address,
    /// What the image is called there: 1 to 64 of A-Z a-z 0-9 . _ -
    #[arg(long, value_name = "NAME", value_parser = ImageName::new)]
    pub(crate) name: ImageName,
    /// Connections that carry pages.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) lanes: u8,
    /// Allow memory to cross a network in the clear (there is no TLS yet).
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    #[command(flatten)]
    pub(crate) live: Live,
    #[command(flatten)]
    pub(crate) keeping: Keeping,
    #[command(flatten)]
    pub(crate) matching: Matching,
    #[command(flatten)]
    pub(crate) transfer: Transfer,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// A guest that runs, at the sender.
#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "Guests that run")]
pub(crate) struct Live {
    /// SRC is memory that something keeps writing to: send it in rounds, pause the guest, hand it over. The receiver has
    /// to be told to take guests: --on-start or --leave-paused.
    #[arg(long, requires = "on_pause")]
    pub(crate) live: bool,
    /// Stops the guest, which must stand still when CMD ends; run by sh when what is left to send fits the downtime. This
    /// and the next have a minute. PAGEWIRE_NAME names the guest.
    #[arg(long, value_name = "CMD", requires = "live")]
    pub(crate) on_pause: Option<String>,
    /// Lets the guest run on here, if it is not handed over after all. Without it a guest that was paused stays so.
    #[arg(long, value_name = "CMD", requires = "live")]
    pub(crate) on_resume: Option<String>,
    /// Slows the guest down if it writes too fast: by PAGEWIRE_THROTTLE per cent, 20 at first and then 10 more each time,
    /// up to 99. Run with 0 in the end, wherever the guest is then.
    #[arg(long, value_name = "CMD", requires = "live")]
    pub(crate) on_throttle: Option<String>,
    /// Has the last word: run when the guest stands still and the receiver has all of it. The guest is handed over if CMD
    /// succeeds within 90 seconds, and runs on here if it fails or takes longer.
    #[arg(long, value_name = "CMD", requires = "live")]
    pub(crate) pause_before_switchover: Option<String>,
    /// Device state that CMD of --on-pause has written when it ends; it goes with the memory.
    #[arg(long, value_name = "FILE", requires = "live")]
    pub(crate) state: Option<PathBuf>,
    /// How long the guest may stand still, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 300, requires = "live")]
    pub(crate) downtime: u32,
    /// Rounds at most before the last.
    #[arg(long, value_name = "N", default_value_t = 30, requires = "live", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// What to do when the guest writes too fast to be stopped for as short as it should, or --rounds are over.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = AtLimit::Cancel, requires = "live")]
    pub(crate) at_limit: AtLimit,
    /// Whether the guest may start at the receiver before all of its memory is there (never, if this is not given). It
    /// stands still for less then, whatever it writes; who touches a page that is not there waits until it has come from
    /// here, so SRC has to be kept until this command ends with 0. If the network breaks the guest runs on as far as it
    /// can, and is brought the rest when the receiver is back; after --patience `pagewire resume` goes on. The receiver
    /// has to be able to: `receive --into-uffd`.
    #[arg(long, value_enum, value_name = "WHEN", requires = "live")]
    pub(crate) post_copy: Option<PostCopy>,
    /// How long a receiver that does not answer is asked where the guest is, in seconds; then it is in doubt. In post-copy
    /// also how long the receiver is tried again when nothing goes on.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, requires = "live")]
    pub(crate) patience: Duration,
    /// Where hand-overs are recorded, to survive a crash [default: ~/.local/state/pagewire/journal]
    #[arg(long, value_name = "DIR", requires = "live")]
    pub(crate) journal: Option<PathBuf>,
    /// Let files FILE.GUEST.EPOCH, on storage that both hosts reach, decide who has the guest when the other host does
    /// not answer: who asks first. The receiver has to name the same file.
    #[arg(long, value_name = "FILE", requires = "live")]
    pub(crate) lease: Option<PathBuf>,
    /// Draw the rounds into FILE, an SVG, also if it fails: pages sent and left, what the guest changes and the link
    /// carries, and the switchover.
    #[arg(long, value_name = "FILE", requires = "live")]
    pub(crate) plot: Option<PathBuf>,
    /// Keep in FILE which pages the guest was found to write, and when, for simulations. No session fails for it.
    #[arg(long, value_name = "FILE", requires = "live")]
    pub(crate) record_trace: Option<PathBuf>,
}

/// What to do when a guest writes too fast.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum AtLimit {
    /// Leave it where it is.
    Cancel,
    /// Hand it over all the same.
    Force,
    /// Start it at the receiver, and bring what it lacks while it runs there: as --post-copy auto.
    PostCopy,
}

/// When a guest may start before all of its memory is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PostCopy {
    /// It stands still until all of it is there.
    Never,
    /// When the rounds come to their limits: then what is left follows.
    Auto,
    /// At once: none of its memory goes ahead of it.
    Now,
}

/// Guests that run, at the receiver.
#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "Guests that run")]
pub(crate) struct Take {
    /// Take guests over, and start each by CMD when it is this host's: PAGEWIRE_NAME, PAGEWIRE_IMAGE (or PAGEWIRE_SOCKET),
    /// PAGEWIRE_STATE (its device state) and PAGEWIRE_EPOCH tell which. CMD has 10 seconds; what it leaves in the background goes on.
    #[arg(long, value_name = "CMD")]
    pub(crate) on_start: Option<String>,
    /// Take guests over, and leave it to somebody else to start them.
    #[arg(long, conflicts_with = "on_start")]
    pub(crate) leave_paused: bool,
    /// Where hand-overs are recorded, to survive a crash [default: ~/.local/state/pagewire/journal]
    #[arg(long, value_name = "DIR")]
    pub(crate) journal: Option<PathBuf>,
    /// Ask files FILE.GUEST.EPOCH, on storage that both hosts reach, before a guest is started, if its sender wants that.
    #[arg(long, value_name = "FILE")]
    pub(crate) lease: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Receive {
    /// Where to listen: tcp://HOST:PORT or unix:/PATH. Port 0 finds a free one and says which.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Address,
    /// Images land in DIR/NAME. A file that exists is the base; it stays until the new one replaces it.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["into_file", "into_uffd"])]
    pub(crate) into: Option<PathBuf>,
    /// Fill the existing file PATH where it lies, whatever the image is called; somebody may hold it open.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["into", "inplace"])]
    pub(crate) into_file: Option<PathBuf>,
    /// Guests land in the memory of a hypervisor that loads them in --on-start and hands over its userfaultfd, as
    /// Firecracker does: each on the Unix socket DIR/NAME.sock, which PAGEWIRE_SOCKET names. They are sent with
    /// --post-copy now. With --store, pages that an earlier visit has do not travel. If this process ends before all of a
    /// guest is there, the guest stands still for ever.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["into", "into_file", "inplace"])]
    pub(crate) into_uffd: Option<PathBuf>,
    /// Change files where they lie: nothing unchanged is written, but until it is whole a file is absent.
    #[arg(long)]
    pub(crate) inplace: bool,
    /// Ignore what is there already.
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Connections for pages that a session may have.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) lanes: u8,
    /// Sessions at once.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) max_sessions: u16,
    /// The largest image that is accepted.
    #[arg(long, value_name = "SIZE", default_value = "1TiB", value_parser = size)]
    pub(crate) max_image: u64,
    /// Stop after one session.
    #[arg(long)]
    pub(crate) once: bool,
    /// Allow memory to cross a network in the clear (there is no TLS yet).
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    #[command(flatten)]
    pub(crate) keeping: Keeping,
    #[command(flatten)]
    pub(crate) matching: Matching,
    /// Take unchanged pages of a kept image as they are, where they need not be copied: with --inplace, or on a file
    /// system that shares blocks. They are not read, and the report counts them.
    #[arg(long, requires = "store")]
    pub(crate) trust_store: bool,
    #[command(flatten)]
    pub(crate) take: Take,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Inspect {
    /// The image.
    #[arg(value_name = "IMAGE")]
    pub(crate) image: PathBuf,
    /// An earlier version of it, or another image, that the destination would hold.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) against: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Store {
    #[command(subcommand)]
    pub(crate) verb: StoreVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreVerb {
    /// Show the visits, the newest of each domain first.
    List(StoreAt),
    /// Read and re-hash everything that is kept; name what is wrong, and end with code 1 if something is.
    Verify(StoreAt),
    /// Verify, and drop what is damaged: single pages where it can be, else whole visits. What is sound stays.
    ///
    /// Nothing is lost by it: a page that is not kept is sent again. What a session has open is left for later.
    Repair(StoreAt),
    /// Remove superseded visits, and evict what is over the budget: what was used longest ago goes first.
    Prune(Prune),
    /// Remove visits by id, by name, or all. What a session has open stays.
    #[command(name = "rm")]
    Remove(Remove),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct StoreAt {
    /// The store's folder: yours, and closed to others.
    #[arg(long = "store", value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Print JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Prune {
    /// Bytes on disk that each dedup domain may take, as in 20GiB. Without it only superseded visits go.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) store_budget: Option<u64>,
    #[command(flatten)]
    pub(crate) at: StoreAt,
}

#[derive(Debug, ClapArgs)]
#[group(id = "which", required = true, multiple = true, args = ["ids", "name", "all"])]
pub(crate) struct Remove {
    /// Ids as `pagewire store list` shows them; the first digits are enough if they fit one visit.
    #[arg(value_name = "ID", conflicts_with_all = ["name", "all"])]
    pub(crate) ids: Vec<String>,
    /// All visits of guests called NAME.
    #[arg(long, value_name = "NAME", value_parser = ImageName::new, conflicts_with = "all")]
    pub(crate) name: Option<ImageName>,
    /// All visits, damaged ones too.
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) at: StoreAt,
}

fn size(text: &str) -> Result<u64, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err("must be more than zero".to_owned()),
        Ok(ByteSize(bytes)) => Ok(bytes),
        Err(_) => Err("expected a size as in 256MiB or 125MB".to_owned()),
    }
}

/// Few enough to type, and enough that no two hosts share them.
fn host_digits(text: &str) -> Result<String, String> {
    let digits = text.to_ascii_lowercase();
    let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hex && (8..=64).contains(&digits.len()) { Ok(digits) } else { Err("expected 8 to 64 hex digits".to_owned()) }
}

/// Below this a single batch would take longer than a receiver waits.
const RATE_MIN: u64 = 64 * 1024;

fn rate(text: &str) -> Result<u64, String> {
    match size(text.strip_suffix("/s").unwrap_or(text))? {
        rate if rate < RATE_MIN => Err("must be at least 64KiB".to_owned()),
        rate => Ok(rate),
    }
}

/// In thousandths: what is finer makes no difference to what a demo shows.
fn scale(text: &str) -> Result<u32, String> {
    let scale: f64 = text.parse().map_err(|_| "expected a number as in 0.1".to_owned())?;
    let is_nearest = |thousandths: &u32| (scale * 1000.0 - f64::from(*thousandths)).abs() <= 0.5;
    let known = (0.001..=1.0).contains(&scale).then(|| (1..=1000).find(is_nearest)).flatten();
    known.ok_or_else(|| "must be from 0.001 to 1".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected seconds".to_owned())?;
    if seconds <= 0.0 {
        return Err("must be more than zero".to_owned());
    }
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
