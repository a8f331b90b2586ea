//! What goes over the TAP, as a pcapng file (draft-ietf-opsawg-pcapng).
//!
//! ```text
//!  engine's thread ── whole blocks, CAPTURE_BUFFER bytes at most ──> writer's thread ── write(2) ──> file, fifo
//! ```
//!
//! Nothing is written before the stack has started ([`Capture::begin`]), and what is in the file stays till then: a network
//! that cannot start is no reason to lose another one's packets.
//!
//! The network never waits for the file: a packet for which there is no room in the queue is left out, and the next one
//! says how many were (`epb_dropcount`). When the file takes no more, the capture ends with a message in the log, and the
//! file is cut behind its last whole block.
//!
//! Frames are written as they cross the TAP: a super-segment is one packet with its real length, and checksums that the
//! kernel is yet to finish are unfinished, as in captures of any interface with these offloads. Directions are those of
//! the guest's interface. Times have nanoseconds. Names that the DNS forwarder gave for addresses stand in front of the
//! first packet that can use them (name resolution blocks).

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::CAPTURE_BUFFER;

/// Bytes written at once, about.
const WRITE: usize = 256 * 1024;
/// How long the end of the capture is waited for: a fifo may have nobody who reads it.
const FINISH_PATIENCE: Duration = Duration::from_secs(5);
/// No frame is longer; readers take no more (MAXIMUM_SNAPLEN of libpcap).
const SNAP_LEN: u32 = 262_144;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const NAMES: u32 = 4;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;

/// Which way a packet goes, as `epb_flags` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToGuest = 1,
    FromGuest = 2,
}

enum Item {
    Block(Vec<u8>),
    End,
}

#[derive(Debug)]
struct Inner {
    queue: Sender<Item>,
    counts: Arc<Counts>,
    /// Of the packets that were left out, those that a packet has told.
    told: AtomicU64,
    done: Mutex<Receiver<()>>,
    /// Until the stack has started.
    file: Mutex<Option<File>>,
    /// What is in it goes then.
    replaces: bool,
    /// That it could not, so no stack has started with it.
    refused: AtomicBool,
    /// The file, or that nothing is to be written: what comes first counts.
    begin: Sender<Option<File>>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Bytes that wait.
    queued: AtomicUsize,
    seen: AtomicU64,
    dropped: AtomicU64,
    /// The file takes no more.
    ended: AtomicBool,
}

/// A capture of what goes over the TAP: give it to a stack in its [`StackSpec`](crate::StackSpec), and call
/// [`Capture::finish`] when that stack has ended.
#[derive(Debug, Clone)]
pub struct Capture(Arc<Inner>);

/// How a capture went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Captured {
    /// Packets that crossed the TAP.
    pub seen: u64,
    /// Those of them that were left out because the file did not take them fast enough.
    pub dropped: u64,
    /// Everything else is in the file: not if it takes no more, nor if it could not be emptied.
    pub complete: bool,
}

impl Capture {
    /// Writes to `file` from a thread of its own, from the file's present position, once the stack has started.
    ///
    /// # Errors
    ///
    /// The thread cannot be made.
    pub fn start(file: File) -> io::Result<Self> {
        Self::prepare(file, false)
    }

    /// The same, in place of what is in `file` then, if it is an ordinary one. A stack does not start if that cannot be
    /// taken out of it.
    ///
    /// # Errors
    ///
    /// The thread cannot be made.
    pub fn replace(file: File) -> io::Result<Self> {
        Self::prepare(file, true)
    }

