//! One way out for every command: a view is printed as a table, as JSON, as YAML or as names.

use std::io::{self, IsTerminal as _, Write};

use clap::ValueEnum;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// What `-o` chooses.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(super) enum Format {
    #[default]
    Table,
    /// A table with more columns
    Wide,
    Json,
    Yaml,
    /// Names alone, one a line
    Name,
}

/// Something that can be printed in every format.
pub(super) trait View: Serialize {
    fn text(&self, style: Style) -> String;
    fn names(&self) -> Vec<String>;
}

/// How a table is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) wide: bool,
    pub(super) headers: bool,
}

/// Where a command writes to, and how.
pub(super) struct Output<'a> {
    writer: &'a mut dyn Write,
    format: Format,
    headers: bool,
    quiet: bool,
}

impl<'a> Output<'a> {
    pub(super) fn new(writer: &'a mut dyn Write, format: Format, headers: bool, quiet: bool) -> Self {
        Self { writer, format, headers, quiet }
    }

    /// Prints what was asked for.
    pub(super) fn print(&mut self, view: &impl View) -> anyhow::Result<()> {
        let text = self.render(view)?;
        self.writer.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Prints one of several states of the same thing: JSON then takes a line each.
    pub(super) fn print_next(&mut self, view: &impl View) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Json => serde_json::to_string(view)? + "\n",
            // A screen is cleared and written anew; a pipe gets everything, states apart.
            _ if io::stdout().is_terminal() => format!("\x1b[H\x1b[2J{}", self.render(view)?),
            Format::Yaml => format!("---\n{}", self.render(view)?),
            _ => self.render(view)? + "\n",
        };
        self.writer.write_all(text.as_bytes())?;
        Ok(self.writer.flush()?)
    }

    /// Prints the result of a change: a sentence, or the changed thing for programs.
    pub(super) fn done(&mut self, view: &impl View, sentence: impl FnOnce() -> String) -> anyhow::Result<()> {
        match self.format {
            Format::Table | Format::Wide => self.say(&sentence()),
            _ if self.quiet => Ok(()),
            _ => self.print(view),
        }
    }

    /// Prints a sentence for people; other formats go without.
    pub(super) fn say(&mut self, sentence: &str) -> anyhow::Result<()> {
        if !self.quiet && matches!(self.format, Format::Table | Format::Wide) {
            writeln!(self.writer, "{sentence}")?;
            self.writer.flush()?;
        }
        Ok(())
    }

    /// Prints text that has one form only.
    pub(super) fn raw(&mut self, text: &[u8]) -> anyhow::Result<()> {
        Ok(self.writer.write_all(text)?)
    }

    fn render(&self, view: &impl View) -> anyhow::Result<String> {
        let style = Style { wide: self.format == Format::Wide, headers: self.headers };
        let mut text = match self.format {
            Format::Table | Format::Wide => view.text(style),
            Format::Json => serde_json::to_string_pretty(view)?,
            Format::Yaml => serde_saphyr::to_string(view)?,
            Format::Name => view.names().join("\n"),
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        Ok(text)
    }
}

/// A table without lines. Columns named here hold numbers and are set to the right.
pub(super) fn table(style: Style, headers: &[&str], numbers: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if style.headers {
        table.set_header(headers.to_vec());
    }
    table.add_rows(rows);
    for (at, header) in headers.iter().enumerate() {
        if let Some(column) = table.column_mut(at) {
            column.set_padding((0, 2));
            if numbers.contains(header) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

/// `14.1M`: three digits that matter, with a decimal prefix.
pub(super) fn short(number: u64) -> String {
    if number < 10_000 {
        return number.to_string();
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = number as f64;
    let mut prefixes = ["k", "M", "G", "T", "P", "E"].iter();
    let mut prefix = "";
    while value >= 1000.0 {
        value /= 1000.0;
        prefix = prefixes.next().unwrap_or(&"");
    }
    if value < 100.0 { format!("{value:.1}{prefix}") } else { format!("{value:.0}{prefix}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_keep_three_digits() {
        for (number, text) in [
            (0, "0"),
            (9999, "9999"),
            (14_100_000, "14.1M"),
            (812_345, "812k"),
            (88_000_000_000, "88.0G"),
            (u64::MAX, "18.4E"),
        ] {
            assert_eq!(short(number), text);
        }
    }

    #[test]
    fn a_table_has_no_lines_and_numbers_stand_to_the_right() {
        let rows = vec![
            vec!["a".to_owned(), "1".to_owned(), "x".to_owned()],
            vec!["long".to_owned(), "100".to_owned(), "y".to_owned()],
        ];
        let style = Style { wide: false, headers: true };
        assert_eq!(
            table(style, &["NAME", "FLOWS", "Z"], &["FLOWS"], rows),
            "NAME  FLOWS  Z\na         1  x\nlong    100  y"
        );
    }
}
