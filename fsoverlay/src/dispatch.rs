//! When a request is served, and on which thread. What is done for it is the caller's ([`crate::fs`]).
//!
//! The workers are few, and each may be needed to answer the kernel before somebody else can go on. So a request
//! leaves its worker, with its reply, when
//!
//! - it *takes long* ([`LONG`]: a copy-up of a large file or of a tree, a copy_file_range, a sync while another
//!   one is under way): it goes on *aside*, on a thread of its own, of which there are about [`MAX_ASIDE`];
//! - it touches what *may never answer* ([`FAR`]): it goes on *afar*, on one of that mount's threads
//!   ([`crate::far`]), and is given up when that takes too long, unless it may have much to copy;
//! - a limit on rates holds it back: it waits *without a thread* ([`crate::later`]), and goes on aside, however
//!   long it is until there is a thread for it;
//! - it waits for the kernel to write back (a seek), which the kernel may want a worker for: aside as well. In a file of
//!   a far mount it is not one of that mount's threads that waits, since those serve what is written back.
//!
//! What the kernel has forgotten needs no answer; a worker that gives way ([`crate::near`]) leaves most of it to another
//! thread.
//!
//! Names that the kernel is to forget need an answer of the kernel, too. They wait on one thread for all,
//! which also takes the seeks that have no thread of their own.
//!
//! A handler that panics is caught wherever it runs, logged, and answers `EIO` to its one request: the reply
//! object does that when it is dropped.

use std::cell::Cell;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{INodeNo, Notifier, ReplyLseek, Request};

use crate::attr::Kind;
use crate::engine::Engine;
use crate::errno::{Errno, FAR, LONG, Res, calmly, far_mount, gives_way, hurried, is_much};
use crate::far::{Far, GiveUp};
use crate::fs::{FuseFs, TTL, reply_offset};
use crate::helper::Helper;
use crate::hooks::{Direction, Opcode};
use crate::inode::{Link, Node};
use crate::journal::path_of;
use crate::later::{Called, Later};
use crate::near::Near;
use crate::sync::{Mutex, start_with};

/// What the file system shares with the [`crate::Server`].
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) notifier: OnceLock<Notifier>,
    /// Where somebody can be served on his own processor.
    near: OnceLock<Arc<Near>>,
    waiter: Helper<Task>,
    /// Who forgets where the workers do not.
    forgetter: Helper<Forget>,
    /// Names that wait for the kernel to forget them.
    forgetting: AtomicUsize,
    /// See [`MAX_FAR_FLUSHES`].
    far_flushes: AtomicUsize,
    /// Threads of requests that take long.
    aside: Mutex<Vec<JoinHandle<()>>>,
    /// Requests that a limit on rates holds back.
    pub(crate) later: Later,
}

/// How many names may wait for the kernel to forget them. Of those beyond, whoever meets them next
/// brings them up again.
const MAX_FORGETTING: usize = 1024;

/// How many requests that take long have a thread of their own; those beyond take a worker, or, if no
/// worker may wait for them, one thread for all.
pub(crate) const MAX_ASIDE: usize = 64;

/// Whether a request may take some milliseconds, as is known before it begins: by what is asked for, and of how many
/// bytes. Such a one is nothing for a worker that gives way. Of all others it turns out on the way
/// ([`crate::errno::LONG`]).
pub(crate) fn takes_long(what: Opcode, bytes: usize) -> bool {
    match what {
        // A directory may have to be read as a whole; a disk is waited for.
        Opcode::ReadDir
        | Opcode::ReadDirPlus
        | Opcode::RmDir
        | Opcode::Fsync
        | Opcode::FsyncDir
        | Opcode::Fallocate => true,
        Opcode::Read | Opcode::Write => is_much(bytes as u64),
        _ => false,
    }
}

/// How many seeks in files of far mounts may wait for the kernel to write back, which a mount that does not answer may
/// keep it from. Fewer than [`MAX_ASIDE`], whose threads they have, so that all others still get theirs; those beyond
/// are given up.
const MAX_FAR_FLUSHES: usize = 16;

/// When somebody for whom no thread was free asks again.
const AGAIN: Duration = Duration::from_millis(10);

