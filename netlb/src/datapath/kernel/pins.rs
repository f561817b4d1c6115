//! What is pinned where, under netlb's directory of the BPF file system.
//!
//! ```text
//! maps/            the maps in use; META tells that they are complete
//! maps-next/       maps being filled, to take their place
//! maps-previous/   maps whose place was taken, until no link's program uses them
//! links/           TCX and XDP links: <interface index>-ingress, <interface index>-egress, <interface index>-xdp, with -last for TCX
//!                  links that are to be last and -generic for XDP in that mode; links of the socket hooks: connect4, …
//! clsact/          empty directories called by the index of interfaces that have clsact filters of ours
//! ```
//!
//! A set of maps is made in `maps-next`; its META is written when the set is filled, then directories are renamed. Whenever that is
//! interrupted, there is one complete set that the next start recognises, or none. (Names have no dots: the kernel reserves them.)

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use super::syscall::{Direction, Order, XdpMode};

#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
}

impl Pins {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The maps in use.
    pub(super) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// The maps being filled.
    pub(super) fn next_maps(&self) -> PathBuf {
        self.root.join("maps-next")
    }

    fn previous_maps(&self) -> PathBuf {
        self.root.join("maps-previous")
    }

    fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// A link keeps its place when its program is exchanged, so that its name says which place that is.
    pub(super) fn link(&self, index: u32, direction: Direction, order: Order) -> PathBuf {
        let suffix = match order {
            Order::First => "",
            Order::Last => "-last",
        };
        self.links().join(format!("{index}-{}{suffix}", direction.name()))
    }

    /// As with the place, so with the mode.
    pub(super) fn xdp_link(&self, index: u32, mode: XdpMode) -> PathBuf {
        let suffix = match mode {
            XdpMode::Native => "",
            XdpMode::Generic => "-generic",
        };
        self.links().join(format!("{index}-xdp{suffix}"))
    }

    pub(super) fn socket_link(&self, hook: &str) -> PathBuf {
        self.links().join(hook)
    }

    fn filters(&self) -> PathBuf {
        self.root.join("clsact")
    }

    /// Makes what links and notes are put in.
    pub(super) fn create(&self) -> io::Result<()> {
        make_dir(&self.links())?;
        make_dir(&self.filters())
    }

    /// Finishes, or undoes, what a start before this one was interrupted in.
    pub(super) fn recover(&self, is_complete: impl Fn(&Path) -> bool) -> io::Result<()> {
        if !self.maps().exists() && is_complete(&self.next_maps()) {
            fs::rename(self.next_maps(), self.maps())?;
        }
        remove_dir(&self.next_maps())?;
        remove_dir(&self.previous_maps())
    }

    /// Makes the directory for a new set of maps.
    pub(super) fn begin_maps(&self) -> io::Result<PathBuf> {
        let next = self.next_maps();
        make_dir(&next)?;
        Ok(next)
    }

    /// Lets go of a new set that came to nothing.
    pub(super) fn abandon_maps(&self) -> io::Result<()> {
        remove_dir(&self.next_maps())
    }

    /// Puts the new set of maps, now complete, in place of the one in use.
    pub(super) fn commit_maps(&self) -> io::Result<()> {
        if self.maps().exists() {
            fs::rename(self.maps(), self.previous_maps())?;
        }
        fs::rename(self.next_maps(), self.maps())
    }

    /// Lets go of the set whose place was taken. Programs that still use it keep it.
    pub(super) fn forget_previous_maps(&self) -> io::Result<()> {
        remove_dir(&self.previous_maps())
    }

    /// The interfaces that have pinned links.
    pub(super) fn linked(&self) -> io::Result<Vec<u32>> {
        indexes(&self.links(), |name| name.split_once('-').map_or(name, |(index, _)| index))
    }

    /// The interfaces that are noted to have filters.
    pub(super) fn filtered(&self) -> io::Result<Vec<u32>> {
        indexes(&self.filters(), |name| name)
    }

