//! `cargo xtask bpf-stats`: how long the BPF programs are.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};
use serde_json::Value;

use crate::{artifacts, shell, ui};

/// Count the instructions of each BPF program
#[derive(Debug, clap::Args)]
pub(crate) struct BpfStats {}

impl BpfStats {
    pub(crate) fn run(self) -> Result<()> {
        /// Bytes of an instruction. The loads of 64-bit constants have two, and the kernel counts them as two.
        const INSTRUCTION: u64 = 8;

        let object = build()?;
        let bytes = fs::read(&object).with_context(|| format!("failed to read {}", object.display()))?;
        let file = object::File::parse(&*bytes).with_context(|| format!("failed to parse {}", object.display()))?;
        let mut rows = vec![["section", "function", "instructions"].map(str::to_owned)];
        let mut total = 0;
        for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
            let Some(section) = symbol.section_index() else { continue };
            let section = file.section_by_index(section)?;
            let instructions = symbol.size() / INSTRUCTION;
            total += instructions;
            rows.push([section.name()?.to_owned(), symbol.name()?.to_owned(), instructions.to_string()]);
        }
        rows.push(["total".to_owned(), String::new(), total.to_string()]);
        ui::table(&rows);
        Ok(())
    }
}

/// Builds netlb and tells where its build script put the object.
fn build() -> Result<PathBuf> {
    let messages = shell::output(artifacts::build().args(["--message-format", "json-render-diagnostics"]))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "build-script-executed")
        .filter_map(|message| Some(PathBuf::from(message["out_dir"].as_str()?).join("netlb-bpf")))
        .find(|object| object.exists())
        .context("cargo ran no build script that left a netlb-bpf")
}
