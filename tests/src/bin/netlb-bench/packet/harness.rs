//! The harness: a program under test, run on packets of many flows.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use aya::programs::{Program, ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, Pod};
use netlb_integration::lab;

use super::cases::{Case, Hook, Packets};
use super::plan::Plan;
use crate::report::Instructions;

// SAFETY: plain words without padding.
unsafe impl Pod for Plan {}

/// The type of a program.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Tc,
    Xdp,
}

impl Kind {
    /// The program of this type that does nothing.
    pub(crate) const fn floor(self) -> &'static str {
        match self {
            Self::Tc => "tc_next",
            Self::Xdp => "xdp_pass",
        }
    }
}

/// What a program is there for.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Does nothing of netlb's, with this answer.
    Floor(Kind, i32),
    Hook(Hook),
}

/// A loaded program to be measured.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    place: Place,
    pub(crate) instructions: Instructions,
    program: OwnedFd,
}

impl Target {
    /// One of netlb's.
    pub(crate) fn new(name: &'static str, hook: Hook, program: BorrowedFd<'_>) -> Result<Self> {
        Self::at(name, Place::Hook(hook), program)
    }

    fn at(name: &'static str, place: Place, program: BorrowedFd<'_>) -> Result<Self> {
        let instructions = instructions(program).with_context(|| format!("failed to ask how long {name} is"))?;
        Ok(Self { name, place, instructions, program: program.try_clone_to_owned()? })
    }

    pub(crate) fn kind(&self) -> Kind {
        match self.place {
            Place::Floor(kind, _) => kind,
            Place::Hook(Hook::Xdp) => Kind::Xdp,
            Place::Hook(Hook::Ingress | Hook::Egress) => Kind::Tc,
        }
    }

    /// Where it runs, if it is one of netlb's.
    pub(crate) fn hook(&self) -> Option<Hook> {
        match self.place {
            Place::Floor(..) => None,
            Place::Hook(hook) => Some(hook),
        }
    }

    /// What the program should answer in a case.
    pub(crate) fn verdict(&self, case: &Case) -> i32 {
        match self.place {
            Place::Floor(_, verdict) => verdict,
            Place::Hook(hook) => case.verdict(hook),
        }
    }
}

/// What came of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Of the last packet.
    pub(crate) verdict: i32,
    /// For one packet, in the mean. The kernel cuts it to whole ones, and leaves out when others had the CPU.
    pub(crate) nanoseconds: f64,
}

/// The harness programs and their maps.
pub(crate) struct Harness {
    ebpf: Ebpf,
    plan: Array<MapData, Plan>,
    tc_target: Array<MapData, u32>,
    xdp_target: Array<MapData, u32>,
}

impl Harness {
    /// Loads the programs. The calling thread is in a lab's network namespace.
    pub(crate) fn load(object: &Path) -> Result<Self> {
        let mut ebpf = Ebpf::load(&std::fs::read(object)?)?;
        for (name, program) in ebpf.programs_mut() {
            let loaded = match program {
                Program::SchedClassifier(program) => program.load(),
                Program::Xdp(program) => program.load(),
                _ => continue,
            };
            loaded.with_context(|| format!("failed to load the program {name}"))?;
        }
        // A packet comes in by a queue, and these devices have queues for XDP only while a program is attached. It is this program because
        // the kernel, which calls XDP programs through a table, would otherwise change that table before and after each run, and wait.
        let program: &mut Xdp =
            ebpf.program_mut("xdp_harness").context("there is no program xdp_harness")?.try_into()?;
        for interface in ["clients", "backends"] {
            program
                .attach(interface, XdpMode::Driver)
                .with_context(|| format!("failed to attach XDP to {interface}"))?;
        }
        Ok(Self {
            plan: Array::try_from(ebpf.take_map("PLAN").context("there is no map PLAN")?)?,
            tc_target: program_array(&mut ebpf, "TC_TARGET")?,
            xdp_target: program_array(&mut ebpf, "XDP_TARGET")?,
            ebpf,
        })
    }

