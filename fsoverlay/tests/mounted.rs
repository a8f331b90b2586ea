//! Mounts for real; see `examples/mount.rs`.

fn main() {}
