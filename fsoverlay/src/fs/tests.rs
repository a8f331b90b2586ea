use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::*;
use crate::config::{LayerSpec, OverlaySpec};
use crate::dispatch::MAX_ASIDE;
use crate::engine::tests::Scratch;
use crate::errno::set_gives_way;
use crate::far::{Far, MAX_THREADS, MountTable};
use crate::hooks::{Access, Hooks, RateLimit, Trace};
use crate::passthrough::Wanted;
use crate::sync::Mutex;
use crate::sync::tests::{in_time, without_threads};

const HOUR: Duration = Duration::from_secs(3600);

/// Says when something below the far mount is found, and waits until it may be.
#[derive(Debug)]
struct Slow {
    found: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Trace for Slow {
    fn accessed(&self, access: Access) {
        if access.path == Path::new("far/file") {
            let _ = self.found.send(());
            let _ = self.go_on.lock().recv();
        }
    }
}

/// A layer with a mount that may never answer, which is only a directory.
struct BesideFar {
    fs: FuseFs,
    far: Arc<Far>,
    dir: Arc<Node>,
    found: Receiver<()>,
    go_on: Sender<()>,
    _scratch: Scratch,
}

impl BesideFar {
    fn new(name: &str) -> Self {
        Self::with(name, None)
    }

    fn with(name: &str, rate: Option<Arc<dyn RateLimit>>) -> Self {
        let scratch = Scratch::new(name);
        let lower = scratch.dir.canonicalize().expect("there").join("lower");
        std::fs::create_dir(lower.join("far")).expect("made");
        std::fs::write(lower.join("far/file"), "").expect("written");
        let table = format!("25 22 0:45 / {}/far rw - fuse.sshfs me@phone: rw", lower.display());
        let layer = LayerSpec { dir: lower, ..LayerSpec::default() };
        let spec = OverlaySpec {
            layers: vec![layer],
            passthrough: true,
            patience: Some(HOUR),
            ..OverlaySpec::default()
        };
        let mut engine = Engine::open_among(&MountTable::parse(table.as_bytes()), &spec).expect("an overlay");
        let ((tell, found), (go_on, wait)) = (channel(), channel());
        let slow = Slow { found: tell, go_on: Mutex::new(wait) };
        engine.set_hooks(Hooks { trace: Some(Arc::new(slow)), rate, ..Hooks::default() });
        let dir = engine.lookup(engine.root(), b"far").expect("found");
        let far = engine.far.first().expect("a far mount").clone();
        Self { fs: FuseFs { shared: Shared::new(engine) }, far, dir, found, go_on, _scratch: scratch }
    }

