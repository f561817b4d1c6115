//! Errors in a configuration file, with the line and a caret under what is wrong.

use std::{fmt, ops::Range};

use crate::nearest::nearest;

/// One thing that is wrong at one place of a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Diagnostic {
    file: String,
    /// Line and column from 1; the column counts characters.
    line: usize,
    column: usize,
    source_line: String,
    caret_width: usize,
    message: String,
    help: Option<String>,
}

impl Diagnostic {
    /// What is wrong at these bytes of the file's text.
    pub fn new(file: &str, text: &str, span: Range<usize>, message: impl Into<String>) -> Self {
        let start = floor_char_boundary(text, span.start);
        let end = floor_char_boundary(text, span.end.max(start));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        Self {
            file: file.to_owned(),
            line: line_number(text, start),
            column: text[line_start..start].chars().count() + 1,
            source_line: text[line_start..line_end].trim_end().to_owned(),
            caret_width: text[start..end.min(line_end)].trim_end().chars().count().max(1),
            message: message.into(),
            help: None,
        }
    }

    /// A syntax or type error as the TOML reader reports it, with a suggestion where it lists what it knows.
    pub fn from_toml(file: &str, text: &str, error: &toml::de::Error) -> Self {
        let span = error.span().unwrap_or(text.len()..text.len());
        // The reader's messages may span lines ("invalid string\nexpected `\"`").
        let message = error.message().trim().replace('\n', ": ");
        let help = suggestion(&message);
        Self { help, ..Self::new(file, text, span, message) }
    }

    #[must_use]
    pub fn with_help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    #[must_use]
    pub fn line(&self) -> usize {
        self.line
    }

    /// The error on one line, for logs and `netlb status`.
    #[must_use]
    pub fn summary(&self) -> String {
        format!("{}:{}:{}: {}", self.file, self.line, self.column, self.message)
    }

    #[must_use]
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }
}

/// The line, counted from 1, that holds this byte.
#[must_use]
pub(super) fn line_number(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// "did you mean": serde lists the names it knows between back-quotes, after "expected".
fn suggestion(message: &str) -> Option<String> {
    let (found, expected) = message.split_once("`, expected ")?;
    let (_, found) = found.rsplit_once('`')?;
    let known = expected.split('`').skip(1).step_by(2);
    nearest(found, known).map(|known| format!("did you mean `{known}`?"))
}

fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, source_line, caret_width, help, .. } = self;
        let gutter = " ".repeat(line.to_string().len());
        // Tabs stay tabs, so that the caret is under the character wherever the terminal puts its stops.
        let indent: String = source_line.chars().take(column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        writeln!(f, "{}", self.summary())?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{line} | {source_line}")?;
        write!(f, "{gutter} | {indent}{}", "^".repeat(*caret_width))?;
        if let Some(help) = help {
            write!(f, "\n{gutter} = help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostic {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caret_stands_under_the_characters_also_behind_wide_ones() {
        let text = "a = 1\nä = \"é\" x\n";
        let at = text.find('x').unwrap();
        let shown = Diagnostic::new("f.toml", text, at..at + 1, "no `x` here").to_string();
        assert_eq!(shown, "f.toml:2:9: no `x` here\n  |\n2 | ä = \"é\" x\n  |         ^");
    }

    #[test]
    fn a_span_over_lines_or_past_the_end_is_cut() {
        let shown = Diagnostic::new("f", "[[service]]\nname = 1\n", 0..21, "m").to_string();
        assert!(shown.ends_with("1 | [[service]]\n  | ^^^^^^^^^^^"), "{shown}");
        let shown = Diagnostic::new("f", "ab", 9..12, "m").to_string();
        assert!(shown.ends_with("1 | ab\n  |   ^"), "{shown}");
    }
}