/// What is done elsewhere when the kernel has forgotten something.
#[derive(Debug)]
enum Forget {
    /// The table forgets, too.
    Lookups(INodeNo, u64),
    /// Memory is given back that the table does not need any more. It takes some milliseconds, in which nobody gets any.
    Memory,
}

/// How many names a worker that gives way forgets itself after a request.
const FEW: u32 = 64;

/// How long those beyond are collected.
const FORGET_AFTER: Duration = Duration::from_millis(10);

/// When memory is given back, after the table has shrunk last.
const GIVE_BACK_AFTER: Duration = Duration::from_millis(500);

/// Something that needs an answer of the kernel, which a worker must not wait for: the kernel may first
/// want one of the workers.
#[derive(Debug)]
enum Task {
    Seek(Seek),
    /// A name that does not lead to its object any more.
    ForgetName(Link),
}

/// A seek that waits for the kernel to write back what it holds of the file.
#[derive(Debug)]
pub(crate) struct Seek {
    pub(crate) node: Arc<Node>,
    pub(crate) offset: u64,
    pub(crate) hole: bool,
    pub(crate) reply: ReplyLseek,
}

impl Shared {
    pub(crate) fn new(engine: Engine) -> Arc<Self> {
        Arc::new(Self {
            engine,
            notifier: OnceLock::new(),
            near: OnceLock::new(),
            waiter: Helper::new("fsoverlay-wait"),
            forgetter: Helper::new("fsoverlay-forget"),
            forgetting: AtomicUsize::new(0),
            far_flushes: AtomicUsize::new(0),
            aside: Mutex::default(),
            later: Later::default(),
        })
    }

    /// What must be there before a request comes: whoever waits for a far mount is given up by one thread, which
    /// may not be had any more when it is needed. Then such requests fail at once. What a limit on rates holds back waits
    /// on the same thread: without it there would be no limit, and nothing is to be served. And a worker that gives way is
    /// not to start what others wait for.
    pub(crate) fn prepare(self: &Arc<Self>) -> std::io::Result<()> {
        if self.near.get().is_some() {
            // Without it, the workers forget.
            let _ = self.forgetter.prepare(self.forgetter_main());
        }
        let is_limited = self.engine.hooks.rate.is_some();
        if (is_limited || !self.engine.far.is_empty()) && !self.later.ready() {
            if is_limited {
                return Err(std::io::Error::other("no thread can be had, without which bytes have no limit"));
            }
            tracing::warn!("no thread to look after requests to remote file systems");
        }
        Ok(())
    }

