//! Specs in, plans out, from recorded facts. A changed snapshot is reviewed like code;
//! `ROOTLET_BLESS=1 cargo test` writes them anew.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::*;
use crate::host::layers::{Accounts, Kind, LayerFacts, PlaceFacts, RootFacts, VolumeFacts};
use crate::host::{HostFacts, ResolvFacts};
use crate::spec::{IdsSpec, NetMode, RootSpec, SandboxSpec, TmpfsSpec, VolumeSpec};

const WHOLE: IdExtent = IdExtent { inside: 0, outside: 0, count: u32::MAX };

/// An ordinary user without ranges.
fn ada() -> HostFacts {
    HostFacts {
        uid: 1000,
        gid: 1000,
        initial_userns: true,
        may_set_ids: false,
        setgroups_denied: false,
        landlock_scopes: true,
        no_new_privs: false,
        user_name: Some("ada".into()),
        subuids: None,
        subgids: None,
        free_subids: 165_536,
        newuidmap: None,
        newgidmap: None,
        own_uid_map: vec![WHOLE],
        own_gid_map: vec![WHOLE],
        networks_v4: vec![([192, 168, 2, 0].into(), 24)],
        resolv: ResolvFacts { has_resolver: true, ..ResolvFacts::default() },
        current_dir: Some("/home/ada/src".into()),
        environ: [("PATH", "/home/ada/bin:/usr/bin"), ("HOME", "/home/ada"), ("SSH_AUTH_SOCK", "/run/agent")]
            .map(|(name, value)| (name.into(), value.into()))
            .into(),
    }
}

/// One with ranges.
fn bob() -> HostFacts {
    HostFacts {
        uid: 1001,
        gid: 1001,
        user_name: Some("bob".into()),
        subuids: Some((200_000, 65_536)),
        subgids: Some((300_000, 1000)),
        newuidmap: Some("/usr/bin/newuidmap".into()),
        newgidmap: Some("/usr/bin/newgidmap".into()),
        current_dir: Some("/home/bob".into()),
        ..ada()
    }
}

fn root() -> HostFacts {
    HostFacts {
        uid: 0,
        gid: 0,
        may_set_ids: true,
        user_name: Some("root".into()),
        current_dir: Some("/root".into()),
        ..ada()
    }
}

fn found(root_path: &str, kind: Option<Kind>) -> PlaceFacts {
    PlaceFacts { root_path: root_path.into(), resolved: root_path.trim_start_matches('/').into(), kind }
}

fn place(layers: &[(&str, u32)]) -> BoxPlace {
    let state_root = PathBuf::from("/home/ada/.local/state/rootlet");
    let state_dir = state_root.join("boxes/calm-otter");
    BoxPlace {
        name: "calm-otter".into(),
        upper: Some(UpperPlan { dir: state_dir.join("upper"), work: state_dir.join("work") }),
        state_root,
        state_dir,
        root: RootFacts {
            layers: layers
                .iter()
                .map(|&(path, owner)| LayerFacts { host_path: path.into(), uid: owner, gid: owner })
                .collect(),
            places: ["/proc", "/sys", "/dev"].map(|path| found(path, Some(Kind::Directory))).into(),
            ..RootFacts::default()
        },
    }
}

fn over_host() -> BoxPlace {
    let mut place = place(&[("/", 0)]);
    place.root.has_apt = true;
    place.root.accounts = Some(Accounts { users: vec!["root".into(), "ada".into()], groups: Vec::new() });
    place.root.hosts = Some("127.0.0.1 localhost\n".into());
    place
}

fn spec() -> SandboxSpec {
    SandboxSpec::new(vec!["make".into(), "install now".into()])
}

fn planned(spec: SandboxSpec, facts: &HostFacts, place: &BoxPlace) -> Plan {
    plan(&spec.validate().unwrap(), facts, place).unwrap()
}

fn refused(spec: SandboxSpec, facts: &HostFacts, place: &BoxPlace) -> PlanError {
    plan(&spec.validate().unwrap(), facts, place).unwrap_err()
}

