//! Commands to an engine that runs.

use super::*;

#[test]
fn commands_are_obeyed_between_two_packets_and_answered_when_the_stack_is_gone() {
    let Script { mut engine, control, wire, now, .. } = Script::new(&spec(), true);
    let port = forwarded(Protocol::Tcp, 80);
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            // Also if the caller fails: the engine turns until it is told to stop.
            struct Stop<'a>(&'a Control);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.stop();
                }
            }
            let _stop = Stop(&control);
            let published = control.publish(&port).expect("published");
            assert_eq!(control.published().expect("list"), std::slice::from_ref(&published));
            assert_eq!(control.unpublish(published.id).expect("removed"), Some(published.clone()));
            assert_eq!(control.unpublish(published.id).expect("no such port"), None);
            // What it had is free again.
            TcpListener::bind(published.addresses[0]).expect("closed");
        });
        while engine.turn(&mut || now, None) == Turn::Goes {}
        caller.join().expect("caller");
    });
    // Commands that nobody will run any more are answered, too.
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| control.published());
        drop((engine, wire));
        waiting.join().expect("caller")
    });
    assert!(matches!(waiting, Err(crate::Error::Stopped)));
    assert!(matches!(control.publish(&port), Err(crate::Error::Stopped)));
}

#[test]
fn of_ports_for_which_descriptors_do_not_suffice_none_is_published() {
    let mut script = Script::new(&spec(), true);
    let thirty = || {
        let ports = Published::bind(&[(); 30].map(|()| forwarded(Protocol::Tcp, 80))).expect("bound");
        let addresses: Vec<SocketAddr> = ports.addresses().map(|(address, ..)| address).collect();
        (ports, addresses)
    };
    let used = script.engine.budget().used();
    script.engine.budget().limit = used + 40;
    let (ports, addresses) = thirty();
    // Before anything is bound it is known.
    let [few, many] =
        [6, 30].map(|ports| script.engine.check_room_for(&vec![forwarded(Protocol::Tcp, 80); ports]));
    assert!(few.is_ok() && matches!(many, Err(crate::Error::Listen { .. })));
    match script.engine.publish_all(ports) {
        Err(crate::Error::Listen { addr, source, .. }) => {
            assert_eq!(source.raw_os_error(), Some(nix::errno::Errno::EMFILE as i32));
            assert!(addr != addresses[0], "some did fit");
        }
        other => panic!("{other:?}"),
    }
    assert!(script.engine.published().is_empty() && script.engine.budget().used() == used);
    for address in addresses {
        TcpListener::bind(address).expect("free again");
    }
    script.engine.budget().limit = used + 200;
    let (ports, addresses) = thirty();
    let published = script.engine.publish_all(ports).expect("published");
    assert_eq!(published.iter().flat_map(|port| port.addresses.clone()).collect::<Vec<_>>(), addresses);
    assert_eq!(script.engine.published(), published);
}