    pub(crate) fn set_notifier(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    pub(crate) fn set_near(&self, near: Arc<Near>) {
        let _ = self.near.set(near);
    }

    /// How many requests were served on the processor of who asked.
    pub(crate) fn served_near(&self) -> u64 {
        self.near.get().map_or(0, |near| near.served())
    }

    /// Ends the threads beside the workers, once the mount is gone: the one that waits for the kernel
    /// holds a reference to all this, and a copy-up that still goes on changes the upper. (Nothing that the kernel was
    /// asked about a mount lasts longer than the mount.) A far mount's threads are only told: one that waits for an
    /// answer of that mount may do so for ever, and is not waited for.
    pub(crate) fn stop(&self) {
        self.later.stop();
        for far in &self.engine.far {
            far.stop();
        }
        self.waiter.stop();
        self.forgetter.stop();
        // One may have started another.
        loop {
            let aside = std::mem::take(&mut *self.aside.lock());
            if aside.is_empty() {
                return;
            }
            for thread in aside {
                // A handler's panic was caught in it.
                let _ = thread.join();
            }
        }
    }

    /// Hands something to the thread that may wait for the kernel. Where there is none, what can be done without the
    /// kernel is done here.
    fn hand_over(self: &Arc<Self>, task: Task) {
        let shared = Arc::downgrade(self);
        let main = move |tasks: mpsc::Receiver<Task>| {
            for task in tasks {
                let Some(shared) = shared.upgrade() else { return };
                shared.perform(task);
            }
        };
        let Err(undone) = self.waiter.give(task, main) else { return };
        // Those of others, too.
        calmly(|| {
            for task in undone.tasks {
                match task {
                    Task::Seek(seek) => answer_seek(&self.engine, seek),
                    // Whoever meets it next brings it up again.
                    Task::ForgetName(_) => {
                        self.forgetting.fetch_sub(1, Ordering::AcqRel);
                    }
                }
            }
        });
    }

    fn perform(self: &Arc<Self>, task: Task) {
        let fs = FuseFs { shared: self.clone() };
        match task {
            Task::Seek(seek) => {
                fs.guarded(Opcode::Lseek, INodeNo(seek.node.ino), || self.flush_and_seek(seek));
            }
            Task::ForgetName(link) => {
                let parent = INodeNo(link.parent.ino);
                fs.guarded(Opcode::Lookup, parent, || {
                    if let Some(notifier) = self.notifier.get() {
                        let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&link.name);
                        let _ = notifier.inval_entry(parent, name);
                    }
                });
                self.forgetting.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// The kernel forgets `count` lookups of a number. It may tell of very many at once, and tells nobody else: a worker
    /// that gives way takes a few itself, before the numbers are used again, and passes all others on.
    pub(crate) fn forget(self: &Arc<Self>, ino: INodeNo, count: u64) {
        let few = !gives_way() || FORGOTTEN.replace(FORGOTTEN.get().saturating_add(1)) < FEW;
        if !few {
            return self.forget_elsewhere(Forget::Lookups(ino, count));
        }
        let table = &self.engine.table;
        table.forget(ino.0, count);
        if table.has_shrunk() {
            self.forget_elsewhere(Forget::Memory);
        }
    }

    /// Here, if there is no thread for it.
    fn forget_elsewhere(self: &Arc<Self>, what: Forget) {
        let Err(undone) = self.forgetter.give(what, self.forgetter_main()) else { return };
        // Whoever gives way does not try for each name.
        FORGOTTEN.set(0);
        let table = &self.engine.table;
        for what in undone.tasks {
            match what {
                Forget::Lookups(ino, count) => table.forget(ino.0, count),
                Forget::Memory => table.set_shrunk(),
            }
        }
    }

    fn forgetter_main(self: &Arc<Self>) -> impl FnOnce(mpsc::Receiver<Forget>) + Send + 'static {
        let shared = Arc::downgrade(self);
        move |told| forget_what_is_told(&shared, &told)
    }

    /// Not on a worker: the kernel's pages come back as WRITE requests.
    fn flush_and_seek(&self, seek: Seek) {
        self.flush(INodeNo(seek.node.ino));
        answer_seek(&self.engine, seek);
    }

    /// Nor on a thread of a far mount, which may have to serve them.
    fn flush(&self, ino: INodeNo) {
        if let Some(notifier) = self.notifier.get() {
            // Writes back and drops the pages; a failure is the kernel's
            // not knowing the file, which then holds none.
            let _ = notifier.inval_inode(ino, 0, 0);
        }
    }

    /// An object is not what its names lead to any more: somebody changed a layer. The kernel knows
    /// the names for ever, and opens files without asking: told to forget them, it will look them up
    /// and find what is there now.
    pub(crate) fn forget_names(self: &Arc<Self>, node: &Node) {
        // The kernel detaches what is mounted below a directory that it forgets.
        if node.kind == Kind::Dir {
            return;
        }
        let links = node.inner.lock().links.clone();
        for link in links {
            if self.forgetting.fetch_add(1, Ordering::AcqRel) >= MAX_FORGETTING {
                self.forgetting.fetch_sub(1, Ordering::AcqRel);
            } else {
                self.hand_over(Task::ForgetName(link));
            }
        }
    }
}

/// Forgets until there is nobody any more who tells. It is not woken for each number: that costs who tells more than
/// forgetting does.
fn forget_what_is_told(shared: &Weak<Shared>, told: &mpsc::Receiver<Forget>) {
    let mut give_back: Option<Instant> = None;
    loop {
        let first = match give_back {
            None => told.recv().map_err(|mpsc::RecvError| RecvTimeoutError::Disconnected),
            Some(due) => told.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match first {
            Ok(first) => {
                // Cut short when the mount is gone.
                std::thread::park_timeout(FORGET_AFTER);
                let Some(shared) = shared.upgrade() else { return };
                let fs = FuseFs { shared };
                let mut shrunk = false;
                for forget in std::iter::once(first).chain(told.try_iter()) {
                    match forget {
                        Forget::Lookups(ino, count) => {
                            fs.guarded(Opcode::Forget, ino, || fs.engine().table.forget(ino.0, count));
                        }
                        Forget::Memory => shrunk = true,
                    }
                }
                if shrunk | fs.engine().table.has_shrunk() {
                    // More of it will come.
                    give_back = Some(Instant::now() + GIVE_BACK_AFTER);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                give_back = None;
                crate::sys::give_memory_back();
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// A request that may be answered before what it asks for is done.
struct Waiting<R, F> {
    reply: Mutex<Option<R>>,
    refuse: F,
}

impl<R, F> Waiting<R, F> {
    fn is_answered(&self) -> bool {
        self.reply.lock().is_none()
    }
}

impl<R: Send, F: Fn(R) + Send + Sync> GiveUp for Waiting<R, F> {
    fn give_up(&self) -> bool {
        let reply = self.reply.lock().take();
        reply.map(&self.refuse).is_some()
    }
}

thread_local! {
    /// The thread whose request this worker serves.
    static ASKER: Cell<u32> = const { Cell::new(0) };
    /// How many names it was told to forget since its last request.
    static FORGOTTEN: Cell<u32> = const { Cell::new(0) };
}

/// To be called before [`FuseFs::run`], and what comes to it.
pub(crate) fn asked_by(request: &Request) {
    ASKER.set(request.pid());
}

impl FuseFs {
    /// Runs the handler of a request, on a worker, which may then be kept from the next one ([`crate::near`]).
    pub(crate) fn run(&self, what: Opcode, ino: INodeNo, handler: impl FnOnce()) {
        self.engine().counts.request(what);
        // Nobody waits for names to be forgotten, of which there may be many at once.
        let near = self.shared.near.get();
        if what == Opcode::Forget {
            self.guarded(what, ino, handler);
            if let Some(near) = near.filter(|_| !gives_way()) {
                near.after_forget();
            }
            return;
        }
        if gives_way()
            && let Some(near) = near
        {
            FORGOTTEN.set(0);
            near.begin();
        }
        self.guarded(what, ino, handler);
        if let Some(near) = near {
            near.after(ASKER.take());
        }
    }

    /// Whether this worker leaves a request to another thread ([`FuseFs::aside`]) before it begins: it gives way, and it
    /// [`takes_long`]. (What is far goes to its mount's threads, which do not give way either.)
    pub(crate) fn leaves(&self, what: Opcode, bytes: usize) -> bool {
        gives_way() && takes_long(what, bytes)
    }

    /// Runs a handler, or what is left of it, on whatever thread; see the module about panics.
    fn guarded(&self, what: Opcode, ino: INodeNo, handler: impl FnOnce()) {
        tracing::trace!(?what, ino = ino.0, "request");
        if catch_unwind(AssertUnwindSafe(handler)).is_err() {
            // What the payload can bring about is counted always and logged rarely.
            let count = self.engine().counts.panics.fetch_add(1, Ordering::Relaxed);
            if count.is_power_of_two() || count == 0 {
                let path = self.engine().table.get(ino.0).and_then(|node| path_of(&node));
                tracing::error!(
                    ?what,
                    ino = ino.0,
                    ?path,
                    count = count + 1,
                    "internal error, answered with EIO"
                );
            }
        }
    }

    /// Answers a request that may take long: if it does, on a thread of its own, so that the
    /// workers, who are few, go on with what others ask.
    pub(crate) fn answer<T: 'static, R: Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        reply: R,
        send: impl Fn(Res<T>, R) + Copy + Send + Sync + 'static,
        operation: impl Fn(&Self) -> Res<T> + Send + 'static,
    ) {
        self.run(what, ino, || {
            if self.leaves(what, 0) && !self.is_far(ino) {
                return self.aside(what, ino, move |fs| send(operation(fs), reply));
            }
            match hurried(|| operation(self)) {
                Err(LONG) => self.aside(what, ino, move |fs| send(operation(fs), reply)),
                // Copying may take its time.
                Err(FAR) => self.afar(what, ino, None, reply, send, operation),
                done => send(done, reply),
            }
        });
    }

    /// Answers a request that is over soon, unless it touches what may never answer ([`crate::far`]): that
    /// is done `again`, by a closure that has all it needs, where others need not wait for it.
    pub(crate) fn serve<T: 'static, R: Send + 'static, O: FnOnce(&Self) -> Res<T> + Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        reply: R,
        send: impl Fn(Res<T>, R) + Copy + Send + Sync + 'static,
        now: impl FnOnce(&Self) -> Res<T>,
        again: impl FnOnce() -> O,
    ) {
        self.run(what, ino, || {
            if self.leaves(what, 0) && !self.is_far(ino) {
                let again = again();
                return self.aside(what, ino, move |fs| send(again(fs), reply));
            }
            if self.engine().far.is_empty() && !gives_way() {
                return send(now(self), reply);
            }
            match hurried(|| now(self)) {
                Err(FAR) => self.afar(what, ino, Some(self.engine().patience), reply, send, again()),
                Err(LONG) => {
                    let again = again();
                    self.aside(what, ino, move |fs| send(again(fs), reply));
                }
                done => send(done, reply),
            }
        });
    }

    /// Like [`FuseFs::serve`], for an operation on a name that can be begun twice.
    pub(crate) fn serve_named<T: 'static, R: Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        name: &OsStr,
        reply: R,
        send: impl Fn(Res<T>, R) + Copy + Send + Sync + 'static,
        operation: impl Fn(&Self, &OsStr) -> Res<T> + Copy + Send + 'static,
    ) {
        let again = || {
            let name = name.to_owned();
            move |fs: &Self| operation(fs, &name)
        };
        self.serve(what, ino, reply, send, |fs| operation(fs, name), again);
    }

    /// Does what this thread has met [`FAR`] with on one of the mount's; gives it up when that takes longer
    /// than `patience`.
    pub(crate) fn afar<T: 'static, R: Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        patience: Option<Duration>,
        reply: R,
        send: impl Fn(Res<T>, R) + Copy + Send + Sync + 'static,
        operation: impl FnOnce(&Self) -> Res<T> + Send + 'static,
    ) {
        let Some(far) = far_mount() else { return send(Err(Errno::IO), reply) };
        let waiting = self.wait_for(&far, patience, reply, move |reply| send(Err(Errno::IO), reply));
        self.run_afar(&far, what, ino, waiting, send, operation);
    }

    /// A request to a far mount, which is given up by `refuse` when it takes longer than `patience`: maybe at once, where
    /// nobody would do so later.
    fn wait_for<R: Send + 'static, F: Fn(R) + Send + Sync + 'static>(
        &self,
        far: &Arc<Far>,
        patience: Option<Duration>,
        reply: R,
        refuse: F,
    ) -> Arc<Waiting<R, F>> {
        let waiting = Arc::new(Waiting { reply: Mutex::new(Some(reply)), refuse });
        if let Some(patience) = patience {
            let request: Arc<dyn GiveUp> = waiting.clone();
            if let Some(due) = far.wait_for(Arc::downgrade(&request), patience) {
                self.watch(far.clone(), due);
            }
        }
        waiting
    }

    /// Does what such a request asks for on one of the mount's threads, unless it is given up.
    fn run_afar<T: 'static, R: Send + 'static>(
        &self,
        far: &Arc<Far>,
        what: Opcode,
        ino: INodeNo,
        waiting: Arc<Waiting<R, impl Fn(R) + Send + Sync + 'static>>,
        send: impl FnOnce(Res<T>, R) + Send + 'static,
        operation: impl FnOnce(&Self) -> Res<T> + Send + 'static,
    ) {
        if waiting.is_answered() {
            return;
        }
        let fs = self.clone();
        let mine = waiting.clone();
        let job = move || {
            fs.guarded(what, ino, || {
                if mine.is_answered() {
                    return;
                }
                let done = operation(&fs);
                // If it was given up meanwhile, what was found is dropped: the kernel has not learnt of it.
                let reply = mine.reply.lock().take();
                if let Some(reply) = reply {
                    send(done, reply);
                }
            });
        };
        if !far.run(job) {
            waiting.give_up();
        }
    }

    /// Sees to it that requests to a far mount are given up in time, as long as there are any: at once, if there is
    /// no thread that could do so later.
    fn watch(&self, far: Arc<Far>, due: Instant) {
        let fs = self.clone();
        self.shared.later.at(due, move |called| match called {
            Called::InTime => {
                if let Some(next) = far.give_up_late(Instant::now()) {
                    fs.watch(far, next);
                }
            }
            // Also those that rely on this.
            Called::NoThread => far.give_up_all(),
        });
    }

    /// Whether what is asked of an object may never be answered; [`FuseFs::afar`] is for it then.
    pub(crate) fn is_far(&self, ino: INodeNo) -> bool {
        !self.engine().far.is_empty() && matches!(hurried(|| self.engine().node(ino.0)), Err(FAR))
    }

    /// Reads what the first lookup of a link would, where that takes long: for it may be a worker's that gives way.
    pub(crate) fn read_owners(&self) {
        if self.engine().upper.as_ref().is_some_and(|upper| upper.sidecar.is_long_to_read()) {
            self.aside(Opcode::Lookup, INodeNo::ROOT, |fs| {
                // What fails here fails again where it is needed.
                let _ = fs.engine().upper.as_ref().map(|upper| upper.sidecar.read());
            });
        }
    }

    /// Runs a handler on a thread of its own; if there are too many, here, or later if this thread is not to do what takes
    /// long and there is one that waits.
    pub(crate) fn aside(&self, what: Opcode, ino: INodeNo, handler: impl FnOnce(&Self) + Send + 'static) {
        if let Err(handler) = self.start_aside(what, ino, handler, |fs, handler| handler(fs)) {
            if gives_way() {
                return self.delayed(what, ino, AGAIN, handler);
            }
            handler(self);
        }
    }

    /// Starts a thread for something that takes long; gives it back if there are too many.
    fn start_aside<T: Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        task: T,
        perform: fn(&Self, T),
    ) -> Result<(), T> {
        {
            let mut threads = self.shared.aside.lock();
            threads.retain(|thread| !thread.is_finished());
            if threads.len() >= MAX_ASIDE {
                return Err(task);
            }
        }
        let fs = self.clone();
        // Not under the lock: who gives way may wait long for whoever starts it.
        let thread =
            start_with("fsoverlay-long", task, move |task| fs.guarded(what, ino, || perform(&fs, task)))?;
        self.shared.aside.lock().push(thread);
        Ok(())
    }

    /// How long a request for bytes is to wait.
    pub(crate) fn delay(&self, direction: Direction, bytes: impl FnOnce(&Self) -> u64) -> Option<Duration> {
        let rate = self.engine().hooks.rate.as_ref()?;
        Some(rate.delay(direction, bytes(self))).filter(|delay| !delay.is_zero())
    }

    /// Serves a request when its time has come, on a thread of its own; at once where nothing can wait.
    pub(crate) fn delayed<S: FnOnce(&Self) + Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        delay: Duration,
        serve: S,
    ) {
        let fs = self.clone();
        let due = Instant::now().checked_add(delay).unwrap_or_else(|| Instant::now() + TTL);
        self.shared.later.at(due, move |called| {
            if let Err(serve) = fs.start_aside(what, ino, serve, |fs, serve| serve(fs)) {
                match called {
                    // Where there is no thread it waits on: the one that waits for all of them must not wait for one.
                    Called::InTime => fs.delayed(what, ino, AGAIN, serve),
                    Called::NoThread => fs.guarded(what, ino, || serve(&fs)),
                }
            }
        });
    }

    /// Answers a seek once the kernel has written back what it holds of the file: a series of WRITE
    /// requests that the workers have to serve, the first of which may copy the file up.
    pub(crate) fn seek_after_flush(&self, seek: Seek) {
        let ino = INodeNo(seek.node.ino);
        let started = self.start_aside(Opcode::Lseek, ino, seek, |fs, seek| fs.shared.flush_and_seek(seek));
        if let Err(seek) = started {
            self.shared.hand_over(Task::Seek(seek));
        }
    }

    /// The same in a file of a far mount: what the kernel holds of it may be there before anything is copied up, and the
    /// copy-up that writing it back begins with may never end. So the seek's patience begins before that.
    pub(crate) fn seek_far<R: Send + 'static>(
        &self,
        ino: INodeNo,
        offset: u64,
        hole: bool,
        reply: R,
        send: impl Fn(Res<u64>, R) + Copy + Send + Sync + 'static,
    ) {
        let Some(far) = far_mount() else { return send(Err(Errno::IO), reply) };
        let patience = Some(self.engine().patience);
        let waiting = self.wait_for(&far, patience, reply, move |reply| send(Err(Errno::IO), reply));
        let flushes = &self.shared.far_flushes;
        let room = flushes.fetch_add(1, Ordering::AcqRel) < MAX_FAR_FLUSHES;
        let mine = waiting.clone();
        let seek = move |fs: &Self| {
            fs.shared.flush(ino);
            fs.shared.far_flushes.fetch_sub(1, Ordering::AcqRel);
            let seek = move |fs: &Self| fs.on(ino, |node| fs.engine().seek(node, offset, hole));
            fs.run_afar(&far, Opcode::Lseek, ino, mine, send, seek);
        };
        if !room || self.start_aside(Opcode::Lseek, ino, seek, |fs, seek| seek(fs)).is_err() {
            flushes.fetch_sub(1, Ordering::AcqRel);
            waiting.give_up();
        }
    }
}

fn answer_seek(engine: &Engine, seek: Seek) {
    reply_offset(engine.seek(&seek.node, seek.offset, seek.hole), seek.reply);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Scratch;
    use crate::errno::set_gives_way;
    use crate::sync::tests::without_threads;

    #[test]
    fn of_many_names_that_are_forgotten_who_gives_way_takes_a_few() {
        let scratch = Scratch::new("forget");
        let fs = FuseFs { shared: Shared::new(Engine::open(&scratch.spec()).expect("an overlay")) };
        let (shared, engine) = (&fs.shared, fs.engine());
        let root = engine.node(1).expect("the root");
        let (few, many) = (FEW as usize, 200);
        let look_up = |i: usize| {
            let name = i.to_string();
            std::fs::write(scratch.dir.join("lower").join(&name), "").expect("written");
            let node = engine.lookup(&root, name.as_bytes()).expect("found");
            engine.table.remember(&node);
            INodeNo(node.ino)
        };
        let all: Vec<_> = (0..many).map(look_up).collect();
        let known = || all.iter().filter(|ino| engine.table.get(ino.0).is_some()).count();
        assert_eq!(known(), many);
        let (sender, told) = mpsc::channel();
        let told = Mutex::new(told);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                set_gives_way();
                let thread = std::thread::spawn(|| {});
                shared.forgetter.set(Some((sender, thread)));
                for ino in &all[..few + 20] {
                    shared.forget(*ino, 1);
                }
                assert_eq!((known(), told.lock().try_iter().count()), (many - few, 20));
                // Where there is no thread for it, it takes them all.
                shared.forgetter.set(None);
                without_threads(|| shared.forget(all[few + 20], 1));
                assert_eq!(known(), many - few - 1);
                for ino in &all[few..] {
                    shared.forget(*ino, 1);
                }
            });
        });
        // With the end of all this is done what was still to do.
        fs.shared.stop();
        assert_eq!((known(), Arc::strong_count(&fs.shared)), (0, 1));
    }

    #[test]
    fn in_the_end_nobody_asks_the_kernel_any_more() {
        let scratch = Scratch::new("waiter");
        let shared = Shared::new(Engine::open(&scratch.spec()).expect("an overlay"));
        let link = || Link { parent: shared.engine.root().clone(), name: (*b"name").into() };
        let ((tell, told), (sender, tasks)) = (mpsc::channel(), mpsc::channel());
        let thread = std::thread::spawn(move || {
            let asked = tasks.iter().count();
            // So long that whoever does not wait for it would be gone.
            (0..10_000).for_each(|_| std::thread::yield_now());
            tell.send(asked).expect("somebody listens");
        });
        shared.waiter.set(Some((sender, thread)));
        shared.hand_over(Task::ForgetName(link()));
        shared.stop();
        assert_eq!(told.try_recv(), Ok(1));
        // Whoever meets a name now starts no other thread, and none is for ever about to be forgotten.
        shared.forgetting.store(1, Ordering::Release);
        shared.hand_over(Task::ForgetName(link()));
        assert_eq!(shared.forgetting.load(Ordering::Acquire), 0);
        assert_eq!(Arc::strong_count(&shared), 1);
    }
}
