//! Names made up for boxes: two words a person can say and remember.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

const FIRST: [&str; 64] = [
    "able", "amber", "apt", "ashen", "bold", "brave", "brisk", "bright", "calm", "candid", "clear", "clever",
    "cool", "coral", "crisp", "dapper", "deft", "eager", "early", "easy", "fair", "fancy", "fleet", "fond",
    "free", "fresh", "gentle", "glad", "golden", "grand", "green", "happy", "hardy", "jolly", "keen", "kind",
    "late", "lively", "lucky", "mellow", "merry", "mild", "neat", "nimble", "noble", "open", "plain",
    "polite", "proud", "quick", "quiet", "rapid", "ready", "sharp", "silent", "sleek", "smart", "solid",
    "spry", "steady", "sunny", "swift", "tidy", "vivid",
];
const SECOND: [&str; 64] = [
    "badger", "beaver", "bison", "bobcat", "camel", "condor", "cougar", "coyote", "crane", "curlew", "dingo",
    "dolphin", "donkey", "eagle", "egret", "falcon", "ferret", "finch", "gecko", "gibbon", "goose", "heron",
    "hornet", "ibex", "iguana", "jackal", "jaguar", "kestrel", "koala", "lemur", "lizard", "llama", "lynx",
    "macaw", "magpie", "marmot", "marten", "mole", "moose", "newt", "ocelot", "oriole", "osprey", "otter",
    "panda", "parrot", "pelican", "pigeon", "plover", "puffin", "rabbit", "raven", "robin", "salmon", "seal",
    "sparrow", "stork", "swan", "tapir", "toucan", "turtle", "walrus", "weasel", "wombat",
];

/// Makes up a name. After a few that are taken, a number makes it longer.
pub(super) fn make_up(attempt: u32) -> String {
    // The seed of every RandomState comes from the kernel.
    let random = RandomState::new().build_hasher().finish();
    let pick = |shift: u32| usize::from(u8::try_from((random >> shift) & 0x3f).unwrap_or(0));
    let name = format!("{}-{}", FIRST[pick(0)], SECOND[pick(8)]);
    if attempt < 4 { name } else { format!("{name}-{}", (random >> 16) % 100_000) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_and_differ() {
        let names: std::collections::HashSet<String> = (0..64).map(make_up).collect();
        for name in &names {
            crate::spec::check_box_name(name).unwrap();
        }
        assert!(names.len() > 32, "{}", names.len());
    }
}