    /// Looks the file up; whether a reply of it was to be counted.
    fn look(&self) -> Receiver<Res<bool>> {
        let (reply, replied) = channel();
        let send = |told: Res<Told>, reply: Sender<_>| {
            let _ = reply.send(told.map(|told| told.uncounted.is_some()));
        };
        self.fs.look(INodeNo(self.dir.ino), OsStr::new("file"), reply, send);
        replied
    }
}

impl Drop for BesideFar {
    fn drop(&mut self) {
        self.fs.shared.stop();
    }
}

#[test]
fn what_is_found_after_it_was_given_up_is_not_known_to_the_kernel() {
    let beside = BesideFar::new("given-up");
    let replied = beside.look();
    assert_eq!(beside.found.recv(), Ok(()));
    beside.far.give_up_late(Instant::now() + 2 * HOUR);
    assert_eq!(replied.recv(), Ok(Err(Errno::IO)));
    let _ = beside.go_on.send(());
    // The request's own reference goes last; the other one looks after those that may be given up.
    in_time(|| (Arc::strong_count(&beside.fs.shared) <= 2).then_some(()));
    let _ = beside.go_on.send(());
    let engine = beside.fs.engine();
    let ino = engine.lookup(&beside.dir, b"file").expect("found").ino;
    assert!(engine.table.get(ino).is_none(), "nobody would ever forget it");
}

#[test]
fn who_gives_way_leaves_what_takes_long_to_others() {
    let scratch = Scratch::new("gives-way");
    let lower = scratch.dir.join("lower");
    for (name, size) in [("small", 1 << 10), ("large", 200 << 10)] {
        std::fs::write(lower.join(name), vec![1; size]).expect("written");
    }
    let deep: std::path::PathBuf = (0..9).map(|i| i.to_string()).collect();
    std::fs::create_dir_all(lower.join(&deep)).expect("made");
    for dir in ["0/1/2/3/4/5/6/7", "0/1/2/3/4/5/6/7/8"] {
        std::fs::write(lower.join(dir).join("small"), "").expect("written");
    }
    std::fs::write(lower.join("link"), "").expect("written");
    for i in 0..9 {
        std::fs::hard_link(lower.join("link"), lower.join(format!("link{i}"))).expect("linked");
    }
    let engine = Engine::open(&scratch.spec()).expect("an overlay");
    let fs = FuseFs { shared: Shared::new(engine) };
    let worker = std::thread::spawn(move || {
        set_gives_way();
        let me = std::thread::current().id();
        let (engine, root) = (fs.engine(), fs.engine().root());
        assert_eq!(hurried(|| engine.read_dir(root, 0, 9)).map(drop), Err(LONG));
        assert!(engine.read_dir(root, 0, 9).is_ok(), "it has time");
        let file = |name: &[u8]| engine.lookup(root, name).expect("found");
        assert_eq!(hurried(|| engine.copy_up(&file(b"small"))), Ok(()));
        assert_eq!(hurried(|| engine.copy_up(&file(b"large"))), Err(LONG));
        // Directories above, and names.
        let mut dir = root.clone();
        let new =
            |perm| NewObject { kind: Kind::File, perm, umask: 0, rdev: (0, 0), target: b"", owner: (0, 0) };
        let dirs: Vec<_> = (0..9)
            .map(|i: u8| {
                dir = engine.lookup(&dir, i.to_string().as_bytes()).expect("found");
                dir.clone()
            })
            .collect();
        let small = |dir| engine.lookup(dir, b"small").expect("found");
        assert_eq!(hurried(|| engine.copy_up(&small(&dirs[8]))), Err(LONG));
        assert_eq!(hurried(|| engine.create(&dirs[8], b"new", &new(0o600)).map(drop)), Err(LONG));
        assert_eq!(hurried(|| engine.unlink(&dirs[8], b"small")), Err(LONG));
        let moved = crate::setattr::SetAttr { perm: Some(0o700), ..Default::default() };
        assert_eq!(hurried(|| engine.set_attr(&dirs[8], moved).map(drop)), Err(LONG));
        assert!(!dirs[0].is_upper(), "nothing has been done");
        assert_eq!(hurried(|| engine.copy_up(&small(&dirs[7]))), Ok(()));
        assert_eq!(hurried(|| engine.create(&dirs[8], b"new", &new(0o600)).map(drop)), Ok(()));
        let linked: Vec<_> = (0..9).map(|i| file(format!("link{i}").as_bytes())).collect();
        assert_eq!(hurried(|| engine.copy_up(&linked[0])), Err(LONG));
        // What a file loses.
        let grown = engine.create(root, b"grown", &new(0o600)).expect("made");
        let sized = |size| crate::setattr::SetAttr { size: Some(size), ..Default::default() };
        let resize = |size| hurried(|| engine.set_attr(&grown, sized(size)).map(|attr| attr.stat.size));
        assert_eq!([1 << 20, 1000 << 10, 0].map(resize), [Ok(1 << 20), Ok(1000 << 10), Err(LONG)]);
        assert_eq!(hurried(|| engine.unlink(root, b"grown")), Err(LONG));
        assert!(engine.create(root, b"empty", &new(0o600)).is_ok());
        let replace = |how| hurried(|| engine.rename(root, b"empty", root, b"grown", how));
        assert_eq!([How::Replace, How::Exchange].map(replace), [Err(LONG), Ok(())]);
        assert_eq!(hurried(|| engine.unlink(root, b"grown")), Ok(()), "the empty one");
        assert!(engine.set_attr(&grown, sized(0)).is_ok(), "it has time");
        let (done, by) = channel();
        let answered = || by.recv_timeout(HOUR).expect("an answer");
        fs.run_listing(Opcode::ReadDir, INodeNo(root.ino), done.clone(), |_, done| {
            let _ = done.send(std::thread::current().id());
        });
        assert_ne!(answered(), me, "a listing");
        let send = |_: Res<()>, done: Sender<_>| done.send(std::thread::current().id()).expect("asked");
        for (what, here) in [(Opcode::Unlink, true), (Opcode::RmDir, false)] {
            let name = OsStr::new("no such name");
            fs.serve_named(what, INodeNo(root.ino), name, done.clone(), send, |_, _| Ok(()));
            assert_eq!(answered() == me, here, "{what:?}");
        }
        let ino = INodeNo(file(b"large").ino);
        let send = |_: Res<&[u8]>, done: Sender<_>| done.send(std::thread::current().id()).expect("asked");
        let read = |size: u64| fs.serve_read(ino, 0, u32::try_from(size).expect("small"), done.clone(), send);
        // (What is_much says of a thread that gives way.)
        let most = 128 << 10;
        read(most);
        assert_eq!(answered(), me);
        read(most + 1);
        assert_ne!(answered(), me, "much to read");
        let send = |_: Res<usize>, done: Sender<_>| done.send(std::thread::current().id()).expect("asked");
        let data = vec![0; usize::try_from(most).expect("small") + 1];
        let write = |data: &[u8]| fs.serve_write(ino, data, done.clone(), send, |_, data| Ok(data.len()));
        write(&data[1..]);
        assert_eq!(answered(), me);
        write(&data);
        assert_ne!(answered(), me, "much to write");
        fs.shared.stop();
    });
    worker.join().expect("no panic");
}

#[test]
fn a_large_file_of_owners_is_read_before_it_is_needed() {
    for (lines, is_long) in [(1, false), (10_000, true)] {
        let scratch = Scratch::new(&format!("owners-{lines}"));
        let text: String = (0..lines).map(|ino| format!("{ino:x} 1.0 5 6\n")).collect();
        std::fs::write(scratch.dir.join("work/owners"), text).expect("written");
        let fs = FuseFs { shared: Shared::new(Engine::open(&scratch.spec()).expect("an overlay")) };
        let is_long_to_read = || fs.engine().upper.as_ref().expect("there is one").sidecar.is_long_to_read();
        assert_eq!(is_long_to_read(), is_long);
        fs.read_owners();
        // Waits for what was begun.
        fs.shared.stop();
        assert!(!is_long_to_read());
    }
}

#[test]
fn a_reader_of_a_far_file_is_not_kept_waiting() {
    let beside = BesideFar::new("open-far");
    let _ = beside.go_on.send(());
    let file = beside.fs.engine().lookup(&beside.dir, b"file").expect("found");
    let (release, gate) = channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    for _ in 0..MAX_THREADS {
        let gate = gate.clone();
        assert!(beside.far.run(move || {
            let _ = gate.lock().recv();
        }));
    }
    let (reply, replied) = channel();
    let send = |ready: Res<Arc<Node>>, reply: Sender<_>| {
        let _ = reply.send(ready.map(drop));
    };
    beside.fs.get_ready(INodeNo(file.ino), Wanted { write: false, uid: 0 }, reply, send);
    assert!(replied.try_recv().is_err(), "it does not wait for the far mount");
    beside.far.give_up_late(Instant::now() + 2 * HOUR);
    assert_eq!(replied.try_recv(), Ok(Err(Errno::IO)));
    drop(release);
}

/// Has each thread of the mount wait until what is given is dropped.
fn hold(far: &Arc<Far>) -> Sender<()> {
    let ((release, gate), (began, begun)) = (channel::<()>(), channel());
    let gate = Arc::new(Mutex::new(gate));
    for _ in 0..MAX_THREADS {
        let (began, gate) = (began.clone(), gate.clone());
        assert!(far.run(move || {
            let _ = began.send(());
            let _ = gate.lock().recv();
        }));
    }
    for _ in 0..MAX_THREADS {
        assert_eq!(begun.recv(), Ok(()));
    }
    release
}

#[test]
fn a_seek_in_a_far_file_is_done_by_the_mount_s_threads_or_given_up() {
    let beside = BesideFar::new("seek-far");
    let _ = (beside.go_on.send(()), beside.go_on.send(()), beside.go_on.send(()));
    let file = beside.fs.engine().lookup(&beside.dir, b"file").expect("found");
    let (reply, replied) = channel();
    let send = |offset: Res<u64>, reply: Sender<_>| {
        let _ = reply.send((offset, std::thread::current().name().map(str::to_owned)));
    };
    let seek = || {
        assert!(beside.fs.is_far(INodeNo(file.ino)));
        beside.fs.seek_far(INodeNo(file.ino), 0, true, reply.clone(), send);
    };
    seek();
    // (It is empty.)
    assert_eq!(replied.recv(), Ok((Err(Errno::NXIO), Some("fsoverlay-far".to_owned()))));
    let release = hold(&beside.far);
    seek();
    let answer = in_time(|| {
        beside.far.give_up_late(Instant::now() + 2 * HOUR);
        replied.try_recv().ok()
    });
    assert_eq!(answer.0, Err(Errno::IO));
    drop(release);
    // Nor does one wait for a thread that cannot be had, or that is not for so many.
    beside.fs.shared.prepare().expect("nothing is limited");
    without_threads(seek);
    assert_eq!(replied.try_recv().map(|answer| answer.0), Ok(Err(Errno::IO)));
}

#[test]
fn who_gives_way_leaves_what_is_far_to_the_mount_s_threads() {
    let beside = BesideFar::new("gives-way-far");
    let (fs, ino) = (beside.fs.clone(), INodeNo(beside.dir.ino));
    let by = std::thread::spawn(move || {
        set_gives_way();
        let (done, by) = channel();
        let send = |_: Res<()>, done: Sender<_>| {
            let _ = done.send(std::thread::current().name().map(str::to_owned));
        };
        let touch = move |fs: &FuseFs| fs.on(ino, |_| Ok(()));
        fs.serve_named(Opcode::RmDir, ino, OsStr::new("x"), done.clone(), send, move |fs, _| touch(fs));
        let rmdir = by.recv_timeout(HOUR).expect("an answer");
        fs.answer(Opcode::Fallocate, ino, done, send, touch);
        [rmdir, by.recv_timeout(HOUR).expect("an answer")]
    });
    let far = Some("fsoverlay-far".to_owned());
    assert_eq!(by.join().expect("no panic"), [far.clone(), far]);
}

#[test]
fn where_too_much_waits_a_request_is_refused() {
    let beside = BesideFar::new("refused-far");
    let (release, gate) = channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    let (began, begun) = channel();
    let wait = || {
        let (began, gate) = (began.clone(), gate.clone());
        move || {
            let _ = began.send(());
            let _ = gate.lock().recv();
        }
    };
    // First one for each thread: none of them takes another from the queue then.
    for _ in 0..MAX_THREADS {
        assert!(beside.far.run(wait()));
    }
    for _ in 0..MAX_THREADS {
        assert_eq!(begun.recv(), Ok(()));
    }
    assert!((0..100_000).any(|_| !beside.far.run(wait())), "it is never full");
    assert_eq!(beside.look().recv(), Ok(Err(Errno::IO)));
    drop(release);
    let _ = beside.go_on.send(());
    // Those before it go, and there is room again.
    let found = in_time(|| beside.look().recv().ok()?.ok());
    assert!(found);
}

#[test]
fn a_request_that_nobody_would_give_up_is_not_begun() {
    let beside = BesideFar::new("unwatched-far");
    // The mount's thread would take it in the end.
    let ((release, gate), (began, begun)) = (channel::<()>(), channel());
    assert!(beside.far.run(move || {
        let _ = began.send(());
        let _ = gate.recv();
    }));
    assert_eq!(begun.recv(), Ok(()));
    let replied = without_threads(|| beside.look());
    assert_eq!(in_time(|| replied.try_recv().ok()), Err(Errno::IO));
    // The next one has its threads.
    drop(release);
    let _ = beside.go_on.send(());
    assert_eq!(beside.look().recv(), Ok(Ok(true)));
    // So has one that the thread is there for, but not the mount's own.
    let other = BesideFar::new("threadless-far");
    other.fs.shared.prepare().expect("nothing is limited");
    let replied = without_threads(|| other.look());
    assert_eq!(in_time(|| replied.try_recv().ok()), Err(Errno::IO));
}

/// Holds back everything for a moment.
#[derive(Debug)]
struct Moment;

impl RateLimit for Moment {
    fn delay(&self, _direction: Direction, _bytes: u64) -> Duration {
        Duration::from_nanos(1)
    }
}

#[test]
fn a_limit_on_rates_holds_or_nothing_is_served() {
    for (is_limited, name) in [(true, "limited"), (false, "not-limited")] {
        let scratch = Scratch::new(name);
        let mut engine = Engine::open(&scratch.spec()).expect("an overlay");
        let rate = is_limited.then(|| Arc::new(Moment) as Arc<dyn RateLimit>);
        engine.set_hooks(Hooks { rate, ..Hooks::default() });
        let fs = FuseFs { shared: Shared::new(engine) };
        assert_eq!(without_threads(|| fs.shared.prepare()).is_err(), is_limited);
        assert!(fs.shared.prepare().is_ok());
        // Where there is a limit, its thread is there from then on.
        let (sender, receiver) = channel();
        let serve = move |_: &FuseFs| {
            let _ = sender.send(());
        };
        without_threads(|| fs.delayed(Opcode::Read, INodeNo::ROOT, HOUR, serve));
        assert_eq!(receiver.try_recv().is_ok(), !is_limited, "it is held back");
        fs.shared.stop();
    }
}

#[test]
fn a_read_that_was_held_back_can_be_given_up() {
    let beside = BesideFar::with("held-back-far", Some(Arc::new(Moment)));
    // One for the lookup, the other for a read that would not wait for the mount.
    let _ = (beside.go_on.send(()), beside.go_on.send(()));
    let engine = beside.fs.engine();
    let node = engine.lookup(&beside.dir, b"file").expect("found");
    let ((release, gate), (began, begun)) = (channel::<()>(), channel());
    let gate = Arc::new(Mutex::new(gate));
    for _ in 0..MAX_THREADS {
        let (began, gate) = (began.clone(), gate.clone());
        assert!(beside.far.run(move || {
            let _ = began.send(());
            let _ = gate.lock().recv();
        }));
    }
    for _ in 0..MAX_THREADS {
        assert_eq!(begun.recv(), Ok(()));
    }
    let (reply, replied) = channel();
    let send = |data: Res<&[u8]>, reply: Sender<_>| {
        let _ = reply.send(data.map(<[u8]>::len));
    };
    beside.fs.serve_read(INodeNo(node.ino), 0, 16, reply, send);
    let answer = in_time(|| {
        beside.far.give_up_late(Instant::now() + 2 * HOUR);
        replied.try_recv().ok()
    });
    assert_eq!(answer, Err(Errno::IO));
    drop(release);
}

/// Waits before it lets anything but the first into the upper.
#[derive(Debug)]
struct SlowQuota {
    first: std::sync::atomic::AtomicBool,
    asked: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl crate::hooks::Quota for SlowQuota {
    fn reserve(&self, _most: crate::hooks::Usage) -> Result<(), crate::hooks::Refusal> {
        if !self.first.swap(false, Ordering::AcqRel) {
            let _ = self.asked.send(());
            let _ = self.go_on.lock().recv();
        }
        Ok(())
    }

    fn settle(&self, _reserved: crate::hooks::Usage, _growth: crate::hooks::Growth) {}
}

#[test]
fn nobody_waits_for_the_directories_of_a_far_file_that_is_copied_up() {
    let scratch = Scratch::new("far-parents");
    let lower = scratch.dir.canonicalize().expect("there").join("lower");
    std::fs::create_dir_all(lower.join("far/sub")).expect("made");
    std::fs::write(lower.join("far/sub/file"), "x").expect("written");
    let table = format!("25 22 0:45 / {}/far rw - fuse.sshfs me@phone: rw", lower.display());
    let spec = OverlaySpec {
        layers: vec![LayerSpec { dir: lower, ..LayerSpec::default() }],
        patience: Some(HOUR),
        ..scratch.spec()
    };
    let mut engine = Engine::open_among(&MountTable::parse(table.as_bytes()), &spec).expect("an overlay");
    let ((asked, is_asked), (go_on, wait)) = (channel(), channel());
    let quota = Arc::new(SlowQuota { first: true.into(), asked, go_on: Mutex::new(wait) });
    engine.set_hooks(Hooks { quota: Some(quota), ..Hooks::default() });
    let mut file = engine.root().clone();
    for name in ["far", "sub", "file"] {
        file = engine.lookup(&file, name.as_bytes()).expect("found");
    }
    let set = crate::setattr::SetAttr { perm: Some(0o600), ..Default::default() };
    let settled = std::thread::scope(|scope| {
        let changed = scope.spawn(|| engine.set_attr(&file, set).map(|attr| attr.meta.perm));
        let settled = ["far", "sub"].map(|_| {
            assert_eq!(is_asked.recv(), Ok(()));
            let settled = file.names.settled().is_some();
            let _ = go_on.send(());
            settled
        });
        drop(go_on);
        assert_eq!(changed.join().expect("no panic"), Ok(0o600));
        settled
    });
    assert_eq!(settled, [true; 2], "its names are not being changed yet");
    let nlink = || hurried(|| engine.attr_now(&file)).map(|attr| attr.stat.nlink);
    assert_eq!(nlink(), Ok(1));
    // While they are changed, by whoever may wait for the mount, no worker waits for that.
    let changing = file.names.begin();
    assert_eq!(nlink(), Err(FAR));
    drop(changing);
    assert_eq!(nlink(), Ok(1));
}

#[test]
fn a_write_that_was_held_back_has_the_bytes_that_came() {
    let scratch = Scratch::new("held-back-write");
    std::fs::write(scratch.dir.join("lower/file"), "lower").expect("written");
    let mut engine = Engine::open(&scratch.spec()).expect("an overlay");
    engine.set_hooks(Hooks { rate: Some(Arc::new(Moment)), ..Hooks::default() });
    let fs = FuseFs { shared: Shared::new(engine) };
    let file = fs.engine().lookup(fs.engine().root(), b"file").expect("found");
    let ino = INodeNo(file.ino);
    let (reply, replied) = channel();
    let send = |written: Res<usize>, reply: Sender<_>| {
        let _ = reply.send(written);
    };
    let write = move |offset| {
        move |fs: &FuseFs, data: &[u8]| {
            fs.change_content(ino, true, |node| fs.engine().write(node, offset, data, true))
        }
    };
    // The worker's buffer takes the next request as soon as this one is taken.
    let mut buffer = *b"upper";
    fs.serve_write(ino, &buffer, reply.clone(), send, write(0));
    buffer = *b"other";
    fs.serve_write(ino, &buffer[..2], reply, send, write(5));
    let mut done = [(); 2].map(|()| replied.recv().expect("an answer").expect("written"));
    done.sort();
    assert_eq!(done, [2, 5]);
    let upper = std::fs::read(scratch.dir.join("upper/file")).expect("copied up");
    assert_eq!(String::from_utf8_lossy(&upper), "upperot");
    fs.shared.stop();
}

#[test]
fn what_was_held_back_waits_for_a_thread_of_its_own() {
    let beside = BesideFar::new("no-thread-aside");
    let ((release, gate), (began, begun)) = (channel::<()>(), channel());
    let (gate, ino) = (Arc::new(Mutex::new(gate)), INodeNo(beside.dir.ino));
    for _ in 0..MAX_ASIDE {
        let (began, gate) = (began.clone(), gate.clone());
        beside.fs.aside(Opcode::Read, ino, move |_| {
            let _ = began.send(());
            let _ = gate.lock().recv();
        });
    }
    for _ in 0..MAX_ASIDE {
        assert_eq!(begun.recv(), Ok(()));
    }
    let (sender, receiver) = channel();
    let say = |sender: Sender<_>| {
        move || {
            let _ = sender.send(std::thread::current().name().map(str::to_owned));
        }
    };
    let handler = say(sender.clone());
    beside.fs.delayed(Opcode::Read, ino, Duration::ZERO, move |_| handler());
    let handler = say(sender);
    // The thread that waits for all comes to what is due after it.
    beside.fs.shared.later.at(Instant::now() + Duration::from_nanos(1), move |_| handler());
    assert_eq!(receiver.recv(), Ok(Some("fsoverlay-later".to_owned())));
    drop(release);
    assert_eq!(receiver.recv(), Ok(Some("fsoverlay-long".to_owned())));
}

#[test]
fn device_numbers_round_trip() {
    for dev in [(0, 0), (1, 3), (8, 300), (4095, 0xf_ffff)] {
        assert_eq!(decode_dev(encode_dev(dev)), dev);
    }
}
