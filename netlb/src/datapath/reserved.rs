//! Node ports are kept out of the ports that the kernel gives to sockets by itself: `net.ipv4.ip_local_reserved_ports`.
//!
//! The list may have entries of the operator's, who may change it at any time. So netlb writes down which entries are its own, before it
//! makes them: whoever comes after a daemon that was killed takes away those and no others. Each network namespace has a list, and what was
//! written of another one is kept for those who come there.

use std::{
    collections::BTreeSet,
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Of the network namespace of the thread that opens it.
const LIST: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// In the state directory. Two lines for each list: where it is, and netlb's entries.
const FILE: &str = "reserved-ports";
/// The longest list: every other port.
const LONGEST: usize = 6 << 15;

type Ports = BTreeSet<u16>;

/// The entries of the list that are netlb's.
#[derive(Debug)]
pub(crate) struct Reserved {
    list: PathBuf,
    file: PathBuf,
    own: Ports,
    /// Those in lists of other network namespaces, by what tells these.
    elsewhere: Vec<(String, Ports)>,
    problem: Option<String>,
}

impl Reserved {
    /// Finds what a daemon before this one left.
    pub(crate) fn open(state_dir: &Path) -> Self {
        Self::at(Path::new(LIST), state_dir)
    }

    fn at(list: &Path, state_dir: &Path) -> Self {
        let file = state_dir.join(FILE);
        let here = namespace();
        let mut notes = notes(&fs::read_to_string(&file).unwrap_or_default());
        // What was written in another life of the kernel is in no list.
        notes.retain(|(place, _)| boot(place) == boot(&here));
        let (own, elsewhere): (Vec<_>, Vec<_>) = notes.into_iter().partition(|(place, _)| *place == here);
        let own = own.into_iter().flat_map(|(_, ports)| ports).collect();
        Self { list: list.to_owned(), file, own, elsewhere, problem: None }
    }

    /// Has these ports reserved, and none of our own beside them. Where that fails, it is said once and services go on.
    pub(crate) fn set(&mut self, wanted: &Ports) {
        match self.try_set(wanted) {
            Ok(()) => self.problem = None,
            Err(error) => {
                let problem = format!("node ports may be taken by outgoing connections of the node: {error}");
                if self.problem.is_none() {
                    tracing::warn!("{problem}");
                }
                self.problem = Some(problem);
            }
        }
    }

    /// What is wrong, if anything is.
    pub(crate) const fn problem(&self) -> Option<&String> {
        self.problem.as_ref()
    }

    /// The ports that are reserved because of netlb.
    pub(crate) fn own(&self) -> String {
        format(&self.own)
    }

    /// The ports that are reserved because of netlb in other network namespaces.
    pub(crate) fn elsewhere(&self) -> String {
        format(&self.elsewhere.iter().flat_map(|(_, ports)| ports).copied().collect())
    }

    /// Takes all of them away, and the file as well if it says nothing of other network namespaces.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        self.try_set(&Ports::new())?;
        if !self.elsewhere.is_empty() {
            return Ok(());
        }
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(named(&self.file, &error)),
            _ => Ok(()),
        }
    }

    fn try_set(&mut self, wanted: &Ports) -> io::Result<()> {
        if wanted.is_empty() && self.own.is_empty() {
            return Ok(());
        }
        let current = read(&self.list).map_err(|error| named(&self.list, &error))?;
        let Merged { list, own } = merge(&current, &self.own, wanted);
        if list != current {
            let before_and_after = &self.own | &own;
            self.note(&before_and_after)?;
            write(&self.list, &list).map_err(|error| named(&self.list, &error))?;
        }
        if own != self.own || list != current {
            self.note(&own)?;
        }
        Ok(())
    }

    fn note(&mut self, own: &Ports) -> io::Result<()> {
        let new = self.file.with_extension("new");
        let here = (namespace(), own.clone());
        let notes = self.elsewhere.iter().chain((!own.is_empty()).then_some(&here));
        let text: String = notes.map(|(place, ports)| format!("{place}\n{}\n", format(ports))).collect();
        fs::write(&new, text).and_then(|()| fs::rename(&new, &self.file)).map_err(|error| named(&self.file, &error))?;
        self.own.clone_from(own);
        Ok(())
    }
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// What tells this list from others.
fn namespace() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::metadata("/proc/thread-self/ns/net").map_or(0, |namespace| namespace.ino());
    format!("{} {namespace}", boot.trim())
}

/// The part of it that tells lives of the kernel.
fn boot(namespace: &str) -> Option<&str> {
    namespace.split_once(' ').map(|(boot, _)| boot)
}

/// What is written of each list; nothing of those without entries.
fn notes(text: &str) -> Vec<(String, Ports)> {
    let mut notes = Vec::new();
    let mut lines = text.lines();
    while let (Some(place), Some(ports)) = (lines.next(), lines.next()) {
        notes.extend(parse(ports).filter(|ports| !ports.is_empty()).map(|ports| (place.to_owned(), ports)));
    }
    notes
}

