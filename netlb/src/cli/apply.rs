//! `netlb apply`.

use std::{io::Read as _, path::PathBuf};

use anyhow::Context as _;
use serde::Deserialize;

use super::output::Output;
use crate::{api::ApplyRequest, client::Client, config, spec::ServiceSpec, view::ApplyResult};

#[derive(clap::Args, Debug)]
pub(super) struct Apply {
    /// File with [[service]] tables (TOML), or services as JSON: a list, or an object with `services`; - is standard input
    #[arg(short, long)]
    file: PathBuf,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
    /// Remove the services added by the API that are not in the file; those of the daemon's configuration file stay
    #[arg(long)]
    prune: bool,
}

impl Apply {
    pub(super) fn run(&self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { file, dry_run, prune } = self;
        let (name, text) = if file.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
            ("-".to_owned(), text)
        } else {
            let name = file.display().to_string();
            (name.clone(), std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?)
        };
        let request = ApplyRequest { services: read_services(&name, &text)? };
        let result: ApplyResult = client.post(&format!("/v1/apply?dryRun={dry_run}&prune={prune}"), &request)?;
        out.done(&result, || {
            super::output::View::text(&result, super::output::Style { wide: false, headers: true })
                .trim_end()
                .to_owned()
        })
    }
}

/// Services as TOML or JSON. JSON begins with a brace, or a bracket that is no TOML table.
fn read_services(name: &str, text: &str) -> anyhow::Result<Vec<ServiceSpec>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Services {
        #[serde(alias = "service", alias = "items")]
        services: Vec<ServiceSpec>,
        #[serde(rename = "apiVersion")]
        _api_version: Option<String>,
    }
    let start = text.trim_start();
    if start.starts_with('{') {
        let Services { services, .. } =
            serde_json::from_str(text).with_context(|| format!("cannot read {name} as JSON"))?;
        return Ok(services);
    }
    if start.strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with(['{', ']'])) {
        return serde_json::from_str(text).with_context(|| format!("cannot read {name} as JSON"));
    }
    Ok(config::parse_services(name, text)?.iter().map(ServiceSpec::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_and_three_shapes_of_json_are_read() {
        let json = r#"{"name":"web","frontend":"10.96.0.1:80/tcp","backends":["10.0.0.1:80=2"]}"#;
        let toml = "[[service]]\nname = \"web\"\nfrontend = \"10.96.0.1:80/tcp\"\nbackends = [\"10.0.0.1:80=2\"]\n";
        for text in [
            toml.to_owned(),
            format!(" [\n {json} ]"),
            format!(r#"{{"services":[{json}]}}"#),
            format!(r#"{{"apiVersion":"netlb/v1","items":[{json}]}}"#),
        ] {
            let services = read_services("f", &text).unwrap();
            assert_eq!(services[0].clone().into_service().unwrap().backends()[0].weight.get(), 2, "{text}");
        }
        assert!(read_services("f", "[]").unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_placed() {
        let error = format!("{:#}", read_services("f.json", "{\"services\": [}").unwrap_err());
        assert_eq!(error, "cannot read f.json as JSON: expected value at line 1 column 15");
        let error = format!("{:#}", read_services("f.toml", "[[service]]\nfrontends = 1\n").unwrap_err());
        assert!(error.starts_with("f.toml:2:13: invalid type: integer `1`, expected a sequence"), "{error}");
    }
}