fn check(name: &str, plan: &Plan) {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plan/snapshots").join(name).with_extension("txt");
    let text = explain(plan);
    if std::env::var_os("ROOTLET_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "the plan differs from {}:\n{text}", path.display());
}

#[test]
fn over_the_hosts_tree_with_one_id() {
    check("host-single", &planned(spec(), &ada(), &over_host()));
}

#[test]
fn over_the_hosts_tree_with_a_range() {
    check("host-range", &planned(spec(), &bob(), &over_host()));
}

#[test]
fn over_the_hosts_tree_as_root() {
    check("host-root", &planned(spec(), &root(), &over_host()));
}

#[test]
fn layers_with_everything() {
    let mut spec = spec();
    spec.fs.root = RootSpec::Layers(vec!["/l/base".into(), "/l/top".into()]);
    spec.process.inherit_env = false;
    spec.process.workdir = Some("/srv/work".into());
    spec.process.terminal = true;
    spec.process.timeout = Some(Duration::from_secs(90));
    spec.process.env =
        vec![("A".into(), Some("1".into())), ("HOSTNAME".into(), None), ("B\u{1b}".into(), Some("2".into()))];
    spec.hostname = Some("inner".into());
    spec.domainname = Some("lab".into());
    spec.time = Some(TimeSpec { monotonic: 5, boottime: -7 });
    spec.fs.volumes = vec![
        VolumeSpec { host_path: "/home/ada/f".into(), root_path: "/etc/f".into(), read_only: true },
        VolumeSpec { host_path: "/home/ada".into(), root_path: "/data".into(), read_only: false },
    ];
    spec.fs.tmpfs = vec![TmpfsSpec { root_path: "/data/cache".into(), size: Some(4096), mode: 0o700 }];
    spec.net.publish = crate::spec::parse::publish("[::1]:8080:80/udp").unwrap();
    spec.net.dns = vec![crate::spec::parse::dns("192.0.2.53").unwrap()];
    spec.net.dns_search = Some(vec!["corp.example".into()]);
    spec.net.add_host = ["db:2001:db8::5", "host.docker.internal:host-gateway"]
        .map(|text| crate::spec::parse::add_host(text).unwrap())
        .into();
    spec.net.host_loopback = crate::spec::LoopbackSpec::Ports([5432, 8000, 8001, 8002].into());
    spec.net.allow = vec!["tcp:192.0.2.0/24:443".parse().unwrap(), "[2001:db8::/32]".parse().unwrap()];
    spec.net.deny = vec!["any:25".parse().unwrap()];
    [spec.net.rate_in, spec.net.rate_out] = crate::spec::parse::network_rate("out:10mbit,burst=1m").unwrap();
    spec.remove = true;
    let mut place = place(&[("/l/base", 1000), ("/l/top", 0)]);
    place.root.places[1].kind = None;
    place.root.places.extend([
        found("/etc/f", None),
        found("/data", None),
        found("/data/cache", None),
        found("/srv/work", None),
    ]);
    place.root.volumes = vec![
        VolumeFacts { host_path: "/home/ada/f".into(), kind: Kind::File },
        VolumeFacts { host_path: "/home/ada".into(), kind: Kind::Directory },
    ];
    check("layers-everything", &planned(spec, &ada(), &place));
}

#[test]
fn what_the_gateway_cannot_be_is_told() {
    let with = |change: &dyn Fn(&mut SandboxSpec)| {
        let mut spec = spec();
        change(&mut spec);
        spec
    };
    for rule in ["10.87.0.1:5432", "tcp:10.87.0.0/25", "[fd87:726f:6f74::1]"] {
        let spec = with(&|spec| spec.net.allow = vec!["any".parse().unwrap(), rule.parse().unwrap()]);
        let error = refused(spec, &ada(), &over_host());
        assert_eq!(error, PlanError::RuleForOwnNetwork { rule: rule.into() });
        assert!(error.hint().unwrap().contains("--allow-host-loopback"));
    }
    for rule in ["10.87.0.0/16", "10.87.1.1", "[fd00::/8]"] {
        planned(with(&|spec| spec.net.allow = vec![rule.parse().unwrap()]), &ada(), &over_host());
    }
    // That they are denied changes nothing, and is true.
    planned(with(&|spec| spec.net.deny = vec!["10.87.0.0/24".parse().unwrap()]), &ada(), &over_host());
    let notes = |ports: &str| {
        let loopback = crate::spec::parse::host_loopback(ports).unwrap();
        let plan = planned(with(&|spec| spec.net.host_loopback = loopback.clone()), &ada(), &over_host());
        plan.notes.iter().filter(|note| note.weaker && note.what.contains("port 53")).count()
    };
    assert_eq!(["53", "50-60,5432", "5353,54", "all"].map(notes), [1, 1, 0, 0]);
}

#[test]
fn the_search_list_is_the_hosts_unless_another_is_given() {
    let facts = HostFacts {
        resolv: ResolvFacts {
            has_resolver: true,
            search: vec!["lan".into(), "corp.example".into()],
            ndots: Some(2),
        },
        ..ada()
    };
    let resolv_conf = |spec: SandboxSpec| {
        let plan = planned(spec, &facts, &over_host());
        let file = plan.root.generated.iter().find(|file| file.path == Path::new("etc/resolv.conf")).unwrap();
        file.content.clone().unwrap()
    };
    assert_eq!(resolv_conf(spec()), "nameserver 10.87.0.1\nsearch lan corp.example\noptions ndots:2\n");
    let mut other = spec();
    other.net.dns_search = Some(vec!["b.example".into()]);
    assert_eq!(resolv_conf(other), "nameserver 10.87.0.1\nsearch b.example\noptions ndots:2\n");
    let mut none = spec();
    none.net.dns_search = Some(Vec::new());
    assert_eq!(resolv_conf(none), "nameserver 10.87.0.1\noptions ndots:2\n");
}

#[test]
fn a_host_without_a_resolver_is_told() {
    let facts = HostFacts { resolv: ResolvFacts::default(), ..ada() };
    let told = |spec: SandboxSpec| {
        let plan = planned(spec, &facts, &over_host());
        plan.notes.iter().any(|note| note.what.contains("127.0.0.53") && note.reason.contains("--dns"))
    };
    assert!(told(spec()));
    let mut given = spec();
    given.net.dns = vec!["192.0.2.1:53".parse().unwrap()];
    assert!(!told(given));
    let mut none = spec();
    none.net.mode = NetMode::None;
    assert!(!told(none));
}

#[test]
fn host_network_and_read_only() {
    let mut spec = spec();
    spec.net.mode = NetMode::Host;
    spec.fs.read_only = true;
    let mut place = over_host();
    place.upper = None;
    check("host-network", &planned(spec, &ada(), &place));
}

#[test]
fn only_abstract_sockets_in_reach_are_weaker_than_asked() {
    let weaker = |spec: SandboxSpec, facts: &HostFacts| {
        let plan = planned(spec, facts, &over_host());
        let lines = explain(&plan).lines().filter(|line| line.starts_with("weaker ")).count();
        let notes: Vec<Note> = plan.notes.into_iter().filter(|note| note.weaker).collect();
        assert_eq!(lines, notes.len());
        notes
    };
    let mut host = spec();
    host.net.mode = NetMode::Host;
    let old = HostFacts { landlock_scopes: false, ..ada() };
    assert!(weaker(host.clone(), &old)[0].what.contains("abstract unix sockets"));
    assert_eq!(weaker(host.clone(), &ada()), []);
    host.nested = true;
    host.net.mode = NetMode::Stack;
    assert_eq!(weaker(host, &HostFacts { landlock_scopes: false, ..root() }), []);
}

#[test]
fn nested_shows_all_of_proc_and_is_not_root_outside() {
    let mut nested = spec();
    nested.nested = true;
    let plan = planned(nested.clone(), &root(), &over_host());
    assert_eq!(plan.ids.uids, [IdExtent { inside: 0, outside: 65_534, count: 1 }]);
    assert!(!plan.mounts.iter().any(|step| matches!(step, MountStep::Mask(_) | MountStep::ReadOnly(_))));
    assert_eq!(plan.confine.seccomp, SeccompPlan::Nested);
    // Inside a sandbox, root of it is nobody outside already.
    let inner = HostFacts {
        initial_userns: false,
        own_uid_map: vec![IdExtent { inside: 0, outside: 1000, count: 1 }],
        own_gid_map: vec![IdExtent { inside: 0, outside: 1000, count: 1 }],
        setgroups_denied: true,
        ..root()
    };
    assert!(planned(nested.clone(), &inner, &over_host()).ids.deny_setgroups);
    assert_eq!(
        planned(nested, &inner, &over_host()).ids.uids,
        [IdExtent { inside: 0, outside: 0, count: 1 }]
    );
}

/// A user whose service manager gave him CAP_SETUID, CAP_SETGID and CAP_SETFCAP.
fn capable() -> HostFacts {
    HostFacts { may_set_ids: true, ..ada() }
}

#[test]
fn nested_never_has_root_of_the_host_in_its_map() {
    let nested = |mut spec: SandboxSpec| {
        spec.nested = true;
        spec
    };
    let nobody = [IdExtent { inside: 0, outside: 65_534, count: 1 }];
    let plan = planned(nested(spec()), &capable(), &over_host());
    assert_eq!((&plan.ids.uids[..], &plan.ids.gids[..]), (&nobody[..], &nobody[..]));

    let own = [(0, 1000, 1)];
    for (spec, field) in [
        (with_maps(&[(0, 0, 1)], &own), "uidmap"),
        (with_maps(&[(0, 1000, 1), (1, 0, 2)], &own), "uidmap"),
        (with_maps(&own, &[(5, 0, 10)]), "gidmap"),
    ] {
        for facts in [root(), capable()] {
            let error = refused(nested(spec.clone()), &facts, &over_host());
            assert!(error.to_string().starts_with(&format!("{field}: cannot map")), "{error}");
            assert!(error.hint().is_some());
            // Without --nested /proc/sys is read-only.
            planned(spec.clone(), &facts, &over_host());
        }
    }
    // Root without capabilities can map itself only.
    let powerless = HostFacts { may_set_ids: false, ..root() };
    assert!(matches!(
        refused(nested(spec()), &powerless, &over_host()),
        PlanError::RootInNested { field: "uidmap", .. }
    ));
    // The map of an ordinary user is as before.
    assert_eq!(planned(nested(spec()), &ada(), &over_host()).ids.uids[0].outside, 1000);
}

#[test]
fn root_of_the_host_in_the_map_is_told_of() {
    let told = |spec: SandboxSpec, facts: &HostFacts| {
        planned(spec, facts, &over_host())
            .notes
            .iter()
            .any(|note| note.what.ends_with("inside is root outside"))
    };
    assert!(told(spec(), &root()) && told(spec(), &capable()));
    assert!(told(with_maps(&[(7, 0, 1)], &[(0, 1000, 1)]), &root()));
    assert!(!told(spec(), &ada()));
    assert!(!told(spec(), &HostFacts { initial_userns: false, ..root() }));
}

#[test]
fn a_namespace_of_more_extents_than_the_filter_takes_is_refused() {
    let extents =
        |count: u32| (0..count).map(|id| IdExtent { inside: 2 * id, outside: id, count: 1 }).collect();
    let facts = |count| HostFacts { initial_userns: false, own_uid_map: extents(count), ..root() };
    assert_eq!(planned(spec(), &facts(128), &over_host()).ids.uids.len(), 128);
    assert!(matches!(
        refused(spec(), &facts(129), &over_host()),
        PlanError::TooManyExtents { field: "uidmap", count: 129 }
    ));
}

#[test]
fn a_range_needs_helpers_that_can_work() {
    for facts in [
        HostFacts { newuidmap: None, ..bob() },
        HostFacts { no_new_privs: true, ..bob() },
        HostFacts { subgids: None, ..bob() },
        HostFacts { own_uid_map: vec![IdExtent { inside: 1001, outside: 0, count: 1 }], ..bob() },
    ] {
        let plan = planned(spec(), &facts, &over_host());
        assert_eq!(plan.ids.single(), Some((0, 0)));
        assert_eq!(plan.ids.writer, MapWriter::Setup);
        assert!(plan.ids.deny_setgroups);
    }
}

fn as_user(text: &str) -> SandboxSpec {
    let mut spec = spec();
    spec.process.user = Some(crate::spec::parse::user(text).unwrap());
    spec
}

#[test]
fn the_single_id_is_the_users() {
    let single = |text: &str| {
        let plan = planned(as_user(text), &ada(), &over_host());
        let user = plan.process.user.clone().unwrap();
        (plan.ids.single().unwrap(), format!("{}:{}", user.user, user.group.unwrap()))
    };
    assert_eq!(single("1234:4321"), ((1234, 4321), "1234:4321".into()));
    assert_eq!(single("33"), ((33, 33), "33:33".into()));
    assert_eq!(single("root"), ((0, 0), "0:0".into()));
    let error = refused(as_user("www-data"), &ada(), &over_host());
    assert!(matches!(&error, PlanError::NameInSingleMap { name, .. } if name == "www-data"));
    assert!(error.hint().unwrap().contains("--add-subuids 165536-231071"), "{:?}", error.hint());
}

#[test]
fn with_a_range_the_user_is_looked_up_inside() {
    let plan = planned(as_user("www-data"), &bob(), &over_host());
    assert_eq!(plan.process.user, as_user("www-data").process.user);
}

fn with_maps(uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)]) -> SandboxSpec {
    let extents = |list: &[(u32, u32, u32)]| {
        Some(list.iter().map(|&(inside, outside, count)| IdExtent { inside, outside, count }).collect())
    };
    let mut spec = spec();
    spec.ids = IdsSpec { uid_map: extents(uids), gid_map: extents(gids) };
    spec
}

