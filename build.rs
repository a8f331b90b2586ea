//! Tells the linker where the kernel enters the program: `src/sys/exec_stage.rs` says why.

fn main() {
    println!("cargo::rustc-link-arg-bins=-Wl,-e,rootlet_start");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CARGO_ENCODED_RUSTFLAGS");
    let set = |name: &str, wanted: &str| {
        std::env::var(name)
            .is_ok_and(|value| value.split([',', '\x1f', ' ']).any(|word| word.ends_with(wanted)))
    };
    // What is static and yet relocates itself would run that entry's code before it has done so.
    if set("CARGO_CFG_TARGET_FEATURE", "crt-static")
        && !set("CARGO_ENCODED_RUSTFLAGS", "relocation-model=static")
    {
        println!(
            "cargo::error=a static rootlet needs `-C relocation-model=static`: RUSTFLAGS replaces the flags of \
             .cargo/config.toml, so give both there, or neither"
        );
    }
}
