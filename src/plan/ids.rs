//! Which ids exist inside, and who can write the maps (user_namespaces(7)).
//!
//! | caller | map | writer |
//! |---|---|---|
//! | may set ids (root, also of a sandbox) | every id of its own namespace, as it is | supervisor |
//! | the same in the initial namespace, with `--nested` | 0 → 65534 | supervisor |
//! | has subordinate ranges and usable helpers | 0 → own, 1… → the range | newuidmap, newgidmap |
//! | anybody else | 0 or a numeric `--user` → own | setup |
//!
//! Whatever the way, no sandbox with `--nested` has uid 0 of the initial namespace in its map:
//! /proc/sys is not covered then, and what the kernel asks of a writer there is that uid, not a
//! capability.

use super::{IdPlan, MapWriter, Note, PlanError};
use crate::host::HostFacts;
use crate::host::hints;
use crate::spec::{EXTENTS_MAX, IdExtent, UserSpec, ValidSpec};

/// The id of nobody(8): owns nothing on a host.
const NOBODY: u32 = 65_534;
/// As many ids as images expect, 0 included.
const IDS_MAX: u32 = 65_536;

const fn one(inside: u32, outside: u32) -> IdExtent {
    IdExtent { inside, outside, count: 1 }
}

/// Decides the maps.
pub(super) fn plan_ids(
    spec: &ValidSpec,
    facts: &HostFacts,
    notes: &mut Vec<Note>,
) -> Result<IdPlan, PlanError> {
    let ids = choose(spec, facts, notes)?;
    for (field, extents) in [("uidmap", &ids.uids), ("gidmap", &ids.gids)] {
        // Given maps are validated; the caller's own namespace may have more.
        if extents.len() > EXTENTS_MAX {
            return Err(PlanError::TooManyExtents { field, count: extents.len() });
        }
    }
    if facts.initial_userns {
        if spec.nested {
            refuse_root(spec, &ids)?;
        }
        if let Some(extent) = outside_root(&ids.uids) {
            let inside = if extent.inside == 0 { "root".into() } else { format!("uid {}", extent.inside) };
            notes.push(Note::new(
                format!("{inside} inside is root outside"),
                "what it reaches through volumes it owns as root",
            ));
        }
    }
    Ok(ids)
}

/// The extent that leads to id 0 outside.
fn outside_root(extents: &[IdExtent]) -> Option<&IdExtent> {
    extents.iter().find(|extent| extent.outside == 0)
}

fn refuse_root(spec: &ValidSpec, ids: &IdPlan) -> Result<(), PlanError> {
    // A gid of 0 that was not asked for is an ordinary caller's own, and opens nothing there.
    let gids = spec.ids.gid_map.as_deref().unwrap_or_default();
    for (field, extents) in [("uidmap", ids.uids.as_slice()), ("gidmap", gids)] {
        if let Some(extent) = outside_root(extents) {
            return Err(PlanError::RootInNested {
                field,
                inside: extent.inside,
                outside: extent.outside,
                count: extent.count,
            });
        }
    }
    Ok(())
}

fn choose(spec: &ValidSpec, facts: &HostFacts, notes: &mut Vec<Note>) -> Result<IdPlan, PlanError> {
    if let (Some(uids), Some(gids)) = (&spec.ids.uid_map, &spec.ids.gid_map) {
        return plan_given(uids, gids, facts);
    }
    if facts.may_set_ids {
        if spec.nested && facts.initial_userns {
            notes.push(Note::new(
                format!("root inside is uid {NOBODY} outside, not root"),
                "with --nested /proc/sys is not covered, and uid 0 could write to it",
            ));
            let (uid, gid) = single_ids(spec, facts)?;
            return Ok(IdPlan {
                uids: vec![one(uid, NOBODY)],
                gids: vec![one(gid, NOBODY)],
                writer: MapWriter::Supervisor,
                deny_setgroups: facts.setgroups_denied,
            });
        }
        let as_they_are = |map: &[IdExtent]| -> Vec<IdExtent> {
            map.iter().map(|e| IdExtent { outside: e.inside, ..*e }).collect()
        };
        return Ok(IdPlan {
            uids: as_they_are(&facts.own_uid_map),
            gids: as_they_are(&facts.own_gid_map),
            writer: MapWriter::Supervisor,
            deny_setgroups: facts.setgroups_denied,
        });
    }
    match ranges(facts) {
        Ok((subuids, subgids, writer)) => Ok(IdPlan {
            uids: with_range(facts.uid, subuids),
            gids: with_range(facts.gid, subgids),
            writer,
            deny_setgroups: facts.setgroups_denied,
        }),
        Err(reason) => {
            let (uid, gid) = single_ids(spec, facts)?;
            notes.push(Note::new("one user id and one group id inside", reason));
            Ok(IdPlan {
                uids: vec![one(uid, facts.uid)],
                gids: vec![one(gid, facts.gid)],
                writer: MapWriter::Setup,
                deny_setgroups: true,
            })
        }
    }
}

fn with_range(own: u32, (first, count): (u32, u32)) -> Vec<IdExtent> {
    vec![one(0, own), IdExtent { inside: 1, outside: first, count: count.min(IDS_MAX - 1) }]
}

type Ranges = ((u32, u32), (u32, u32), MapWriter);

