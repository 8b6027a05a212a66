//! What became of pages that were to be put in: the kernel does a part, or says why not, and is asked again.

use pagewire_protocol::limits::PAGE_BYTES;
use rustix::io::Errno;

/// Why the kernel put in no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The address space is being changed, and who changes it waits for its message to be read: read messages, then ask
    /// again (`EAGAIN`).
    Changing,
    /// No registered mapping is there, or more than one (`ENOENT`).
    RangeGone,
    /// The process is gone (`ESRCH`).
    ProcessGone,
    /// The system has no memory, or no huge page, for it (`ENOMEM`).
    NoMemory,
    /// Anything else, such as addresses that are no whole pages.
    Refused(Errno),
}

/// What was put in, from the first byte on without a gap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Bytes put in by this call.
    pub installed: u64,
    /// Bytes that were there already: they stay as they were, and who waited for them is woken.
    pub present: u64,
    /// Why there are no more; `None` if that was all.
    pub stop: Option<Stop>,
}

impl Filled {
    /// Bytes from the first on that are there now.
    pub fn bytes(&self) -> u64 {
        self.installed.saturating_add(self.present)
    }
}

/// One answer of the kernel: bytes it put in, or why none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Done(u64),
    /// The first page is there already.
    Present,
    Stop(Stop),
}

impl Step {
    /// What a call that was to put in `asked` bytes says by what it returned and by the count in its argument.
    ///
    /// A part is `EAGAIN` with a count; the same with none, or with an error where the count is, is a change under way.
    pub(super) fn judge(result: Result<(), Errno>, count: i64, asked: u64) -> Self {
        let done = u64::try_from(count).unwrap_or(0).min(asked);
        match result {
            Ok(()) => Self::Done(asked),
            Err(Errno::AGAIN) if done > 0 => Self::Done(done),
            Err(Errno::AGAIN) => Self::Stop(Stop::Changing),
            Err(Errno::EXIST) => Self::Present,
            Err(Errno::NOENT) => Self::Stop(Stop::RangeGone),
            Err(Errno::SRCH) => Self::Stop(Stop::ProcessGone),
            Err(Errno::NOMEM) => Self::Stop(Stop::NoMemory),
            Err(other) => Self::Stop(Stop::Refused(other)),
        }
    }
}