#[test]
fn given_maps_get_the_writer_that_can() {
    let own = with_maps(&[(5, 1000, 1)], &[(6, 1000, 1)]);
    assert_eq!(planned(own, &ada(), &over_host()).ids.writer, MapWriter::Setup);
    let range = with_maps(&[(0, 200_000, 10), (10, 1001, 1)], &[(0, 300_000, 10)]);
    assert!(matches!(planned(range.clone(), &bob(), &over_host()).ids.writer, MapWriter::Helpers { .. }));
    assert_eq!(planned(range, &root(), &over_host()).ids.writer, MapWriter::Supervisor);
}

#[test]
fn maps_that_nobody_can_write_are_refused() {
    let text = |spec, facts: &HostFacts| {
        let error = refused(spec, facts, &over_host());
        format!("{error}; {}", error.hint().unwrap_or_default())
    };
    let foreign = text(with_maps(&[(0, 0, 1)], &[(0, 1000, 1)]), &ada());
    assert!(foreign.starts_with("uidmap: cannot map 0:0:1: an ordinary user"), "{foreign}");
    let beyond = text(with_maps(&[(0, 1001, 1)], &[(0, 300_999, 2)]), &bob());
    assert!(beyond.starts_with("gidmap: cannot map 0:300999:2"), "{beyond}");
    assert!(beyond.ends_with("your range 300000:1000"), "{beyond}");
    let inner = HostFacts { own_uid_map: vec![IdExtent { inside: 0, outside: 0, count: 10 }], ..root() };
    let absent = text(with_maps(&[(0, 5, 6)], &[(0, 0, 1)]), &inner);
    assert!(absent.contains("do not exist in the caller's own user namespace"), "{absent}");
}