    fn prepare(file: File, replaces: bool) -> io::Result<Self> {
        let (queue, items) = channel();
        let (tell, done) = channel();
        let (begin, begins) = channel();
        let counts = Arc::<Counts>::default();
        let writer_counts = Arc::clone(&counts);
        std::thread::Builder::new().name("capture".into()).spawn(move || {
            // Signals are the business of the process's main thread; one of a limit (SIGXFSZ) would end it all.
            let _ = nix::sys::signal::SigSet::all().thread_block();
            let Ok(Some(file)) = begins.recv() else {
                let _ = tell.send(());
                return;
            };
            let mut writer = Writer { file, counts: writer_counts };
            if let Err(error) = writer.run(&items) {
                writer.counts.ended.store(true, Ordering::Relaxed);
                tracing::error!(%error, "the capture of the network ends here: its file cannot be written");
            } else {
                let _ = tell.send(());
            }
        })?;
        let inner = Inner {
            queue,
            counts,
            told: AtomicU64::new(0),
            done: Mutex::new(done),
            file: Mutex::new(Some(file)),
            replaces,
            refused: AtomicBool::new(false),
            begin,
        };
        let capture = Self(Arc::new(inner));
        let mut head = Block::new(SECTION);
        head.u32(0x1a2b_3c4d).u16(1).u16(0).bytes(&[0xff; 8]);
        head.option(4, concat!("netstack ", env!("CARGO_PKG_VERSION")).as_bytes()).end_of_options();
        capture.put(head.finish());
        let mut interface = Block::new(INTERFACE);
        // Ethernet; times in units of 10^-9 s.
        interface.u16(1).u16(0).u32(SNAP_LEN).option(9, &[9]).end_of_options();
        capture.put(interface.finish());
        Ok(capture)
    }

    /// The stack has started. If it fails nothing is written: the file cannot be emptied, as it was to be.
    pub(crate) fn begin(&self) -> io::Result<()> {
        let Inner { file, replaces, refused, begin, .. } = &*self.0;
        let Ok(mut place) = file.lock() else { return Ok(()) };
        // Once, for how many stacks it may be.
        let Some(mut file) = place.take() else { return Ok(()) };
        let emptied = if *replaces { empty(&mut file) } else { Ok(()) };
        refused.store(emptied.is_err(), Ordering::Relaxed);
        if emptied.is_ok() {
            let _ = begin.send(Some(file));
        } else {
            // Another stack is not to start without its capture, either.
            *place = Some(file);
        }
        emptied
    }

    /// A frame, without its virtio header.
    pub(crate) fn frame(&self, direction: Direction, frame: &[u8]) {
        let Inner { counts, told, .. } = &*self.0;
        if counts.ended.load(Ordering::Relaxed) {
            return;
        }
        counts.seen.fetch_add(1, Ordering::Relaxed);
        if counts.queued.load(Ordering::Relaxed) + frame.len() > CAPTURE_BUFFER {
            counts.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (high, low) = now();
        let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let mut block = Block::new(PACKET);
        block.u32(0).u32(high).u32(low).u32(len).u32(len).bytes(frame);
        block.option(2, &(direction as u32).to_ne_bytes());
        let dropped = counts.dropped.load(Ordering::Relaxed);
        let untold = dropped - told.swap(dropped, Ordering::Relaxed);
        if untold > 0 {
            block.option(4, &untold.to_ne_bytes());
        }
        self.put(block.end_of_options().finish());
    }

    /// `ip` is known by `name` from here on.
    pub(crate) fn name(&self, ip: IpAddr, name: &str) {
        let counts = &self.0.counts;
        if counts.ended.load(Ordering::Relaxed)
            || counts.queued.load(Ordering::Relaxed) + name.len() > CAPTURE_BUFFER
        {
            return;
        }
        let mut record = Vec::with_capacity(17 + name.len());
        let kind = match ip {
            IpAddr::V4(ip) => {
                record.extend(ip.octets());
                1
            }
            IpAddr::V6(ip) => {
                record.extend(ip.octets());
                2
            }
        };
        record.extend(name.as_bytes());
        record.push(0);
        // A record looks like an option, and so does the end of them.
        self.put(Block::new(NAMES).option(kind, &record).end_of_options().finish());
    }

    fn put(&self, block: Vec<u8>) {
        self.0.counts.queued.fetch_add(block.len(), Ordering::Relaxed);
        // The writer is gone only if it has failed, which it has told.
        let _ = self.0.queue.send(Item::Block(block));
    }

    /// Ends the file, and waits until it is written, some seconds at most. What the stack tells later is lost.
    #[must_use]
    pub fn finish(&self) -> Captured {
        let _ = self.0.begin.send(None);
        let _ = self.0.queue.send(Item::End);
        let ended = self.0.done.lock().is_ok_and(|done| done.recv_timeout(FINISH_PATIENCE).is_ok());
        if !ended && !self.0.counts.ended.load(Ordering::Relaxed) {
            tracing::warn!("nobody takes the capture of the network: its end is lost");
        }
        let counts = &self.0.counts;
        let (seen, dropped) = (counts.seen.load(Ordering::Relaxed), counts.dropped.load(Ordering::Relaxed));
        Captured { seen, dropped, complete: ended && !self.0.refused.load(Ordering::Relaxed) }
    }
}

/// Takes out what is in an ordinary file.
fn empty(file: &mut File) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        file.rewind()?;
    }
    Ok(())
}