/// Puts in `bytes` bytes from `address` on by as many steps as it takes. `step` is given the place of the first byte
/// that is not there yet, counted from `address`, and `wake` that of a page that was there already.
///
/// Only the kernel knows whether such a page is 4 KiB or a huge one of `page_bytes`: behind it the next 4 KiB are tried,
/// which it refuses inside a huge page.
pub(super) fn fill(
    address: u64,
    bytes: u64,
    page_bytes: u64,
    mut step: impl FnMut(u64) -> Step,
    mut wake: impl FnMut(u64),
) -> Filled {
    let mut filled = Filled::default();
    let mut inside_page = false;
    while filled.bytes() < bytes {
        let at = filled.bytes();
        let left = bytes.saturating_sub(at);
        match step(at) {
            // A kernel that does nothing and calls it success is not asked for ever.
            Step::Done(0) => filled.stop = Some(Stop::Refused(Errno::INVAL)),
            Step::Done(done) => {
                filled.installed = filled.installed.saturating_add(done.min(left));
                inside_page = false;
            }
            Step::Present => {
                wake(at);
                filled.present = filled.present.saturating_add(left.min(PAGE_BYTES as u64));
                inside_page = true;
            }
            Step::Stop(Stop::Refused(Errno::INVAL)) if inside_page && page_bytes > PAGE_BYTES as u64 => {
                let past = address.saturating_add(at).checked_rem(page_bytes).unwrap_or(0);
                let rest = page_bytes.saturating_sub(past);
                filled.present = filled.present.saturating_add(left.min(rest));
                inside_page = false;
            }
            Step::Stop(stop) => filled.stop = Some(stop),
        }
        if filled.stop.is_some() {
            break;
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const HUGE: u64 = 2 << 20;

    /// Runs a fill against a kernel with a script; gives what came of it and which places were asked and woken.
    fn run(bytes: u64, page_bytes: u64, script: &[Step]) -> (Filled, Vec<u64>, Vec<u64>) {
        let (mut asked, mut woken, mut script) = (Vec::new(), Vec::new(), script.iter());
        let step = |at: u64| {
            asked.push(at);
            *script.next().unwrap()
        };
        let filled = fill(0, bytes, page_bytes, step, |at| woken.push(at));
        assert!(script.next().is_none());
        (filled, asked, woken)
    }

    #[test]
    fn answers_are_parts_or_reasons() {
        assert_eq!(Step::judge(Ok(()), 8192, 8192), Step::Done(8192));
        assert_eq!(Step::judge(Err(Errno::AGAIN), 4096, 8192), Step::Done(4096));
        assert_eq!(Step::judge(Err(Errno::AGAIN), i64::MAX, 8192), Step::Done(8192));
        for count in [0, -11, i64::MIN] {
            assert_eq!(Step::judge(Err(Errno::AGAIN), count, 8192), Step::Stop(Stop::Changing));
        }
        assert_eq!(Step::judge(Err(Errno::EXIST), -17, 4096), Step::Present);
        assert_eq!(Step::judge(Err(Errno::NOENT), 0, 4096), Step::Stop(Stop::RangeGone));
        assert_eq!(Step::judge(Err(Errno::SRCH), 0, 4096), Step::Stop(Stop::ProcessGone));
        assert_eq!(Step::judge(Err(Errno::NOMEM), 0, 4096), Step::Stop(Stop::NoMemory));
        assert_eq!(Step::judge(Err(Errno::FAULT), 0, 4096), Step::Stop(Stop::Refused(Errno::FAULT)));
    }

    #[test]
    fn goes_on_after_parts_and_behind_pages_that_are_there() {
        let script = [Step::Done(PAGE), Step::Present, Step::Present, Step::Done(2 * PAGE)];
        let (filled, asked, woken) = run(5 * PAGE, PAGE, &script);
        assert_eq!(filled, Filled { installed: 3 * PAGE, present: 2 * PAGE, stop: None });
        assert_eq!((asked, woken), (vec![0, PAGE, 2 * PAGE, 3 * PAGE], vec![PAGE, 2 * PAGE]));
    }

    #[test]
    fn stops_where_the_kernel_does_and_says_how_far_it_came() {
        for stop in [Stop::Changing, Stop::RangeGone, Stop::ProcessGone, Stop::NoMemory, Stop::Refused(Errno::FAULT)] {
            let (filled, ..) = run(3 * PAGE, PAGE, &[Step::Done(PAGE), Step::Stop(stop)]);
            assert_eq!(filled, Filled { installed: PAGE, present: 0, stop: Some(stop) });
        }
        let (filled, ..) = run(PAGE, PAGE, &[Step::Done(0)]);
        assert_eq!(filled.stop, Some(Stop::Refused(Errno::INVAL)));
        assert_eq!(run(0, PAGE, &[]).0, Filled::default());
    }

    #[test]
    fn a_huge_page_that_is_there_is_passed_as_a_whole_and_small_ones_one_by_one() {
        let refused = Step::Stop(Stop::Refused(Errno::INVAL));
        let (filled, asked, _) = run(2 * HUGE, HUGE, &[Step::Present, refused, Step::Done(HUGE)]);
        assert_eq!(filled, Filled { installed: HUGE, present: HUGE, stop: None });
        assert_eq!(asked, [0, PAGE, HUGE]);
        let (filled, ..) = run(HUGE, HUGE, &[Step::Present, Step::Done(HUGE - PAGE)]);
        assert_eq!(filled, Filled { installed: HUGE - PAGE, present: PAGE, stop: None });
        // What is refused at once is an error, whatever the page size.
        let (filled, ..) = run(HUGE, HUGE, &[refused]);
        assert_eq!(filled.stop, Some(Stop::Refused(Errno::INVAL)));
    }
}