#[derive(Debug, Eq, PartialEq)]
struct Merged {
    list: Ports,
    own: Ports,
}

/// The list with what is wanted, and which of it is ours: what somebody else has put there stays theirs.
fn merge(current: &Ports, own: &Ports, wanted: &Ports) -> Merged {
    let others = current - own;
    Merged { list: &others | wanted, own: wanted - &others }
}

/// A list such as `8080,30000-30010`; nothing where it is none.
fn parse(text: &str) -> Option<Ports> {
    let mut ports = Ports::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        ports.extend(first..=last);
    }
    Some(ports)
}

fn format(ports: &Ports) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *port => *last = *port,
            _ => ranges.push((*port, *port)),
        }
    }
    let range = |(first, last): &(u16, u16)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

/// The kernel gives the list in one piece, cut to what is asked for.
fn read(path: &Path) -> io::Result<Ports> {
    let mut text = vec![0; LONGEST];
    let length = fs::File::open(path)?.read(&mut text)?;
    let text = String::from_utf8_lossy(&text[..length]);
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "this is no list of ports"))
}

fn write(path: &Path, ports: &Ports) -> io::Result<()> {
    // A first part replaces the list, those after it add to it.
    fs::OpenOptions::new().write(true).truncate(true).open(path)?.write_all(format!("{}\n", format(ports)).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(list: &str) -> Ports {
        parse(list).unwrap()
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for list in ["", "8080", "8080,30000-30010", "1-3,5,65534-65535"] {
            assert_eq!(format(&ports(list)), list);
        }
        assert_eq!(format(&ports(" 5,1-3,4\n")), "1-5");
        assert_eq!(parse("80,x"), None);
        assert_eq!(parse("70000"), None);
    }

    #[test]
    fn what_others_have_put_there_stays_theirs() {
        let merged = |current, own, wanted| {
            let Merged { list, own } = merge(&ports(current), &ports(own), &ports(wanted));
            (format(&list), format(&own))
        };
        let is = |list: &str, own: &str| (list.to_owned(), own.to_owned());
        assert_eq!(merged("", "", "30080"), is("30080", "30080"));
        assert_eq!(merged("30080,9000", "", "30080,30081"), is("9000,30080-30081", "30081"));
        assert_eq!(merged("9000,30080-30081", "30081", ""), is("9000,30080", ""));
        assert_eq!(merged("9000", "30081", "30081"), is("9000,30081", "30081"));
        assert_eq!(merged("9000", "30081", ""), is("9000", ""));
    }

    #[test]
    fn the_next_daemon_finds_what_is_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("list");
        fs::write(&list, "9000\n").unwrap();
        let open = || Reserved::at(&list, directory.path());
        let text = || fs::read_to_string(&list).unwrap().trim().to_owned();
        open().set(&ports("30080,30090"));
        assert_eq!(text(), "9000,30080,30090");
        let mut next = open();
        assert_eq!(next.own(), "30080,30090");
        next.set(&ports("30080"));
        assert_eq!(text(), "9000,30080");
        // Of another life of the kernel: 30080 was the operator's before netlb came.
        let noted = fs::read_to_string(directory.path().join(FILE)).unwrap();
        fs::write(directory.path().join(FILE), noted.replacen(&namespace(), "another 1", 1)).unwrap();
        open().clear().unwrap();
        assert_eq!(text(), "9000,30080");
        assert!(!directory.path().join(FILE).exists());
        // Of another network namespace: what is noted of it stays, whatever happens in this one.
        let elsewhere = format!("{} 1", namespace().split_once(' ').unwrap().0);
        fs::write(directory.path().join(FILE), noted.replacen(&namespace(), &elsewhere, 1)).unwrap();
        let mut here = open();
        assert_eq!((here.own(), here.elsewhere()), (String::new(), "30080".to_owned()));
        here.set(&ports("30080,30090"));
        assert_eq!(text(), "9000,30080,30090");
        assert_eq!((open().own(), open().elsewhere()), ("30090".to_owned(), "30080".to_owned()));
        open().clear().unwrap();
        assert_eq!(text(), "9000,30080");
        assert_eq!((open().own(), open().elsewhere()), (String::new(), "30080".to_owned()));
        open().clear().unwrap();
        // There.
        let noted = fs::read_to_string(directory.path().join(FILE)).unwrap();
        fs::write(directory.path().join(FILE), noted.replacen(&elsewhere, &namespace(), 1)).unwrap();
        open().clear().unwrap();
        assert_eq!(text(), "9000");
        assert!(!directory.path().join(FILE).exists());
    }

    #[test]
    fn a_list_that_cannot_be_written_is_a_warning() {
        let directory = tempfile::tempdir().unwrap();
        let mut reserved = Reserved::at(&directory.path().join("missing"), directory.path());
        reserved.set(&ports("30080"));
        assert!(reserved.problem().unwrap().contains("missing: No such file or directory"), "{reserved:?}");
        assert_eq!(reserved.own(), "");
        reserved.set(&Ports::new());
        assert_eq!(reserved.problem(), None);
    }
}