    /// The programs that do nothing of netlb's.
    pub(crate) fn floors(&self) -> Result<Vec<Target>> {
        let floors = [
            ("xdp_pass", Kind::Xdp, lab::XDP_PASS),
            ("xdp_tx", Kind::Xdp, lab::XDP_TX),
            ("tc_next", Kind::Tc, lab::PASS),
        ];
        let target = |(name, kind, verdict)| Target::at(name, Place::Floor(kind, verdict), self.program(name, kind)?);
        floors.into_iter().map(target).collect()
    }

    /// The program that only needs the [memory](Case::memory) of a case.
    pub(crate) fn memory(&self) -> Result<Target> {
        let (name, kind) = ("xdp_memory", Kind::Xdp);
        Target::at(name, Place::Floor(kind, lab::XDP_PASS), self.program(name, kind)?)
    }

    /// Makes a program the one under test.
    pub(crate) fn aim(&mut self, target: &Target) -> Result<()> {
        let map = match target.kind() {
            Kind::Tc => &mut self.tc_target,
            Kind::Xdp => &mut self.xdp_target,
        };
        let program = target.program.as_raw_fd().cast_unsigned();
        map.set(0, program, 0).with_context(|| format!("failed to call {} from the harness", target.name))
    }

    /// Begins with these packets.
    pub(crate) fn plan(&mut self, packets: &Packets) -> Result<()> {
        Ok(self.plan.set(0, packets.plan, 0)?)
    }

    /// Runs that many of the planned packets, which go on from those before.
    pub(crate) fn run(&self, kind: Kind, packets: &Packets, count: u32) -> Result<Run> {
        let mut context = match kind {
            // `struct __sk_buff`, with `ifindex`.
            Kind::Tc => vec![0; 192],
            // `struct xdp_md`, with `data_end` and `ingress_ifindex`.
            Kind::Xdp => vec![0; 24],
        };
        let mut put = |at: usize, value: u32| context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        match kind {
            Kind::Tc => put(40, packets.interface),
            Kind::Xdp => {
                put(4, packets.frame.len() as u32);
                put(12, packets.interface);
            }
        }
        let options = TestRunOptions {
            data_in: Some(&packets.frame),
            ctx_in: Some(&context),
            repeat: count,
            ..TestRunOptions::new()
        };
        let result = match kind {
            Kind::Tc => <&SchedClassifier>::try_from(self.named("tc_harness")?)?.test_run(options),
            Kind::Xdp => <&Xdp>::try_from(self.named("xdp_harness")?)?.test_run(options),
        };
        let result = result.context("failed to run the harness")?;
        Ok(Run { verdict: result.return_value.cast_signed(), nanoseconds: result.duration.as_nanos() as f64 })
    }

    fn program(&self, name: &str, kind: Kind) -> Result<BorrowedFd<'_>> {
        let program = self.named(name)?;
        let fd: &ProgramFd = match kind {
            Kind::Tc => <&SchedClassifier>::try_from(program)?.fd()?,
            Kind::Xdp => <&Xdp>::try_from(program)?.fd()?,
        };
        Ok(fd.as_fd())
    }

    fn named(&self, name: &str) -> Result<&Program> {
        self.ebpf.program(name).with_context(|| format!("there is no program {name}"))
    }
}

/// A map of programs as one of their descriptors, because programs that something else loaded are not ones that the loader knows.
fn program_array(ebpf: &mut Ebpf, name: &str) -> Result<Array<MapData, u32>> {
    match ebpf.take_map(name) {
        Some(Map::ProgramArray(map)) => Ok(Array::try_from(Map::Array(map))?),
        _ => anyhow::bail!("there is no map {name} of programs"),
    }
}

fn instructions(program: BorrowedFd<'_>) -> Result<Instructions> {
    /// Bytes of an instruction.
    const INSTRUCTION: u32 = 8;
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
    let id = text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok());
    let id: u32 = id.context("the kernel does not tell a program's id")?;
    // Programs of others may end while they are listed.
    let info = aya::programs::loaded_programs().flatten().find(|info| info.id() == id);
    let info = info.context("the kernel does not list a program")?;
    Ok(Instructions {
        verified: info.verified_instruction_count().unwrap_or_default(),
        translated: info.size_translated().unwrap_or_default() / INSTRUCTION,
    })
}