#[test]
fn mount_points_that_cannot_be_are_refused() {
    let mut spec = spec();
    spec.fs.tmpfs = vec![TmpfsSpec { root_path: "/etc/passwd".into(), size: None, mode: 0o755 }];
    for kind in [Kind::File, Kind::Blocked] {
        let mut place = over_host();
        place.root.places.push(found("/etc/passwd", Some(kind)));
        assert!(matches!(refused(spec.clone(), &ada(), &place), PlanError::MountPoint { .. }));
    }
}

#[test]
fn an_upper_over_the_hosts_tree_is_hidden() {
    let mut place = over_host();
    place.upper = Some(UpperPlan { dir: "/data/changes".into(), work: "/data/.changes.rootlet-work".into() });
    let hidden = &planned(spec(), &ada(), &place).root.layers[0].hidden;
    assert!(hidden.contains(&"data/changes".into()) && hidden.contains(&"data/.changes.rootlet-work".into()));
}

#[test]
fn an_upper_in_a_volume_is_masked() {
    let mut spec = spec();
    spec.fs.volumes =
        vec![VolumeSpec { host_path: "/data".into(), root_path: "/mnt".into(), read_only: false }];
    let mut place = over_host();
    place.root.places.push(found("/mnt", Some(Kind::Directory)));
    place.root.volumes = vec![VolumeFacts { host_path: "/data".into(), kind: Kind::Directory }];
    let masked = |place: &BoxPlace| {
        let plan = planned(spec.clone(), &ada(), place);
        let below = |step: &MountStep| match step {
            MountStep::Mask(path) if path.starts_with("/mnt") => Some(path.clone()),
            _ => None,
        };
        plan.mounts.iter().filter_map(below).collect::<Vec<_>>()
    };
    assert!(masked(&place).is_empty());
    place.upper =
        Some(UpperPlan { dir: "/data/x/changes".into(), work: "/data/x/.changes.rootlet-work".into() });
    assert_eq!(
        masked(&place),
        [PathBuf::from("/mnt/x/changes"), PathBuf::from("/mnt/x/.changes.rootlet-work")]
    );
}

