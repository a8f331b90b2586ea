//! The least that any process between two sockets of one kernel has to do, as a contender: a recv(2) and a send(2) for
//! each message, found by one epoll. It has no link to the guest, no rules and no packets, only TCP connections that it
//! passes on. What it does not reach of the bare link, no relay reaches on that machine.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _};
use std::rc::Rc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::common::{INTERNET_V4, Net, at};
use crate::contenders::{INSIDE_PORT, listen};

/// Where in the guest it accepts connections to the internet.
pub(crate) const RELAY_PORT: u16 = 7_002;
/// The one port of the internet that it leads to.
pub(crate) const RELAYED_PORT: u16 = 7_003;

/// The process of it: `relay NAMESPACE PORT`. Ends with its input.
pub(crate) fn serve(args: &[String]) {
    let [net, port] = args else { panic!("two arguments") };
    let (host, guest) = (Net::current(), Net::at_path(net));
    let published = at("0.0.0.0", port.parse().unwrap());
    let inner = guest.run(|| listen(at("127.0.0.1", RELAY_PORT))).unwrap();
    let outer = listen(published).unwrap();
    host.spawn(move || relay(&inner, at(INTERNET_V4, RELAYED_PORT)));
    guest.spawn(move || relay(&outer, at("127.0.0.1", INSIDE_PORT)));
    let _ = std::io::stdin().read(&mut [0]);
}

/// Passes everything on between connections that come to `listener` and new ones to `to`.
fn relay(listener: &TcpListener, to: SocketAddr) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let watch = |fd: &dyn AsFd| {
        let fd = fd.as_fd();
        let number = u64::try_from(fd.as_raw_fd()).unwrap();
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, number)).unwrap();
        number
    };
    let door = watch(listener);
    // From where to where, by the number of the descriptor that it comes from.
    let mut ways: HashMap<u64, (Rc<TcpStream>, Rc<TcpStream>)> = HashMap::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut events = [EpollEvent::empty(); 256];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..ready] {
            if event.data() == door {
                let (near, far) = match (listener.accept(), TcpStream::connect(to)) {
                    (Ok((near, _)), Ok(far)) => (Rc::new(near), Rc::new(far)),
                    _ => continue,
                };
                for (from, onto) in [(&near, &far), (&far, &near)] {
                    from.set_nodelay(true).unwrap();
                    ways.insert(watch(&**from), (Rc::clone(from), Rc::clone(onto)));
                }
                continue;
            }
            let Some((from, onto)) = ways.get(&event.data()) else { continue };
            // One message at a time; who takes it slowly holds up all others, which the load does not show.
            let goes_on = match (&**from).read(&mut buffer) {
                Err(error) => error.kind() == ErrorKind::Interrupted,
                Ok(0) => false,
                Ok(len) => (&**onto).write_all(&buffer[..len]).is_ok(),
            };
            if !goes_on {
                let _ = onto.shutdown(std::net::Shutdown::Write);
                epoll.delete(&**from).unwrap();
                ways.remove(&event.data());
            }
        }
    }
}