struct Writer {
    file: File,
    counts: Arc<Counts>,
}

impl Writer {
    fn run(&mut self, items: &Receiver<Item>) -> io::Result<()> {
        let mut batch = Vec::new();
        while let Ok(item) = items.recv() {
            let mut next = Some(item);
            let mut ends = false;
            while let Some(item) = next {
                let Item::Block(block) = item else {
                    ends = true;
                    break;
                };
                batch.extend_from_slice(&block);
                next = if batch.len() < WRITE { items.try_recv().ok() } else { None };
            }
            let taken = batch.len();
            if ends {
                batch.extend(self.statistics());
            }
            self.write(&batch)?;
            self.counts.queued.fetch_sub(taken, Ordering::Relaxed);
            batch.clear();
            if ends {
                break;
            }
        }
        Ok(())
    }

    fn write(&mut self, blocks: &[u8]) -> io::Result<()> {
        let mut rest = blocks;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Without half a block readers do not complain. A fifo cannot be cut, and has no position.
                    let written = blocks.len() - rest.len();
                    let half = written - whole_blocks(blocks, written);
                    if half > 0
                        && let Ok(end) = self.file.stream_position()
                        && let Some(whole) = end.checked_sub(u64::try_from(half).unwrap_or(u64::MAX))
                    {
                        let _ = self.file.set_len(whole);
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn statistics(&self) -> Vec<u8> {
        let (high, low) = now();
        let counts = &self.counts;
        let mut block = Block::new(STATISTICS);
        block.u32(0).u32(high).u32(low);
        block.option(4, &counts.seen.load(Ordering::Relaxed).to_ne_bytes());
        block.option(5, &counts.dropped.load(Ordering::Relaxed).to_ne_bytes());
        block.end_of_options().finish()
    }
}

/// How many of the first `written` bytes of `blocks` are whole blocks.
fn whole_blocks(blocks: &[u8], written: usize) -> usize {
    let mut at = 0;
    while let Some(&[a, b, c, d]) = blocks.get(at + 4..at + 8)
        && let Ok(len) = usize::try_from(u32::from_ne_bytes([a, b, c, d]))
        && at + len <= written
        && len > 0
    {
        at += len;
    }
    at
}

/// Nanoseconds since 1970, in two halves.
fn now() -> (u32, u32) {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let [.., a, b, c, d, e, f, g, h] = nanos.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

/// A block being built. Its type and length come first, and its length again at its end; fields are padded to four bytes.
struct Block(Vec<u8>);

impl Block {
    fn new(kind: u32) -> Self {
        let mut block = Self(Vec::with_capacity(64));
        block.u32(kind).u32(0);
        block
    }

    fn u16(&mut self, n: u16) -> &mut Self {
        self.0.extend(n.to_ne_bytes());
        self
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.0.extend(n.to_ne_bytes());
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn option(&mut self, code: u16, value: &[u8]) -> &mut Self {
        self.u16(code).u16(u16::try_from(value.len()).unwrap_or(u16::MAX)).bytes(value)
    }

    fn end_of_options(&mut self) -> &mut Self {
        self.u32(0)
    }

    fn finish(&mut self) -> Vec<u8> {
        let mut block = std::mem::take(&mut self.0);
        let len = u32::try_from(block.len() + 4).unwrap_or(u32::MAX).to_ne_bytes();
        block.extend(len);
        if let Some(place) = block.get_mut(4..8) {
            place.copy_from_slice(&len);
        }
        block
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Read as _;

    /// Type and body of each block; fails if the file is anything but whole blocks.
    pub(crate) fn blocks(file: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |at: usize| u32::from_ne_bytes(file[at..at + 4].try_into().expect("four bytes"));
        let mut all = Vec::new();
        let mut at = 0;
        while at < file.len() {
            let len = word(at + 4) as usize;
            assert_eq!((len % 4, word(at + len - 4) as usize), (0, len));
            all.push((word(at), file[at + 8..at + len - 4].to_vec()));
            at += len;
        }
        all
    }

    /// Code and value of each option from `at` on.
    fn options(body: &[u8], mut at: usize) -> Vec<(u16, Vec<u8>)> {
        let half = |at: usize| u16::from_ne_bytes(body[at..at + 2].try_into().expect("two bytes"));
        let mut all = Vec::new();
        while half(at) != 0 {
            let len = usize::from(half(at + 2));
            all.push((half(at), body[at + 4..at + 4 + len].to_vec()));
            at += 4 + len.next_multiple_of(4);
        }
        assert_eq!(at + 4, body.len());
        all
    }

    /// Data and options of a packet block.
    pub(crate) fn packet(body: &[u8]) -> (Vec<u8>, Vec<(u16, Vec<u8>)>) {
        let len = u32::from_ne_bytes(body[12..16].try_into().expect("four bytes")) as usize;
        (body[20..20 + len].to_vec(), options(body, 20 + len.next_multiple_of(4)))
    }

    /// A file that is in no directory, and another descriptor of it.
    pub(crate) fn memory() -> (File, File) {
        use nix::sys::memfd::MFdFlags;
        let name = c"capture";
        let fd = nix::sys::memfd::memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .expect("memfd");
        let file = File::from(fd);
        let other = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
        (file, other.expect("memfd again"))
    }

    pub(crate) fn read(mut file: File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).expect("read");
        bytes
    }

    #[test]
    fn what_is_written_reads_as_the_format_wants_it() {
        let (file, copy) = memory();
        let before = SystemTime::now().duration_since(UNIX_EPOCH).expect("time").as_nanos();
        let capture = Capture::start(file).expect("thread");
        capture.begin().expect("an empty file");
        capture.frame(Direction::FromGuest, b"five!");
        capture.name("192.0.2.1".parse().expect("address"), "a.example");
        capture.name("2001:db8::1".parse().expect("address"), "b.example");
        capture.frame(Direction::ToGuest, &[7; 65_000]);
        assert_eq!(capture.finish(), Captured { seen: 2, dropped: 0, complete: true });
        let after = SystemTime::now().duration_since(UNIX_EPOCH).expect("time").as_nanos();
        let file = read(copy);
        let blocks = blocks(&file);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [SECTION, INTERFACE, PACKET, NAMES, NAMES, PACKET, STATISTICS]);
        assert_eq!(blocks[0].1[..4], 0x1a2b_3c4d_u32.to_ne_bytes());
        assert_eq!(blocks[1].1[..2], 1u16.to_ne_bytes());
        assert_eq!(options(&blocks[1].1, 8), [(9, vec![9])]);
        assert_eq!(packet(&blocks[2].1), (b"five!".to_vec(), vec![(2, 2u32.to_ne_bytes().to_vec())]));
        assert_eq!(packet(&blocks[5].1), (vec![7; 65_000], vec![(2, 1u32.to_ne_bytes().to_vec())]));
        let word = |at: usize| u32::from_ne_bytes(blocks[2].1[at..at + 4].try_into().expect("four bytes"));
        let time = u128::from(word(4)) << 32 | u128::from(word(8));
        assert!((before..=after).contains(&time));
        assert_eq!(options(&blocks[3].1, 0), [(1, b"\xc0\0\x02\x01a.example\0".to_vec())]);
        assert_eq!(
            options(&blocks[4].1, 0),
            [(2, b"\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01b.example\0".to_vec())]
        );
        let counts = [(4, 2u64.to_ne_bytes().to_vec()), (5, 0u64.to_ne_bytes().to_vec())];
        assert_eq!(options(&blocks[6].1, 12), counts);
    }

    #[test]
    fn what_nobody_takes_is_bounded_and_what_is_left_out_is_counted() {
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let capture = Capture::start(std::os::fd::OwnedFd::from(writer).into()).expect("thread");
        capture.begin().expect("an empty file");
        let frame = [0; 64 * 1024];
        // The pipe takes one frame about, and the writer may hold a batch.
        let many = 2 * CAPTURE_BUFFER / frame.len() + 8;
        for _ in 0..many {
            capture.frame(Direction::FromGuest, &frame);
        }
        let counts = &capture.0.counts;
        assert!(counts.queued.load(Ordering::Relaxed) <= CAPTURE_BUFFER + 4096);
        let dropped = counts.dropped.load(Ordering::Relaxed);
        assert!(dropped > 0 && dropped < many as u64);
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        while counts.queued.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        capture.frame(Direction::FromGuest, b"again");
        let captured = capture.finish();
        assert_eq!(captured, Captured { seen: many as u64 + 1, dropped, complete: true });
        drop(capture);
        let file = reading.join().expect("reader").expect("read");
        let blocks = blocks(&file);
        let (data, options) = packet(&blocks[blocks.len() - 2].1);
        assert_eq!(data, b"again");
        assert_eq!(options[1], (4, dropped.to_ne_bytes().to_vec()));
    }

    #[test]
    fn a_file_that_takes_no_more_ends_the_capture() {
        let file = File::options().write(true).open("/dev/full").expect("/dev/full");
        let capture = Capture::start(file).expect("thread");
        capture.begin().expect("an empty file");
        assert!(!capture.finish().complete);
        assert!(capture.0.counts.ended.load(Ordering::Relaxed));
        capture.frame(Direction::FromGuest, b"frame");
        assert_eq!(capture.0.counts.seen.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_capture_that_ends_in_the_middle_of_a_file_leaves_whole_blocks() {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(c"capture", flags).expect("memfd"));
        let copy = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
        // Something else stands before, and there is room for no more than two pages.
        file.write_all(&[b'x'; 100]).expect("write");
        file.set_len(8_192).expect("length");
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).expect("seal");
        let capture = Capture::start(file).expect("thread");
        capture.begin().expect("an empty file");
        for _ in 0..20 {
            capture.frame(Direction::FromGuest, &[7; 1_000]);
        }
        assert!(!capture.finish().complete);
        let all = read(copy.expect("memfd again"));
        let (before, capture) = all.split_at(100);
        assert_eq!(before, [b'x'; 100]);
        assert_eq!(blocks(capture).iter().filter(|(kind, _)| *kind == PACKET).count(), 7);
    }

    #[test]
    fn without_a_stack_that_starts_nothing_is_written() {
        let start = |write: fn(File) -> io::Result<Capture>| {
            let (mut file, copy) = memory();
            file.write_all(b"before").expect("write");
            (write(file).expect("thread"), copy)
        };
        for write in [Capture::start, Capture::replace] {
            let (capture, copy) = start(write);
            capture.frame(Direction::FromGuest, b"frame");
            // Nor is anybody waited for.
            assert!(capture.finish().complete);
            assert_eq!(read(copy), b"before");
            let (capture, copy) = start(write);
            drop(capture);
            assert_eq!(read(copy), b"before");
        }
        let (capture, copy) = start(Capture::replace);
        let spec = crate::StackSpec { capture: Some(capture.clone()), ..crate::config::tests::spec() };
        let (_, no_tap) = std::io::pipe().expect("pipe");
        assert!(crate::Stack::start(no_tap.into(), &spec, crate::Published::default()).is_err());
        assert!(capture.finish().complete);
        assert_eq!(read(copy), b"before");
        let (capture, copy) = start(Capture::replace);
        capture.begin().expect("an empty file");
        assert!(capture.finish().complete);
        assert_eq!(blocks(&read(copy)).len(), 3);
        // One that may not become shorter.
        let (file, copy) = memory();
        let mut file = file;
        file.write_all(b"before").expect("write");
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK))
            .expect("seal");
        let capture = Capture::replace(file).expect("thread");
        // Nor does another stack start with it then.
        for _ in 0..2 {
            let refused = capture.begin().expect_err("it cannot be emptied");
            assert_eq!(refused.raw_os_error(), Some(nix::errno::Errno::EPERM as i32));
        }
        capture.frame(Direction::FromGuest, b"frame");
        assert!(!capture.finish().complete);
        assert_eq!(read(copy), b"before");
    }

    #[test]
    fn half_a_block_is_cut_off() {
        let mut all = Block::new(PACKET).u32(1).finish();
        let first = all.len();
        all.extend(Block::new(PACKET).u32(2).u32(3).finish());
        for (written, whole) in
            [(0, 0), (first - 1, 0), (first, first), (all.len() - 1, first), (all.len(), all.len())]
        {
            assert_eq!(whole_blocks(&all, written), whole);
        }
    }
}