#[test]
fn the_state_directory_is_hidden_in_layers_too() {
    let mut spec = spec();
    spec.fs.root = RootSpec::Layers(vec!["/home/ada".into()]);
    let plan = planned(spec, &ada(), &place(&[("/home/ada", 1000)]));
    assert_eq!(plan.root.layers[0].hidden, [PathBuf::from(".local/state/rootlet")]);
}

#[test]
fn a_working_directory_that_is_hidden_is_left() {
    let facts = HostFacts { current_dir: Some("/run/user/1000".into()), ..ada() };
    let plan = planned(spec(), &facts, &over_host());
    assert_eq!(plan.process.workdir, PathBuf::from("/"));
    assert!(plan.notes.iter().any(|note| note.reason.contains("/run/user/1000")));
}

#[test]
fn variables_of_the_session_come_back_by_name_only() {
    let value = |plan: &Plan, name: &str| {
        plan.process.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    };
    assert_eq!(value(&planned(spec(), &ada(), &over_host()), "SSH_AUTH_SOCK"), None);
    let mut asked = spec();
    asked.process.env = vec![("SSH_AUTH_SOCK".into(), Some("/run/agent".into())), ("HOME".into(), None)];
    let plan = planned(asked, &ada(), &over_host());
    assert_eq!(value(&plan, "SSH_AUTH_SOCK"), Some(OsString::from("/run/agent")));
    assert_eq!(value(&plan, "HOME"), None);
    assert_eq!(value(&plan, "container"), Some(OsString::from("rootlet")));
}

