//! Builds the programs again when the linker changes.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
}
