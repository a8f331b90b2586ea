//! System calls on sockets of the host: nix's own functions. In tests each of them can be told to fail, so the crate uses
//! these, and not nix's.

#[cfg(not(test))]
pub(crate) use nix::fcntl::splice;
#[cfg(not(test))]
pub(crate) use nix::sys::socket::{
    bind, connect, getpeername, getsockopt, recv, recvmsg, send, sendmsg, sendto, setsockopt, shutdown,
    socket,
};

#[cfg(not(test))]
pub(crate) use nix::unistd::pipe2;

#[cfg(test)]
pub(crate) use faults::{
    Call, Fault, bind, connect, getpeername, getsockopt, may_fail, pipe2, recv, recvmsg, send, sendmsg,
    sendto, set_plan, setsockopt, shutdown, socket, splice,
};

/// The same calls, with a plan of the calling thread's that says which of them fail.
#[cfg(test)]
mod faults {
    use std::cell::RefCell;
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

    use nix::Result;
    use nix::errno::Errno;
    use nix::fcntl::{OFlag, SpliceFFlags};
    use nix::libc::loff_t;
    use nix::sys::socket::{
        self, AddressFamily, ControlMessage, GetSockOpt, MsgFlags, RecvMsg, SetSockOpt, Shutdown, SockFlag,
        SockProtocol, SockType, SockaddrLike,
    };

    /// A system call. Those that send are one, and those that receive.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub(crate) enum Call {
        Socket,
        Bind,
        Connect,
        Accept,
        GetPeerName,
        SetSockOpt,
        GetSockOpt,
        Shutdown,
        Send,
        Recv,
        EpollAdd,
        Splice,
        Pipe,
        /// Memory for the rings of a connection.
        Map,
    }

    /// What is to happen.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Fault {
        None,
        Fails(Errno),
        /// One byte is sent or received.
        Short,
    }

    type Plan = Box<dyn FnMut(Call, RawFd) -> Fault>;

    thread_local! {
        static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
    }

    /// Replaces the plan of the calling thread.
    pub(crate) fn set_plan(plan: Option<Plan>) {
        PLAN.set(plan);
    }

    /// What the plan says about a call on `fd` (-1: none yet); whether it is to be short.
    fn ask(call: Call, fd: RawFd) -> Result<bool> {
        let fault = PLAN.with_borrow_mut(|plan| plan.as_mut().map_or(Fault::None, |plan| plan(call, fd)));
        match fault {
            Fault::None => Ok(false),
            Fault::Fails(errno) => Err(errno),
            Fault::Short => Ok(true),
        }
    }

    /// For calls that are made elsewhere.
    pub(crate) fn may_fail(call: Call, fd: RawFd) -> Result<()> {
        ask(call, fd).map(drop)
    }

    pub(crate) fn socket<T: Into<Option<SockProtocol>>>(
        family: AddressFamily,
        kind: SockType,
        flags: SockFlag,
        protocol: T,
    ) -> Result<OwnedFd> {
        may_fail(Call::Socket, -1)?;
        socket::socket(family, kind, flags, protocol)
    }

    pub(crate) fn bind(fd: RawFd, addr: &dyn SockaddrLike) -> Result<()> {
        may_fail(Call::Bind, fd)?;
        socket::bind(fd, addr)
    }

    pub(crate) fn connect(fd: RawFd, addr: &dyn SockaddrLike) -> Result<()> {
        may_fail(Call::Connect, fd)?;
        socket::connect(fd, addr)
    }

    pub(crate) fn getpeername<T: SockaddrLike>(fd: RawFd) -> Result<T> {
        may_fail(Call::GetPeerName, fd)?;
        socket::getpeername(fd)
    }

    pub(crate) fn setsockopt<F: AsFd, O: SetSockOpt>(fd: &F, option: O, value: &O::Val) -> Result<()> {
        may_fail(Call::SetSockOpt, fd.as_fd().as_raw_fd())?;
        socket::setsockopt(fd, option, value)
    }

    pub(crate) fn getsockopt<F: AsFd, O: GetSockOpt>(fd: &F, option: O) -> Result<O::Val> {
        may_fail(Call::GetSockOpt, fd.as_fd().as_raw_fd())?;
        socket::getsockopt(fd, option)
    }

    pub(crate) fn shutdown(fd: RawFd, how: Shutdown) -> Result<()> {
        may_fail(Call::Shutdown, fd)?;
        socket::shutdown(fd, how)
    }

    pub(crate) fn send(fd: RawFd, data: &[u8], flags: MsgFlags) -> Result<usize> {
        let most = if ask(Call::Send, fd)? { data.len().min(1) } else { data.len() };
        socket::send(fd, &data[..most], flags)
    }

    pub(crate) fn sendto(fd: RawFd, data: &[u8], to: &dyn SockaddrLike, flags: MsgFlags) -> Result<usize> {
        may_fail(Call::Send, fd)?;
        socket::sendto(fd, data, to, flags)
    }

    pub(crate) fn sendmsg<S: SockaddrLike>(
        fd: RawFd,
        data: &[IoSlice<'_>],
        control: &[ControlMessage<'_>],
        flags: MsgFlags,
        to: Option<&S>,
    ) -> Result<usize> {
        may_fail(Call::Send, fd)?;
        socket::sendmsg(fd, data, control, flags, to)
    }

    pub(crate) fn recv(fd: RawFd, room: &mut [u8], flags: MsgFlags) -> Result<usize> {
        let most = if ask(Call::Recv, fd)? { room.len().min(1) } else { room.len() };
        socket::recv(fd, &mut room[..most], flags)
    }

    pub(crate) fn pipe2(flags: OFlag) -> Result<(OwnedFd, OwnedFd)> {
        may_fail(Call::Pipe, -1)?;
        nix::unistd::pipe2(flags)
    }

    pub(crate) fn splice<A: AsFd, B: AsFd>(
        from: A,
        from_at: Option<&mut loff_t>,
        to: B,
        to_at: Option<&mut loff_t>,
        len: usize,
        flags: SpliceFFlags,
    ) -> Result<usize> {
        let len = if ask(Call::Splice, from.as_fd().as_raw_fd())? { len.min(1) } else { len };
        nix::fcntl::splice(from, from_at, to, to_at, len, flags)
    }

    pub(crate) fn recvmsg<'a, 'outer, 'inner: 'outer, S: SockaddrLike + 'a>(
        fd: RawFd,
        room: &'outer mut [IoSliceMut<'inner>],
        control: Option<&'a mut [u8]>,
        flags: MsgFlags,
    ) -> Result<RecvMsg<'a, 'outer, S>> {
        may_fail(Call::Recv, fd)?;
        socket::recvmsg(fd, room, control, flags)
    }
}