    pub(super) fn note_filters(&self, index: u32) -> io::Result<()> {
        make_dir(&self.filters().join(index.to_string()))
    }

    pub(super) fn has_filters(&self, index: u32) -> bool {
        self.filters().join(index.to_string()).exists()
    }

    pub(super) fn forget_filters(&self, index: u32) -> io::Result<()> {
        ignore_missing(fs::remove_dir(self.filters().join(index.to_string())))
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o750).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Removes a directory of pins, if it is there.
fn remove_dir(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(path)
}

pub(super) fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The interface indexes in the names of a directory's entries.
fn indexes(directory: &Path, part: impl Fn(&str) -> &str) -> io::Result<Vec<u32>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut indexes = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        indexes.extend(name.to_str().and_then(|name| part(name).parse::<u32>().ok()));
    }
    indexes.sort_unstable();
    indexes.dedup();
    Ok(indexes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins() -> (tempfile::TempDir, Pins) {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::new(directory.path());
        pins.create().unwrap();
        (directory, pins)
    }

    fn write_set(directory: &Path, content: &str) {
        fs::write(directory.join("META"), content).unwrap();
    }

    fn current(pins: &Pins) -> Option<String> {
        fs::read_to_string(pins.maps().join("META")).ok()
    }

    fn is_complete(directory: &Path) -> bool {
        directory.join("META").exists()
    }

    #[test]
    fn a_new_set_takes_the_place_of_the_old_one() {
        let (_directory, pins) = pins();
        for set in ["a", "b"] {
            pins.recover(is_complete).unwrap();
            write_set(&pins.begin_maps().unwrap(), set);
            pins.commit_maps().unwrap();
            pins.forget_previous_maps().unwrap();
            assert_eq!(current(&pins).unwrap(), set);
        }
        assert!(!pins.previous_maps().exists() && !pins.next_maps().exists());
    }

    #[test]
    fn a_set_half_made_is_thrown_away_and_a_complete_one_is_not() {
        let (_directory, pins) = pins();
        fs::write(pins.begin_maps().unwrap().join("FLOWS"), "").unwrap();
        pins.recover(is_complete).unwrap();
        assert!(!pins.next_maps().exists() && !pins.maps().exists());

        // Interrupted between the two renames.
        write_set(&pins.begin_maps().unwrap(), "new");
        fs::create_dir(pins.previous_maps()).unwrap();
        write_set(&pins.previous_maps(), "old");
        pins.recover(is_complete).unwrap();
        assert_eq!(current(&pins).unwrap(), "new");
        assert!(!pins.previous_maps().exists());

        // Interrupted before the first of them.
        write_set(&pins.begin_maps().unwrap(), "newer");
        pins.recover(is_complete).unwrap();
        assert_eq!(current(&pins).unwrap(), "new");
    }

    #[test]
    fn interfaces_are_found_by_their_pins() {
        let (_directory, pins) = pins();
        for (index, direction) in [(12, Direction::Ingress), (12, Direction::Egress), (3, Direction::Ingress)] {
            fs::write(pins.link(index, direction, Order::First), "").unwrap();
        }
        fs::write(pins.link(4, Direction::Egress, Order::Last), "").unwrap();
        fs::write(pins.xdp_link(5, XdpMode::Native), "").unwrap();
        fs::write(pins.xdp_link(6, XdpMode::Generic), "").unwrap();
        pins.note_filters(7).unwrap();
        pins.note_filters(7).unwrap();
        assert_eq!(pins.linked().unwrap(), [3, 4, 5, 6, 12]);
        assert_eq!(pins.filtered().unwrap(), [7]);
        assert!(pins.has_filters(7));
        pins.forget_filters(7).unwrap();
        pins.forget_filters(7).unwrap();
        assert!(!pins.has_filters(7));
    }
}
