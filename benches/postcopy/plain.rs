//! The plainest that could serve a remote fault: eight bytes out, one page back over a blocking TCP connection, and one
//! ioctl. Two threads, nothing checked, no second page under way.
#![allow(unsafe_code, reason = "it maps memory and touches it")]

use crate::{Failure, PAGE, pin};
use pagewire_receiver::memory::uffd::{FaultsOf, Features, Message, Uffd, Wake, Watch};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mm::{MapFlags, ProtFlags};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

/// Memory of this program, for good: it ends with it.
fn map(bytes: usize) -> Result<usize, Failure> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: no address is asked for, so nothing that is there is touched.
    let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, flags)? };
    Ok(start.expose_provenance())
}

fn touch(address: usize) -> u8 {
    // SAFETY: inside memory that stays mapped, where nobody writes but the kernel.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

/// Answers page numbers with pages.
fn serve(mut stream: TcpStream, image: &[u8]) -> Result<(), Failure> {
    let mut number = [0; 8];
    while stream.read_exact(&mut number).is_ok() {
        let offset = usize::try_from(u64::from_le_bytes(number))? * PAGE;
        stream.write_all(image.get(offset..offset + PAGE).ok_or("outside")?)?;
    }
    Ok(())
}

fn handle(uffd: &Uffd, start: usize, mut stream: TcpStream, done: &AtomicBool) -> Result<(), Failure> {
    let (mut messages, mut page) = (Vec::new(), vec![0; PAGE]);
    let patience = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    while !done.load(Ordering::Relaxed) {
        if poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&patience))? == 0 {
            continue;
        }
        uffd.read(&mut messages)?;
        for message in messages.drain(..) {
            let Message::Fault { address, .. } = message else { return Err("no fault".into()) };
            let address = usize::try_from(address)? / PAGE * PAGE;
            stream.write_all(&((address - start) / PAGE).to_le_bytes())?;
            stream.read_exact(&mut page)?;
            uffd.copy(address as u64, &page, PAGE as u64, Wake::Now);
        }
    }
    Ok(())
}

/// Who touches would wait for ever.
fn end(error: &Failure) {
    let _ = std::io::stderr().write_all(format!("{error}\n").as_bytes());
    std::process::exit(1);
}

/// How long each touch took, in nanoseconds: guest and handler on the first core, the other side on the second.
pub(crate) fn faults(image: &[u8], pages: &[usize], cores: [usize; 2], pause: Duration) -> Result<Vec<u64>, Failure> {
    let start = map(image.len())?;
    let uffd = Uffd::open(FaultsOf::Everybody, Features::NONE)?;
    // SAFETY: memory of our own in which no object is.
    unsafe { uffd.register(start as u64..(start + image.len()) as u64, Watch::MISSING) }?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let far = listener.accept()?.0;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let done = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| pin(Some(cores[1])).and_then(|()| serve(far, image)).inspect_err(end));
        scope.spawn(|| pin(Some(cores[0])).and_then(|()| handle(&uffd, start, near, &done)).inspect_err(end));
        let toucher = scope.spawn(|| {
            pin(Some(cores[0]))?;
            let mut times = Vec::with_capacity(pages.len());
            for page in pages {
                let before = Instant::now();
                let byte = touch(start + page * PAGE);
                times.push(u64::try_from(before.elapsed().as_nanos())?);
                if Some(&byte) != image.get(page * PAGE) {
                    return Err("a wrong page".into());
                }
                crate::rest(pause);
            }
            Ok(times)
        });
        let times = toucher.join().map_err(|_| "the guest panicked")?;
        done.store(true, Ordering::Relaxed);
        times
    })
}
