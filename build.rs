//! Tells the linker where the kernel enters the program: `src/sys/exec_stage.rs` says why.

fn main() {
    println!("cargo::rustc-link-arg-bins=-Wl,-e,rootlet_start");
    println!("cargo::rerun-if-changed=build.rs");
}