/// The subordinate ranges, if they can be mapped, or why not.
fn ranges(facts: &HostFacts) -> Result<Ranges, &'static str> {
    let (Some(subuids), Some(subgids)) = (facts.subuids, facts.subgids) else {
        return Err("the caller has no range in /etc/subuid and /etc/subgid");
    };
    let (Some(newuidmap), Some(newgidmap)) = (facts.newuidmap.clone(), facts.newgidmap.clone()) else {
        return Err("newuidmap and newgidmap are not installed, or lack their privilege");
    };
    if facts.no_new_privs {
        return Err("no_new_privs is set, so newuidmap would run without its privilege");
    }
    let whole = |(first, count): (u32, u32)| IdExtent { inside: 0, outside: first, count };
    if !covered(&facts.own_uid_map, &whole(subuids)) || !covered(&facts.own_gid_map, &whole(subgids)) {
        return Err("the caller is in a user namespace that lacks the subordinate range");
    }
    Ok((subuids, subgids, MapWriter::Helpers { newuidmap, newgidmap }))
}

/// Whether every outside id of `extent` exists in the caller's namespace.
fn covered(own: &[IdExtent], extent: &IdExtent) -> bool {
    let mut at = u64::from(extent.outside);
    let end = at + u64::from(extent.count);
    while at < end {
        let next = own
            .iter()
            .map(|e| (u64::from(e.inside), u64::from(e.inside) + u64::from(e.count)))
            .find(|(first, last)| *first <= at && at < *last);
        match next {
            Some((_, last)) => at = last,
            None => return false,
        }
    }
    true
}

/// The one uid and gid inside. Names other than root's are the sandbox's own business and
/// cannot be read before its root exists.
fn single_ids(spec: &ValidSpec, facts: &HostFacts) -> Result<(u32, u32), PlanError> {
    let Some(user) = &spec.process.user else { return Ok((0, 0)) };
    let id_of = |name: &str| match (name, name.parse::<u32>()) {
        (_, Ok(id)) => Ok(id),
        ("root", _) => Ok(0),
        _ => Err(PlanError::NameInSingleMap {
            name: name.to_owned(),
            hint: format!("give a number instead, or more ids: {}", hints::mend_subids(facts)),
        }),
    };
    let uid = id_of(&user.user)?;
    let gid = user.group.as_deref().map_or(Ok(uid), id_of)?;
    Ok((uid, gid))
}

/// Who the payload runs as: with one id only, both parts are spelled out, so that the
/// /etc/passwd inside cannot lead to an id that does not exist.
pub(super) fn plan_user(spec: &ValidSpec, ids: &IdPlan) -> Option<UserSpec> {
    let user = spec.process.user.as_ref()?;
    if spec.ids.uid_map.is_none()
        && let Some((uid, gid)) = ids.single()
    {
        return Some(UserSpec { user: uid.to_string(), group: Some(gid.to_string()) });
    }
    Some(user.clone())
}

fn plan_given(uids: &[IdExtent], gids: &[IdExtent], facts: &HostFacts) -> Result<IdPlan, PlanError> {
    let refuse = |field, extent: &IdExtent, reason, hint| {
        Err(PlanError::UnwritableMap {
            field,
            inside: extent.inside,
            outside: extent.outside,
            count: extent.count,
            reason,
            hint,
        })
    };
    let maps = [
        ("uidmap", uids, &facts.own_uid_map, facts.uid, facts.subuids),
        ("gidmap", gids, &facts.own_gid_map, facts.gid, facts.subgids),
    ];
    for (field, extents, own_map, ..) in maps {
        if let Some(extent) = extents.iter().find(|extent| !covered(own_map, extent)) {
            return refuse(
                field,
                extent,
                "the ids outside do not exist in the caller's own user namespace",
                None,
            );
        }
    }
    let plan = |writer, deny_setgroups| {
        Ok(IdPlan { uids: uids.to_vec(), gids: gids.to_vec(), writer, deny_setgroups })
    };
    if facts.may_set_ids {
        return plan(MapWriter::Supervisor, facts.setgroups_denied);
    }
    let only_own =
        |extents: &[IdExtent], own: u32| matches!(extents, [e] if e.outside == own && e.count == 1);
    if only_own(uids, facts.uid) && only_own(gids, facts.gid) {
        return plan(MapWriter::Setup, true);
    }
    for (field, extents, _, own, subordinate) in maps {
        let allowed = |extent: &IdExtent| {
            let in_range = subordinate.is_some_and(|(first, count)| {
                extent.outside >= first
                    && u64::from(extent.outside) + u64::from(extent.count)
                        <= u64::from(first) + u64::from(count)
            });
            in_range || (extent.outside == own && extent.count == 1)
        };
        if let Some(extent) = extents.iter().find(|extent| !allowed(extent)) {
            let reason = "an ordinary user may map his own id and his subordinate range only";
            let hint = match subordinate {
                Some((first, count)) => format!("your own id is {own}, your range {first}:{count}"),
                None => format!("your own id is {own}; for a range: {}", hints::mend_subids(facts)),
            };
            return refuse(field, extent, reason, Some(hint));
        }
    }
    match ranges(facts) {
        Ok((_, _, writer)) => plan(writer, facts.setgroups_denied),
        Err(reason) => {
            let (field, extents) =
                if only_own(uids, facts.uid) { ("gidmap", gids) } else { ("uidmap", uids) };
            match extents.first() {
                Some(extent) => refuse(field, extent, reason, Some(hints::mend_subids(facts))),
                // Validation refuses empty maps.
                None => plan(MapWriter::Setup, true),
            }
        }
    }
}
