//! `netlb.toml`: read, checked, and turned into what the daemon works with.
//!
//! Every key is optional, an unknown one is refused, and an error says where it is. Values that exist are valid: the sections' types
//! refuse what is out of range while they are read, so that the error has the position of the value.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::Spanned;

use crate::{
    model::{Claims, Service, describe_claim},
    spec::ServiceSpec,
};

pub use self::{
    diagnostic::Diagnostic,
    duration::{format_duration, parse_duration},
    glob::Glob,
    networks::{Cidrs, NodePortAddresses},
    sections::{
        Api, Attach, Dsr, Forwarding, Limits, Log, LogFormat, LogLevel, Masquerade, Node, Snat, Socket, SocketScope,
        TcxOrder, Timeouts, Xdp,
    },
};

mod diagnostic;
mod duration;
mod glob;
mod networks;
mod sections;
#[cfg(test)]
mod tests;

/// A configuration file, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    pub node: Node,
    pub socket: Socket,
    pub api: Api,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub snat: Snat,
    pub masquerade: Masquerade,
    pub dsr: Dsr,
    pub log: Log,
    pub services: Vec<Service>,
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Invalid(Box<Diagnostic>),
}

impl ConfigError {
    /// The error on one line.
    #[must_use]
    pub fn summary(&self) -> String {
        match self {
            Self::Read { source, .. } => format!("{self}: {source}"),
            Self::Invalid(diagnostic) => diagnostic.summary(),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&path.display().to_string(), &text)
    }

    /// Checks a file's text; `file` is its name in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text)
            .map_err(|error| ConfigError::Invalid(Box::new(Diagnostic::from_toml(file, text, &error))))?;
        let RawConfig { node, socket, api, limits, timeouts, snat, masquerade, dsr, log, service } = raw;
        let services = check_services(file, text, service)?;
        Ok(Self { node, socket, api, limits, timeouts, snat, masquerade, dsr, log, services })
    }

    /// The sections in which the two differ and that are read at start only.
    #[must_use]
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        [
            ("[node]", self.node != new.node),
            ("[socket]", self.socket != new.socket),
            ("[api]", self.api != new.api),
            ("[limits]", self.limits != new.limits),
            ("[timeouts]", self.timeouts != new.timeouts),
            ("[snat]", self.snat != new.snat),
            ("[masquerade]", self.masquerade != new.masquerade),
            ("[dsr]", self.dsr != new.dsr),
            ("[log]", self.log != new.log),
        ]
        .into_iter()
        .filter_map(|(section, differs)| differs.then_some(section))
        .collect()
    }
}

/// Reads the services of a file for `netlb apply`: `[[service]]` tables and nothing else.
pub fn parse_services(file: &str, text: &str) -> Result<Vec<Service>, ConfigError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct ServicesOnly {
        #[serde(default)]
        service: Vec<Spanned<ServiceSpec>>,
    }
    let raw: ServicesOnly = toml::from_str(text)
        .map_err(|error| ConfigError::Invalid(Box::new(Diagnostic::from_toml(file, text, &error))))?;
    check_services(file, text, raw.service)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default)]
    node: Node,
    #[serde(default)]
    socket: Socket,
    #[serde(default)]
    api: Api,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    timeouts: Timeouts,
    #[serde(default)]
    snat: Snat,
    #[serde(default)]
    masquerade: Masquerade,
    #[serde(default)]
    dsr: Dsr,
    #[serde(default)]
    log: Log,
    #[serde(default)]
    service: Vec<Spanned<ServiceSpec>>,
}

fn check_services(file: &str, text: &str, specs: Vec<Spanned<ServiceSpec>>) -> Result<Vec<Service>, ConfigError> {
    let error = |at, message: String| Diagnostic::new(file, text, at, message);
    let mut services: Vec<Service> = Vec::with_capacity(specs.len());
    // Where each name and claim was first made, as a byte of the file: lines are counted only for an error.
    let mut names: HashMap<String, usize> = HashMap::with_capacity(specs.len());
    let mut claims: Claims<(usize, usize)> = Claims::default();
    for spec in specs {
        let span = spec.span();
        let service = spec
            .into_inner()
            .into_service()
            .map_err(|problem| ConfigError::Invalid(Box::new(error(span.clone(), problem.to_string()))))?;
        let twice = |first: usize, what: String, holder: &str| {
            let line = diagnostic::line_number(text, first);
            let message = format!("{what} is already used by {holder}the [[service]] on line {line}");
            ConfigError::Invalid(Box::new(
                error(span.clone(), message)
                    .with_help("a name and a frontend belong to one service; merge the two, or change one"),
            ))
        };
        if let Some(first) = names.insert(service.name().to_owned(), span.start) {
            return Err(twice(first, format!("service name `{}`", service.name()), ""));
        }
        if let Some(rival) = claims.rivals(&service).next() {
            let (first, holder) = *rival.holder;
            let what = format!("{} of service `{}`", describe_claim(&rival.claim), service.name());
            return Err(twice(first, what, &format!("`{}`, ", services[holder].name())));
        }
        claims.insert(&service, &(span.start, services.len()));
        services.push(service);
    }
    Ok(services)
}