#[test]
fn root_finds_the_programs_of_root() {
    let path = |spec: SandboxSpec, caller: &str| {
        let facts = HostFacts { environ: vec![("PATH".into(), caller.into())], ..bob() };
        let plan = planned(spec, &facts, &over_host());
        plan.process.env.into_iter().find(|(name, _)| name == "PATH").map(|(_, value)| value)
    };
    let all = "/home/ada/bin:/usr/bin:/usr/local/sbin:/usr/sbin:/sbin";
    assert_eq!(path(spec(), "/home/ada/bin:/usr/bin"), Some(all.into()));
    assert_eq!(path(spec(), all), Some(all.into()));
    assert_eq!(path(spec(), "/sbin:/bin"), Some("/sbin:/bin:/usr/local/sbin:/usr/sbin".into()));
    assert_eq!(path(as_user("12"), "/usr/bin"), Some("/usr/bin".into()));
    let mut asked = spec();
    asked.process.env = vec![("PATH".into(), Some("/bin".into()))];
    assert_eq!(path(asked, "/usr/bin"), Some("/bin".into()));
}

#[test]
fn home_is_the_users() {
    let home = |text: &str, home: Option<&str>, host: bool| {
        let mut spec = as_user(text);
        spec.process.inherit_env = host;
        let mut place = over_host();
        place.root.home = home.map(PathBuf::from);
        let plan = planned(spec, &bob(), &place);
        plan.process.env.into_iter().find(|(name, _)| name == "HOME").map(|(_, value)| value)
    };
    assert_eq!(home("www-data", Some("/var/www"), true), Some("/var/www".into()));
    assert_eq!(home("www-data", Some("/var/www"), false), Some("/var/www".into()));
    assert_eq!(home("12", None, false), Some("/".into()));
    assert_eq!(home("0", None, false), Some("/root".into()));
    assert_eq!(home("12", None, true), Some("/home/ada".into()));
}

#[test]
fn json_shows_no_values_of_variables() {
    let plan = planned(spec(), &ada(), &over_host());
    let json = explain_json(&plan);
    assert_eq!(json["process"]["env"][0], "PATH");
    assert!(!json.to_string().contains("/home/ada/bin"));
    let whole = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&whole).unwrap(), plan);
}
